"""A small file system of a test's own: full, read-only, and whole again."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["ROOM", "Disk", "small_disk"]

ROOM = 256 * 1024


class Disk:
    """A small file system, mounted on ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self, room: int = 0) -> None:
        """Leave so many octets."""
        used = os.statvfs(self.folder)
        free = used.f_bavail * used.f_frsize
        self._ballast.write_bytes(b"x" * (free - room))

    def empty(self) -> None:
        self._ballast.unlink()

    def grow(self, octets: int) -> None:
        self._mount(f"remount,size={octets}")

    def read_only(self) -> None:
        self._mount("remount,ro")

    def writable(self) -> None:
        self._mount("remount,rw")

    def _mount(self, options: str) -> None:
        subprocess.run(["mount", "-o", options, str(self.folder)], check=True)

    def litter(self) -> list[str]:
        return [str(path) for path in self.folder.glob("*/tmp/*")]


@contextlib.contextmanager
def small_disk(folder: Path, octets: int = ROOM) -> Iterator[Disk]:
    """Mount one on a folder.  Where that is not possible, the test is skipped, but not in CI."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={octets}", "none", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        reason = f"a small file system cannot be mounted: {mounted.stderr.strip()}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
