"""Live: what it adds to a sender's waits, how much goes through one session, and who is told.

A message is passed on to its customer while its sender waits.  What that adds is seen beside an
account of the same provider, whose mail is held; its throughput beside Exim, which does the same
with ``control = cutthrough_delivery``, but opens a connection for each message.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import peers, serving
from benchmarks.home import connected, until
from benchmarks.intake import BOUND
from benchmarks.processes import Child, Failure, module, wait_for_port
from benchmarks.project import DOMAIN, project
from benchmarks.provider import Run, by_source, median_of, times
from benchmarks.serving import Serving, running
from benchmarks.table import Case, Section, Target

__all__ = ["SECTIONS", "targets"]

OCTETS = 4_000
LIVE, HELD = "live", "live off"

# Round trip of the session in milliseconds -> messages to each account.
WAITS = {0: 500, 200: 100}
# What live may add beside a round trip, in milliseconds.
MOST = 10.0
# Sessions of smtp-source at a time -> messages.
THROUGH = {1: 500, 10: 2000, 100: 2000}
QUICK_THROUGH = {1: 20, 10: 50}
# To one recipient, to none, and spam.
STRANGERS = 100

OURS, EXIM = "ours, over one push session", "Exim, control = cutthrough_delivery"


#: What ``--only`` may name.
SECTIONS: dict[str, Callable[[bool], list[Section]]] = {
    "live-waits": lambda quick: _waits(quick),
    "live-through": lambda quick: _through(quick),
    "live-strangers": lambda quick: [_strangers(quick)],
}


def targets() -> list[Target]:
    """What is to be reached."""
    found = [
        Target(
            f"live adds to {what}, {milliseconds} ms round trip, {figure} in ms",
            median_of(_title(milliseconds), _added(what, figure)),
            lambda _, bound=MOST + milliseconds: bound,  # type: ignore[misc]
            at_least=False,
        )
        for milliseconds in WAITS
        for what in (RCPT, DATA)
        for figure in ("p50", "p99")
    ]
    found += [
        Target(f"live, {_senders(number)}, times Exim", times(title, OURS, EXIM), lambda _: 1.0)
        for number in THROUGH
        for title in [_through_title(number)]
    ]
    nobody = median_of(TOLD, "live on")
    return [*found, Target("notifications with live on", nobody, lambda _: 0.0, at_least=False)]


# -- what a sender waits for ----------------------------------------------------------------------

RCPT, DATA = "RCPT", "the end of data"
_KEYS = {RCPT: "rcpt", DATA: "data"}


def _title(milliseconds: int) -> str:
    return f"What a sender waits for, {milliseconds} ms round trip of the session under TLS"


def _added(what: str, figure: str) -> str:
    return f"{what}, {figure}: live adds"


def _waits(quick: bool) -> list[Section]:
    lengths = {0: 20, 20: 5} if quick else WAITS
    return [_wait_section(milliseconds, messages) for milliseconds, messages in lengths.items()]


def _wait_section(milliseconds: int, messages: int) -> Section:
    run = _Waits(milliseconds, messages)
    names = [
        name
        for what in _KEYS
        for figure in ("p50", "p99")
        for name in (
            *(f"{what}, {figure}: {way}" for way in (HELD, LIVE)),
            _added(what, figure),
        )
    ]
    cases = [Case(name, partial(run.figure, name)) for name in names]
    return Section(_title(milliseconds), "ms", cases, higher=False)


class _Waits(Run):
    """Two accounts of one provider, each with a session that is open, get messages in turn."""

    def __init__(self, milliseconds: int, messages: int) -> None:
        super().__init__()
        self._milliseconds, self._messages = milliseconds, messages

    def _measure(self) -> dict[str, float]:
        domains = {way: f"{number}.{DOMAIN}" for number, way in enumerate((HELD, LIVE))}
        accounts = [
            serving.account(f"customer-{way}", domain, live=way == LIVE)
            for way, domain in domains.items()
        ]
        with (
            serving.host(*accounts, tls=True) as folder,
            running(folder) as provider,
            connected(provider, accounts, True, self._milliseconds, unknown_recipients="refuse"),
        ):
            arguments = (provider.smtp, self._messages, OCTETS, *domains.values())
            with module("senders", "waits", *arguments) as sender:
                said = sender.says(BOUND)
            _all_live(provider, self._messages)
        figures: dict[str, float] = {}
        for what, key in _KEYS.items():
            held, live = (_of(said[domains[way]][key]) for way in (HELD, LIVE))
            for figure in ("p50", "p99"):
                figures[f"{what}, {figure}: {HELD}"] = held[figure]
                figures[f"{what}, {figure}: {LIVE}"] = live[figure]
                figures[_added(what, figure)] = live[figure] - held[figure]
        return figures


def _of(seconds: list[float]) -> dict[str, float]:
    waits = sorted(1000 * one for one in seconds)
    return {"p50": statistics.median(waits), "p99": waits[int(0.99 * (len(waits) - 1))]}


def _all_live(provider: Serving, messages: int) -> None:
    """Raises :class:`Failure` if these messages did not go through live: other figures are none."""
    live = sum(line.endswith(" live") for line in provider.log.splitlines())
    if live < messages:
        raise Failure(f"{live} of {messages} messages went through live")


# -- how much goes through ------------------------------------------------------------------------


def _through_title(number: int, kept: bool = True) -> str:
    way = "" if kept else ", a connection for each message"
    return f"Passed on while the sender waits, 4 KB messages, {_senders(number)}{way}"


def _senders(number: int) -> str:
    return "1 sender" if number == 1 else f"{number} senders at once"


def _through(quick: bool) -> list[Section]:
    counts = QUICK_THROUGH if quick else THROUGH
    sections = [_through_section(number, messages) for number, messages in counts.items()]
    return [*sections, _through_section(10, counts[10], kept=False)]


def _through_section(number: int, messages: int, kept: bool = True) -> Section:
    arguments = (number, messages, kept)
    cases = [
        Case(OURS, lambda: _through_us(*arguments), peers.missing("smtp-source")),
        Case(EXIM, lambda: _through_exim(*arguments), peers.missing("exim", "smtp-source")),
    ]
    return Section(_through_title(number, kept), "messages/s", cases, ours=OURS)


def _through_us(number: int, messages: int, kept: bool) -> float:
    account = serving.account()
    with (
        serving.host(account) as folder,
        running(folder) as provider,
        connected(provider, [account], unknown_recipients="refuse"),
    ):
        rate = by_source(provider.smtp, number, messages, kept)
        _all_live(provider, messages)
        return rate


def _through_exim(number: int, messages: int, kept: bool) -> float:
    port = peers.free_port()
    keys: dict[str, Any] = {"listen": [f"127.0.0.1:{port}"], "unknown_recipients": "refuse"}
    with project(max_connections=300, keep_places_for=["127.0.0.0/8"], **keys) as folder:
        command = [str(peers.COMMAND), "--chdir", str(folder), "run"]
        with Child(command, name="the customer") as customer:
            wait_for_port(port, customer)
            with peers.exim_cutthrough(port) as exim:
                rate = by_source(exim.port, number, messages, kept)
                # Exim's log has ">>" for a recipient to which it delivered before its answer.
                passed_on = exim.log().count(f" >> bench@{DOMAIN} ")
                if passed_on < messages:
                    raise Failure(f"{passed_on} of {messages} messages: {exim.log()[-300:]}")
                return rate


# -- who is told ----------------------------------------------------------------------------------

TOLD = "Notifications to strangers, of mail to no mailbox and of spam"
_WAYS = {"live on": True, "live off": False}


def _strangers(quick: bool) -> Section:
    messages = 5 if quick else STRANGERS
    cases = [Case(name, partial(_told, live, messages)) for name, live in _WAYS.items()]
    return Section(TOLD, f"of {2 * messages}", cases, higher=False)


def _told(live: bool, messages: int) -> float:
    """How many notifications go out while home is there, and refuses two of three messages."""
    account = serving.account(live=live)
    with tempfile.TemporaryDirectory(prefix="revsmtp-bench-") as name:
        told = Path(name, "told")
        told.touch()
        with (
            module("relay", told) as relay,
            serving.host(account, relay=relay.says(20)["port"]) as folder,
            running(folder) as provider,
            connected(provider, [account], handler="refuses_spam", unknown_recipients="refuse"),
        ):
            with module("senders", "mixed", provider.smtp, messages) as senders:
                heard = senders.says(BOUND)
            expected = {"250": 1, "550": 1, "554": 1} if live else {"250": 3}
            if heard != {code: times * messages for code, times in expected.items()}:
                raise Failure(f"the senders heard {heard}")
            until(lambda: not _left(folder))
            return float(told.read_text().count("\n"))


def _left(folder: Path) -> int:
    """Messages that a provider holds, and notifications that have not gone out."""
    command = [str(peers.COMMAND), "--chdir", str(folder), "provider", "accounts", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    held = sum(json.loads(line)["messages"] for line in done.stdout.splitlines())
    return int(held) + len([*folder.glob("run/unsent/new/*"), *folder.glob("run/unsent/cur/*")])
