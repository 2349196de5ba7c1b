"""The boot module of the process that handles what queue mode has stored.

salmon start --boot config.consumer --pid run/consumer.pid
"""

import logging.config

from salmon import queue
from salmon.routing import Router
from salmon.server import Relay

from salmon_revsmtp import QueueConsumer

from . import settings

logging.config.fileConfig("config/logging.conf", disable_existing_loggers=False)

settings.relay = Relay(host=settings.relay_config["host"], port=settings.relay_config["port"])

settings.receiver = QueueConsumer("run/inbound")

Router.defaults(**settings.router_defaults)
Router.load(settings.handlers)
Router.UNDELIVERABLE_QUEUE = queue.Queue("run/undeliverable")
