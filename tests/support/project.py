"""A fresh project of ``salmon gen``, in which commands run in processes of their own, and a
provider for them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from salmon import queue
from salmon.commands import main as salmon_command

from support.configuration import PASSWORD
from support.dialogue import Dialogue, Script, scripted
from support.messages import MESSAGE

HANDLER = """
from salmon import queue
from salmon.routing import route, stateless

@route("(address)@(host)", address=".+")
@stateless
def STORE(message, address=None, host=None):
    queue.Queue("run/got").push(message.Data)
"""


class Project:
    """A fresh ``salmon gen`` project with our line in its boot module."""

    receiver_port = 8823

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        CliRunner().invoke(salmon_command, ["gen", str(folder)], catch_exceptions=False)
        (folder / "app/handlers/sample.py").write_text(HANDLER)
        boot = folder / "config/boot.py"
        boot.write_text(
            boot.read_text()
            .replace("from salmon import queue", "import salmon_revsmtp\nfrom salmon import queue")
            .replace(
                "settings.receiver = LMTPReceiver(settings.receiver_config['host'],\n"
                "                                 settings.receiver_config['port'])",
                "settings.receiver = salmon_revsmtp.attach(settings, LMTPReceiver(\n"
                "    settings.receiver_config['host'], settings.receiver_config['port']))",
            )
        )
        assert "attach" in boot.read_text()
        (folder / ".env").write_text(f"ISP_PASSWORD='{PASSWORD}'\n")

    def configure(self, *agents: dict[str, Any], services: str = "{}") -> None:
        settings = self.folder / "config/settings.py"
        lines = [
            "{" + ", ".join(f"{key!r}: {value}" for key, value in keys.items()) + "}"
            for keys in agents
        ]
        settings.write_text(
            settings.read_text().partition("\nimport os")[0]
            + f"\nimport os\ncollection_agents = [{', '.join(lines)}]\n"
            + f"smtp_services = {services}\n"
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "salmon_revsmtp", *arguments],
            cwd=self.folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert PASSWORD not in done.stdout + done.stderr
        assert base64.b64encode(PASSWORD.encode()).decode() not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def got(self) -> list[bytes]:
        target = queue.Queue(str(self.folder / "run/got"))
        return [target.mbox.get_bytes(key) for key in target.keys()]


def isp(port: int, **keys: str) -> dict[str, str]:
    """An agent's keys as Python source."""
    return {
        "name": "'isp'",
        "protocol": "'odmr'",
        "server": "'localhost'",
        "port": str(port),
        "tls": "'none'",
        "account": "'acme'",
        "password": "os.environ['ISP_PASSWORD']",
        "domains": "['example.org']",
        **keys,
    }


@contextlib.contextmanager
def provider(*scripts: Script) -> Iterator[int]:
    """The scripted provider, in a thread of its own; yields its port."""
    ports: list[int] = []
    started, ending = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    async def main() -> None:
        async with scripted(*scripts) as port:
            ports.append(port)
            started.set()
            await asyncio.to_thread(ending.wait, 60)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            errors.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    try:
        yield ports[0]
    finally:
        ending.set()
        thread.join()
    if errors:
        raise errors[0]


async def one_message(provider: Dialogue) -> None:
    await provider.reverse()
    await provider.send(MESSAGE)
    await provider.quit()
