"""What `salmon start` and `salmon-revsmtp collect` import: logging, relay, receiver, routes."""

import logging.config

from salmon import queue
from salmon.routing import Router
from salmon.server import LMTPReceiver, Relay

import salmon_revsmtp

from . import settings

logging.config.fileConfig("config/logging.conf")

settings.relay = Relay(host=settings.relay_config["host"], port=settings.relay_config["port"])

settings.receiver = salmon_revsmtp.attach(
    settings,
    LMTPReceiver(settings.receiver_config["host"], settings.receiver_config["port"]),
)

Router.defaults(**settings.router_defaults)
Router.load(settings.handlers)
Router.UNDELIVERABLE_QUEUE = queue.Queue("run/undeliverable")
