"""What needs a person, and what there is: from the disk, the journal, and the server if one runs.

A trouble that has begun is remembered in ``run/status.json``, with the time: so a server that is
started again knows it, and says nothing twice.  The log has a line when one begins and one when it
is over, for those of which nothing else is logged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import ssl
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from salmon_revsmtp.customer.agent import Agent
from salmon_revsmtp.customer.report import counted, iso
from salmon_revsmtp.delivery.waiting import Count, WaitingMail
from salmon_revsmtp.files import LITTLE_ROOM, Room, room_in, write_private
from salmon_revsmtp.foreign import abridged
from salmon_revsmtp.journal.collections import AgentState, Entry, Journal
from salmon_revsmtp.journal.file import DEFAULT_JOURNAL
from salmon_revsmtp.net.certificate import RENEWED_BY, certificate_lasts
from salmon_revsmtp.plugins.facade import Trouble
from salmon_revsmtp.provider.settings import AccountSettings, ProviderSettings
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.server.configuration import Configuration

__all__ = ["OLDEST", "Deferring", "Findings", "Health", "Holding", "Live"]

MEMORY = Path("run/status.json")
UNDELIVERABLE = Path("run/undeliverable")
UNSENT = Path("run/unsent")

DAY = 86400.0
MIB = 1024 * 1024

# Seconds that mail waits for an account that has no session.
UNSEEN = DAY
# Seconds after a start in which a customer that was there before is given time to call again.
SETTLED = 3600.0
# Seconds that a notification waits for the relay, which is tried every five minutes.
UNSENT_LONG = 4 * 3600.0
# Seconds that a message waits in the queue of queue mode for its consumer.
INBOUND_LONG = 3600.0
# Seconds that a customer defers what is held for it: it defers a message of itself for minutes, and
# what was deferred is offered again every 15 minutes at least.
DEFERRED_LONG = 3600.0
# Seconds in which a push session brings only what is deferred: a next host that is started again is
# back by then.
TAKES_NOTHING = 300.0
# Of what waits for an account, the oldest messages among which one that was deferred is looked for.
OLDEST = 10
# Characters of an agent's last error, or a reply, in a trouble: what we say ourselves is shorter.
MOST_ERROR = 1000

# Where Salmon's command notes the number of the process that it starts.
PID_FILE = Path("run/smtp.pid")

# Troubles of which there is a line in the log anyway.
_LOGGED = ("agent:", "server")

log = logging.getLogger(__name__)

Row = dict[str, Any]
#: By agent: what the journal keeps of it, and its last collection.
_Kept = Mapping[str, tuple[AgentState, Entry | None]]


class Holding(NamedTuple):
    """What is held for an account.

    ``aside``   messages that are set aside.
    ``oldest``  when the oldest of those came that wait (seconds since the epoch).
    ``online``  its sessions.
    ``seen``    when it had one last, as far as that is known.
    ``deferred``  what the customer said of the oldest that it deferred; empty if it did of none.
    ``account``  its settings, where they are not in ours; ``None`` also if it is not known now
                 whether it is there.
    ``gone``     there is no such account.
    """

    messages: int = 0
    octets: int = 0
    aside: int = 0
    oldest: float | None = None
    online: int = 0
    seen: float | None = None
    deferred: str = ""
    account: AccountSettings | None = None
    gone: bool = False


class Deferring(NamedTuple):
    """A push session takes nothing: since when all that came was deferred (seconds since the
    epoch), and the last reply."""

    since: float
    reply: str


@dataclass(frozen=True)
class Live:
    """What only the running server knows.  Times in seconds since the epoch.

    ``running``  the agents that collect now; ``push``: those with a push session, and since when.
    ``failing``  the agents that fail, and since when; ``next``: when an agent runs next.
    ``deferring``  the agents in whose push sessions all that comes is deferred.
    ``held``     what is held, by account.
    ``undeliverable``  where undeliverable mail is.
    ``hold_error``     why it is not known what is held.
    """

    pid: int
    version: str
    since: float
    running: Collection[str] = ()
    push: Mapping[str, float] = field(default_factory=dict)
    failing: Mapping[str, float] = field(default_factory=dict)
    next: Mapping[str, float] = field(default_factory=dict)
    deferring: Mapping[str, Deferring] = field(default_factory=dict)
    held: Mapping[str, Holding] = field(default_factory=dict)
    undeliverable: Path | None = None
    hold_error: str = ""


@dataclass(frozen=True)
class Queue:
    """A folder in which mail waits, how much, or why that cannot be said."""

    kind: str
    folder: Path
    count: Count
    error: str = ""


class Findings(NamedTuple):
    """A look: what ``status --json`` prints, and what needs a person, the worst first."""

    rows: Sequence[Row]
    troubles: Sequence[Trouble]


class Health:
    """Looks after a project.

    ``clock``   seconds since the epoch.
    ``room``    that on the disk of a folder.
    ``memory``  this is the server, which remembers, and logs what begins and what is over.
    """

    def __init__(
        self,
        configuration: Configuration,
        project: Path,
        *,
        clock: Callable[[], float] = time.time,
        room: Callable[[Path], Room] = room_in,
        memory: bool = False,
    ) -> None:
        self._configuration, self._project = configuration, project
        self._clock, self._room, self._remembers = clock, room, memory
        self._journal = Journal(project / DEFAULT_JOURNAL)
        self._known, self._place = self._recall()
        self._deferred: dict[str, float] = {}  # by account, since when that has been seen

    def look(self, live: Live | None, silent: bool = False) -> Findings:
        """What there is.  ``live``: what the server says; ``silent``: there is one, and it does not
        answer.  Blocks.  What cannot be read is a trouble, and raises nothing."""
        agents = {one.name: one for one in self._configuration.agents}
        kept = self._journal.latest(agents)
        held, unread = (live.held, live.hold_error) if live is not None else self._held()
        queues = list(self._queues(live))
        found = [
            *self._server(kept, live, silent),
            *self._failing(agents.values(), kept, live),
            *(self._deferring(live) if live is not None else ()),
            *self._disks([one.folder for one in queues]),
            *self._certificates(),
            *self._waiting(queues),
            *([Trouble("hold", f"What is held cannot be read: {unread}.")] if unread else []),
            *self._accounts(held, live),
        ]
        troubles = [self._dated(one) for one in found]
        if self._remembers:
            self._remember(troubles, live)
        rows = [
            *(_trouble_row(one) for one in troubles),
            _server_row(live, silent),
            *(_agent_row(one, *kept[name], live) for name, one in agents.items()),
            *([self._provider_row(held)] if self._configuration.holds else []),
            *(self._queue_row(one) for one in queues),
        ]
        return Findings(rows, troubles)

    # -- what needs a person --------------------------------------------------------------------

    def _server(self, kept: _Kept, live: Live | None, silent: bool) -> Iterator[Trouble]:
        if silent:
            yield Trouble(
                "server",
                "The server does not answer: it is stopped or stuck. What is below is what the "
                "disk says. See its log, and restart it.",
            )
        elif live is None and self._is_to_run(kept):
            start = "`salmon start`"
            if _left_by_the_dead(self._project / PID_FILE):
                start = f"`salmon start --force` ({PID_FILE} is left of one that was killed)"
            yield Trouble(
                "server",
                "No server runs in this project, so nothing is collected on schedule and nothing "
                f"listens. Start it with {start} or `salmon-revsmtp run`.",
            )

    def _is_to_run(self, kept: _Kept) -> bool:
        """There is something that only a server does."""
        configuration = self._configuration
        scheduled = any(
            one.settings.every is not None and _enabled(one, kept[one.name][0])
            for one in configuration.agents
        )
        listening = any(one.listen for one in configuration.services.values())
        return scheduled or listening or configuration.provider is not None

    def _failing(
        self,
        agents: Iterable[Agent],
        kept: _Kept,
        live: Live | None,
    ) -> Iterator[Trouble]:
        for agent in agents:
            state, last = kept[agent.name]
            since = _failing_since(agent.name, state, live)
            if since is None or not _enabled(agent, state):
                continue
            error = abridged(last.error, MOST_ERROR).rstrip(".") if last and last.error else ""
            said = f" The last time: {error}" + "." * (not error.endswith("?")) if error else ""
            yield Trouble(
                f"agent:{agent.name}",
                f"The agent {agent.name} has not collected since {_when(since)}.{said} See "
                f"`salmon-revsmtp check {agent.name}`.",
                since,
            )

    def _deferring(self, live: Live) -> Iterator[Trouble]:
        for name, one in live.deferring.items():
            if self._clock() - one.since < TAKES_NOTHING:
                continue
            said = abridged(one.reply, MOST_ERROR).rstrip(".")
            yield Trouble(
                f"agent:{name}:deferred",
                f"The agent {name} has taken no mail since {_when(one.since)}: all that came was "
                f"deferred, the last with {said}. The provider keeps it. See the log, and "
                "`salmon-revsmtp check`.",
                one.since,
            )

    def _disks(self, queues: Iterable[Path]) -> Iterator[Trouble]:
        seen = set()
        folders = [self._project / "run", *queues]
        if self._configuration.holds and self._hold is not None:
            folders.insert(1, self._hold)
        for folder in folders:
            try:
                room = self._room(folder)
            except OSError:
                continue  # who uses it says so
            if room.disk in seen:
                continue
            seen.add(room.disk)
            if not room.little:
                continue
            left = f"{room.octets // MIB:,} MiB are free"
            if room.octets >= LITTLE_ROOM:
                left = f"it has room for {room.files:,} more files"
            yield Trouble(
                f"disk:{self._named(folder)}",
                f"The disk of {self._named(folder)} fills: {left}. When it is full, no mail is "
                "taken any more, though none is lost. Make room.",
            )

    def _certificates(self) -> Iterator[Trouble]:
        provider = self._configuration.provider
        served: list[tuple[str, Path, Path | None]] = []
        if provider is not None and provider.tls_cert is not None:
            served.append(("provider", provider.tls_cert, provider.tls_key))
        served += [
            (f"service:{name}", one.tls_cert, one.tls_key)
            for name, one in self._configuration.services.items()
            if one.listen and one.tls_cert is not None
        ]
        for name, certificate, key in served:
            paths = self._project / certificate, self._project / key if key else None
            yield from self._certificate(name, *paths)

    def _certificate(self, name: str, certificate: Path, key: Path | None) -> Iterator[Trouble]:
        whose = f"The certificate of the {name.replace(':', ' ')}, {self._named(certificate)},"
        try:
            begins, ends = certificate_lasts(certificate, key)
        except (OSError, ssl.SSLError, ValueError, KeyError) as error:
            yield Trouble(f"certificate:{name}", f"{whose} cannot be read: {error}.")
            return
        left = ends - self._clock()
        if left >= RENEWED_BY:
            return
        over = f"has ended on {_when(ends)}" if left < 0 else f"ends on {_when(ends)}"
        yield Trouble(
            f"certificate:{name}",
            f"{whose} {over}. Renew it; the server reads it again by itself.",
            min(max(ends - RENEWED_BY, begins), self._clock()),
        )

    def _waiting(self, queues: Iterable[Queue]) -> Iterator[Trouble]:
        for queue in queues:
            kind, folder, count = queue.kind, queue.folder, queue.count
            if queue.error:
                text = f"The folder {self._named(folder)} cannot be read: {queue.error}."
                yield Trouble(f"queue:{self._named(folder)}", text)
            if not count.messages:
                continue
            waited = self._clock() - (count.oldest or 0.0)
            since = "" if count.oldest is None else f", the oldest since {_when(count.oldest)}"
            number = f"{count.messages:,} message{'' if count.messages == 1 else 's'}"
            if kind == "undeliverable":
                what = f"{number}, which no handler has taken{since}. See"
                yield Trouble(
                    kind, f"Undelivered: {what} `salmon-revsmtp undelivered`.", count.oldest
                )
            elif kind == "unsent" and waited >= UNSENT_LONG:
                what = f"{number}, which the relay has not taken{since}. Does it run? See"
                yield Trouble(kind, f"Unsent: {what} `salmon-revsmtp unsent`.", count.oldest)
            elif kind == "inbound" and waited >= INBOUND_LONG:
                yield Trouble(
                    f"queue:{self._named(folder)}",
                    f"Not handled: {number} in {self._named(folder)}{since}. Does the consumer of "
                    "this queue run? Its log says what a handler defers.",
                    count.oldest,
                )

    def _accounts(self, held: Mapping[str, Holding], live: Live | None) -> Iterator[Trouble]:
        """Without a server, or a look into the hold store, it is what was known last."""
        if live is None or live.hold_error:
            yield from (one for key, one in self._known.items() if key.startswith("account:"))
            return
        accounts = {one.name: one for one in self._configuration.accounts}
        self._deferred = {name: at for name, at in self._deferred.items() if name in held}
        for name, one in held.items():
            if one.aside:
                number = f"{one.aside:,} message{'' if one.aside == 1 else 's'}"
                yield Trouble(
                    f"account:{name}:aside",
                    f"Set aside for the account {name}: {number}. They go out when you say "
                    f"`salmon-revsmtp provider held retry --account {shlex.quote(name)}`; see "
                    "`salmon-revsmtp provider held` for the reason.",
                )
            account = accounts.get(name) or one.account
            if one.messages and self._unseen(name, one, account, live):
                known = self._known.get(f"account:{name}:unseen")
                since = one.seen or (known.since if known else None) or one.oldest
                what = counted(one.messages, one.octets)
                text = f"The account {name} has not called since {_when(since)}: {what} wait."
                if one.gone:
                    text = (
                        f"Mail is held for {name}, and there is no such account any more: {what}."
                    )
                elif name not in accounts and not self._configuration.elsewhere:
                    text = f"Mail is held for {name}, which customer_accounts has no more: {what}."
                yield Trouble(f"account:{name}:unseen", text, since)
            elif since := self._deferred_since(name, one):
                said = abridged(one.deferred, MOST_ERROR).rstrip(".")
                yield Trouble(
                    f"account:{name}:deferred",
                    f"The account {name} has deferred its mail since {_when(since)}: "
                    f"{counted(one.messages, one.octets)} wait. Of the oldest {said}. Tell whoever "
                    "runs it: its mail is returned to the senders after hold_days.",
                    since,
                )

    def _deferred_since(self, name: str, one: Holding) -> float | None:
        """Since when an account has deferred its mail, if that is for long.  The store does not
        say when: the time counts from the look that saw it first."""
        if not one.deferred:
            self._deferred.pop(name, None)
            return None
        known = self._known.get(f"account:{name}:deferred")
        since = (known.since if known else None) or self._deferred.get(name, self._clock())
        self._deferred[name] = since
        return since if known or self._clock() - since >= DEFERRED_LONG else None

    def _unseen(self, name: str, one: Holding, account: AccountSettings | None, live: Live) -> bool:
        if account is None:  # there is none, or it cannot be told now
            return one.gone or not self._configuration.elsewhere
        if one.online or not account.enabled:
            return False
        now = self._clock()
        if one.seen is not None:
            return now - one.seen >= UNSEEN
        # Not since the server started.  What was so before is so still.
        if f"account:{name}:unseen" in self._known:
            return True
        waits = one.oldest is not None and now - one.oldest >= UNSEEN
        return waits and now - live.since >= SETTLED

    # -- what there is --------------------------------------------------------------------------

    def _queues(self, live: Live | None) -> Iterator[Queue]:
        inbound = [
            self._project / Path(one.queue).expanduser()
            for one in self._configuration.services.values()
            if one.delivery == "queue"
        ]
        undeliverable = (live.undeliverable if live is not None else None) or self._place
        for kind, folder in [
            *(("inbound", one) for one in dict.fromkeys(inbound)),
            ("undeliverable", undeliverable or self._project / UNDELIVERABLE),
            ("unsent", self._project / UNSENT),
        ]:
            try:
                yield Queue(kind, folder, WaitingMail(folder).count())
            except OSError as error:
                yield Queue(kind, folder, Count(), error.strerror or str(error))

    def _queue_row(self, queue: Queue) -> Row:
        return {
            "status": "queue",
            "queue": queue.kind,
            "folder": self._named(queue.folder),
            "messages": queue.count.messages,
            "oldest": _time(queue.count.oldest),
        }

    def _provider_row(self, held: Mapping[str, Holding]) -> Row:
        waiting = [one.oldest for one in held.values() if one.oldest is not None]
        return {
            "status": "provider",
            "accounts": self._number_of_accounts,
            "online": sum(1 for one in held.values() if one.online),
            "messages": sum(one.messages for one in held.values()),
            "bytes": sum(one.octets for one in held.values()),
            "aside": sum(one.aside for one in held.values()),
            "oldest": _time(min(waiting, default=None)),
        }

    @property
    def _number_of_accounts(self) -> int | None:
        """``None`` where plugins have some, which would have to list them."""
        if self._configuration.elsewhere:
            return None
        return len(self._configuration.accounts)

    @property
    def _hold(self) -> Path | None:
        """The folder of the hold store, if it is in one."""
        folder = (self._configuration.provider or ProviderSettings()).hold_folder
        return None if folder is None else self._project / folder

    def _held(self) -> tuple[Mapping[str, Holding], str]:
        """Without a server: what the hold store's index says, or why that is not known."""
        if not self._configuration.holds:
            return {}, ""
        if self._hold is None:
            return {}, "it is in a database, which only the server asks"
        from salmon_revsmtp.provider.hold.embedded import glance

        try:
            return {name: Holding(*one) for name, one in glance(self._hold).items()}, ""
        except OSError as error:
            return {}, str(error)

    def _named(self, path: Path) -> str:
        """A path as a person writes it."""
        with contextlib.suppress(ValueError):
            return str(path.relative_to(self._project))
        return str(path)

    # -- memory ---------------------------------------------------------------------------------

    def _dated(self, trouble: Trouble) -> Trouble:
        """With the time since when, as far as that is known."""
        since, now = trouble.since, self._clock()
        if since is None:
            known = self._known.get(trouble.key)
            since = known.since if known is not None else now if self._remembers else None
        # The clock may have been wrong: nothing has begun after now.
        return Trouble(trouble.key, trouble.text, None if since is None else min(since, now))

    def _recall(self) -> tuple[dict[str, Trouble], Path | None]:
        try:
            found = json.loads((self._project / MEMORY).read_text())
            troubles = {one[0]: Trouble(*one) for one in found["troubles"]}
            place = found["undeliverable"]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return {}, None
        return troubles, Path(place) if place else None

    def _remember(self, troubles: Sequence[Trouble], live: Live | None) -> None:
        now = {one.key: one for one in troubles}
        place = live.undeliverable if live is not None else self._place
        if now == self._known and place == self._place:
            return
        for key, one in now.items():
            if key not in self._known and not key.startswith(_LOGGED):
                log_safely(log, logging.WARNING, "trouble=%s %s", key.replace(" ", "_"), one.text)
        for key in self._known.keys() - now.keys():
            if not key.startswith(_LOGGED):
                log_safely(log, logging.WARNING, "trouble=%s is over", key.replace(" ", "_"))
        self._known, self._place = now, place
        kept = {
            "troubles": [[one.key, one.text, one.since] for one in troubles],
            "undeliverable": str(place) if place else None,
        }
        try:
            write_private(self._project / MEMORY, json.dumps(kept).encode())
        except OSError as error:  # a full disk is one of the troubles
            log.debug("file=%s cannot be written: %s", MEMORY, error)


