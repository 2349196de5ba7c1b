"""The password in ``.env``, written as the README says, is the one that the agent has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from salmon_revsmtp.server.project import Project

ROOT = Path(__file__).parent.parent

NASTY = [
    "pa${word}x",
    "${HOME}",
    "${a:-b}",
    "$HOME $(id) `id` !!",
    "a#b",
    "a #b",
    " leading",
    "trailing ",
    "q'uote",
    "'",
    "''",
    "'quoted'",
    'd"quote',
    "back\\slash",
    "end\\",
    "\\'",
    "\\\\'",
    "\\n\\t\\x41",
    "a=b",
    "export X=y",
    "\t",
    "Grüße€日本",
    "a'b\"c\\d${e}#f g",
]


def as_the_readme_says(password: str) -> str:
    return "ISP_PASSWORD='" + re.sub(r"(['\\\\])", r"\\\1", password) + "'\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ISP_PASSWORD", raising=False)
    monkeypatch.setenv("SALMON_SETTINGS_MODULE", "json")  # any module will do
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "the_settings.py").write_text(readme_settings())
    return tmp_path


def readme_settings() -> str:
    """The settings of the README's third step, before the agents."""
    text = (ROOT / "README.rst").read_text()
    lines = text.partition("3. Add an agent")[2].partition("collection_agents")[0].splitlines()[1:]
    code = "\n".join(line.strip() for line in lines)
    assert "load_dotenv" in code
    return code + "\npassword = os.environ['ISP_PASSWORD']\n"


def in_this_process(folder: Path, password: str) -> str:
    (folder / ".env").write_text(as_the_readme_says(password))
    os.environ.pop("ISP_PASSWORD", None)
    Project.open(folder)
    return os.environ.pop("ISP_PASSWORD")


@pytest.mark.parametrize("password", NASTY)
def test_every_password_reaches_the_settings(folder: Path, password: str) -> None:
    """With the command, which reads ``.env`` itself, and with ``salmon start``, which does not."""
    assert in_this_process(folder, password) == password
    told = subprocess.run(
        [sys.executable, "-c", "import the_settings; print(ascii(the_settings.password))"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == ascii(password)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_password_at_all(folder: Path, password: str) -> None:
    assert in_this_process(folder, password) == password


def test_the_examples_settings_read_it_the_same_way() -> None:
    assert "interpolate=False" in (ROOT / "config/settings.py").read_text()
