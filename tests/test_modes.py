"""What we make is for its owner only, whatever the umask, and belongs to whom its folder does."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.collecting import exchange
from support.dialogue import no_more_mail
from support.project import Project, isp, one_message, provider
from support.salmon import Salmon, explodes

from salmon_revsmtp.files import make_folder, make_private_file
from salmon_revsmtp.journal.collections import Journal


@pytest.fixture(params=[0, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def open_to_others(folder: Path) -> list[str]:
    return [
        f"{one.relative_to(folder)} {stat.filemode(one.lstat().st_mode)}"
        for one in folder.rglob("*")
        if one.lstat().st_mode & 0o077
    ]


def test_files_and_the_folders_above_them_are_private(tmp_path: Path, umask: int) -> None:
    make_private_file(tmp_path / "a/b/file")
    make_folder(tmp_path / "c/d")
    assert open_to_others(tmp_path) == []


@pytest.mark.parametrize("delivery", ["queue", "router"])
def test_whatever_a_collection_makes_is_private(salmon: Salmon, umask: int, delivery: str) -> None:
    shutil.rmtree("run")
    salmon.handle(".*", explodes)
    exchange(salmon, "b@example.org", delivery=delivery, queue="run/some/where")
    assert Journal().set_enabled("isp", True)
    assert Path("run/revsmtp.sqlite3").exists() and Path("run/agent-isp.lock").exists()
    assert open_to_others(Path.cwd()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_a_command_of_root_makes_belongs_to_the_projects_owner(project: Project) -> None:
    for one in (project.folder, *project.folder.rglob("*")):
        os.chown(one, 65534, 65534)
    handler = project.folder / "app/handlers/sample.py"
    text = handler.read_text()
    handler.write_text(text.replace("    queue.Queue", "    raise ValueError\n    queue.Queue"))
    with provider(one_message, no_more_mail) as port:
        project.configure(isp(port))
        done = project.run("collect", "isp", PYTHONDONTWRITEBYTECODE="1")
    assert done.stdout.startswith("isp: collected"), done.stderr
    made = [*(project.folder / "run").rglob("*"), *(project.folder / "logs").rglob("*")]
    assert {"revsmtp.sqlite3", "agent-isp.lock", "salmon.log"} <= {one.name for one in made}
    assert [one for one in made if one.lstat().st_uid != 65534] == []
