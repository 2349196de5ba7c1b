"""What ``run`` says, on a terminal and in a journal."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.project import Project, isp
from support.servers import free_port
from support.serving import RUN, answers, wait_for
from support.terminal import on_a_terminal


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path / "project")
    made.receiver_port = free_port()
    port, odmr = free_port(), free_port()
    made.configure(
        isp(1, every="60"),
        isp(1, name="'hand'", every="None"),
        isp(1, name="'off'", enabled="False"),
        isp(1, name="'mine'"),
        services=(
            f"{{'default': {{'listen': ['127.0.0.1:{port}', '[::1]:{port}']}},"
            " 'mx': {'delivery': 'hold', 'listen': '127.0.0.1:0'}}\n"
            "customer_accounts = [{'name': 'acme', 'password': 'long enough',"
            " 'domains': ['a.example']}]\n"
            f"provider = {{'hostname': 'mx.example.net', 'listen': '127.0.0.1:{odmr}'}}\n"
            f"receiver_config = {{'host': '127.0.0.1', 'port': {made.receiver_port}}}"
        ),
    )
    assert made.run("disable", "mine").returncode == 0
    made.ports = [port, odmr]  # type: ignore[attr-defined]
    return made


def expected(project: Project) -> list[str]:
    port, odmr = project.ports  # type: ignore[attr-defined]
    return [
        rf"running in {re.escape(str(project.folder))}",
        rf"listening on 127\.0\.0\.1:{port} for the service default",
        rf"listening on \[::1\]:{port} for the service default",
        r"listening on 127\.0\.0\.1:[1-9]\d* for the service mx",
        rf"listening on 127\.0\.0\.1:{odmr} for customers",
        r"collecting from isp \(odmr, localhost:1\) every 60 minutes, first in \d s",
        r"collecting from hand \(odmr, localhost:1\) only when you ask for it",
        r"not collecting from off \(odmr, localhost:1\): it is disabled",
        r"not collecting from mine \(odmr, localhost:1\): it is disabled",
        r"logging to logs/salmon\.log",
    ]


END = [r"stopping: what is in hand has 10 seconds to be finished", "stopped"]


def matches(lines: list[str], patterns: list[str]) -> bool:
    ours = [line for line in lines if not line.startswith(("warning: ", "error: "))]
    return len(ours) == len(patterns) and all(
        re.fullmatch(pattern, line) for pattern, line in zip(patterns, ours, strict=True)
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_in_a_journal_it_is_a_few_plain_lines(project: Project, number: int) -> None:
    environment = {**os.environ, "FORCE_COLOR": "1"}
    with subprocess.Popen(
        RUN,
        cwd=project.folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        first = process.stderr.readline()  # nothing is said before it listens
        for port in project.ports:  # type: ignore[attr-defined]
            socket.create_connection(("127.0.0.1", port)).close()
        assert answers(project)
        process.send_signal(number)
        errors = process.stderr.read()
        assert process.wait(60) == 0
        assert process.stdout is not None and process.stdout.read() == ""
    assert matches((first + errors).splitlines(), [*expected(project), *END]), first + errors


def test_on_a_terminal_it_says_how_to_end_it(project: Project) -> None:
    status, seen = on_a_terminal(project.folder, "run", answers=[("ctrl-c ends it", "\x03")])
    # The terminal shows the key wherever it is just then.
    lines = [line for line in seen.replace("\r", "").replace("^C", "").splitlines() if line]
    how = "ctrl-c ends it, after the message in hand"
    assert status == 0
    assert matches(lines, [*expected(project), how, *END]), seen


def test_nothing_is_said_of_a_server_that_cannot_listen(project: Project) -> None:
    port = project.ports[1]  # type: ignore[attr-defined]
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        done = project.run("run")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"error: provider cannot listen on .*: Address already in use; another program .*\n",
        done.stderr,
    )


def next_of(project: Project) -> dict[str, str | None]:
    """By agent, when its next collection is due; nothing before the server plans them."""
    done = project.run("agents", "--json")
    return {row["agent"]: row["next"] for row in map(json.loads, done.stdout.splitlines())}


def test_a_journal_that_no_one_reads_any_more_ends_no_server(project: Project) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    process = subprocess.Popen(RUN, cwd=project.folder, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        wait_for(lambda: next_of(project).get("isp"), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_project_with_nothing_to_do_says_so(tmp_path: Path) -> None:
    made = Project(tmp_path / "empty")
    made.configure()
    with subprocess.Popen(
        [sys.executable, "-m", "salmon_revsmtp", "run"],
        cwd=made.folder,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]
        process.terminate()
        assert process.wait(60) == 0
    assert lines[1].startswith("there is nothing to do: ")
