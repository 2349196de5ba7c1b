"""A VPS and a home from two empty folders, by the commands of README.rst and nothing else, on the
clock: from the first command to a message from the world that lies in a Maildir at home.

``make clock`` installs with pip, as the README says.  ``tests/test_two_ends.py`` does not: it takes
what is installed.  What is replaced, because this is one machine, and no one is root:

- the host's name is ``localhost``, and the ports are free ones of loopback;
- what is below ``/srv`` and ``/etc`` is below a folder of the script's, and so is the home;
- apt-get is left out; in place of systemctl, the unit's own command is started.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import smtplib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from docutils import nodes
from docutils.core import publish_doctree

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))

from support.servers import free_port  # noqa: E402
from support.terminal import on_a_terminal  # noqa: E402

SECTION = "Two ends in five minutes"
SUBJECT = "from the world"
# Seconds for what takes moments.
PATIENCE = 60.0


class Blocks(NamedTuple):
    """The three blocks of commands, each command a line."""

    vps: list[str]
    home: list[str]
    look: list[str]


@dataclass(frozen=True)
class Result:
    """``commands``, and ``seconds`` from the first of them to the mail, without pip's and with;
    what the last command has ``shown``."""

    commands: int
    seconds: float
    installing: float
    shown: str


def blocks() -> Blocks:
    """Those of the README."""
    found = literal_blocks(SECTION)
    return Blocks(*(text.replace("\\\n", " ").splitlines() for text in found))


def literal_blocks(title: str) -> list[str]:
    """What is in a section of the README between its sentences."""
    document = publish_doctree((ROOT / "README.rst").read_text(encoding="utf-8"))
    [section] = [one for one in document.findall(nodes.section) if one[0].astext() == title]
    return [one.astext() for one in section.findall(nodes.literal_block)]


class TwoEnds:
    """``install``  with pip; otherwise what is installed here takes the place of both venvs."""

    def __init__(self, root: Path, install: bool) -> None:
        self._root, self._install = root, install
        self._home = root / "home/you"
        self._mx, self._odmr = free_port(), free_port()
        self._installing = 0.0
        self._servers = contextlib.ExitStack()

    def run(self) -> Result:
        readme = blocks()
        for made in (self._root / "srv", self._root / "etc/systemd/system", self._home):
            made.mkdir(parents=True)
        if self._install:  # from a copy, in which pip may leave what it builds
            away = shutil.ignore_patterns(".*", "build", "dist", "_build", "*.egg-info")
            shutil.copytree(ROOT, self._root / "checkout", ignore=away)
        with self._servers:
            began = time.monotonic()
            line = self._vps(readme.vps)
            self._servers.callback(self._stop_home)
            self._at_home(readme.home, line)
            self._send()
            look = f"cd {self._home}/mail; " + "\n".join(readme.look)
            seen = until(lambda: self._shell(look, check=False).stdout)
            seconds = time.monotonic() - began
        commands = len(readme.vps) + len(readme.home)
        return Result(commands, seconds, self._installing, seen)

    def _vps(self, commands: list[str]) -> str:
        """Run them, start the server, and return the join line."""
        lines = []
        for command in commands:
            for before, after in (
                ("/srv/", f"{self._root}/srv/"),
                ("/etc/", f"{self._root}/etc/"),
                ("--hostname mx.example.net", f"--hostname localhost {self._ports()}"),
            ):
                command = command.replace(before, after)
            words = shlex.split(command)
            if words[0] == "apt-get":
                continue
            if words[:3] == ["systemctl", "enable", "--now"]:
                self._servers.enter_context(self._systemd(words[3]))
                continue
            said = self._installed(command).stdout
            lines += [one for one in said.splitlines() if one.startswith("revsmtp://")]
        [line] = lines
        return line

    def _ports(self) -> str:
        return f"--listen 127.0.0.1:{self._odmr} --mx 127.0.0.1:{self._mx}"

    def _installed(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command; of those that install, measure the time, or take what is here."""
        made = command.startswith("python3 -m venv ")
        if not made and "pip install" not in command:
            return self._shell(command)
        if not self._install:
            command = f"ln -s {sys.prefix} {command.split()[3]}" if made else "true"
        began = time.monotonic()
        done = self._shell(command.replace("install salmon-revsmtp", "install ./checkout"))
        self._installing += time.monotonic() - began
        return done

    @contextlib.contextmanager
    def _systemd(self, name: str) -> Iterator[None]:
        """What systemd would run, while this lasts."""
        unit = (self._root / f"etc/systemd/system/{name}.service").read_text()
        found = dict(re.findall(r"^(ExecStart|WorkingDirectory)=(.*)$", unit, re.MULTILINE))
        with (self._root / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                shlex.split(found["ExecStart"]),
                cwd=found["WorkingDirectory"],
                stdout=log,
                stderr=log,
            )
            try:
                until(lambda: self._listens())
                yield
            finally:
                process.terminate()
                process.wait(PATIENCE)

    def _listens(self) -> bool:
        for port in (self._mx, self._odmr):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                continue
            return False
        return True

    def _at_home(self, commands: list[str], line: str) -> None:
        """Type them all into one shell on a terminal, and the join line where it is asked for."""
        venv, activate, pip, *others = commands
        self._installed(venv)
        self._installed(f"{activate}; {pip}")
        # A person's shell is still there when the server has gone into the background.
        script = "\n".join(("set -e", activate, *others, "read -p 'the shell stays' line"))
        status, seen = on_a_terminal(
            self._home,
            program=["bash", "-c", script],
            answers=[("not shown): ", line), ("the shell stays", self._home_runs)],
            HOME=str(self._home),
        )
        assert status == 0, seen
        assert line not in seen

    def _home_runs(self) -> str:
        until((self._home / "mail/run/revsmtp.sock").exists)
        return ""

    def _stop_home(self) -> None:
        if (self._home / "mail/run/smtp.pid").exists():
            self._shell(f"cd {self._home}/mail; {sys.prefix}/bin/salmon stop", check=False)
            until(lambda: not (self._home / "mail/run/revsmtp.sock").exists())

    def _send(self) -> None:
        """As any mail server in the world does it."""
        with smtplib.SMTP("127.0.0.1", self._mx, timeout=PATIENCE) as world:
            world.starttls()
            text = f"From: a@example.com\r\nSubject: {SUBJECT}\r\n\r\nhello\r\n"
            world.sendmail("a@example.com", ["you@example.org"], text)

    def _shell(self, command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self._root,
            env={**os.environ, "HOME": str(self._home)},
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done


def until(what: Callable[[], str | bool]) -> str:
    """What is there, as soon as something is."""
    give_up = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.05)
    return str(found)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="two-ends-") as name:
        result = TwoEnds(Path(name), install="--install" in sys.argv).run()
    assert SUBJECT in result.shown
    print(
        f"{result.commands} commands, {result.seconds:.0f} seconds, of which "
        f"{result.installing:.0f} to install: {SUBJECT!r} lies in a Maildir at home"
    )


if __name__ == "__main__":
    main()
