"""The plugins of the documentation, which are below ``tests/plugins``."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent.parent / "plugins"


def install(name: str, place: Path) -> str:
    """Have pip install one below ``place``; returns what ``PYTHONPATH`` is for those who use it."""
    shutil.copytree(HERE / name, place / "source")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(place / "installed"), "."],
        cwd=place / "source",
        check=True,
        capture_output=True,
    )
    return str(place / "installed")


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of one, in this process."""
    monkeypatch.syspath_prepend(str(HERE / name))
    return importlib.import_module(f"salmon_revsmtp_{name}")
