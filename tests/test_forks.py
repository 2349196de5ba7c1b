"""A handler that forks, or changes the folder: what is ours stays ours, and where it is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.dialogue import Dialogue, no_more_mail
from support.messages import MESSAGE
from support.project import Project, isp, one_message, provider
from support.servers import free_port
from support.serving import START, answers, server, wait_for

from salmon_revsmtp.journal.collections import Journal

HEAD = """
import multiprocessing, os, signal, subprocess, sys, time
from salmon import queue
from salmon.routing import route, stateless

def live_on():
    "Until the test opens the other end."
    with open({folder!r} + "/children", "a") as children:
        children.write(f"{{os.getpid()}}\\n")
    with open({folder!r} + "/end") as end:
        end.read()

@route("(address)@(host)", address=".+")
@stateless
def STORE(message, address=None, host=None):
    queue.Queue({folder!r} + "/got").push(message.Data)
"""

FORK = """
    if not os.fork():
        live_on()
        os._exit(0)
"""
MULTIPROCESSING = """
    multiprocessing.get_context("fork").Process(target=live_on).start()
"""
SUBPROCESS = """
    here = {folder!r}
    said = f"echo $$ >> {{here}}/children; read end < {{here}}/end"
    subprocess.Popen(["sh", "-c", said], close_fds=False)
"""
WITH_PREEXEC = SUBPROCESS.replace("close_fds=False", "close_fds=False, preexec_fn=os.getpid")
HANG = """
    live_on()
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path / "project")
    made.receiver_port = free_port()
    os.mkfifo(made.folder / "end")
    return made


def handler(project: Project, *lines: str) -> None:
    text = "".join((HEAD, *lines)).format(folder=str(project.folder))
    (project.folder / "app/handlers/sample.py").write_text(text)


def got(project: Project) -> list[Path]:
    return list((project.folder / "got/new").iterdir())


def children(project: Project) -> list[int]:
    file = project.folder / "children"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


@pytest.fixture
def ending(project: Project) -> Iterator[None]:
    """Those who wait for the end are let go at the end."""
    yield
    os.close(os.open(project.folder / "end", os.O_RDWR | os.O_NONBLOCK))
    wait_for(lambda: all(map(ended, children(project))))


