"""Much mail, large mail, many agents: the figures.

``python tests/faults/load.py`` runs every load and prints a table; ``test_load`` runs the same and
holds them to their bounds.  The customer and the provider are processes of their own, so that the
most memory that either ever had is its own, and nothing of the test's.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from salmon import mail, queue
from salmon.routing import Router, route, stateless
from support.configuration import agent_keys, configuration
from support.dialogue import Dialogue
from support.holding import Holding, account

from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.smtp.envelope import Envelope

__all__ = ["LOADS", "Load", "Result", "run"]

KIB, MIB, MB = 1024, 1024 * 1024, 1_000_000
LARGE = 200 * MB
PIECE = 256 * KIB
# Seconds after which a process that says nothing hangs.
PATIENCE = 1200


@dataclass(frozen=True)
class Load:
    """``what`` for people; then what the provider holds, and how the customer takes it.

    ``agents``    so many accounts, and an agent for each.
    ``messages``  per agent, of ``octets`` each.
    ``wire``      how they come: ``provider`` is the built-in one; ``data`` and ``chunks`` are one
                  that announces no SIZE and sends by DATA or by BDAT of 1 MiB; ``pipelined`` is one
                  that waits for no answer.
    ``then``      small messages behind those, in the same session.
    ``delivery``, ``limit``, ``slow``  the service's; ``slow`` seconds per message in the handler.
    """

    what: str
    messages: int
    octets: int
    agents: int = 1
    wire: str = "provider"
    then: int = 0
    delivery: str = "router"
    limit: int = 50 * MIB
    slow: float = 0.0


LOADS = {
    "many": Load("10,000 messages in one session", 10_000, 4 * KIB),
    "many-queued": Load("the same, queue mode", 10_000, 4 * KIB, delivery="queue"),
    "agents": Load("200 agents at once, 20 messages each", 20, 4 * KIB, agents=200),
    "refused": Load("too large, by its SIZE", 1, LARGE, then=1),
    "refused-data": Load("too large, no SIZE, DATA", 1, LARGE, wire="data", then=1),
    "refused-chunks": Load("too large, no SIZE, BDAT", 1, LARGE, wire="chunks", then=1),
    "large-queued": Load("large, queue mode", 1, LARGE, delivery="queue", limit=300 * MB),
    "large-queued-data": Load(
        "large, queue mode, DATA", 1, LARGE, wire="data", delivery="queue", limit=300 * MB
    ),
    "large": Load("large, router mode", 1, LARGE, limit=300 * MB),
    "slow": Load("faster than handlers", 2_000, 64 * KIB, wire="pipelined", slow=0.002),
}


@dataclass
class Result:
    """``before`` and ``peak`` in octets: the customer's memory before its first connection, and the
    most that it had.  ``left`` is what the provider still has, ``provider`` by how much its memory
    grew, ``heard`` what it was answered to the messages, by code."""

    seconds: float
    before: int
    peak: int
    outcomes: dict[str, int]
    handled: int
    twice: int
    sessions: int
    refused: int
    left: int = 0
    provider: int = 0
    heard: dict[str, int] = field(default_factory=dict)

    @property
    def grown(self) -> int:
        return self.peak - self.before


def message(number: int, octets: int) -> bytes:
    """A message with an attachment, as large ones are, of about so many octets."""
    head = (
        f"From: a@example.net\r\nTo: b@example.org\r\nSubject: {number}\r\nMIME-Version: 1.0\r\n"
        "Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n"
        "Content-Type: text/plain\r\n\r\nhello\r\n--b\r\n"
        "Content-Type: application/octet-stream\r\n"
        'Content-Transfer-Encoding: base64\r\nContent-Disposition: attachment; filename="x"\r\n\r\n'
    ).encode()
    lines = base64.encodebytes(random.Random(number).randbytes(57 * 32)).replace(b"\n", b"\r\n")
    return head + lines * max(1, octets // len(lines)) + b"--b--\r\n"


def name(number: int) -> str:
    return f"acme{number}"


def domain(number: int) -> str:
    return f"d{number}.example.org"


# -- the provider's process --------------------------------------------------------------------


async def provide(load: Load) -> None:
    """Hold the mail, tell the port, serve until standard input ends, tell what is left."""
    if load.wire == "provider":
        await provide_by_provider(load)
    else:
        await provide_by_script(load)


def messages(load: Load) -> Iterable[tuple[str, bytes]]:
    """All of them: domain, and the octets."""
    numbers = iter(range(1 << 62))
    for agent in range(load.agents):
        for _ in range(load.messages):
            yield domain(agent), message(next(numbers), load.octets)
        for _ in range(load.then):
            yield domain(agent), message(next(numbers), KIB)


def holding(load: Load) -> Holding:
    """The built-in provider's mail."""
    accounts = [account(name(one), domains=[domain(one)]) for one in range(load.agents)]
    return Holding(Path("provider"), *accounts)


