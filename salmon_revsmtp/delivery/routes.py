"""What Salmon's Router knows of a recipient before any message for it has come."""

from __future__ import annotations

from salmon import utils
from salmon.routing import Router

__all__ = ["is_routed", "missing_handlers"]


def is_routed(recipient: str, *, wait: bool) -> bool | None:
    """Whether any route matches a recipient, in the form in which it is routed.  No handler is
    called.

    ``None``: the handlers are being loaded again (``Router.RELOAD``), and until that is done no one
    knows; with ``wait`` this waits for it.  Where there are no routes at all every recipient is
    matched: these are of a process that stores mail for another one's handlers, or they could not
    be imported, and mail must not bounce for that.
    """
    if not Router.lock.acquire(blocking=wait):
        return None
    try:
        if not Router.ORDER:
            return True
        return next(Router.match(recipient.lower()), None) is not None
    finally:
        Router.lock.release()


def missing_handlers() -> list[str]:
    """The modules in ``handlers`` of the settings that Salmon could not import, and goes on
    without: no one knows which recipients they would take."""
    listed = getattr(utils.settings, "handlers", None)
    names = listed if isinstance(listed, list | tuple) else ()
    return [str(name) for name in names if name not in Router.HANDLERS]
