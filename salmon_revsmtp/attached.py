"""``attach``: the line in a project's boot module that makes it ours."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

from salmon_revsmtp.plugins import Plugins
from salmon_revsmtp.project import enable_logging
from salmon_revsmtp.settings import Configuration, load

__all__ = ["AttachedReceiver", "attach"]

log = logging.getLogger(__name__)


class AttachedReceiver:
    """Stands where Salmon's receiver stood, and starts it.

    ``configuration``  the valid agents and services.
    ``receiver``       Salmon's receiver, or ``None``.
    """

    def __init__(self, configuration: Configuration, receiver: Any = None) -> None:
        self.configuration = configuration
        self.receiver = receiver

    def start(self) -> None:
        """What ``salmon start`` calls.  Agents are collected by ``salmon-revsmtp collect``."""
        for agent in self.configuration.agents:
            log.info("agent=%s is collected on demand: salmon-revsmtp collect", agent.title)
        if self.receiver is not None:
            self.receiver.start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.receiver, name)


def attach(settings: ModuleType, receiver: Any = None) -> AttachedReceiver:
    """Validate ``collection_agents`` and ``smtp_services`` of ``settings`` and wrap a receiver::

        settings.receiver = salmon_revsmtp.attach(settings, LMTPReceiver(...))

    Raises :class:`~salmon_revsmtp.SettingsError` with every problem that there is.
    """
    enable_logging()
    return AttachedReceiver(load(settings, Plugins.load()), receiver)
