"""One of the hosts that have one hold store: a process.

``python -m benchmarks.hosting WORK PLACE JSON`` opens the hold store (a URL, or a folder), prints
that it is ready, does its work when it is told to by a line, and prints what came of it:

``put``       keep messages, some at a time; how long it took, and how often it waited for an answer
``hand_over`` take all that waits for an account, settle it; the same
``send``      keep messages at a rate; when each was kept
``listen``    hear for which accounts mail has come, until the next line; when
``churn``     keep messages, take them and settle them, again and again; how long that took
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.feeding import SENDER, message
from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.provider.hold.store import Arrival, HoldStore, Settled
from salmon_revsmtp.smtp.envelope import Client, Envelope

__all__: list[str] = []

# Messages of a feed that are taken together, as a hand-over does.
PAGE = 100
# Seconds without a wake-up after which no more come.
QUIET = 2.0


def arrival(number: int, octets: int, account: str) -> Arrival:
    """A message as the intake makes it."""
    client = Client(address="192.0.2.1", ident=str(number))
    to = (f"b@{account}.example",)
    envelope = Envelope(SENDER, to, {}, {}, "client.example.net", True, client)
    return Arrival(envelope, (account,), message(number, octets))


def opened(place: str, folder: Path) -> HoldStore:
    if "://" not in place:
        return EmbeddedStore(Path(place))
    from salmon_revsmtp.provider.hold.postgres import PostgresStore

    return PostgresStore(place, folder)


class Waits:
    """How often psycopg has waited for the server."""

    def __init__(self) -> None:
        self.number = 0
        try:
            import psycopg
        except ImportError:
            return
        wait = psycopg.Connection.wait

        def counted(connection: Any, generator: Any, *arguments: Any, **keys: Any) -> Any:
            self.number += 1
            return wait(connection, generator, *arguments, **keys)

        psycopg.Connection.wait = counted  # type: ignore[method-assign, assignment]


def put(store: HoldStore, keys: dict[str, Any]) -> dict[str, Any]:
    accounts, number = keys["accounts"], 0
    began, cpu = time.monotonic(), time.process_time()
    while number < keys["messages"]:
        numbers = range(number, number + keys["batch"])
        store.put([arrival(one, keys["octets"], accounts[one % len(accounts)]) for one in numbers])
        number += keys["batch"]
    seconds = time.monotonic() - began
    return {"messages": number, "seconds": seconds, "cpu": time.process_time() - cpu}


def hand_over(store: HoldStore, keys: dict[str, Any]) -> dict[str, Any]:
    began, cpu, number = time.monotonic(), time.process_time(), 0
    for account in keys["accounts"]:
        feed = store.feed(account)
        while number < keys["messages"] and (page := feed.take(PAGE, 1 << 40)):
            number += len(page)
            store.load([one.key for one in page])
            feed.leave([one.key for one in page])
            store.settle([Settled(one.key, one.envelope.recipients) for one in page])
        feed.close()
    seconds = time.monotonic() - began
    return {"messages": number, "seconds": seconds, "cpu": time.process_time() - cpu}


def churn(store: HoldStore, keys: dict[str, Any]) -> dict[str, Any]:
    """The last part is what counts: what has gone before is in its way by then."""
    [account], began, number = keys["accounts"], 0.0, 0
    feed = store.feed(account)
    while number < keys["messages"] + keys["before"]:
        if number == keys["before"]:
            began = time.monotonic()
        store.put([arrival(one, keys["octets"], account) for one in range(PAGE)])
        page = feed.take(PAGE, 1 << 40)
        feed.leave([one.key for one in page])
        store.settle([Settled(one.key, one.envelope.recipients) for one in page])
        number += len(page)
    return {"messages": keys["messages"], "seconds": time.monotonic() - began}


def send(store: HoldStore, keys: dict[str, Any]) -> dict[str, Any]:
    accounts, batch, kept = keys["accounts"], keys["batch"], []
    began = time.monotonic()
    for first in range(0, keys["messages"], batch):
        time.sleep(max(0.0, began + first / keys["rate"] - time.monotonic()))
        names = [accounts[one % len(accounts)] for one in range(first, first + batch)]
        store.put([arrival(first, keys["octets"], name) for name in names])
        now = time.monotonic()
        kept += [(name, now) for name in names]
    seconds = time.monotonic() - began
    return {"messages": keys["messages"], "seconds": seconds, "kept": kept}


def listen(store: HoldStore, keys: dict[str, Any]) -> dict[str, Any]:
    heard: list[tuple[str, float]] = []

    def woken(names: Any) -> None:
        now = time.monotonic()
        heard.extend((name, now) for name in names)

    store.watch(woken)
    print(json.dumps({"listens": True}), flush=True)
    sys.stdin.readline()
    while heard and time.monotonic() - heard[-1][1] < QUIET:  # the last ones are on their way
        time.sleep(QUIET / 10)
    return {"heard": heard}


WORK: dict[str, Callable[[HoldStore, dict[str, Any]], dict[str, Any]]] = {
    **{"put": put, "hand_over": hand_over, "churn": churn, "send": send, "listen": listen}
}


def main(work: str, place: str, keys: dict[str, Any]) -> None:
    """The process."""
    waits = Waits()
    with tempfile.TemporaryDirectory() as folder:
        store = opened(place, Path(folder))
        print(json.dumps({"ready": True}), flush=True)
        sys.stdin.readline()
        before = waits.number
        came = WORK[work](store, keys)
        waited = waits.number - before
        store.close()  # first: it may have to wake others, and who hears the result ends us
        print(json.dumps({**came, "waits": waited}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
    os._exit(0)
