"""Tables on a terminal: however narrow it is, nothing is cut off."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from salmon_revsmtp.cli.output import BAD, Toned, lasted, outcome, table
from salmon_revsmtp.journal.collections import Entry, Journal

ERROR = "connecting to odmr.provider.example.net:366: its certificate was not accepted (expired)"
COLUMNS = ("name", "server", "outcome", "error")
ROWS = [("isp (Disabled)", "odmr.provider.example.net:366", "failed", ERROR)]


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


RED, GREEN, YELLOW = ("\x1b[31m", "\x1b[32m", "\x1b[33m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    remarks: bool = False,
) -> str:
    """What a table is on a terminal of that width."""
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        patch.setattr(sys, "stdout", Terminal())
        table("Agents", columns, rows, remarks)
        assert isinstance(sys.stdout, Terminal)
        return plain(sys.stdout.getvalue())


@pytest.mark.parametrize("remarks", [False, True])
@pytest.mark.parametrize("width", [200, 80, 60, 40, 20])
def test_every_word_is_there_whole_and_in_order(
    width: int, remarks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = drawn(monkeypatch, width, COLUMNS, ROWS, remarks).split()
    for cell in ROWS[0]:
        words = iter(shown)
        assert all(word in words for word in cell.split()), cell


@pytest.mark.parametrize("remarks", [False, True])
def test_no_line_is_wider_than_the_terminal(remarks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in range(len("odmr.provider.example.net:366") + 10, 120):
        lines = drawn(monkeypatch, width, COLUMNS, ROWS, remarks).splitlines()
        assert max(map(len, lines)) <= width


def test_what_a_server_wrote_commands_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, 80, ("error",), [("550 \x1b[2Jgone\r\nhi",)])
    assert "550 ?[2Jgone??hi" in text


def coloured(monkeypatch: pytest.MonkeyPatch, width: int, cell: str) -> str:
    """A table with that cell, as it goes to a terminal."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stdout", Terminal())
    table("Agents", ("name", "outcome", "next"), [("isp", cell, "soon")])
    assert isinstance(sys.stdout, Terminal)
    return sys.stdout.getvalue()


@pytest.mark.parametrize("width", [80, 12, 5])
@pytest.mark.parametrize(
    ("word", "colour"),
    [
        ("collected", GREEN),
        ("no-mail", GREEN),
        ("requested", GREEN),
        ("disabled", GREEN),
        ("deferred", YELLOW),
        ("busy", YELLOW),
        ("refused", RED),
        ("failed", RED),
    ],
)
def test_an_outcome_has_its_colour_on_a_terminal(
    word: str, colour: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = coloured(monkeypatch, width, outcome(word))
    assert f"{colour}{word}\x1b[0m" in shown
    assert plain(shown) == plain(coloured(monkeypatch, width, word))


def test_what_folds_is_coloured_on_each_of_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = coloured(monkeypatch, 20, Toned("set aside", BAD))
    assert f"{RED}set\x1b[0m" in shown
    assert f"{RED}aside\x1b[0m" in shown


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_who_wants_no_colours_gets_none(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    assert "\x1b" not in coloured(monkeypatch, 80, outcome("failed"))


def test_no_color_that_is_empty_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "")
    assert RED in coloured(monkeypatch, 80, outcome("failed"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min"),
        (61, "1 min 1 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (86400, "1 d"),
        (200_000, "2 d 8 h"),
    ],
)
def test_how_long_something_lasted_is_read_at_once(
    seconds: float, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert lasted(seconds) == text


def test_into_a_pipe_goes_no_colour(capsys: pytest.CaptureFixture[str]) -> None:
    table("Agents", ("outcome",), [(outcome("failed"),)])
    assert capsys.readouterr().out == "outcome\nfailed\n"


def test_into_a_pipe_a_row_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    table("Agents", COLUMNS, ROWS, remarks=True)
    assert capsys.readouterr().out == "\n".join("\t".join(row) for row in (COLUMNS, *ROWS)) + "\n"


SETTINGS = """
collection_agents = [
    {"name": "backup-mx", "protocol": "etrn", "server": "mail-collection.provider.example.net",
     "domains": ["example.org"], "enabled": False},
    {"name": "isp", "protocol": "odmr", "server": "odmr.provider.example.net",
     "account": "acme", "password": "secret", "domains": ["example.org"]},
]
"""


def test_agents_history_and_plugins_at_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/settings.py").write_text(SETTINGS)
    now = time.time()
    failed = Entry("isp", "odmr", now - 60, now, "failed", 0, 0, 0, 0, 1, None, None, ERROR)
    Journal().record(failed, good=False)
    for command, contents in (
        (["agents"], ["backup-mx (Disabled)", "mail-collection.provider.example.net:25"]),
        (["history"], ["failed", *ERROR.split()]),
        (["plugins"], ["salmon-revsmtp", "register_agent_types"]),
    ):
        output = on_a_terminal(*command)
        assert "\u2026" not in output
        for content in contents:
            assert content in output
        assert max(map(len, output.splitlines())) <= 80


def on_a_terminal(*arguments: str) -> str:
    """What a command writes on a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "salmon_revsmtp", *arguments],
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        stdout=theirs,
        stderr=subprocess.STDOUT,
    ) as process:
        os.close(theirs)
        output = b""
        with contextlib.suppress(OSError):  # how a terminal says that it is over
            while data := os.read(ours, 4096):
                output += data
        os.close(ours)
    assert process.returncode == 0, output
    return plain(output.decode())
