"""The built-in agent types, registered as a third party's would be: an entry point for each.

A type's module is imported when agents are first needed, so that a command that is not about
agents starts without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from salmon_revsmtp.hooks import hookimpl

__all__ = ["etrn", "odmr"]


class _AgentType:
    """A plugin that registers one agent type."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    @hookimpl
    def register_agent_types(self, register: Callable[[type], None]) -> None:
        register(getattr(importlib.import_module(self._module), self._name))


etrn = _AgentType("salmon_revsmtp.customer.etrn", "EtrnAgent")
odmr = _AgentType("salmon_revsmtp.customer.odmr", "OdmrAgent")