def hold(load: Load) -> None:
    """Fill the built-in provider's queue."""
    held = holding(load)
    for where, data in messages(load):
        held.put(Envelope("a@example.net", (f"b@{where}",)), data)


async def provide_by_provider(load: Load) -> None:
    held = holding(load)
    before = memory("VmRSS")
    async with held.provider() as provider:
        tell(port=provider.port)
        await end_of_input()
        tell(left=len(held), heard={}, provider=memory("VmHWM") - before)


async def provide_by_script(load: Load) -> None:
    """One session that sends everything, and one that says that there is no more."""
    heard: Counter[str] = Counter()
    calls = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        dialogue = Dialogue(reader, writer)
        with contextlib.closing(writer):
            if calls > 1:
                await dialogue.up_to_atrn()
                await dialogue.asks("ATRN", "453 no mail")
                await dialogue.asks("QUIT", "221 bye")
                return
            await dialogue.reverse()
            ways = {"data": by_data, "chunks": by_chunks, "pipelined": pipelined}
            async for reply in ways[load.wire](load, dialogue, writer):
                heard[reply[:3]] += 1
            await dialogue.quit()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        tell(port=server.sockets[0].getsockname()[1])
        await end_of_input()
        tell(left=0, heard=heard, provider=0)


async def write(writer: asyncio.StreamWriter, data: bytes) -> None:
    """In pieces, each when there is room."""
    view = memoryview(data)
    for start in range(0, len(view), PIECE):
        writer.write(view[start : start + PIECE])
        await writer.drain()


async def by_data(
    load: Load, dialogue: Dialogue, writer: asyncio.StreamWriter
) -> AsyncIterator[str]:
    for where, data in messages(load):
        dialogue.say("MAIL FROM:<a@example.net>", f"RCPT TO:<b@{where}>", "DATA")
        for code in (250, 250, 354):
            await dialogue.replied(code)
        await write(writer, data + b".\r\n")
        yield await dialogue.hear()


async def by_chunks(
    load: Load, dialogue: Dialogue, writer: asyncio.StreamWriter
) -> AsyncIterator[str]:
    for where, data in messages(load):
        dialogue.say("MAIL FROM:<a@example.net>", f"RCPT TO:<b@{where}>")
        for _ in range(2):
            await dialogue.replied(250)
        for start in range(0, len(data), MIB):
            chunk = data[start : start + MIB]
            last = b" LAST" if start + MIB >= len(data) else b""
            await write(writer, b"BDAT %d%b\r\n%b" % (len(chunk), last, chunk))
            reply = await dialogue.hear()
        yield reply


async def pipelined(
    load: Load, dialogue: Dialogue, writer: asyncio.StreamWriter
) -> AsyncIterator[str]:
    """Everything is written as fast as it goes, the replies are read beside it."""

    async def send() -> None:
        for where, data in messages(load):
            head = f"MAIL FROM:<a@example.net>\r\nRCPT TO:<b@{where}>\r\nBDAT {len(data)} LAST\r\n"
            await write(writer, head.encode() + data)

    sending = asyncio.create_task(send())
    for _ in range(load.messages):
        for _ in range(2):
            await dialogue.replied(250)
        yield await dialogue.hear()
    await sending


# -- the customer's process --------------------------------------------------------------------


