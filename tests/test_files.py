"""Locks between processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest
from support.children import living_child

from salmon_revsmtp.files import FolderLock, exclusive_lock


def test_one_has_it_and_then_another(tmp_path: Path) -> None:
    path = tmp_path / "run/agent.lock"
    with exclusive_lock(path) as first, exclusive_lock(path) as second:
        assert (first, second) == (True, False)
    with exclusive_lock(path) as third:
        assert third


def test_a_lock_file_that_is_deleted_lets_no_one_in(tmp_path: Path) -> None:
    path = tmp_path / "agent.lock"
    with exclusive_lock(path) as first:
        for _ in range(3):
            path.unlink()
            with exclusive_lock(path) as second:
                assert (first, second) == (True, False)
    with exclusive_lock(path) as third:
        assert third


def test_a_lock_file_that_is_deleted_before_it_is_locked_is_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "agent.lock"
    flock = fcntl.flock
    deleted: list[Path] = []

    def late(descriptor: int, operation: int) -> None:
        if not deleted:
            deleted.append(path)
            path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with exclusive_lock(path) as first, exclusive_lock(path) as second:
        assert (first, second, path.exists()) == (True, False, True)


def test_a_folder_is_locked_by_what_it_is_and_not_by_its_name(tmp_path: Path) -> None:
    folder, link = tmp_path / "queue", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    with FolderLock(folder).hold() as first, FolderLock(link).hold() as second:
        assert (first.had, second.had) == (True, False)
        assert first.holds() and not second.holds()
        folder.rename(tmp_path / "aside")
        assert not first.holds()
        folder.mkdir()
        assert not first.holds()
        with FolderLock(link).hold() as third:
            assert third.had
    assert not first.holds()


def test_where_folders_cannot_be_locked_a_file_beside_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS."""
    flock = fcntl.flock

    def files_only(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", files_only)
    (tmp_path / "queue").mkdir()
    (tmp_path / "link").symlink_to("queue")
    folder, link = FolderLock(tmp_path / "queue"), FolderLock(tmp_path / "link")
    with folder.hold() as first, link.hold() as second:
        assert (first.had, second.had) == (True, False)
        assert first.holds()


def test_a_child_that_lives_on_does_not_keep_it(tmp_path: Path) -> None:
    """As when a handler has a pool of processes."""
    path = tmp_path / "agent.lock"
    with contextlib.ExitStack() as stack:
        with exclusive_lock(path):
            stack.enter_context(living_child())
        with exclusive_lock(path) as ours:
            assert ours
