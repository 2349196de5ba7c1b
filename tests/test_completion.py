"""What bash completes, by the function that it gets from us: commands, options, names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

BASH = shutil.which("bash") or ""

pytestmark = pytest.mark.skipif(not BASH, reason="there is no bash here: install bash")

# As a person has it in ~/.bashrc, and then what bash does when TAB is pressed.
TAB = """
eval "$(_SALMON_REVSMTP_COMPLETE=bash_source salmon-revsmtp)"
complete -p salmon-revsmtp >&2
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_salmon_revsmtp_completion salmon-revsmtp
printf '%s\\n' "${COMPREPLY[@]}"
"""

SETTINGS = """
import os
print("hello from the settings")
os.system("echo hello from a child")
open("seen", "a").write("x")
collection_agents = [
    {"name": "isp", "protocol": "odmr"},
    {"name": "island", "protocol": "odmr", "every": "wrong"},
    {"name": "backup-mx", "protocol": "etrn"},
    "not a dict", {"protocol": "odmr"}, {"name": 7}, {"name": "two\\nlines"},
]
customer_accounts = [{"name": "acme"}, {"name": "other"}]
"""


def make_project(folder: Path, settings: str = SETTINGS) -> Path:
    (folder / "config").mkdir(parents=True)
    (folder / "config/settings.py").write_text(settings)
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


def completed(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words; nothing else may be said."""
    scripts = str(Path(sys.executable).parent)
    done = subprocess.run(
        [BASH, "--norc", "-c", TAB, "bash", "salmon-revsmtp", *words],
        cwd=folder,
        env={**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "HOME": str(folder.parent)},
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr.count("\n") == 1, done.stderr
    assert "-F _salmon_revsmtp_completion salmon-revsmtp" in done.stderr
    return [line for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["coll"], ["collect"]),
        (["provider", "h"], ["held"]),
        (["provider", "held", "b"], ["bounce"]),
        (["history", "--js"], ["--json"]),
        (["collect", ""], ["isp", "island", "backup-mx"]),
        (["collect", "is"], ["isp", "island"]),
        (["collect", "isp", "is"], ["island"]),
        (["collect", "-v", "b"], ["backup-mx"]),
        (["enable", "is"], ["isp", "island"]),
        (["disable", "b"], ["backup-mx"]),
        (["history", "b"], ["backup-mx"]),
        (["provider", "password", ""], ["acme", "other"]),
        (["provider", "held", "--account", "a"], ["acme"]),
        (["provider", "held", "--account", "=", "o"], ["other"]),
        (["provider", "held", "drop", "--account", "o"], ["other"]),
        (["collect", "nobody"], []),
    ],
)
def test_bash_completes(project: Path, words: list[str], offered: list[str]) -> None:
    assert completed(project, *words) == offered


@pytest.mark.parametrize(
    "words",
    [
        ["--chdir", "../project", "collect", "is"],
        ["collect", "--chdir", "../project", "is"],
        ["collect", "--chdir", "=", "../project", "is"],
        ["collect", "--chdir", "~/project", "is"],
    ],
)
def test_the_names_are_those_of_the_project_that_is_named(
    project: Path, tmp_path: Path, words: list[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert completed(elsewhere, "collect", "is") == []
    assert completed(elsewhere, *words) == ["isp", "island"]


def test_the_names_are_those_of_the_settings_that_are_named(project: Path) -> None:
    (project / "config/other.py").write_text("collection_agents = [{'name': 'third'}]")
    assert completed(project, "collect", "--settings", "config.other", "") == ["third"]


@pytest.mark.parametrize(
    "settings",
    [
        "collection_agents = [",
        "import os\nos.environ['NOT_THERE']",
        "raise SystemExit(3)",
        "collection_agents = None",
        "collection_agents = 7",
        "import sys\ninput('password: ')",
    ],
)
def test_settings_that_are_wrong_offer_nothing_and_say_nothing(
    tmp_path: Path, settings: str
) -> None:
    project = make_project(tmp_path / "project", settings)
    assert completed(project, "collect", "") == []
    assert completed(project, "coll") == ["collect"]


def test_settings_that_take_long_are_not_waited_for(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", "import time\ntime.sleep(600)")
    began = time.monotonic()
    assert completed(project, "collect", "") == []
    assert time.monotonic() - began < 50


def test_completion_leaves_nothing_behind_and_imports_no_handler(project: Path) -> None:
    (project / "config/boot.py").write_text("raise RuntimeError('no one asked for this')")
    before = {"config", "config/boot.py", "config/settings.py", "seen"}
    assert completed(project, "collect", "i") == ["isp", "island"]
    assert {str(one.relative_to(project)) for one in project.rglob("*")} == before


def test_what_a_plugin_prints_is_no_word(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = tmp_path / "noisy"
    (noisy / "noisy-1.0.dist-info").mkdir(parents=True)
    (noisy / "noisy-1.0.dist-info/METADATA").write_text("Name: noisy\nVersion: 1.0\n")
    (noisy / "noisy-1.0.dist-info/entry_points.txt").write_text(
        "[salmon_revsmtp]\nnoisy = noisy\nbroken = no_such_module\n"
    )
    (noisy / "noisy.py").write_text(
        "import click\n"
        "from salmon_revsmtp import hookimpl\n"
        "print('plain,noise')\n"
        "@hookimpl\n"
        "def register_commands(cli):\n"
        "    cli.add_command(click.Command('noisy'))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(noisy))
    assert completed(project, "no") == ["noisy"]
    assert completed(project, "collect", "b") == ["backup-mx"]


def test_a_folder_is_left_to_the_shell(project: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "salmon_revsmtp"],
        cwd=project,
        env={
            **os.environ,
            "_SALMON_REVSMTP_COMPLETE": "bash_complete",
            "COMP_WORDS": "salmon-revsmtp\nagents\n--chdir\np",
            "COMP_CWORD": "3",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("dir,p\n", "")
