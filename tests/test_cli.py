"""The command, as a user runs it: in a fresh project of ``salmon gen``, in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.configuration import PASSWORD
from support.dialogue import Dialogue, no_more_mail
from support.messages import MESSAGE
from support.plugins import install
from support.project import Project, isp, one_message, provider

HERE = Path(__file__).parent
REPORT_KEYS = [
    "agent",
    "protocol",
    "outcome",
    "messages",
    "recipients",
    "bytes",
    "refused",
    "sessions",
    "seconds",
    "tls",
    "auth",
    "error",
    "push",
]


def test_collect_in_a_fresh_salmon_project(project: Project) -> None:
    with provider(one_message, no_more_mail) as port:
        project.configure(isp(port))
        done = project.run("collect", "isp")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        f"isp: collected, 1 message, {len(MESSAGE)} bytes for 1 recipient (2 sessions"
    )
    [message] = project.got()
    assert message.endswith(b"Subject: hi\n\n.hello")


def test_collect_from_all_as_json_one_object_per_line(project: Project) -> None:
    async def wrong_password(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 AUTH CRAM-MD5")
        await provider.asks("AUTH", "334 PDFAeD4=")
        # A provider that shows what it got must not make us show it.
        await provider.asks("", f"535 {PASSWORD} is wrong")

    with provider(one_message, no_more_mail) as good, provider(wrong_password) as bad:
        project.configure(
            isp(good),
            isp(bad, name="'other'"),
            isp(good, name="'off'", enabled="False"),
        )
        done = project.run("collect", "--all", "--json")
    assert done.returncode == 1
    rows = {row["agent"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert set(rows) == {"isp", "other", "off"}
    for row in rows.values():
        assert list(row) == REPORT_KEYS
    assert rows["isp"]["outcome"] == "collected"
    assert (rows["isp"]["messages"], rows["isp"]["error"]) == (1, None)
    assert rows["other"]["outcome"] == "refused"
    assert "535 *** is wrong" in rows["other"]["error"]
    assert rows["off"]["outcome"] == "disabled"


# Their answers make a report of 80 KB, which is more than a pipe holds.
MANY = [str(number) for number in range(200)]


async def many_answers(provider: Dialogue) -> None:
    provider.say("220 etrn")
    await provider.asks("EHLO", "250-etrn", "250 ETRN")
    for _ in MANY:
        await provider.asks("ETRN", "250 ok " + "x" * 400)
    await provider.asks("QUIT", "221 bye")


def talkative(port: int) -> dict[str, str]:
    return {
        "name": "'etrn'",
        "protocol": "'etrn'",
        "server": "'localhost'",
        "port": str(port),
        "domains": "['example.org']",
        "parameters": repr(MANY),
    }


@contextlib.contextmanager
def unread(project: Project) -> Iterator[subprocess.Popen[bytes]]:
    """Collects from all, ``talkative`` first, and stands in the midst of the first report."""
    with subprocess.Popen(
        [sys.executable, "-m", "salmon_revsmtp", "collect", "--all", "--json"],
        cwd=project.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # It hears ctrl-c also where the tests do not: in the background of a shell.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        select.select([process.stdout], [], [], 60)
        yield process


def test_a_reader_that_stops_reading_holds_up_no_collection(project: Project) -> None:
    stuck, finished = threading.Event(), threading.Event()

    async def meanwhile(provider: Dialogue) -> None:
        await provider.reverse()
        await asyncio.to_thread(stuck.wait, 60)
        await provider.send(MESSAGE)
        await provider.quit()

    async def last(provider: Dialogue) -> None:
        await no_more_mail(provider)
        finished.set()

    with provider(many_answers) as first, provider(meanwhile, last) as second:
        project.configure(talkative(first), isp(second))
        with unread(project) as process:
            stuck.set()
            assert finished.wait(30)
            output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    rows = [json.loads(line) for line in output.splitlines()]
    assert [(row["agent"], row["outcome"]) for row in rows] == [
        ("etrn", "requested"),
        ("isp", "collected"),
    ]


def test_ctrl_c_ends_a_command_that_nobody_reads(project: Project) -> None:
    with provider(many_answers) as port:
        project.configure(talkative(port))
        with unread(project) as process:
            # Once does; but asyncio may lose one that comes while it closes its loop.
            for _ in range(3):
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60)
            assert process.returncode in (1, -signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_collect_stops_after_the_message_in_hand(project: Project, number: signal.Signals) -> None:
    begun, stopped = threading.Event(), threading.Event()

    async def within(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say("MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>")
        await provider.replied(250)
        await provider.replied(250)
        provider.say(f"BDAT {len(MESSAGE)} LAST")
        await asyncio.to_thread(begun.set)
        await asyncio.to_thread(stopped.wait, 30)
        provider.writer.write(MESSAGE)
        await provider.replied(250)
        await provider.replied(421)
        await provider.silence()

    with provider(within) as port:
        project.configure(isp(port))
        with subprocess.Popen(
            [sys.executable, "-m", "salmon_revsmtp", "collect", "isp", "-v"],
            cwd=project.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            assert begun.wait(30)
            process.send_signal(number)
            # The message in hand is finished, whichever of the two comes first.
            stopped.set()
            output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "isp: collected, 1 message" in output
    assert "interrupted; what was not answered with 250 stays" in errors


def test_an_error_ends_a_command_that_nobody_reads() -> None:
    """Such as asyncio's, which may lose a ctrl-c while it closes its loop."""
    program = (
        "from salmon_revsmtp.cli.output import in_a_thread\n"
        "with in_a_thread(print) as show:\n"
        "    show('x' * 100_000)\n"
        "    raise RuntimeError('Event loop stopped')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.wait(60) == 1
        finally:
            process.kill()
        assert process.stderr is not None
        assert b"RuntimeError: Event loop stopped" in process.stderr.read()


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_is_gone_ends_the_command(project: Project, options: list[str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with provider(no_more_mail) as port:
        project.configure(isp(port))
        done = subprocess.run(
            [sys.executable, "-m", "salmon_revsmtp", "collect", "isp", *options],
            cwd=project.folder,
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, "")


def test_verbose_shows_the_dialogue_without_secrets(project: Project) -> None:
    with provider(one_message, no_more_mail) as port:
        project.configure(isp(port))
        done = project.run("collect", "-v", "isp")
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert "C: AUTH CRAM-MD5" in lines
    assert "C: ***" in lines
    assert "C: ATRN example.org" in lines
    assert any(line.startswith("customer: 220 ") for line in lines)
    assert any("MAIL FROM:<a@example.net>" in line for line in lines)


def test_the_project_is_found_with_chdir_and_settings_before_or_behind_the_command(
    project: Project, tmp_path: Path
) -> None:
    project.configure(isp(366))
    (project.folder / "config/other.py").write_text("collection_agents = []")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    inside, project.folder = project.folder, elsewhere
    for arguments in (
        ["--chdir", str(inside), "agents", "--json"],
        ["agents", "--json", "--chdir", str(inside)],
    ):
        done = project.run(*arguments)
        assert json.loads(done.stdout)["agent"] == "isp"
    project.folder = inside
    assert project.run("agents", "--json", "--settings", "config.other").stdout == ""
    done = project.run("agents", "--json", SALMON_SETTINGS_MODULE="config.other")
    assert done.stdout == ""


def test_agents_lists_them_with_their_state(project: Project) -> None:
    project.configure(isp(366), isp(367, name="'spare'", enabled="False", every="None"))
    done = project.run("agents")
    assert done.returncode == 0
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert rows[1][:4] == ["isp", "odmr", "localhost:366", "every 10 minutes"]
    assert rows[2][:4] == ["spare (Disabled)", "odmr", "localhost:367", "on demand"]
    first, second = map(json.loads, project.run("agents", "--json").stdout.splitlines())
    assert (first["agent"], first["enabled"], first["port"]) == ("isp", True, 366)
    assert (second["title"], second["every"]) == ("spare (Disabled)", None)


AND_SAY_WHAT_IS_IMPORTED = """
import atexit, sys
from salmon_revsmtp.cli.main import main
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
main()
"""


def imported(project: Project, *arguments: str) -> set[str]:
    """The modules that a command imports; coverage, which imports some itself, is not to see it."""
    environment = {name: os.environ[name] for name in os.environ if "COVERAGE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", AND_SAY_WHAT_IS_IMPORTED, *arguments],
        cwd=project.folder,
        env={**environment, "ISP_PASSWORD": PASSWORD},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


# What takes a while to import, and what only a collection needs.
COLLECTING = {"aiosmtplib", "dns", "rich", "salmon", "scramp", "smtplib"}


def test_help_imports_nothing_that_takes_long(project: Project) -> None:
    modules = imported(project, "--help")
    assert {"click", "salmon_revsmtp.cli.main", "salmon_revsmtp.plugins.builtin"} <= modules
    assert not modules & (COLLECTING | {"asyncio", "dotenv", "pydantic", "sqlite3", "ssl"})


def test_agents_imports_nothing_that_only_a_collection_needs(project: Project) -> None:
    project.configure(isp(366))
    modules = imported(project, "agents")
    assert {"pydantic", "salmon_revsmtp.customer.odmr"} <= modules
    serving = {"asyncio", "ssl", "salmon_revsmtp.provider.settings", "salmon_revsmtp.net.client"}
    assert not modules & (COLLECTING | serving)
    # The name of a plugin's distribution is read where someone asks for it.
    assert "email.parser" not in modules


def test_check_logs_in_and_asks_for_nothing(project: Project) -> None:
    async def script(provider: Dialogue) -> None:
        await provider.up_to_atrn()
        await provider.asks("QUIT", "221 bye")

    with provider(script, script) as port:
        project.configure(isp(port))
        done = project.run("check", "isp")
        assert done.returncode == 0
        assert "logged in with CRAM-MD5" in done.stdout
        assert "ATRN" in done.stdout
        row = json.loads(project.run("check", "isp", "--json").stdout)
    assert (row["agent"], row["outcome"], row["auth"]) == ("isp", None, "CRAM-MD5")
    assert (row["problems"], "ATRN" in row["offers"]) == ([], True)


def test_check_says_what_would_fail(project: Project) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("220 odmr")
        await provider.asks("EHLO", "250-odmr", "250 AUTH PLAIN")

    with provider(script) as port:
        project.configure(isp(port))
        done = project.run("check", "isp")
    assert done.returncode == 1
    assert "failed: localhost:" in done.stdout
    assert "set tls to 'starttls'" in done.stdout


def test_plugins_lists_distribution_and_version(project: Project) -> None:
    rows = [json.loads(line) for line in project.run("plugins", "--json").stdout.splitlines()]
    [odmr] = [row for row in rows if row["plugin"] == "odmr"]
    assert (odmr["distribution"], odmr["agent_types"]) == ("salmon-revsmtp", ["odmr"])
    assert odmr["version"] == project.run("--version").stdout.strip()


def test_wrong_settings_are_all_reported_with_status_2(project: Project) -> None:
    project.configure(
        isp(0, every="'often'"), isp(1, name="'two'", passwort="os.environ['ISP_PASSWORD']")
    )
    for command in (["agents"], ["collect", "--all"], ["collect", "isp"], ["check", "isp"]):
        done = project.run(*command)
        assert done.returncode == 2
        assert done.stdout == ""
        assert [line.partition(": found")[0] for line in done.stderr.splitlines()[:2]] == [
            'error: agent "isp": every',
            'error: agent "isp": port',
        ]
        assert 'agent "two": passwort: unknown key' in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["collect"], "or give --all"),
        (["collect", "isp", "--all"], "or give --all"),
        (["collect", "nobody"], "no agent is named 'nobody'; there are: isp"),
        (["check", "nobody"], "no agent is named 'nobody'"),
        (["agents", "--chdir", "/nowhere"], "/nowhere"),
        (["agents", "--settings", "no.such"], "no.such"),
        (["collect", "isp", "--boot", "config.no_such"], "config.no_such"),
    ],
)
def test_usage_errors_have_status_2(project: Project, arguments: list[str], words: str) -> None:
    project.configure(isp(1))
    done = project.run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_variable_that_is_not_in_env_is_named(project: Project) -> None:
    project.configure(isp(1, password="os.environ['NOT_THERE']"))
    done = project.run("agents")
    assert done.returncode == 2
    assert "'NOT_THERE' is not set (config/settings.py, line" in done.stderr


