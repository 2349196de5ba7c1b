"""Sessions that are held and say nothing: what each costs, and all of them calling at once.

``python -m benchmarks.idle [NUMBER]`` does it by itself, once; ten thousand take some minutes, 300
MB, and as many descriptors in each of two processes.
"""

from __future__ import annotations

import resource
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.crowd import open_files
from benchmarks.processes import Child, module
from benchmarks.table import Case, Section, Target

__all__ = ["sections", "targets"]

SESSIONS, QUICK = 10_000, 50
# asyncio's TLS is measured with fewer: each takes 290 KiB.
PEERS = 1000

KEEPALIVE = 60.0
# Seconds in which keepalives are watched.
WATCHED, WATCHED_QUICKLY = 60.0, 2.0

# Seconds until all have called.
BOUND = 900.0

OCTETS, OCTETS_QUICK = 500_000_000, 20_000_000
BLOCK = 256 * 1024

MEMORY = "Memory of a TLS session that is held, above the first"
PROCESSOR = "Processor time for the keepalives of held sessions"
STORM = "All customers call at once"

BULK = {
    "take": "TLS octets that a server takes, one connection",
    "give": "TLS octets that a server gives, one connection",
}

OURS, OURS_BARE = "our provider, push sessions", "our TLS, and a protocol that does nothing"
ASYNCIO = "asyncio's TLS, and a protocol that does nothing"
FIRST, AGAIN = "the first time", "after the provider has been killed and started again"
WORK = "the same, in the provider's processor time, its start included"


def sections(quick: bool, number: int | None = None) -> list[Section]:
    """Memory, keepalives, a restart, and octets through one connection."""
    number = number or (QUICK if quick else SESSIONS)
    held = _Held(number, WATCHED_QUICKLY if quick else WATCHED)

    def figure(name: str) -> Case:
        return Case(name, lambda: held.figure(name), held.missing)

    peers = min(number, PEERS)
    memory = [
        figure(OURS),
        Case(OURS_BARE, lambda: _bare("ours", peers)),
        Case(ASYNCIO, lambda: _bare("asyncio", peers)),
    ]
    return [
        Section(MEMORY, "KiB", memory, ours=OURS, higher=False),
        Section(
            PROCESSOR,
            "% of a core",
            [Case(_share(number), lambda: held.figure("share"), held.missing)],
            higher=False,
        ),
        Section(STORM, "s", [figure(FIRST), figure(AGAIN), figure(WORK)], higher=False),
        *(_bulk(way, quick) for way in ("take", "give")),
    ]


def targets() -> list[Target]:
    """What ten thousand may cost, and TLS that is as fast as asyncio's."""

    def most(text: str, title: str, case: str, bound: float) -> Target:
        return Target(
            text,
            lambda by: by[title].median(case) if title in by else None,
            lambda by: bound,
            at_least=False,
        )

    found = [
        most("KiB of a held TLS session", MEMORY, OURS, 24),
        most("% of a core for keepalives", PROCESSOR, _share(SESSIONS), 5),
        most("s until all are back after a restart", STORM, AGAIN, 60),
        most("s of processor time until all are back", STORM, WORK, 60),
    ]
    found += [_as_fast(title) for title in BULK.values()]
    return found


def _as_fast(title: str) -> Target:
    def of(by: dict[str, Section], case: str) -> float | None:
        return by[title].median(case) if title in by else None

    text = f"as many as asyncio's: {title}"
    return Target(text, lambda by: of(by, "ours"), lambda by: of(by, "asyncio's"))


class _Held:
    """One provider, its customers, and its successor give all figures of a round."""

    def __init__(self, number: int, watched: float) -> None:
        self._number, self._watched = number, watched
        self._figures: dict[str, float] = {}
        self.missing = _too_few_files(number)

    def figure(self, name: str) -> float:
        """Each figure is asked for once a round; one that is gone means another round."""
        if name not in self._figures:
            self._figures = self._measure()
        return self._figures.pop(name)

    def _measure(self) -> dict[str, float]:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            port = _free_port()
            with self._provider(port, folder / "1") as provider:
                with module("callers", port, 1) as caller:
                    caller.says(BOUND)
                    before = _asked(provider)["resident"]
                callers = stack.enter_context(module("callers", port, self._number))
                first = callers.says(BOUND)["seconds"]
                begin = _asked(provider)
                time.sleep(self._watched)
                end = _asked(provider)
                provider.process.kill()
            # One account has called before: it is in both.
            with self._provider(port, folder / "2") as successor:
                again = callers.says(BOUND)["seconds"]
                work = _asked(successor)["cpu"]
        seconds = end["clock"] - begin["clock"]
        return {
            OURS: (end["resident"] - before) / 1024 / self._number,
            "share": 100 * (end["cpu"] - begin["cpu"]) / seconds,
            FIRST: first,
            AGAIN: again,
            WORK: work,
        }

    @contextmanager
    def _provider(self, port: int, folder: Path) -> Iterator[Child]:
        with module("idling", "provider", self._number, KEEPALIVE, port, folder) as child:
            child.says(BOUND)
            yield child


def _asked(child: Child) -> dict[str, float]:
    assert child.process.stdin is not None
    child.process.stdin.write(b"\n")
    child.process.stdin.flush()
    return child.says(BOUND)


def _bare(kind: str, number: int) -> float:
    """KiB of a connection that has greeted, above the first."""
    with module("idling", kind) as server:
        port = server.says(BOUND)["port"]
        with module("callers", port, 1, "bare") as one:
            one.says(BOUND)
            before = _asked(server)["resident"]
            with module("callers", port, number, "bare") as callers:
                callers.says(BOUND)
                return (_asked(server)["resident"] - before) / 1024 / number


def _share(number: int) -> str:
    return f"{number:,} sessions, each silent for {KEEPALIVE:.0f} s"


def _bulk(way: str, quick: bool) -> Section:
    octets = OCTETS_QUICK if quick else OCTETS
    cases = [
        Case("ours", lambda: _rate("ours", way, octets)),
        Case("asyncio's", lambda: _rate("asyncio", way, octets)),
    ]
    return Section(BULK[way], "MB/s", cases, ours="ours")


def _rate(kind: str, way: str, octets: int) -> float:
    """MB/s between a client that does nothing else, and a server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    block = bytearray(BLOCK)
    with module("bulk", kind, way, octets) as server:
        raw = socket.create_connection(("127.0.0.1", server.says(BOUND)["port"]))
        with context.wrap_socket(raw) as connection:
            started = time.monotonic()
            done = 0
            while done < octets:
                if way == "take":
                    connection.sendall(block)
                    done += len(block)
                else:
                    done += connection.recv_into(block)
            if way == "take":
                connection.recv(1)
            return done / 1e6 / (time.monotonic() - started)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def _too_few_files(number: int) -> str | None:
    open_files()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = number + 100
    return None if soft >= needed else f"needs {needed} open files, and may have {soft}"


if __name__ == "__main__":
    chosen = int(sys.argv[1]) if sys.argv[1:] else None
    for section in sections(False, chosen):
        print(f"\n{section.title} ({section.unit})")
        for case in section.cases:
            print(f"  {case.name}: {case.missing or f'{case.measure():.2f}'}", flush=True)
