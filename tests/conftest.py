"""The fixtures that the tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from salmon import queue
from salmon.routing import Router
from support import sample
from support.postgres import Cluster, programs
from support.project import Project
from support.salmon import Salmon
from support.servers import find


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(sample)
    # How long an example takes depends on what else the machine does.
    hypothesis.settings.register_profile("untimed", hypothesis.settings(), deadline=None)
    hypothesis.settings.load_profile("untimed")


@pytest.fixture
def salmon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Salmon:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    Router.clear_routes()
    Router.clear_states()
    monkeypatch.setattr(Router, "RELOAD", False)
    monkeypatch.setattr(Router, "LOG_EXCEPTIONS", True)
    monkeypatch.setattr(Router, "UNDELIVERABLE_QUEUE", queue.Queue("run/undeliverable"))
    return Salmon(tmp_path)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


@pytest.fixture(scope="session")
def database() -> Iterator[Cluster]:
    """A PostgreSQL of this process's own.  Where none is installed, that is a reason to skip the
    test, but not in CI."""
    found = programs()
    if isinstance(found, str):
        if os.environ.get("CI"):
            pytest.fail(found)
        pytest.skip(found)
    with Cluster(found) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def chroot() -> Callable[[str], Path]:
    """A function that gives the root of a real server's chroot.  A server that is not there is a
    reason to skip the test, but not in CI."""

    def root(name: str) -> Path:
        found = find(name)
        if isinstance(found, str):
            if os.environ.get("CI"):
                pytest.fail(found)
            pytest.skip(found)
        return found

    return root