def test_a_folder_that_is_no_project(project: Project, tmp_path: Path) -> None:
    project.folder = tmp_path
    done = project.run("agents")
    assert done.returncode == 2
    assert "Salmon project's folder" in done.stderr


def test_collect_beside_a_running_salmon(project: Project) -> None:
    """The boot module's receiver has its port taken, and collect does not take it either."""
    import socket

    with socket.socket() as taken, provider(no_more_mail) as port:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        project.configure(isp(port))
        settings = project.folder / "config/settings.py"
        settings.write_text(
            settings.read_text()
            + f"receiver_config = {{'host': '127.0.0.1', 'port': {taken.getsockname()[1]}}}\n"
        )
        done = project.run("collect", "isp")
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["isp:", "no-mail"])


# -- a third party's plugin ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def spool(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The plugin of the docs, in a folder of its own."""
    return install("spool", tmp_path_factory.mktemp("spool"))


def test_the_agent_of_the_documentation_collects(project: Project, spool: str) -> None:
    pile = project.folder / "run/pile"
    pile.mkdir()
    (pile / "1.eml").write_bytes(MESSAGE)
    project.configure(
        {
            "name": "'pile'",
            "protocol": "'spool'",
            "folder": "'run/pile'",
            "recipient": "'b@example.org'",
        }
    )
    assert project.run("spool", "run/pile", PYTHONPATH=spool).stdout == "1 waiting\n"
    rows = project.run("plugins", "--json", PYTHONPATH=spool).stdout.splitlines()
    [row] = [row for row in map(json.loads, rows) if row["plugin"] == "spool"]
    assert (row["distribution"], row["version"]) == ("salmon-revsmtp-spool", "1.0")
    done = project.run("collect", "pile", "--json", PYTHONPATH=spool)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["outcome"], report["messages"]) == ("collected", 1)
    assert list(pile.iterdir()) == []
    assert len(project.got()) == 1
    done = project.run("collect", "pile", "--json", PYTHONPATH=spool)
    assert json.loads(done.stdout)["outcome"] == "no-mail"