def ended(pid: int) -> bool:
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def refused(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("way", [FORK, MULTIPROCESSING, SUBPROCESS, WITH_PREEXEC])
def test_a_child_that_lives_on_after_the_servers_death_keeps_nothing(
    project: Project, ending: None, way: str
) -> None:
    handler(project, way, HANG)
    lost = threading.Event()

    async def hears_the_end(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say("MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>")
        provider.say(f"BDAT {len(MESSAGE)} LAST")
        provider.writer.write(MESSAGE)
        try:
            # The guardian says so for the dead, and a provider leaves then.
            while b"421" not in (await asyncio.wait_for(provider.reader.read(1000), 30) or b"421"):
                pass
        except ConnectionError:
            pass
        lost.set()

    listening = free_port()
    with provider(hears_the_end, no_more_mail) as port:
        project.configure(
            isp(port), services=f"{{'default': {{'listen': '127.0.0.1:{listening}'}}}}"
        )
        with server(project, START) as process:
            with socket.create_connection(("127.0.0.1", listening)) as client:
                assert client.recv(1000).startswith(b"220 ")
                # Two of them: the child, and the handler itself.
                wait_for(lambda: len(children(project)) == 2, process)
                child = next(pid for pid in children(project) if pid != process.pid)
                process.kill()
                process.wait(60)
                assert lost.wait(60)
                client.settimeout(20)
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1000)[:4] in (b"", b"421 ")
            assert not ended(child)
            assert refused(listening)
            assert refused(project.receiver_port)
            assert not answers(project)
            done = project.run("collect", "isp")
    assert "no-mail" in done.stdout, done


def test_what_a_child_does_after_the_handler_is_nothing_of_ours(project: Project) -> None:
    """It returns, raises, or exits; the message is handled once, by its parent."""
    ends = ("return", "raise RuntimeError('in the child')", "sys.exit(7)")
    wait = "STATUS.append(os.waitpid(child, 0)[1])"
    lines = [f"    child = os.fork()\n    if not child: {end}\n    {wait}\n" for end in ends]
    stored = "    open({folder!r} + '/statuses', 'w').write(repr(STATUS))\n"
    handler(project, *lines, stored)
    sample = project.folder / "app/handlers/sample.py"
    sample.write_text(sample.read_text().replace("def live_on", "STATUS = []\n\ndef live_on"))
    with provider(one_message, no_more_mail) as port:
        project.configure(isp(port))
        done = project.run("collect", "isp")
    assert "collected, 1 message" in done.stdout, done
    assert (project.folder / "statuses").read_text() == repr([0, 1 << 8, 7 << 8])
    assert len(got(project)) == 1
    assert not list((project.folder / "run/undeliverable/new").iterdir())


def test_a_signal_to_a_child_ends_the_child_and_not_the_server(project: Project) -> None:
    handler(
        project,
        """
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join(30)
    other = os.fork()
    if not other:
        signal.signal(signal.SIGUSR1, lambda *arguments: None)
        os.kill(os.getpid(), signal.SIGUSR1)
        os._exit(0)
    os.waitpid(other, 0)
    open({folder!r} + '/status', 'w').write(str(child.exitcode))
""",
    )
    with provider(one_message, no_more_mail) as port:
        project.configure(isp(port))
        with server(project, START) as process:
            wait_for(
                lambda: len(Journal(project.folder / "run/revsmtp.sqlite3").history()), process
            )
            assert (project.folder / "status").read_text() == str(-signal.SIGTERM)
            assert answers(project)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


@pytest.mark.parametrize("delivery", ["router", "queue"])
def test_a_handler_that_changes_the_folder_moves_nothing(
    project: Project, tmp_path: Path, delivery: str
) -> None:
    """Journal, locks, claims, queues, control socket, certificates and the log."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    listening = free_port()
    handler(
        project,
        f"""
    os.chdir({str(elsewhere)!r})
    if address == "fails":
        raise RuntimeError("a bug")
""",
    )
    services = (
        f"{{'default': {{'listen': '127.0.0.1:{listening}', 'domains': ['example.org']}},"
        f" 'other': {{'delivery': '{delivery}', 'domains': ['example.org']}}}}"
    )

    async def another(provider: Dialogue) -> None:
        await provider.reverse()
        await provider.send(MESSAGE, "fails@example.org")
        await provider.quit()

    with provider(one_message, no_more_mail) as one, provider(another, no_more_mail) as other:
        project.configure(
            isp(one, every="None"),
            isp(other, name="'isp2'", service="'other'", every="None"),
            services=services,
        )
        with server(project, START) as process:
            for name in ("isp", "isp2"):
                done = project.run("collect", name)
                assert "collected, 1 message" in done.stdout, done
            assert Path(f"/proc/{process.pid}/cwd").resolve() == elsewhere
            wait_for(lambda: len(Journal(project.folder / "run/revsmtp.sqlite3").history()) == 2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    assert list(elsewhere.iterdir()) == []
    assert not (project.folder / "run/revsmtp.sock").exists()
    assert not (project.folder / "run/smtp.pid").exists()
    kept = "run/inbound/new" if delivery == "queue" else "run/undeliverable/new"
    assert len(list((project.folder / kept).iterdir())) == 1


def test_a_project_far_below_the_root_has_a_control_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    project = Project(deep / "project")
    project.receiver_port = free_port()
    with provider(one_message, no_more_mail) as port:
        project.configure(isp(port, every="None"))
        with server(project, START):
            done = project.run("collect", "isp")
    assert "collected, 1 message" in done.stdout, done
    assert not (project.folder / "run/revsmtp.sock").exists()
