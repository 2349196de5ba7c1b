"""The running server as a plugin sees it: what a console, metrics or an alarm live from."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

__all__ = ["Server", "Serving", "Trouble", "WaitingKind"]

Row = dict[str, Any]

#: Where mail waits for a person: what no handler has taken, and notifications that the relay has
#: not taken.
WaitingKind = Literal["undeliverable", "unsent"]

# What the control socket and the commands call these.
_WORDS = {"undeliverable": "undelivered", "unsent": "unsent"}

# Keys of messages in one request.
_AT_ONCE = 1000


@dataclass(frozen=True)
class Trouble:
    """Something that needs a person.

    ``key``    which, the same as long as it lasts and each time that it comes back: ``agent:isp``,
               ``account:acme:unseen``, ``disk:run``, ``certificate:provider``, ``undeliverable``.
    ``text``   what it is and what to try, for a person.
    ``since``  since when, in seconds since the epoch; ``None`` if that is not known.
    """

    key: str
    text: str
    since: float | None = None


class Serving(Protocol):
    """What the server does for its :class:`Server`.  In any thread; raises as that does."""

    def look(self) -> tuple[Sequence[Row], Sequence[Trouble]]:
        """What there is, and what needs a person."""

    def send(self, to: str, message: bytes) -> None:
        """Send a message by the relay."""

    def ask(self, request: Row) -> Iterator[Row]:
        """The answers to a request, as the control socket gives them."""

    def activity(self) -> Row:
        """What goes on."""

    def report(self, trouble: Trouble) -> None:
        """Have a trouble of a plugin among the others."""

    def over(self, key: str) -> None:
        """It is over."""

    def answers(self, seconds: float) -> bool:
        """Whether the event loop does."""

    def register(self, plugin: object) -> None:
        """Have hooks called."""


class Server:
    """The server that runs, in the hooks ``server_started`` and ``server_stopping``.

    Its methods may be called from any thread of a plugin, as long as the server runs; they block.
    They raise :class:`RuntimeError` when it has stopped or does not answer in a minute,
    :class:`LookupError` for an agent or a message that there is not, and :class:`OSError` when what
    is asked for cannot be read or written.  What they return is the caller's own.

    A row is a dict with the keys that the command has with ``--json``; the commands page of the
    documentation says which.  What a stranger wrote, such as an address, a subject or a reply, is
    there as he wrote it.

    ``settings``  the project's settings module, in which a plugin finds its own.
    ``project``   the project's folder.
    ``version``   of salmon-revsmtp.
    ``started``   when the server started, in seconds since the epoch.
    ``holds``     mail is held here: it is a provider.
    """

    def __init__(
        self,
        settings: ModuleType,
        project: Path,
        version: str,
        started: float,
        *,
        serving: Serving,
        holds: bool = False,
    ) -> None:
        self.settings, self.project = settings, project
        self.version, self.started, self.holds = version, started, holds
        self._serving = serving

    def status(self) -> list[Row]:
        """What ``salmon-revsmtp status --json`` prints, a dict for each line."""
        return list(self._serving.look()[0])

    def troubles(self) -> list[Trouble]:
        """What needs a person now, the worst first."""
        return list(self._serving.look()[1])

    def report(self, trouble: Trouble) -> None:
        """Have a trouble of the plugin's own among the others, for ``status`` and the alarm, until
        :meth:`over` is called with its key.  Begin the key with the plugin's name:
        ``console:listen``.  Reported again, it has the new text."""
        self._serving.report(trouble)

    def over(self, key: str) -> None:
        """A trouble that the plugin reported is over; without one, nothing happens."""
        self._serving.over(key)

    def answers(self, seconds: float) -> bool:
        """Whether the event loop, which does all the server's work, answers in so many seconds."""
        return self._serving.answers(seconds)

    def register(self, plugin: object) -> None:
        """Have the hooks of ``plugin`` called from now on, until the server stops: its methods that
        are marked with :data:`~salmon_revsmtp.hookimpl`.  A plugin that is only at work where the
        settings say so has its ``message_delivered`` and the like here, so that no message pays for
        them elsewhere."""
        self._serving.register(plugin)

    def send(self, message: EmailMessage, to: str) -> None:
        """Send a message through the project's relay, from the null sender, so that what becomes of
        it comes back to no one.  It is safe on disk when this returns, and waits there while the
        relay is down.  Say ``Auto-Submitted: auto-generated`` in it (RFC 3834).  Raises
        :class:`OSError` if it cannot be written."""
        self._serving.send(to, message.as_bytes())

    def activity(self) -> Row:
        """What goes on now: cheap enough to be asked several times a second.

        ``agents``    by name: ``running``, ``push`` (since when a push session is open, in seconds
                      since the epoch, or ``None``), ``messages`` and ``bytes`` (all that it has
                      brought since the server started), ``ended`` (how many collections have ended
                      since then), and while it runs ``doing`` and ``seconds``: what it does, and
                      for how long.
        ``accounts``  by name, those with a session: ``sessions``, and ``messages``: how many were
                      handed over in those.
        """
        return self._serving.activity()

    # -- agents ---------------------------------------------------------------------------------

    def agents(self) -> list[Row]:
        """As ``agents --json``: how the last collection of each ended, when the next one begins,
        since when it has a push session."""
        return self._rows({"do": "agents"}, "agent")

    def history(
        self, agent: str | None = None, limit: int = 50, outcome: str | None = None
    ) -> list[Row]:
        """As ``history --json``: past collections, the newest first; of one agent, and with one
        outcome, if they are given."""
        request = {"do": "history", "agent": agent, "limit": limit, "outcome": outcome}
        return self._rows(request, "collection")

    def collect(self, agent: str) -> Iterator[Row]:
        """Have an agent collect now, as ``collect`` does.  It has begun when this returns; each
        row is a sign that it goes on, with ``agent``, ``messages``, ``bytes``, ``doing`` and
        ``seconds``, or at its end ``report``: a dict as ``collect --json`` prints it.  Whoever
        stops reading does not stop the collection."""
        self.settings_of(agent)  # is there one?
        answers = self._asked({"do": "collect", "agents": [agent]})
        first = next(answers, None)
        return _one_before(first, answers)

    def set_enabled(self, agent: str, enabled: bool) -> None:
        """As ``enable`` and ``disable``: it is kept, and holds at once."""
        self._rows({"do": "enable" if enabled else "disable", "agent": agent}, "")

    def check(self, agent: str) -> Row:
        """As ``check NAME --json``: try the agent without asking for mail.  It may take a minute
        and more."""
        [row] = self._rows({"do": "check", "agent": agent}, "check")
        return row

    def settings_of(self, agent: str) -> Row:
        """The agent's settings as they are in force, by their keys, as JSON has them.  Secrets are
        hidden."""
        [row] = self._rows({"do": "settings", "agent": agent}, "settings")
        return row

    def dialogue(self, agent: str) -> list[str]:
        """The dialogue of the agent's last collection, or of the one that goes on, in outline:
        commands and replies as ``collect -v`` shows them, without content and secrets, and of a
        long one only the beginning and the end.  Empty if it has not collected since the server
        started."""
        lines: list[Any] = self._rows({"do": "dialogue", "agent": agent}, "line")
        return lines

    def traffic(
        self, agent: str | None, seconds: float, buckets: int
    ) -> list[tuple[float, int, int]]:
        """How much mail an agent, or all of them, brought in the last ``seconds``: when each of
        ``buckets`` parts of that time began (seconds since the epoch), its messages and octets, the
        oldest first.  It is known to a quarter of an hour, for a week."""
        request = {"do": "traffic", "agent": agent, "seconds": seconds, "buckets": buckets}
        return [
            (row["start"], row["messages"], row["bytes"])
            for row in self._asked(request)
            if "start" in row
        ]

    # -- the provider ---------------------------------------------------------------------------

    def accounts(self) -> list[Row]:
        """As ``provider accounts --json``.  Empty where no mail is held; so is the next."""
        return self._rows({"do": "provider accounts"}, "account") if self.holds else []

    def sessions(self) -> list[Row]:
        """As ``provider sessions --json``: the sessions that are open."""
        return self._rows({"do": "provider sessions"}, "session") if self.holds else []

    def held(self, account: str | None = None, limit: int = 50, after: int = 0) -> list[Row]:
        """As ``provider held --json``: messages that are held, for one account if it is given, the
        oldest first; those after the key ``after``."""
        if not self.holds:
            return []
        request = {"do": "provider held", "account": account, "limit": limit, "after": after}
        return self._rows(request, "held")

    def held_message(self, key: int, content: bool = False) -> Row:
        """A held message: its row, with ``header`` (a text; ``cut`` is true if there is more of
        it), or with ``content`` (the octets as they will be sent)."""
        answers = self._asked({"do": "provider show", "key": key, "whole": content})
        return _message(answers, "held", content, f"no message with the key {key} is held")

    def retry_held(self, keys: Sequence[int]) -> list[Row]:
        """Have messages tried again that were set aside, as ``provider held retry``.  A row for
        each: ``key``, ``done``, and ``remark``, which says why not."""
        return self._treated("provider retry", keys)

    def bounce_held(self, keys: Sequence[int]) -> list[Row]:
        """Return messages to their senders, as ``provider held bounce``.  Rows as
        :meth:`retry_held`."""
        return self._treated("provider bounce", keys)

    def drop_held(self, keys: Sequence[int]) -> list[Row]:
        """Delete messages; no one is told.  Rows as :meth:`retry_held`."""
        return self._treated("provider drop", keys)

    # -- what waits for a person ----------------------------------------------------------------

    def waiting(self, kind: WaitingKind, limit: int = 50, after: str | None = None) -> list[Row]:
        """As ``undelivered --json`` and ``unsent --json``: the oldest first; those after the key
        ``after``."""
        request = {"do": f"{_WORDS[kind]} list", "limit": limit, "after": after}
        return self._rows(request, "message")

    def waiting_message(self, kind: WaitingKind, key: str, content: bool = False) -> Row:
        """A message that waits: its row, with ``header`` (a text) or ``content`` (octets)."""
        answers = self._asked({"do": f"{_WORDS[kind]} show", "key": key, "whole": content})
        return _message(answers, "message", content, f"no message is {_WORDS[kind]} with {key}")

    def retry_waiting(
        self, kind: WaitingKind, keys: Sequence[str], to: str | None = None
    ) -> list[Row]:
        """Take messages through the handlers again, or give notifications to the relay.  ``to``:
        for whom an undeliverable message is whose envelope was not kept.  Rows as
        :meth:`retry_held`.  It takes as long as the handlers take."""
        return self._treated(f"{_WORDS[kind]} retry", keys, to=to)

    def drop_waiting(self, kind: WaitingKind, keys: Sequence[str]) -> list[Row]:
        """Delete messages; no one is told.  Rows as :meth:`retry_held`."""
        return self._treated(f"{_WORDS[kind]} drop", keys)

    # -- asking ---------------------------------------------------------------------------------

    def _asked(self, request: Row) -> Iterator[Row]:
        for answer in self._serving.ask(request):
            if "error" in answer:
                if answer.get("unknown"):
                    raise LookupError(answer["error"])
                raise OSError(answer["error"])
            if "end" in answer:
                return
            yield answer

    def _rows(self, request: Row, kind: str) -> list[Row]:
        return [answer[kind] for answer in self._asked(request) if kind in answer]

    def _treated(self, do: str, keys: Sequence[Any], **more: Any) -> list[Row]:
        chosen = list(dict.fromkeys(keys))
        return [
            answer
            for start in range(0, len(chosen), _AT_ONCE)
            for answer in self._asked({"do": do, "keys": chosen[start : start + _AT_ONCE], **more})
            if "key" in answer
        ]


def _one_before(first: Row | None, others: Iterator[Row]) -> Iterator[Row]:
    if first is not None:
        yield first
        yield from others


def _message(answers: Iterator[Row], kind: str, content: bool, missing: str) -> Row:
    row: Row | None = None
    octets = b""
    for answer in answers:
        if kind in answer:
            row = {**answer[kind], "cut": answer.get("cut", False)}
        elif "octets" in answer:
            octets += base64.b64decode(answer["octets"])
    if row is None:
        raise LookupError(missing)
    if content:
        return {**row, "content": octets}
    return {**row, "header": octets.decode("utf-8", "replace")}
