"""The README leads from two empty folders to mail at home; and a project of ``init`` runs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from salmon.commands import main as salmon_command
from support.dialogue import no_more_mail
from support.project import one_message, provider
from support.servers import free_port
from support.serving import wait_for
from two_ends import ROOT, SUBJECT, TwoEnds, literal_blocks

from salmon_revsmtp.server.control import running


def test_the_readme_leads_from_nothing_to_mail_at_home(tmp_path: Path) -> None:
    result = TwoEnds(tmp_path, install=False).run()
    assert "Delivered-To: you@example.org" in result.shown
    assert f"Subject: {SUBJECT}" in result.shown
    readme = (ROOT / "README.rst").read_text()
    assert f"These are {result.commands} commands" in readme


def test_a_project_of_salmon_gen_keeps_its_mail_when_it_follows_the_readme(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    CliRunner().invoke(salmon_command, ["gen", str(folder)], catch_exceptions=False)
    _, _, password, agent, handlers, boot, *_ = literal_blocks("In a Salmon project that you have")
    (folder / ".env").write_text(password)
    with provider(one_message, no_more_mail) as port:
        agent = agent.replace(
            '"server": "odmr.example.net"', f"'port': {port}, 'tls': 'none', 'server': 'localhost'"
        )
        with (folder / "config/settings.py").open("a") as settings:
            settings.write(f"\n{agent}\n{handlers}\n")
        with (folder / "config/boot.py").open("a") as module:
            module.write(f"\n{boot}\n")
        command = [sys.executable, "-m", "salmon_revsmtp", "collect", "isp"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("isp: collected, 1 message"), done.stdout + done.stderr
    [kept] = (folder / "run/mail").glob("*/new/*")
    assert kept.read_bytes().endswith(b"Subject: hi\n\n.hello\n")


@pytest.mark.parametrize("end", ["provider", "customer"])
def test_a_project_of_init_runs_under_salmon_start_until_salmon_stop(
    tmp_path: Path, end: str
) -> None:
    folder = tmp_path / "project"
    made = init(end, folder)
    assert made.returncode == 0, made.stderr
    salmon = [sys.executable, "-c", "from salmon.commands import main; main()"]
    subprocess.run([*salmon, "start"], cwd=folder, check=True, timeout=30)
    pid = None
    try:
        wait_for(lambda: running(folder / "run/revsmtp.sock"))
        pid = int((folder / "run/smtp.pid").read_text())
        subprocess.run([*salmon, "stop"], cwd=folder, check=True, timeout=30)
        wait_for(lambda: not Path(f"/proc/{pid}").exists())
    finally:
        print((folder / "logs/salmon.err").read_text())
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    log = (folder / "logs/salmon.log").read_text()
    assert "stopping on signal 1" in log
    assert not re.search(r" (DEBUG|ERROR|CRITICAL) ", log)


def test_the_consumer_of_init_handles_what_queue_mode_has_stored(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    assert init("customer", folder).returncode == 0
    store = (
        "from salmon_revsmtp.delivery.queue import QueueDelivery as Q;"
        "from salmon_revsmtp.smtp.envelope import Envelope as E;"
        "Q('run/inbound').deliver(('192.0.2.1', 25), E('a@example.net', ('b@example.org',)),"
        " 'b@example.org', b'', b'Subject: kept\\n\\nhello\\n')"
    )
    subprocess.run([sys.executable, "-c", store], cwd=folder, check=True, timeout=30)
    command = "from salmon.commands import main; main()"
    arguments = ["start", "--no-daemon", "--boot", "config.consumer"]
    process = subprocess.Popen([sys.executable, "-c", command, *arguments], cwd=folder)
    try:
        wait_for(lambda: list(folder.glob("run/mail/*/new/*")), process)
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    [stored] = folder.glob("run/mail/*/new/*")
    assert b"Subject: kept\n" in stored.read_bytes()


def init(end: str, folder: Path) -> subprocess.CompletedProcess[str]:
    options = ["--join", f"revsmtp://a:b@localhost:{free_port()}?domains=example.org"]
    if end == "provider":
        options = ["--hostname", "localhost", "--account", "a", "--domain", "example.org"]
        for option in ("--listen", "--mx"):
            options += [option, f"127.0.0.1:{free_port()}"]
    command = [sys.executable, "-m", "salmon_revsmtp", "init", end, str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)
