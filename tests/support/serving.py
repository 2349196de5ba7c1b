"""A server of a project, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from salmon_revsmtp.server.control import running
from support.project import Project


def wait_for(what: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    """Until something that another process does can be seen."""
    give_up = time.monotonic() + 60
    while not what():
        assert process is None or process.poll() is None, "the server has ended"
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.02)


START = [sys.executable, "-c", "from salmon.commands import main; main()", "start", "--no-daemon"]
RUN = [sys.executable, "-m", "salmon_revsmtp", "run"]


@contextlib.contextmanager
def server(project: Project, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A server process that answers on its control socket."""
    settings = project.folder / "config/settings.py"
    text = settings.read_text()
    settings.write_text(
        text + f"receiver_config = {{'host': '127.0.0.1', 'port': {project.receiver_port}}}\n"
    )
    environment = {**os.environ, "ISP_PASSWORD": "correct horse battery"}
    log_file = project.folder / "server.log"
    log = log_file.open("wb")
    process = subprocess.Popen(
        command, cwd=project.folder, env=environment, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        wait_for(lambda: answers(project), process)
        yield process
    except BaseException:
        print(log_file.read_text())
        raise
    finally:
        # Coverage has what it ran only if it may end by itself.
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()
            log.close()


def answers(project: Project) -> bool:
    """Whether a server answers on the project's control socket."""
    return running(project.folder / "run/revsmtp.sock")


def ended_with(project: Project, process: subprocess.Popen[bytes]) -> int:
    code = process.wait(60)
    assert not (project.folder / "run/revsmtp.sock").exists()
    return code
