"""Reverse SMTP for the Salmon mail framework: collection agents that fetch waiting mail.

What a project's ``boot.py`` and a plugin's author need is here; the rest is inside.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salmon_revsmtp.customer.agent import Agent, Check
    from salmon_revsmtp.customer.collection import Collection
    from salmon_revsmtp.customer.report import Report
    from salmon_revsmtp.customer.settings import AgentSettings, ServerSettings
    from salmon_revsmtp.delivery.consumer import QueueConsumer
    from salmon_revsmtp.hooks import hookimpl
    from salmon_revsmtp.net.client import Connection
    from salmon_revsmtp.net.outcome import CollectionError, Deferred, Failed, Outcome, Refused
    from salmon_revsmtp.plugins.facade import Server, Trouble
    from salmon_revsmtp.server.attach import attach
    from salmon_revsmtp.server.holding import hold
    from salmon_revsmtp.settings import SettingsError, validated
    from salmon_revsmtp.smtp.envelope import Envelope
    from salmon_revsmtp.smtp.replies import Reply

    #: Of a layer that the server, which uses this module, may not know.
    with_project: Callable[[Callable[..., Any]], Callable[..., Any]]

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
    "Server",
    "ServerSettings",
    "SettingsError",
    "Trouble",
    "attach",
    "hold",
    "hookimpl",
    "validated",
    "with_project",
]

# name -> module: imported when it is first asked for, so that a command that needs none of it
# starts at once.
_HOME = {
    "Agent": "customer.agent",
    "AgentSettings": "customer.settings",
    "Check": "customer.agent",
    "Collection": "customer.collection",
    "CollectionError": "net.outcome",
    "Connection": "net.client",
    "Deferred": "net.outcome",
    "Envelope": "smtp.envelope",
    "Failed": "net.outcome",
    "Outcome": "net.outcome",
    "QueueConsumer": "delivery.consumer",
    "Refused": "net.outcome",
    "Reply": "smtp.replies",
    "Report": "customer.report",
    "Server": "plugins.facade",
    "ServerSettings": "customer.settings",
    "SettingsError": "settings",
    "Trouble": "plugins.facade",
    "attach": "server.attach",
    "hold": "server.holding",
    "hookimpl": "hooks",
    "validated": "settings",
    "with_project": "cli.options",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