def _when(seconds: float | None) -> str:
    """A time for a person."""
    return "an unknown time" if seconds is None else iso(seconds)[:16].replace("T", " ")


def _enabled(agent: Agent, state: AgentState) -> bool:
    return bool(agent.settings.enabled if state.enabled is None else state.enabled)


def _failing_since(name: str, state: AgentState, live: Live | None) -> float | None:
    """An agent with a push session does not fail, whatever is still remembered."""
    if live is None:
        return state.failing_since
    return None if name in live.push else live.failing.get(name)


def _left_by_the_dead(pid_file: Path) -> bool:
    """It names a process that there is not; `salmon start` refuses to begin beside it."""
    try:
        os.kill(int(pid_file.read_text()), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else iso(seconds)


def _server_row(live: Live | None, silent: bool) -> Row:
    return {
        "status": "server",
        "up": live is not None or silent,
        "answers": live is not None,
        "pid": live.pid if live is not None else None,
        "version": live.version if live is not None else None,
        "since": _time(live.since if live is not None else None),
    }


def _agent_row(agent: Agent, state: AgentState, last: Entry | None, live: Live | None) -> Row:
    name, enabled = agent.name, _enabled(agent, state)
    return {
        "status": "agent",
        "agent": name,
        "enabled": enabled,
        "running": live is not None and name in live.running,
        "push": _time(live.push.get(name) if live is not None else None),
        "failing_since": _time(_failing_since(name, state, live)),
        "outcome": last.outcome if last is not None else None,
        "ended": _time(last.ended if last is not None else None),
        "error": last.error if last is not None else None,
        "next": _time(live.next.get(name) if live is not None and enabled else None),
    }


def _trouble_row(one: Trouble) -> Row:
    return {"status": "trouble", "trouble": one.key, "since": _time(one.since), "text": one.text}
