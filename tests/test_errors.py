"""How commands fail: in one form, on standard error, also those of plugins."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.terminal import on_a_terminal

PLUGIN = """
import click
from salmon_revsmtp import hookimpl

@click.command()
@click.argument("kind")
def breaks(kind):
    if kind == "click":
        raise click.ClickException("it is\\nbroken\\x1b[2J")
    if kind == "usage":
        raise click.UsageError("Not like this.")
    if kind == "parameter":
        raise click.BadParameter("must be round", param_hint="KIND")
    if kind == "file":
        open("no/such/file")
    if kind == "full":
        raise OSError(28, "No space left on device")
    if kind == "bare":
        raise TimeoutError
    if kind == "abort":
        raise click.Abort
    if kind == "prompt":
        click.prompt("Well?")
    if kind == "bug":
        raise ValueError("a bug")
    if kind == "exit":
        click.get_current_context().exit(7)
    if kind == "number":
        return 7

@hookimpl
def register_commands(cli):
    cli.add_command(breaks)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with a plugin that has a command ``breaks``."""
    place = tmp_path / "plugin"
    (place / "breaks-1.0.dist-info").mkdir(parents=True)
    (place / "breaks-1.0.dist-info/METADATA").write_text("Name: breaks\nVersion: 1.0\n")
    (place / "breaks-1.0.dist-info/entry_points.txt").write_text(
        "[salmon_revsmtp]\nbreaks = breaks_plugin\n"
    )
    (place / "breaks_plugin.py").write_text(PLUGIN)
    monkeypatch.setenv("PYTHONPATH", str(place))
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "salmon_revsmtp", *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        ("click", 1, "error: it is\nerror: broken?[2J\n"),
        ("usage", 2, "error: not like this\nsee: salmon-revsmtp breaks --help\n"),
        (
            "parameter",
            2,
            "error: invalid value for KIND: must be round\nsee: salmon-revsmtp breaks --help\n",
        ),
        ("file", 1, "error: No such file or directory: no/such/file\n"),
        ("full", 1, "error: No space left on device\n"),
        ("bare", 1, "error: TimeoutError\n"),
        ("abort", 1, "error: aborted\n"),
        ("prompt", 1, "error: aborted\n"),
        ("exit", 7, ""),
        ("number", 0, ""),
    ],
)
def test_an_error_of_a_plugin_s_command_has_our_form(
    plugin: Path, kind: str, status: int, said: str
) -> None:
    done = run(plugin, "breaks", kind)
    assert (done.returncode, done.stderr) == (status, said)
    assert done.stdout in ("", "Well?: ", "Well?: \n")


def test_a_bug_keeps_its_traceback(plugin: Path) -> None:
    done = run(plugin, "breaks", "bug")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and "ValueError: a bug" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["agents", "--no-such"],
            r"error: no such option.*--no-such.*\nsee: salmon-revsmtp agents",
        ),
        (["no-such"], r"error: no such command.*no-such.*\nsee: salmon-revsmtp --help\n"),
        (["enable"], r"error: missing argument 'NAME'\nsee: salmon-revsmtp enable --help\n"),
        (["collect"], r"error: name the agents .*\nsee: salmon-revsmtp collect --help\n"),
        (
            ["provider", "held", "drop"],
            r"error: name the KEYs.*\nsee: salmon-revsmtp provider held",
        ),
        (["agents"], r"error: config.settings: .*Salmon project's folder"),
    ],
)
def test_a_wrong_command_line_is_a_sentence_and_where_to_look(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match(words, done.stderr), done.stderr
    assert "Usage" not in done.stderr and "Error" not in done.stderr


def test_without_a_command_there_is_help(tmp_path: Path) -> None:
    done = run(tmp_path)
    told = done.stdout + done.stderr
    assert told.startswith("Usage: ") and "error" not in told


@pytest.mark.parametrize("command", [[], ["agents"], ["provider"], ["provider", "held", "show"]])
def test_h_is_help(tmp_path: Path, command: list[str]) -> None:
    short, long = run(tmp_path, *command, "-h"), run(tmp_path, *command, "--help")
    assert (short.returncode, short.stderr) == (0, "")
    assert short.stdout == long.stdout and "-h, --help" in short.stdout


def test_a_reader_that_is_gone_hears_no_error(plugin: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    for command in (["plugins"], ["plugins", "--json"], ["--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "salmon_revsmtp", *command],
            cwd=plugin,
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (1, "")
    os.close(theirs)


def test_a_disk_that_is_full_is_a_sentence(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "salmon_revsmtp", "plugins"],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_ctrl_c_at_a_question_is_no_traceback(tmp_path: Path) -> None:
    status, seen = on_a_terminal(tmp_path, "provider", "password", answers=[("Password", "\x03")])
    assert status == 1
    assert "error: aborted" in seen and "Traceback" not in seen


def test_what_is_logged_on_the_terminal_has_the_same_prefixes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    (broken / "broken-1.0.dist-info").mkdir(parents=True)
    (broken / "broken-1.0.dist-info/METADATA").write_text("Name: broken\nVersion: 1.0\n")
    (broken / "broken-1.0.dist-info/entry_points.txt").write_text(
        "[salmon_revsmtp]\nbroken = no_such_module\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(broken))
    done = run(tmp_path, "plugins")
    assert done.returncode == 0
    assert done.stderr.startswith("error: plugin=broken distribution=broken not loaded: ")
