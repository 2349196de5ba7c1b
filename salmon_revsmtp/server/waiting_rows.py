"""Mail that waits for a person as ``undelivered --json`` and ``unsent --json`` have it, and how it
is deleted.  Everything here blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from salmon_revsmtp.customer.report import iso

if TYPE_CHECKING:
    from salmon_revsmtp.delivery.waiting import Message, WaitingMail

__all__ = ["after", "dropped", "waiting_row"]

Row = dict[str, Any]


def waiting_row(message: Message, reason: str) -> Row:
    """A message; ``reason``: why it waits."""
    return {
        "key": message.key,
        "since": iso(message.since),
        "from": message.sender,
        "to": list(message.recipients),
        "size": message.size,
        "subject": message.subject,
        "reason": reason,
        "envelope": message.envelope,
    }


def after(waiting: WaitingMail, key: str | None) -> list[str]:
    """The keys of what waits, the oldest first: those that come after ``key``.  Raises
    :class:`LookupError` if there is no such message, and :class:`OSError`."""
    keys = waiting.keys()
    if key is not None:
        if key not in keys:
            raise LookupError(key)
        del keys[: keys.index(key) + 1]
    return keys


def dropped(waiting: WaitingMail, key: str) -> Row:
    """Delete a message; what became of that."""
    from salmon_revsmtp.files import FolderLock

    try:
        # Who tries it just now would write it anew.
        with FolderLock(waiting.folder).hold() as lock:
            if not lock.had:
                remark = "another process is at work on it just now; try again when it is done"
                return {"key": key, "done": False, "remark": remark}
            done = waiting.drop(key)
    except OSError as error:
        return {"key": key, "done": False, "remark": f"deleting it: {error}"}
    return {"key": key, "done": done, "remark": "" if done else "it is not there any more"}
