import logging.config
import os

import django
from salmon import queue
from salmon.routing import Router
from salmon.server import Relay

import salmon_revsmtp

from . import settings

logging.config.fileConfig("config/logging.conf", disable_existing_loggers=False)

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "web.settings")
django.setup()  # before the handlers are loaded, which import models

settings.relay = Relay(host=settings.relay_config["host"], port=settings.relay_config["port"])
settings.receiver = salmon_revsmtp.attach(settings)

Router.defaults(**settings.router_defaults)
Router.load(settings.handlers)
Router.UNDELIVERABLE_QUEUE = queue.Queue("run/undeliverable")
