"""What the rest of the program knows of plugins: how to mark a hook, and how to call one.

``plugins`` has the hooks themselves and the plugins that implement them.
"""

from __future__ import annotations

from typing import Any, Protocol

import pluggy

__all__ = ["HOOK_TIMEOUT", "HookAsker", "HookCaller", "HookFailedError", "hookimpl"]

#: Seconds that a collection waits for a hook: as long as the provider waits for our greeting
#: (RFC 5321 4.5.3.2.1), before which ``connection_reversed`` is called.
HOOK_TIMEOUT = 300.0

#: Marks a plugin's functions as implementations of our hooks.
hookimpl = pluggy.HookimplMarker("salmon_revsmtp")


class HookFailedError(Exception):
    """A plugin that was asked something has raised; the text names it, and says what."""


class HookCaller(Protocol):
    """Calls hooks.  Never raises: what a plugin raises is logged."""

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call a hook; returns what pluggy returns."""

    async def call_apart(self, hook: str, agent: Any, **arguments: Any) -> Any:
        """The same in a thread of its own, and no longer than :data:`HOOK_TIMEOUT`; only whoever
        awaits it waits."""

    def implemented(self, hook: str) -> bool:
        """Whether any plugin has this hook, so that no one pays for one that none has."""


class HookAsker(Protocol):
    """Asks plugins what only they know."""

    def ask(self, hook: str, **arguments: Any) -> Any:
        """Call a hook where "no" and "I cannot tell now" are not the same.  Raises
        :class:`HookFailedError` where a plugin has raised and no other has an answer."""

    def ask_each(self, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        """Call a hook; returns each plugin's name and what it has returned, without ``None``.
        Raises :class:`HookFailedError` where one has raised."""
