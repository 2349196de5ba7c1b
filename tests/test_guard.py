"""The guardian: what a peer hears when the process that it talks to is gone."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import LONG

WORDS = b"421 4.3.2 it has ended\r\n"

# Takes a connection for each "connect", guards it, and does to it what it reads on standard input.
PROGRAM = """
import logging, os, signal, socket, subprocess, sys
from salmon_revsmtp.net import guard

logging.basicConfig()
guard.SHORT_LIFE = float(sys.argv[1])
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
words = sys.argv[2].encode() + b"\\r\\n"
guards, connections = [], []
for line in sys.stdin:
    match line.split():
        case ["connect"]:
            connections.append(listening.accept()[0])
            guards.append(guard.guard(connections[-1], words))
        case ["say", text]:
            connections[-1].sendall(text.encode())
        case ["torn"]:
            guards[-1].torn(True)
        case ["let_go" | "close" | "end" as what]:
            getattr(guards[-1], what)()
            connections[-1].close()
        case ["forget"]:
            del guards[-1], connections[-1]
        case ["fork"]:
            if not os.fork():
                for one in (*connections, listening):
                    one.close()
                signal.pause()
        case ["run"]:
            subprocess.Popen(["sleep", "1000"], close_fds=False)
    print("done", flush=True)
"""


class Guarded:
    """A process with guarded connections."""

    def __init__(self, short_life: float = 0) -> None:
        command = [sys.executable, "-c", PROGRAM, str(short_life), WORDS.decode().strip()]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def do(self, command: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(command, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), LONG)
        self.do("connect")
        return connection

    def guardian(self) -> int:
        """The guardian's process id."""
        [pid] = children(self.process.pid)
        return pid

    def kill(self) -> str:
        """Kill it; returns what it logged."""
        self.process.kill()
        _, log = self.process.communicate(timeout=LONG)
        return log

    def close(self) -> None:
        if self.process.returncode is None:
            self.kill()


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    one = Guarded()
    yield one
    one.close()


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(one) for children in found for one in children.read_text().split()]


def end_of(pid: int) -> None:
    """Wait for the end of a process that is no child of ours."""
    give_up = time.monotonic() + LONG
    while _lives(pid):
        assert time.monotonic() < give_up, f"{pid} does not end"
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def heard(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    data = b""
    while more := connection.recv(65536):
        data += more
    return data


def has_closed(connection: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        assert heard(connection) == b""


def test_after_sigkill_each_peer_hears_the_last_words(guarded: Guarded) -> None:
    peers = [guarded.connect() for _ in range(150)]
    guardian = guarded.guardian()
    guarded.kill()
    for peer in peers:
        peer.sendall(b"RCPT TO:<b@example.org>\r\nDATA\r\nquit\r\nmore\r\n")
        assert heard(peer) == WORDS * 4
        peer.close()
    end_of(guardian)


def test_a_large_message_on_its_way_does_not_cost_the_last_words(guarded: Guarded) -> None:
    peer = guarded.connect()
    guarded.kill()
    peer.sendall(b"a line of it, and no one takes it\r\n" * 500_000)
    peer.shutdown(socket.SHUT_WR)
    assert heard(peer).startswith(WORDS)
    peer.close()


def test_after_half_a_line_the_last_words_are_a_line_of_their_own(guarded: Guarded) -> None:
    peer = guarded.connect()
    guarded.do("say 250-mail")
    guarded.do("torn")
    guarded.kill()
    peer.sendall(b"QUIT\r\n")
    assert heard(peer) == b"250-mail\r\n" + WORDS + WORDS
    peer.close()


@pytest.mark.parametrize("how", ["let_go", "close"])
def test_a_connection_that_has_ended_is_closed_at_once(guarded: Guarded, how: str) -> None:
    peer, other = guarded.connect(), guarded.connect()
    guarded.do(how)
    has_closed(other)
    assert not select.select([peer], [], [], 0)[0]
    peer.close()
    other.close()


def test_a_connection_that_we_close_while_we_owe_an_answer(guarded: Guarded) -> None:
    peer = guarded.connect()
    guarded.do("end")
    assert peer.recv(65536) == WORDS
    peer.sendall(b"QUIT\r\n")
    assert heard(peer) == WORDS
    peer.close()


def test_a_connection_that_is_forgotten_is_ended(guarded: Guarded) -> None:
    peer = guarded.connect()
    guarded.do("forget")
    assert peer.recv(65536) == WORDS
    peer.close()


@pytest.mark.parametrize("command", ["fork", "run"])
def test_a_child_of_the_process_does_not_hide_its_death(guarded: Guarded, command: str) -> None:
    peer = guarded.connect()
    guardian = guarded.guardian()
    guarded.do(command)
    [child] = set(children(guarded.process.pid)) - {guardian}
    try:
        guarded.process.kill()
        guarded.process.wait(LONG)
        assert peer.recv(65536) == WORDS
        peer.close()
        end_of(guardian)
        assert _lives(child)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_group_or_a_service_does_not_end_the_guardian(
    guarded: Guarded, number: int
) -> None:
    peer = guarded.connect()
    guardian = guarded.guardian()
    assert os.getpgid(guardian) != os.getpgid(guarded.process.pid)
    os.kill(guardian, number)
    guarded.kill()
    assert peer.recv(65536) == WORDS
    peer.close()
    end_of(guardian)


def test_the_guardian_has_nothing_open_but_the_connections(guarded: Guarded) -> None:
    """No port, no lock, no terminal or pipe of ours, and no folder that anyone wants to unmount."""
    peer = guarded.connect()
    place = Path(f"/proc/{guarded.guardian()}")
    give_up = time.monotonic() + LONG
    while len(links := _open_in(place)) < 5:
        assert time.monotonic() < give_up, links
    assert sum(link.startswith("socket:") for link in links) == 2
    others = {link for link in links if not link.startswith("socket:")}
    assert others == {"/dev/null", "anon_inode:[eventpoll]"}
    assert (place / "cwd").readlink() == Path("/")
    assert (place / "environ").read_bytes().count(b"=") <= 2
    peer.close()


def _open_in(place: Path) -> list[str]:
    links = []
    for one in (place / "fd").iterdir():
        with contextlib.suppress(OSError):  # the interpreter is starting
            links.append(str(one.readlink()))
    return links


def test_a_guardian_that_dies_is_replaced_and_its_connections_are_guarded(
    guarded: Guarded,
) -> None:
    peer = guarded.connect()
    first = guarded.guardian()
    os.kill(first, signal.SIGKILL)
    give_up = time.monotonic() + LONG
    while children(guarded.process.pid) in ([], [first]):
        assert time.monotonic() < give_up
        time.sleep(0.01)
    other = guarded.connect()
    log = guarded.kill()
    assert "the guardian process has ended, status -9; another is started" in log
    for one in (peer, other):
        assert one.recv(65536) == WORDS
        one.close()


def test_a_guardian_that_cannot_live_is_done_without() -> None:
    guarded = Guarded(short_life=1_000)
    try:
        peer = guarded.connect()
        os.kill(guarded.guardian(), signal.SIGKILL)
        give_up = time.monotonic() + LONG
        while children(guarded.process.pid):
            assert time.monotonic() < give_up
            time.sleep(0.01)
        other = guarded.connect()
        assert guarded.process.poll() is None
        log = guarded.kill()
        assert log.count("no guardian process: it has ended at once, with status -9") == 1
        for one in (peer, other):
            has_closed(one)
            one.close()
    finally:
        guarded.close()
