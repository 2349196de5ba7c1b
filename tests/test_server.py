"""The server: beside ``salmon start``, and in the foreground with ``salmon-revsmtp run``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.dialogue import Dialogue, no_more_mail
from support.messages import MESSAGE
from support.project import Project, isp, one_message, provider
from support.servers import free_port
from support.serving import RUN, START, answers, ended_with, server, wait_for
from support.tls import CERTIFICATE, PRIVATE_KEY

from salmon_revsmtp.journal.collections import Journal
from salmon_revsmtp.server.control import ask

HERE = Path(__file__).parent


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path / "project")
    # Salmon's own receiver must not meet that of another test.
    made.receiver_port = free_port()
    return made


@pytest.mark.parametrize("command", [START, [*START[:-1], "--debug"], RUN])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_it_collects_on_schedule_and_ends_on_a_signal(
    project: Project, command: list[str], number: int
) -> None:
    with provider(one_message, no_more_mail) as port:
        project.configure(isp(port))
        with server(project, command) as process:
            wait_for(lambda: len(Journal(project.folder / "run/revsmtp.sqlite3").history()))
            if command != RUN:
                with smtplib.LMTP("127.0.0.1", project.receiver_port) as salmon:
                    assert salmon.noop()[0] == 250, "Salmon's own receiver works beside it"
            process.send_signal(number)
            assert ended_with(project, process) == 0
    [message] = project.got()
    assert message.endswith(b"Subject: hi\n\n.hello")


def test_attach_alone_keeps_the_process(project: Project) -> None:
    project.configure(isp(1, every="None"))
    boot = project.folder / "config/boot.py"
    head, _, tail = boot.read_text().partition("attach(settings, LMTPReceiver(")
    boot.write_text(head + "attach(settings)" + tail.partition("))")[2])
    with server(project, START) as process:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", project.receiver_port))
        process.send_signal(signal.SIGHUP)
        assert ended_with(project, process) == 0


def test_salmon_start_as_a_daemon_and_salmon_stop(project: Project) -> None:
    project.configure(isp(1, every="None"))
    salmon = [sys.executable, "-c", "from salmon.commands import main; main()"]
    text = (project.folder / "config/settings.py").read_text()
    (project.folder / "config/settings.py").write_text(
        text + f"receiver_config = {{'host': '127.0.0.1', 'port': {project.receiver_port}}}\n"
    )
    environment = {**os.environ, "ISP_PASSWORD": "x"}
    subprocess.run([*salmon, "start"], cwd=project.folder, env=environment, check=True, timeout=60)
    pid_file = project.folder / "run/smtp.pid"
    wait_for(lambda: answers(project))
    pid = int(pid_file.read_text())
    try:
        log = project.folder / "logs/salmon.log"
        assert not log.exists() or log.stat().st_mode & 0o077 == 0, "whatever Salmon's umask is"
        second = project.run("run", ISP_PASSWORD="x")
        assert second.returncode == 1
        assert "error: another server runs in this project" in second.stderr
        subprocess.run([*salmon, "stop"], cwd=project.folder, check=True, timeout=60)
        wait_for(lambda: not Path(f"/proc/{pid}").exists())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not (project.folder / "run/revsmtp.sock").exists()


def test_a_message_in_hand_is_finished_before_the_end(project: Project) -> None:
    half, stopped = threading.Event(), threading.Event()

    async def slow(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say("MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>")
        await provider.replied(250)
        await provider.replied(250)
        provider.say("DATA")
        await provider.replied(354)
        provider.say("Subject: half")
        half.set()
        await asyncio.to_thread(stopped.wait, 20)
        provider.say("", "the other half", ".")
        await provider.replied(250)
        await provider.replied(421)
        await provider.silence()

    with provider(slow) as port:
        project.configure(isp(port))
        with server(project, RUN) as process:
            assert half.wait(60)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: b"stopping on signal" in project_log(project))
            stopped.set()
            assert ended_with(project, process) == 0
    [message] = project.got()
    assert message.endswith(b"Subject: half\n\nthe other half")


def project_log(project: Project) -> bytes:
    return (project.folder / "logs/salmon.log").read_bytes()


def test_an_address_that_is_taken_is_said(project: Project) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        project.configure(isp(1), services=f"{{'default': {{'listen': '127.0.0.1:{port}'}}}}")
        done = project.run("run")
    assert done.returncode == 1
    assert "address already in use" in done.stderr.lower()


def test_it_listens_for_mail(project: Project) -> None:
    port = free_port()
    project.configure(
        isp(1, every="None"), services=f"{{'default': {{'listen': '127.0.0.1:{port}'}}}}"
    )
    with server(project, RUN):
        with smtplib.SMTP("127.0.0.1", port) as client:
            client.sendmail("a@example.net", ["b@example.org"], MESSAGE)
        assert len(project.got()) == 1


BROKEN_RECEIVER = """
import threading
class Broken:
    def start(self):
        {start}
