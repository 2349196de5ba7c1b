"""The plugin ``odmr``.  ``agent`` has the agent type; it is imported when somebody asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from salmon_revsmtp.plugins import hookimpl

if TYPE_CHECKING:
    from salmon_revsmtp.agents.base import Agent
    from salmon_revsmtp.agents.odmr.agent import OdmrAgent, OdmrSettings

__all__ = ["OdmrAgent", "OdmrSettings"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from salmon_revsmtp.agents.odmr import agent

    return getattr(agent, name)


@hookimpl
def register_agent_types(register: Callable[[type[Agent]], Any]) -> None:
    """As every plugin does it."""
    from salmon_revsmtp.agents.odmr.agent import OdmrAgent

    register(OdmrAgent)