async def consume(load: Load, port: int) -> None:
    """Collect with every agent at once, and tell what came of it."""
    handled: Counter[str] = Counter()
    Path("run").mkdir()
    Router.RELOAD = False
    Router.UNDELIVERABLE_QUEUE = queue.Queue("run/undeliverable")

    def handler(message: mail.MailRequest, **captures: str) -> None:
        handled[message["Subject"]] += 1
        if load.slow:
            time.sleep(load.slow)

    route(".*")(stateless(handler))
    plugins = Plugins.load()
    keys = [
        agent_keys(
            port,
            name=f"agent{one}",
            server="127.0.0.1",
            account=name(one),
            domains=[domain(one)],
            timeout=600,
        )
        for one in range(load.agents)
    ]
    service = {
        "hostname": "mail.example.org",
        "delivery": load.delivery,
        "max_message_size": load.limit,
    }
    valid = configuration(*keys, plugins=plugins, default=service)
    with Collector(valid, plugins, lambda: None) as collector:
        before = memory("VmRSS")
        started = time.monotonic()
        reports = await collector.collect(valid.agents)
        seconds = time.monotonic() - started
        peak = memory("VmHWM")
    if load.delivery == "queue":
        for path in Path("run/inbound/new").iterdir():
            with path.open("rb") as file:
                [subject] = [line for line in file if line.startswith(b"Subject:")][:1]
                handled[subject.decode()] += 1
    result = Result(
        seconds,
        before,
        peak,
        dict(Counter(str(report.outcome) for report in reports)),
        len(handled),
        sum(times > 1 for times in handled.values()),
        sum(report.sessions for report in reports),
        sum(report.refused for report in reports),
    )
    tell(**asdict(result))


def parse(octets: int) -> None:
    """What Salmon's own parser needs for one message, nothing of ours beside it."""
    content = message(0, octets).replace(b"\r\n", b"\n")
    before = memory("VmRSS")
    started = time.monotonic()
    mail.MailRequest(("127.0.0.1", 0), "a@example.net", "b@example.org", content)
    tell(seconds=time.monotonic() - started, grown=memory("VmHWM") - before, octets=len(content))


def memory(which: str) -> int:
    """A line of this process's status: ``VmRSS`` is its memory now, ``VmHWM`` the most of it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) * KIB
    raise LookupError(which)


# -- both --------------------------------------------------------------------------------------


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


async def end_of_input() -> None:
    await asyncio.to_thread(sys.stdin.read)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    return subprocess.Popen(
        command, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    hanging = threading.Timer(PATIENCE, process.kill)
    hanging.start()
    try:
        line = process.stdout.readline()
    finally:
        hanging.cancel()
    assert line, f"the process {process.args!r} said nothing"
    return dict(json.loads(line))


def run(load: Load, folder: Path) -> Result:
    """Run a load in an empty folder."""
    words = json.dumps(asdict(load))
    if load.wire == "provider":
        with start(folder, "hold", words) as holding:
            assert holding.wait() == 0
    with start(folder, "provider", words) as provider:
        try:
            port = told(provider)["port"]
            with start(folder, "customer", words, str(port)) as customer:
                try:
                    result = Result(**told(customer))
                finally:
                    customer.kill()
            assert provider.stdin is not None
            provider.stdin.close()
            after = told(provider)
        finally:
            provider.kill()
    result.left, result.heard, result.provider = after["left"], after["heard"], after["provider"]
    return result


def parser_alone(folder: Path, octets: int = LARGE) -> dict[str, Any]:
    """Salmon's parser in a process of its own."""
    with start(folder, "parser", str(octets)) as process:
        return told(process)


def main() -> None:
    print("| load | mode | messages | octets each | seconds | messages/s | memory before | most |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for load in LOADS.values():
        with tempfile.TemporaryDirectory() as folder:
            result = run(load, Path(folder))
        count = load.agents * (load.messages + load.then)
        times = f" ({result.grown / load.octets:.1f} times it)" if load.octets == LARGE else ""
        print(
            f"| {load.what} | {load.delivery} | {count:,} | {load.octets:,} | {result.seconds:.1f} "
            f"| {result.handled / result.seconds:,.0f} | {result.before / MB:.0f} MB "
            f"| +{result.grown / MB:.0f} MB{times} |",
            flush=True,
        )
    with tempfile.TemporaryDirectory() as folder:
        alone = parser_alone(Path(folder))
    print(
        f"| Salmon's parser alone | | 1 | {LARGE:,} | {alone['seconds']:.1f} | | "
        f"| +{alone['grown'] / MB:.0f} MB ({alone['grown'] / alone['octets']:.1f} times it) |"
    )


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    match sys.argv[1:]:
        case ["hold", load]:
            hold(Load(**json.loads(load)))
        case ["provider", load]:
            asyncio.run(provide(Load(**json.loads(load))))
        case ["customer", load, port]:
            asyncio.run(consume(Load(**json.loads(load)), int(port)))
        case ["parser", octets]:
            parse(int(octets))
        case _:
            main()