settings.receiver = salmon_revsmtp.attach(settings, Broken())
"""

BROKEN_SERVER = """
from salmon_revsmtp.customer.schedule import Schedule
def broken(self):
    raise RuntimeError("the schedule broke")
Schedule.next_time = broken
"""


@pytest.mark.parametrize(
    ("command", "broken", "words"),
    [
        (
            START,
            BROKEN_RECEIVER.format(start="raise OSError('no such address')"),
            "no such address",
        ),
        (
            START,
            BROKEN_RECEIVER.format(
                start="self.poller = threading.Thread(target=lambda: None); self.poller.start()"
            ),
            "its thread has ended",
        ),
        (START, BROKEN_SERVER, "the schedule broke"),
        (RUN, BROKEN_SERVER, "the schedule broke"),
    ],
)
def test_a_server_that_fails_ends_with_a_status_and_the_reason(
    project: Project, command: list[str], broken: str, words: str
) -> None:
    project.configure(isp(1, every="None"))
    settings = project.folder / "config/settings.py"
    settings.write_text(
        settings.read_text()
        + f"receiver_config = {{'host': '127.0.0.1', 'port': {project.receiver_port}}}\n"
    )
    boot = project.folder / "config/boot.py"
    boot.write_text(boot.read_text() + broken)
    done = subprocess.run(
        command,
        cwd=project.folder,
        env={**os.environ, "ISP_PASSWORD": "x"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert words in project_log(project).decode()
    assert not (project.folder / "run/revsmtp.sock").exists()


def test_a_server_that_cannot_start_says_why_in_the_log(project: Project) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        project.configure(isp(1), services=f"{{'default': {{'listen': '{listen}'}}}}")
        settings = project.folder / "config/settings.py"
        settings.write_text(
            settings.read_text()
            + f"receiver_config = {{'host': '127.0.0.1', 'port': {project.receiver_port}}}\n"
        )
        done = subprocess.run(
            START,
            cwd=project.folder,
            env={**os.environ, "ISP_PASSWORD": "x"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    for told in (done.stderr, project_log(project).decode()):
        assert f"service=default cannot listen on {listen}" in told
        assert "address already in use" in told.lower()


@pytest.mark.parametrize("taken_by", ["a service", "the receiver"])
def test_check_without_a_name_says_what_would_keep_the_server_from_starting(
    project: Project, taken_by: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        listen = f"127.0.0.1:{port if taken_by == 'a service' else free_port()}"
        receiver_port = port if taken_by == "the receiver" else project.receiver_port
        keys = isp(1, enabled="False")
        project.configure(keys, services=f"{{'default': {{'listen': '{listen}'}}}}")
        settings = project.folder / "config/settings.py"
        settings.write_text(
            settings.read_text()
            + f"receiver_config = {{'host': '127.0.0.1', 'port': {receiver_port}}}\n"
        )
        done = project.run("check")
        assert "\nthe server cannot start; 1 thing would fail" in done.stdout
        assert done.returncode != 0
        told = (done.stdout + done.stderr).lower()
        assert "address already in use" in told
        assert (f"service=default cannot listen on {listen}" in told) == (taken_by == "a service")
    done = project.run("check", "--json")
    assert (done.returncode, json.loads(done.stdout.splitlines()[-1])["ready"]) == (0, True)
    with server(project, RUN):
        assert "\nthe server is running" in project.run("check").stdout


def test_salmon_start_with_a_wrong_key_leaves_the_reason(project: Project) -> None:
    """It has left the terminal when it reads the settings; ``check`` says it before."""
    project.configure(isp(1, evry="10"))
    words = 'agent "isp": evry: unknown key'
    done = project.run("check")
    assert done.returncode == 2
    assert words in done.stderr
    subprocess.run(
        [*START[:-1]],
        cwd=project.folder,
        env={**os.environ, "ISP_PASSWORD": "x"},
        check=True,
        timeout=60,
    )
    wait_for(lambda: words in (project.folder / "logs/salmon.err").read_text())
    wait_for(lambda: words.encode() in project_log(project))


@pytest.mark.parametrize("way", ["renamed", "copytruncate"])
def test_the_log_can_be_rotated_as_the_documentation_says(project: Project, way: str) -> None:
    if way == "renamed":
        conf = project.folder / "config/logging.conf"
        text = conf.read_text()
        documented = "class=handlers.WatchedFileHandler"
        assert documented in (HERE.parent / "docs/running.rst").read_text()
        assert "\nclass=FileHandler" in text
        conf.write_text(text.replace("\nclass=FileHandler", f"\n{documented}"))
    port = free_port()
    project.configure(
        isp(1, every="None"), services=f"{{'default': {{'listen': '127.0.0.1:{port}'}}}}"
    )
    log = project.folder / "logs/salmon.log"
    with server(project, RUN):
        if way == "renamed":
            log.rename(log.with_suffix(".log.1"))
        else:
            log.with_suffix(".log.1").write_bytes(log.read_bytes())
            os.truncate(log, 0)
        with smtplib.SMTP("127.0.0.1", port) as client:
            client.sendmail("a@example.net", ["b@example.org"], MESSAGE)
        wait_for(lambda: log.exists() and b"from=<a@example.net>" in log.read_bytes())
        assert b"\0" not in log.read_bytes()
    assert b"listens on" in log.with_suffix(".log.1").read_bytes()


def test_a_stale_pid_file_is_explained(project: Project) -> None:
    """What the page about running says that one sees, and what it says to do."""
    page = (HERE.parent / "docs/running.rst").read_text()
    project.configure(isp(1, every="None"))
    settings = project.folder / "config/settings.py"
    settings.write_text(
        settings.read_text()
        + f"receiver_config = {{'host': '127.0.0.1', 'port': {project.receiver_port}}}\n"
    )
    salmon = START[:-1]
    environment = {**os.environ, "ISP_PASSWORD": "x"}
    pid_file = project.folder / "run/smtp.pid"

    def start(*options: str) -> tuple[int, str]:
        done = subprocess.run(
            [*salmon, *options],
            cwd=project.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout

    start()
    wait_for(lambda: answers(project))
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGHUP)
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    assert pid_file.exists()
    status, told = start()
    assert status == 1
    assert "exists, so assuming Salmon is running" in told and told.split(".  ")[0] in page
    assert "\nthe server can start" in project.run("check").stdout
    assert start("--force")[0] == 0
    wait_for(lambda: answers(project))
    os.kill(int(pid_file.read_text()), signal.SIGTERM)
    wait_for(lambda: not pid_file.exists())


# -- the control socket --------------------------------------------------------------------------


def test_collect_asks_the_running_server_and_shows_its_progress(project: Project) -> None:
    seen = threading.Event()

    async def slow(provider: Dialogue) -> None:
        await provider.reverse()
        await provider.send(MESSAGE)
        await asyncio.to_thread(seen.wait, 20)
        await provider.quit()

    with provider(slow, no_more_mail) as port:
        project.configure(isp(port, every="None"))
        with server(project, RUN):
            os.chdir(project.folder)
            answers = []
            for answer in ask({"do": "collect", "agents": ["isp"]}):
                answers.append(answer)
                if answer.get("messages") == 1 and not seen.is_set():
                    busy = project.run("collect", "isp", "--json")
                    assert busy.returncode == 1
                    assert json.loads(busy.stdout)["outcome"] == "busy"
                    seen.set()
            [progress, *_] = [one for one in answers if one.get("messages") == 1]
            assert (progress["agent"], progress["bytes"]) == ("isp", len(MESSAGE))
            assert progress["doing"] == "waiting for the provider's next message"
            assert answers[-1] == {"end": True}
            [report] = [answer["report"] for answer in answers if "report" in answer]
            assert (report["outcome"], report["messages"]) == ("collected", 1)
    assert len(project.got()) == 1


def test_collect_by_the_server_looks_as_by_itself(project: Project) -> None:
    with provider(one_message, no_more_mail) as port:
        project.configure(isp(port, every="None"))
        with server(project, RUN) as process:
            mode = (project.folder / "run/revsmtp.sock").stat().st_mode & 0o777
            assert mode == 0o600
            done = project.run("collect", "isp")
            assert done.stdout.startswith("isp: collected, 1 message")
            assert done.returncode == 0
            assert process.poll() is None
            row = json.loads(project.run("agents", "--json").stdout)
            assert (row["outcome"], row["next"]) == ("collected", None)


def test_agents_shows_the_next_run_of_the_running_server(project: Project) -> None:
    project.configure(isp(1), isp(1, name="'late'", every="60"))
    with server(project, RUN):

        def shown() -> bool:  # not for one that collects just now
            rows = project.run("agents", "--json").stdout.splitlines()
            return all(json.loads(row)["next"] for row in rows)

        wait_for(shown)


def test_looking_whether_a_server_runs_leaves_nothing_in_its_log(project: Project) -> None:
    project.configure()
    with server(project, RUN):
        assert project.run("check").returncode == 0
        assert project.run("agents").returncode == 0
    assert "failed" not in project_log(project).decode()


def test_a_socket_that_a_dead_process_left_is_no_obstacle(project: Project) -> None:
    with provider(no_more_mail) as port:
        project.configure(isp(port, every="None"))
        with server(project, RUN) as process:
            process.kill()
            process.wait()
            assert (project.folder / "run/revsmtp.sock").exists()
        done = project.run("collect", "isp", "--json")
        assert json.loads(done.stdout)["outcome"] == "no-mail"
        with server(project, RUN) as process:
            process.send_signal(signal.SIGTERM)
            assert ended_with(project, process) == 0


def test_two_processes_never_collect_from_one_agent_at_once(project: Project) -> None:
    held, done = threading.Event(), threading.Event()

    async def slow(provider: Dialogue) -> None:
        await provider.up_to_atrn()
        held.set()
        await asyncio.to_thread(done.wait, 20)
        await provider.asks("ATRN", "453 no mail")

    with provider(slow) as port:
        project.configure(isp(port))
        first = subprocess.Popen(
            [sys.executable, "-m", "salmon_revsmtp", "collect", "isp"],
            cwd=project.folder,
            stdout=subprocess.DEVNULL,
        )
        assert held.wait(60)
        second = project.run("collect", "isp", "--json")
        done.set()
        assert first.wait(60) == 0
    assert second.returncode == 1
    assert json.loads(second.stdout)["outcome"] == "busy"


def test_an_agent_that_fails_is_one_line_however_often_it_fails(project: Project) -> None:
    port = free_port()
    project.configure(isp(port, every="0.005"))
    with server(project, RUN):
        journal = Journal(project.folder / "run/revsmtp.sqlite3")
        wait_for(lambda: len(journal.history()) >= 3)
        assert project_log(project).count(b"agent=isp fails: failed: connecting") == 1
    assert project_log(project).count(b"agent=isp fails") == 1


@pytest.mark.parametrize("command", [START, RUN])
def test_a_server_that_is_killed_within_a_message_ends_the_session_in_words(
    project: Project, command: list[str]
) -> None:
    """And another server has the port at once, whatever the guardian still does."""
    port = free_port()
    listening = f"{{'default': {{'listen': '127.0.0.1:{port}', 'domains': ['example.org']}}}}"
    project.configure(services=listening)
    with server(project, command) as process, smtplib.SMTP("127.0.0.1", port) as client:
        begin_a_message(client)
        process.kill()
        process.wait(60)
        assert client.getreply()[0] == 421
        with server(project, command):
            for line in ("RCPT TO:<bob@example.org>", "DATA", "QUIT"):
                assert client.docmd(line)[0] == 421
            assert client.file is not None and client.file.read() == b""
            with smtplib.SMTP("127.0.0.1", port) as other:
                assert other.noop()[0] == 250


def test_under_starttls_a_server_that_is_killed_says_nothing(project: Project) -> None:
    """It cannot: a reply in the clear would be no part of the session."""
    port = free_port()
    files = f"'tls_cert': {str(CERTIFICATE)!r}, 'tls_key': {str(PRIVATE_KEY)!r}"
    listening = f"{{'listen': '127.0.0.1:{port}', 'domains': ['example.org'], {files}}}"
    project.configure(services=f"{{'default': {listening}}}")
    with server(project, RUN) as process, smtplib.SMTP("127.0.0.1", port) as client:
        client.starttls(context=ssl.create_default_context(cafile=CERTIFICATE))
        begin_a_message(client)
        process.kill()
        process.wait(60)
        with pytest.raises(smtplib.SMTPServerDisconnected):
            client.getreply()


def begin_a_message(client: smtplib.SMTP) -> None:
    client.ehlo("mx.example.net")
    assert client.docmd("MAIL FROM:<a@example.net>")[0] == 250
    assert client.docmd("RCPT TO:<ann@example.org>")[0] == 250
