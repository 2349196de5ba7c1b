"""A console in this process, of a server that the test makes up, and a browser for it."""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import urlencode

from salmon_revsmtp import Trouble
from salmon_revsmtp.console.links import Running
from salmon_revsmtp.console.serving import Console
from salmon_revsmtp.console.settings import ConsoleSettings

PASSWORD = "correct horse"


class FakeServer:
    """As much of a server as the console asks for."""

    version, started, holds = "1", 0.0, False

    def __init__(self, project: Path) -> None:
        (project / "run").mkdir(exist_ok=True)
        self.project, self.settings = project, ModuleType("settings")
        self.rows: list[dict[str, Any]] = []
        self.there: list[Trouble] = []
        self.reported: dict[str, str] = {}
        self.plugins: list[Any] = []
        self.enabled: list[tuple[str, bool]] = []
        self.well = True
        self.busy: dict[str, Any] = {"agents": {}, "accounts": {}}
        self.asked = 0

    def agents(self) -> list[dict[str, Any]]:
        return self.rows

    def history(self, agent: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
        return [{"agent": agent, "outcome": "no-mail"}]

    def troubles(self) -> list[Trouble]:
        return self.there

    def status(self) -> list[dict[str, Any]]:
        troubles = [
            {"status": "trouble", "trouble": one.key, "text": one.text, "since": None}
            for one in self.there
        ]
        server = {"status": "server", "pid": 1, "since": None, "lag": 0.0}
        return [*troubles, server, *({"status": "agent", **row} for row in self.rows)]

    def traffic(
        self, agent: str | None, seconds: float, buckets: int
    ) -> list[tuple[float, int, int]]:
        return [(0.0, 0, 0)] * buckets

    def activity(self) -> dict[str, Any]:
        self.asked += 1
        return self.busy

    def answers(self, seconds: float) -> bool:
        return self.well

    def register(self, plugin: object) -> None:
        self.plugins.append(plugin)

    def report(self, trouble: Trouble) -> None:
        self.reported[trouble.key] = trouble.text

    def over(self, key: str) -> None:
        self.reported.pop(key, None)

    def set_enabled(self, agent: str, enabled: bool) -> None:
        self.enabled.append((agent, enabled))


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    text: str

    @property
    def cookies(self) -> list[str]:
        return self.headers.get_all("set-cookie") or []

    @property
    def csrf(self) -> str:
        found = re.search(r'name="csrf" value="([^"]+)"', self.text)
        assert found is not None, self.text
        return found[1]


class Browser:
    """Keeps cookies, and says where a form comes from, as browsers do."""

    def __init__(self, port: int, base: str = "") -> None:
        self.port, self.base = port, base
        self.jar: dict[str, str] = {}
        self.host = f"127.0.0.1:{port}"

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, None, headers)

    def post(self, path: str, form: dict[str, str] | str, **headers: str) -> Answer:
        body = form if isinstance(form, str) else urlencode(form)
        given = {
            "origin": f"http://{self.host}",
            "content-type": "application/x-www-form-urlencoded",
        }
        for name, value in headers.items():
            given[name.replace("_", "-")] = value
        return self.ask("POST", path, body, {key: one for key, one in given.items() if one})

    def ask(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {"host": self.host, **{name.replace("_", "-"): v for name, v in headers.items()}}
        if self.jar and "cookie" not in given:
            given["cookie"] = "; ".join(f"{name}={value}" for name, value in self.jar.items())
        with contextlib.closing(connection):
            connection.request(method, self.base + path, body, given)
            response = connection.getresponse()
            answer = Answer(response.status, response.headers, response.read().decode())
        for line in answer.cookies:
            name, _, value = line.partition(";")[0].partition("=")
            self.jar.pop(name, None)
            if "Max-Age=0" not in line:
                self.jar[name] = value
        return answer

    def log_in(self, password: str = PASSWORD, **headers: str) -> Answer:
        page = self.get("/login", **headers)
        return self.post("/login", {"password": password, "csrf": page.csrf}, **headers)


class Consoled(NamedTuple):
    server: FakeServer
    console: Console
    running: Running

    def browser(self) -> Browser:
        return Browser(self.running.listen[1])


@contextlib.contextmanager
def console(project: Path, **settings: Any) -> Iterator[Consoled]:
    """A console that listens on a port of the system's choice."""
    server = FakeServer(project)
    fake: Any = server
    given = {"listen": "127.0.0.1:0", "password": PASSWORD, **settings}
    one = Console(fake, ConsoleSettings(**given))
    one.start()
    try:
        yield Consoled(server, one, started(project))
    finally:
        one.stop()
    assert not any(thread.name == "console" for thread in threading.enumerate())


def started(project: Path) -> Running:
    """Where it listens, when it does."""
    give_up = time.monotonic() + 60
    while (running := Running.read(project)) is None:
        assert time.monotonic() < give_up, "the console has not started"
        time.sleep(0.01)
    return running
