"""Reverse SMTP for the Salmon mail framework: collection agents that fetch waiting mail.

What a project's ``boot.py`` and a plugin's author need is here; the rest is inside.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salmon_revsmtp.agents.base import Agent, AgentSettings, Check, ServerSettings
    from salmon_revsmtp.attached import attach
    from salmon_revsmtp.client import Connection
    from salmon_revsmtp.collection import Collection
    from salmon_revsmtp.delivery.queue import QueueConsumer
    from salmon_revsmtp.plugins import hookimpl
    from salmon_revsmtp.report import CollectionError, Deferred, Failed, Outcome, Refused, Report
    from salmon_revsmtp.settings import SettingsError
    from salmon_revsmtp.smtp.envelope import Envelope
    from salmon_revsmtp.smtp.replies import Reply

__all__ = [
    "Agent",
    "AgentSettings",
    "Check",
    "Collection",
    "CollectionError",
    "Connection",
    "Deferred",
    "Envelope",
    "Failed",
    "Outcome",
    "QueueConsumer",
    "Refused",
    "Reply",
    "Report",
    "ServerSettings",
    "SettingsError",
    "attach",
    "hookimpl",
]

# name -> module: imported when it is first asked for, so that a command that needs none of it
# starts at once.
_HOME = {
    "Agent": "agents.base",
    "AgentSettings": "agents.base",
    "Check": "agents.base",
    "Collection": "collection",
    "CollectionError": "report",
    "Connection": "client",
    "Deferred": "report",
    "Envelope": "smtp.envelope",
    "Failed": "report",
    "Outcome": "report",
    "QueueConsumer": "delivery.queue",
    "Refused": "report",
    "Reply": "smtp.replies",
    "Report": "report",
    "ServerSettings": "agents.base",
    "SettingsError": "settings",
    "attach": "attached",
    "hookimpl": "plugins",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
