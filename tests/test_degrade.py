"""What is done without: a server that is stopped, a journal or a folder that cannot be had."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from salmon import queue
from support.collecting import exchange
from support.dialogue import Dialogue, no_more_mail
from support.processes import LONG
from support.project import Project, isp, one_message, provider
from support.salmon import Salmon, explodes
from support.servers import free_port
from support.serving import RUN, server

from salmon_revsmtp.journal import collections
from salmon_revsmtp.journal.collections import Journal
from salmon_revsmtp.server import control


@pytest.fixture
def stopped(project: Project) -> Iterator[Project]:
    """A project whose server has been stopped (SIGSTOP)."""
    project.receiver_port = free_port()
    project.configure(isp(1, every="None"), isp(1, name="'two'", every="None"))
    with server(project, RUN) as process:
        process.send_signal(signal.SIGSTOP)
        try:
            yield project
        finally:
            process.send_signal(signal.SIGCONT)


def test_agents_does_not_wait_for_a_stopped_server(stopped: Project) -> None:
    begun = time.monotonic()
    done = stopped.run("agents", "--json")
    assert time.monotonic() - begun < LONG / 2
    assert [json.loads(line)["agent"] for line in done.stdout.splitlines()] == ["isp", "two"]
    assert "has not answered in 2 seconds" in done.stderr


def test_collect_says_that_a_stopped_server_does_not_answer(stopped: Project) -> None:
    done = stopped.run("collect", "isp")
    assert done.returncode == 1
    assert "has not answered in 10 seconds" in done.stderr


def test_a_control_socket_that_is_full_is_no_missing_server(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with contextlib.ExitStack() as stack, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(0)
        for _ in range(2):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(str(path))
        with pytest.raises(TimeoutError):
            list(control.ask({}, path, patience=0.1))
        assert control.running(path)


def test_a_journal_that_another_process_writes_is_read_at_once(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collections, "READ_PATIENCE", LONG)
    journal = Journal(project.folder / "run/revsmtp.sqlite3")
    assert journal.set_enabled("isp", False)
    project.configure(isp(1), isp(1, name="'two'"))
    with contextlib.closing(
        sqlite3.connect(project.folder / "run/revsmtp.sqlite3", isolation_level=None)
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        begun = time.monotonic()
        assert journal.state("isp").enabled is False
        assert time.monotonic() - begun < LONG / 2
        assert "isp (Disabled)" in project.run("agents").stdout


def test_a_journal_that_another_process_holds_costs_a_second_and_not_one_a_look(
    project: Project,
) -> None:
    journal = Journal(project.folder / "run/revsmtp.sqlite3")
    assert journal.set_enabled("isp", False)
    agents = 2 * LONG
    project.configure(*(isp(1, name=f"'isp{number}'") for number in range(agents)))
    path = project.folder / "run/revsmtp.sqlite3"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        begun = time.monotonic()
        done = project.run("agents", "--json")
        assert time.monotonic() - begun < LONG
    assert len(done.stdout.splitlines()) == agents
    assert "cannot be read" in done.stderr


def test_a_server_starts_with_a_run_folder_that_cannot_be_written(project: Project) -> None:
    folder = project.folder / "run"
    queue.Queue(str(folder / "undeliverable"))
    mounted = subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        project.receiver_port = free_port()
        asked = threading.Event()

        async def script(provider: Dialogue) -> None:
            await no_more_mail(provider)
            asked.set()

        with provider(script) as port:
            project.configure(isp(port))
            with subprocess.Popen(
                RUN,
                cwd=project.folder,
                env={**os.environ, "ISP_PASSWORD": "correct horse battery"},
                stderr=subprocess.DEVNULL,
            ) as process:
                try:
                    assert asked.wait(60), "it collects all the same"
                    process.terminate()
                    assert process.wait(60) == 0
                finally:
                    process.kill()
        assert "cannot be made" in (project.folder / "logs/salmon.log").read_text()
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("delivery", ["queue", "router"])
def test_a_queue_folder_that_is_deleted_is_made_again(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, delivery: str
) -> None:
    from salmon_revsmtp.delivery import maildir

    salmon.handle(".*", explodes)
    folder = Path("run/inbound" if delivery == "queue" else "run/undeliverable")
    create = maildir._create

    def deleted_before(mbox: object) -> object:
        shutil.rmtree(folder)
        return create(mbox)

    monkeypatch.setattr(maildir, "_create", deleted_before)
    heard, _ = exchange(salmon, "b@example.org", delivery=delivery)
    assert heard[0].startswith("250 ")
    assert len(queue.Queue(str(folder)).keys()) == 1


def test_one_message_is_what_the_project_got(project: Project) -> None:
    """Without a journal, mail comes all the same."""
    (project.folder / "run/revsmtp.sqlite3").mkdir(parents=True)
    with provider(one_message, no_more_mail) as port:
        project.configure(isp(port))
        done = project.run("collect", "isp")
    assert done.stdout.startswith("isp: collected, 1 message")
    assert len(project.got()) == 1
