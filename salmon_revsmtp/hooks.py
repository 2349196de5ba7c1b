"""What the rest of the program knows of plugins: how to mark a hook, and how to call one.

``plugins`` has the hooks themselves and the plugins that implement them.
"""

from __future__ import annotations

from typing import Any, Protocol

import pluggy

__all__ = ["HookCaller", "hookimpl"]

#: Marks a plugin's functions as implementations of our hooks.
hookimpl = pluggy.HookimplMarker("salmon_revsmtp")


class HookCaller(Protocol):
    """Calls hooks.  Never raises: what a plugin raises is logged."""

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call a hook; returns what pluggy returns."""

    def implemented(self, hook: str) -> bool:
        """Whether any plugin has this hook, so that no one pays for one that none has."""
