"""The console beside a server: its settings, its command, what it says of what happens."""

from __future__ import annotations

import io
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import trustme
from support.console import PASSWORD, Browser, Consoled, console, started
from support.dialogue import no_more_mail
from support.project import Project, isp, one_message, provider
from support.serving import RUN, server, wait_for

from salmon_revsmtp import SettingsError
from salmon_revsmtp.console import events, passwords
from salmon_revsmtp.console.events import Lines
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.configuration import load

# -- settings -------------------------------------------------------------------------------------


def problems_of(**settings: Any) -> list[str]:
    """What is said of these settings."""
    try:
        load(SimpleNamespace(console=settings), Plugins.load())  # type: ignore[arg-type]
    except SettingsError as error:
        return error.problems
    return []


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "other machines": ({"listen": "0.0.0.0:8366"}, "passwords would go in the clear"),
    "another name": ({"listen": "mail.example.org:8366"}, "passwords would go in the clear"),
    "no port": ({"listen": "127.0.0.1"}, "it does not end with a colon and a port"),
    "a large port": ({"listen": "127.0.0.1:70000"}, "allowed: an address and a TCP port"),
    "no brackets": ({"listen": "::1:8366"}, "has brackets around it"),
    "no password": ({"password": ""}, "password: found that value (it is empty)"),
    "half a hash": ({"password": "scrypt$1$2"}, "is not what `salmon-revsmtp console password`"),
    "a missing variable": ({"password": None, "listen": 5}, "listen: found 5"),
    "a slash too much": ({"base_path": "/mail/"}, "that is no such path"),
    "a way out": ({"base_path": "/../etc"}, "that is no such path"),
    "one host": ({"hosts": "mail.example.org"}, "a single string is not a list"),
    "a URL": ({"hosts": ["https://x.example"]}, "leave scheme, port and path out"),
    "no network": ({"proxies": ["10.0.0.1/8"]}, "proxies: found"),
    "a header of anyone": ({"user_header": "X-User"}, "no proxies, so no one would be believed"),
    "no header": ({"user_header": "X User", "proxies": ["::1/128"]}, "no name of a header"),
    "a short token": ({"metrics_token": "x"}, "metrics_token: found that value (it is too short)"),
    "no certificate": ({"tls_cert": "/nowhere.pem"}, "tls_cert: it cannot be used: No such file"),
    "a key alone": ({"tls_key": "/nowhere.pem"}, "tls_key: it is there, and no tls_cert"),
    "another word": ({"pass": "x"}, "unknown key, allowed: listen, password"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_a_sentence(case: str) -> None:
    settings, said = WRONG[case]
    [problem] = problems_of(**settings)
    assert problem.startswith("console: ") and said in problem


def test_what_is_right_is_taken() -> None:
    assert problems_of() == []
    assert problems_of(listen="0.0.0.0:8366", plain_http=True, proxies=["10.0.0.0/8"]) == []
    assert problems_of(listen="[::1]:0", password="x", base_path="/a/b-c") == []


def test_what_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from salmon_revsmtp import console as plugin

    monkeypatch.setattr(plugin, "PACKAGES", ("jinja2", "starlette_x", "uvicorn_x"))
    [problem] = problems_of()
    assert problem == (
        "console: starlette_x and uvicorn_x are not installed; "
        "pip install 'salmon-revsmtp[console]'"
    )


def test_what_it_needs_is_imported_by_no_command_and_no_server_without_it() -> None:
    code = (
        "import sys; from salmon_revsmtp.plugins.manager import Plugins; "
        "Plugins.load().call('check_settings', settings=type(sys)('settings')); "
        "print([one for one in sys.modules if one.partition('.')[0] in "
        "('starlette', 'uvicorn', 'jinja2', 'anyio', 'h11')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- the log --------------------------------------------------------------------------------------


def test_the_last_lines_are_kept_and_harmless() -> None:
    lines, log = Lines(), logging.getLogger("salmon_revsmtp.test")
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    try:
        for number in range(events.MOST_LINES + 5):
            log.info("line %d", number)
        log.warning("from \x1b[31m\u202e%s", "evil\r\nan agent=isp all is well")
        log.error("x" * 100_000)
    finally:
        log.removeHandler(lines)
    kept = lines.since()
    assert len(kept) == events.MOST_LINES
    assert kept[-2].text == "from ?[31m?evil??an agent=isp all is well"
    assert kept[-2].level == "warning" and kept[-1].level == "error"
    assert len(kept[-1].text) == events.LONGEST_LINE
    assert [one.number for one in lines.since(kept[-3].number)] == [one.number for one in kept[-2:]]


# -- events ---------------------------------------------------------------------------------------


class Hears:
    """A browser that listens."""

    def __init__(self, browser: Browser) -> None:
        self._socket = socket.create_connection(("127.0.0.1", browser.port), 20)
        cookie = "; ".join(f"{name}={value}" for name, value in browser.jar.items())
        text = f"GET /events HTTP/1.1\r\nHost: {browser.host}\r\nCookie: {cookie}\r\n\r\n"
        self._socket.sendall(text.encode())
        self._file: io.BufferedReader = self._socket.makefile("rb")
        self.until("hello")

    def until(self, word: str) -> dict[str, Any]:
        """The next event in which there is this word."""
        for line in self._file:
            if word.encode() in line:
                text = line.decode().removeprefix("data: ")
                found: dict[str, Any] = json.loads(text) if text.startswith("{") else {}
                return found
        raise AssertionError(f"it ended, and nothing said {word}")

    def ended(self) -> bool:
        return not self._file.read().strip(b"\r\n0")

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Consoled]:
    monkeypatch.setattr(events, "EVERY", 0.01)
    with console(tmp_path) as one:
        yield one


def agent(**given: Any) -> dict[str, Any]:
    row = {"running": False, "push": None, "messages": 0, "bytes": 0, "ended": 0}
    return {"agents": {"isp": {**row, **given}}, "accounts": {}}


def test_a_browser_hears_what_agents_do(here: Consoled) -> None:
    here.server.busy = agent()
    browser = here.browser()
    browser.log_in()
    hears = Hears(browser)
    asked = here.server.asked
    wait_for(lambda: here.server.asked > asked + 1)
    here.server.busy = agent(running=True, doing="connecting")
    assert hears.until('"agent"') == {
        "kind": "agent",
        "agent": "isp",
        "state": "collecting",
        "doing": "connecting",
    }
    here.server.busy = agent(running=True, messages=3, bytes=4711, push=1.0, doing="waiting")
    assert hears.until("delivery") == {
        "kind": "delivery",
        "agent": "isp",
        "messages": 3,
        "bytes": 4711,
    }
    assert hears.until('"agent"')["state"] == "push"
    here.server.busy = agent(messages=3, bytes=4711, ended=1)
    assert hears.until("idle")["outcome"] == "no-mail"
    hears.close()


def test_a_browser_hears_what_is_held_and_the_log(here: Consoled) -> None:
    browser = here.browser()
    browser.log_in()
    hears = Hears(browser)
    asked = here.server.asked
    wait_for(lambda: here.server.asked > asked + 1)
    [hub] = here.server.plugins
    hub.message_held("acme")
    hub.message_handed_over("acme", SimpleNamespace(positive=True))
    found = hears.until('"held"')
    if found["messages"] == 0:
        found = hears.until('"held"')
    assert (found["account"], found["messages"]) == ("acme", 1)
    log = logging.getLogger("salmon_revsmtp.test")
    log.warning("agent=isp fails: </script>")
    [line] = hears.until("fails")["lines"]
    assert (line["level"], line["text"]) == ("warning", "agent=isp fails: </script>")
    hears.close()


def test_while_no_browser_listens_nothing_is_asked(here: Consoled) -> None:
    browser = here.browser()
    browser.log_in()
    time.sleep(0.1)
    assert here.server.asked == 0
    hears = Hears(browser)
    wait_for(lambda: here.server.asked > 3)
    hears.close()
    [hub] = here.server.plugins
    monkey = events.ALIVE
    try:
        events.ALIVE = 0.05
        wait_for(lambda: not hub._waiting)
    finally:
        events.ALIVE = monkey
    before = here.server.asked
    time.sleep(0.1)
    assert here.server.asked <= before + 1


def test_a_server_of_which_nothing_can_be_seen_is_one_line_in_the_log(
    here: Consoled, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def fails() -> Any:
        looks.append(1)
        raise OSError("no disk")

    monkeypatch.setattr(here.server, "activity", fails)
    browser = here.browser()
    browser.log_in()
    hears = Hears(browser)
    wait_for(lambda: len(looks) > 3)
    hears.close()
    said = [one for one in caplog.records if "looking what goes on" in one.getMessage()]
    assert [one.levelname for one in said if one.levelno > logging.DEBUG] == ["WARNING"]


def test_the_events_end_with_the_session(here: Consoled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "ALIVE", 0.05)
    browser = here.browser()
    browser.log_in()
    hears = Hears(browser)
    browser.post("/logout", {"csrf": browser.get("/").csrf})
    hears.until("0")
    assert browser.get("/events").status == 401


def test_a_browser_that_does_not_read_costs_no_memory(here: Consoled) -> None:
    browser = here.browser()
    browser.log_in()
    hears = Hears(browser)
    [hub] = here.server.plugins
    for number in range(20_000):
        hub._note(f"account{number % 500}", 1)
    [waiting] = hub._waiting
    assert waiting.maxlen == events.MOST_WAITING
    hears.close()


def test_no_more_browsers_listen_than_may(here: Consoled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MOST_STREAMS", 2)
    browser = here.browser()
    browser.log_in()
    two = [Hears(browser), Hears(browser)]
    assert browser.get("/events").status == 503
    for one in two:
        one.close()


# -- beside a server ------------------------------------------------------------------------------


def configured(project: Project, port: int, text: str = "") -> None:
    project.configure(isp(port, every="None"))
    settings = project.folder / "config/settings.py"
    more = text or f"{{'listen': '127.0.0.1:0', 'password': {PASSWORD!r}}}"
    settings.write_text(settings.read_text() + f"console = {more}\n")


def test_a_server_has_it_and_the_command_lets_in(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    configured(project, 1)
    with server(project, RUN) as process:
        running = started(project.folder)
        browser = Browser(running.listen[1])
        done = project.run("console", ISP_PASSWORD="x")
        assert done.returncode == 0 and running.url in done.stdout
        link = urlsplit(done.stdout.splitlines()[-1])
        assert browser.get(f"{link.path}?{link.query}").status == 303
        page = browser.get("/")
        assert page.status == 200
        assert browser.get("/readyz").text == "ok\n"
        form = {"csrf": page.csrf, "enabled": "no"}
        browser.post("/agents/isp/enable", form)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert "(Disabled)" in project.run("agents", ISP_PASSWORD="x").stdout
    done = project.run("console", ISP_PASSWORD="x")
    assert done.returncode == 1 and "`salmon-revsmtp run`" in done.stderr


def test_the_command_says_how_to_have_one(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    project.configure(isp(1))
    done = project.run("console", ISP_PASSWORD="x")
    assert done.returncode == 2 and 'console = {"listen"' in done.stderr


def test_a_file_that_a_killed_server_left_is_no_console(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    configured(project, 1)
    with server(project, RUN) as process:
        started(project.folder)
        process.kill()
        process.wait(60)
    done = project.run("console", ISP_PASSWORD="x")
    assert done.returncode == 1 and "enter?token" not in done.stdout


def test_the_command_makes_a_hash(tmp_path: Path) -> None:
    def made(text: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "salmon_revsmtp", "console", "password"]
        return subprocess.run(
            command, cwd=tmp_path, input=text, capture_output=True, text=True, timeout=60
        )

    done = made(f"{PASSWORD}\n")
    assert done.returncode == 0 and PASSWORD not in done.stdout
    assert passwords.Password(done.stdout.strip()).check(PASSWORD)
    for wrong in ("", "scrypt$1", "a\tb"):
        assert made(wrong).returncode == 2


def test_with_a_certificate_it_is_https_and_its_cookie_is_secure(tmp_path: Path) -> None:
    import ssl

    ca = trustme.CA()
    pem = tmp_path / "server.pem"
    ca.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(pem))
    context = ssl.create_default_context()
    ca.configure_trust(context)
    with console(tmp_path, listen="localhost:0", tls_cert=pem) as here:
        assert here.running.url.startswith("https://localhost:")
        host, port = here.running.listen
        with (
            socket.create_connection((host, port), 20) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as one,
        ):
            query = here.running.link().partition(str(port))[2]
            request = f"GET {query} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            one.sendall(request.encode())
            answer = b"".join(iter(lambda: one.recv(4096), b""))
    assert b"303" in answer.splitlines()[0] and b"; Secure" in answer


def test_mail_goes_on_where_it_cannot_listen(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    taken = socket.create_server(("127.0.0.1", 0))
    with provider(one_message, no_more_mail) as port:
        configured(project, port, f"{{'listen': '127.0.0.1:{taken.getsockname()[1]}'}}")
        with server(project, RUN):
            done = project.run("collect", "--all", ISP_PASSWORD="x")
            assert done.returncode == 0
            wait_for(lambda: "console" in project.run("status", ISP_PASSWORD="x").stdout)
            done = project.run("status", ISP_PASSWORD="x")
            assert done.returncode == 1 and "The console cannot listen" in done.stdout
    taken.close()
    assert len(project.got()) == 1


def test_threads_of_many_requests_do_not_stay(here: Consoled) -> None:
    browser = here.browser()
    browser.log_in()
    for _ in range(30):
        assert browser.get("/").status == 200
    assert sum("AnyIO" in one.name for one in threading.enumerate()) <= 2