def test_a_plugin_that_cannot_be_imported_is_named(project: Project, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    (broken / "broken-1.0.dist-info").mkdir(parents=True)
    (broken / "broken-1.0.dist-info/METADATA").write_text("Name: broken\nVersion: 1.0\n")
    (broken / "broken-1.0.dist-info/entry_points.txt").write_text(
        "[salmon_revsmtp]\nbroken = no_such_module\n"
    )
    project.configure(isp(1), isp(1, name="'pigeon'", protocol="'pigeon'"))
    done = project.run("agents", PYTHONPATH=str(broken))
    assert done.returncode == 2
    assert "plugin=broken distribution=broken not loaded" in done.stderr
    assert "agent \"pigeon\": protocol: found 'pigeon', allowed: 'etrn', 'odmr'" in done.stderr
    rows = project.run("plugins", "--json", PYTHONPATH=str(broken)).stdout.splitlines()
    [row] = [row for row in map(json.loads, rows) if row["error"]]
    assert "no_such_module" in row["error"]


def test_a_plugin_whose_agent_type_cannot_be_imported_is_named(
    project: Project, tmp_path: Path
) -> None:
    late = tmp_path / "late"
    (late / "late-1.0.dist-info").mkdir(parents=True)
    (late / "late-1.0.dist-info/METADATA").write_text("Name: late\nVersion: 1.0\n")
    (late / "late-1.0.dist-info/entry_points.txt").write_text("[salmon_revsmtp]\nlate = late\n")
    (late / "late.py").write_text(
        "from salmon_revsmtp import hookimpl\n"
        "@hookimpl\n"
        "def register_agent_types(register):\n"
        "    import no_such_module\n"
    )
    project.configure(isp(1))
    rows = project.run("plugins", "--json", PYTHONPATH=str(late)).stdout.splitlines()
    errors = {row["plugin"]: row["error"] for row in map(json.loads, rows)}
    assert "no_such_module" in errors.pop("late")
    assert set(errors.values()) == {None}


# -- the journal -----------------------------------------------------------------------------------


def test_history_and_the_last_outcome(project: Project) -> None:
    with provider(one_message, no_more_mail, no_more_mail) as port:
        project.configure(isp(port))
        assert project.run("history", "--json").stdout == ""
        project.run("collect", "isp")
        project.run("collect", "isp")
    rows = [json.loads(line) for line in project.run("history", "--json").stdout.splitlines()]
    assert [(row["agent"], row["outcome"], row["messages"]) for row in rows] == [
        ("isp", "no-mail", 0),
        ("isp", "collected", 1),
    ]
    lines = project.run("history", "isp").stdout.splitlines()
    assert lines[1].split("\t")[1:4] == ["isp", "no-mail", "0"]
    assert json.loads(project.run("agents", "--json").stdout)["outcome"] == "no-mail"
    assert project.run("history", "nobody").returncode == 2


def test_disable_and_enable_win_over_the_settings(project: Project) -> None:
    project.configure(isp(1), isp(1, name="'spare'", enabled="False"))
    assert project.run("disable", "isp").stdout == "isp is disabled\n"
    assert project.run("enable", "spare").stdout == "spare is enabled\n"
    first, second = map(json.loads, project.run("agents", "--json").stdout.splitlines())
    assert (first["title"], first["enabled"]) == ("isp (Disabled)", False)
    assert (second["title"], second["enabled"]) == ("spare", True)
    done = project.run("collect", "--all", "--json")
    rows = {row["agent"]: row["outcome"] for row in map(json.loads, done.stdout.splitlines())}
    assert rows == {"isp": "disabled", "spare": "failed"}
    assert project.run("disable", "nobody").returncode == 2
