"""The console lets no one in, and no one act, who may not."""

from __future__ import annotations

import base64
import contextlib
import html
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from support.children import living_child
from support.console import PASSWORD, Browser, Consoled, console, started
from support.processes import LONG

from salmon_revsmtp import Trouble
from salmon_revsmtp.console import accepting, attempts, http, links, security, serving, sessions
from salmon_revsmtp.console.attempts import Attempts
from salmon_revsmtp.console.links import Links, Running
from salmon_revsmtp.console.passwords import BadHash, Password, hashed
from salmon_revsmtp.console.sessions import Sessions

TOKEN = "a-token-for-prometheus"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Consoled]:
    with console(tmp_path) as one:
        yield one


def test_no_page_without_a_login_and_then_all_of_them(here: Consoled) -> None:
    browser = here.browser()
    for path in ("/", "/agents", "/nothing", "/events?x=1"):
        answer = browser.get(path)
        assert answer.status in (303, 401) and "isp" not in answer.text
    assert browser.get("/agents?outcome=failed").headers["location"] == (
        "/login?next=%2Fagents%3Foutcome%3Dfailed"
    )
    assert browser.log_in("wrong").status == 403
    assert browser.get("/").status == 303
    assert browser.log_in().status == 303
    assert browser.get("/").status == 200


def test_after_the_login_one_goes_where_one_wanted_and_nowhere_else(here: Consoled) -> None:
    for wanted, to in (
        ("/agents?x=1", "/agents?x=1"),
        ("//evil.example/", "/"),
        ("/\\evil.example/", "/"),
        ("https://evil.example/", "/"),
        ("/\r\nX-Evil: 1", "/"),
    ):
        browser = here.browser()
        form = {"password": PASSWORD, "csrf": browser.get("/login").csrf, "next": wanted}
        assert browser.post("/login", form).headers["location"] == to


def test_the_cookie_is_for_no_script_and_no_other_site(here: Consoled) -> None:
    answer = here.browser().log_in()
    [cookie] = [one for one in answer.cookies if "login" not in one]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert len(cookie.partition(";")[0].partition("=")[2]) >= 43, "256 bits"
    assert "Secure" not in cookie, "it would not come back by http"


@pytest.mark.parametrize("other", ['state={"a": "b, c"}', "path=/x", "=", "x", 'a="b'])
def test_a_cookie_of_another_program_on_this_host_is_in_no_ones_way(
    here: Consoled, other: str
) -> None:
    browser = here.browser()
    browser.log_in()
    [(name, value)] = browser.jar.items()
    assert browser.get("/", cookie=f"{other}; {name}={value}").status == 200
    assert browser.get("/", cookie=f"{name}={value}; {other}").status == 200


def test_a_login_begins_another_session(here: Consoled) -> None:
    browser = here.browser()
    browser.log_in()
    before = dict(browser.jar)
    browser.jar["salmon-revsmtp-0-login"] = "x" * 43
    browser.post("/login", {"password": PASSWORD, "csrf": browser.get("/").csrf})
    assert browser.jar != before
    browser.jar = before
    assert browser.get("/").status == 303


def test_logged_out_is_logged_out(here: Consoled) -> None:
    browser = here.browser()
    browser.log_in()
    kept = dict(browser.jar)
    assert browser.post("/logout", {"csrf": browser.get("/").csrf}).status == 303
    assert browser.get("/").status == 303
    browser.jar = kept
    assert browser.get("/").status == 303, "also for who has kept the cookie"


def test_a_session_ends_when_no_one_is_there_and_after_a_day() -> None:
    now = [0.0]
    open_now = Sessions(600.0, lambda: now[0])
    identity, session = open_now.begin()
    for _ in range(10):
        now[0] += 599
        assert open_now.find(identity) is session
    now[0] += 300
    assert open_now.find(identity, use=False) is session
    now[0] += 300
    assert open_now.find(identity) is None and not open_now.alive(session)
    identity, session = open_now.begin()
    while now[0] < sessions.LONGEST + 12_000 and open_now.find(identity):
        now[0] += 599
    assert open_now.find(identity) is None, "however busy"


def test_sessions_are_bounded() -> None:
    open_now = Sessions(600.0)
    first, _ = open_now.begin()
    for _ in range(sessions.MOST):
        last, _ = open_now.begin()
    assert open_now.find(first) is None and open_now.find(last) is not None


# -- forms ----------------------------------------------------------------------------------------


def form_of(here: Consoled) -> tuple[Browser, dict[str, str]]:
    browser = here.browser()
    browser.log_in()
    return browser, {"csrf": browser.get("/").csrf, "enabled": "yes"}


def test_a_form_needs_the_token_of_its_session(here: Consoled) -> None:
    browser, form = form_of(here)
    _, other = form_of(here)
    for token in ("", "x", other["csrf"]):
        assert browser.post("/agents/isp/enable", {**form, "csrf": token}).status == 403
    assert browser.post("/agents/isp/enable", "enabled=yes").status == 403
    assert here.server.enabled == []
    assert browser.post("/agents/isp/enable", form).status == 303
    assert here.server.enabled == [("isp", True)]


def test_a_form_of_another_site_does_nothing(here: Consoled) -> None:
    browser, form = form_of(here)
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://localhost.evil"):
        assert browser.post("/agents/isp/enable", form, origin=origin).status == 403
    answer = browser.post("/agents/isp/enable", form, origin="", sec_fetch_site="cross-site")
    assert answer.status == 403
    assert here.server.enabled == []


def test_a_form_without_a_session_does_nothing(here: Consoled) -> None:
    _, form = form_of(here)
    assert here.browser().post("/agents/isp/enable", form).headers["location"] == "/login"
    assert here.server.enabled == []


def test_no_link_changes_anything(here: Consoled) -> None:
    browser, _ = form_of(here)
    assert browser.get("/agents/isp/enable?enabled=yes").status == 405
    assert browser.get("/logout").status == 405
    assert browser.ask("PUT", "/agents/isp/enable", "x", {}).status == 405
    assert here.server.enabled == []


def test_a_form_is_bounded_and_is_a_form(here: Consoled) -> None:
    browser, form = form_of(here)
    huge = {**form, "key": "x" * security.MOST_FORM}
    assert browser.post("/agents/isp/enable", huge).status == 413
    many = "&".join(["key=1"] * (security.MOST_FIELDS + 1))
    assert browser.post("/agents/isp/enable", many).status == 400
    answer = browser.post("/agents/isp/enable", form, content_type="text/plain")
    assert answer.status == 415
    assert here.server.enabled == []


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[", "localhost@x"])
def test_by_a_name_that_is_not_its_own_there_is_no_answer(here: Consoled, host: str) -> None:
    browser = here.browser()
    browser.log_in()
    browser.host = host
    answer = browser.get("/")
    assert answer.status in (400, 421) and "<" not in answer.text


def test_by_its_own_names_there_is(tmp_path: Path) -> None:
    with console(tmp_path, hosts=["Mail.Example.org"]) as here:
        for name in ("localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:9", "mail.example.org"):
            browser = here.browser()
            browser.host = name
            assert browser.get("/login").status == 200
            assert browser.log_in().status == 303, "and its forms are taken"


# -- what a browser may do with a page ------------------------------------------------------------


def test_every_answer_has_the_headers(here: Consoled) -> None:
    browser = here.browser()
    answers = [browser.get(path) for path in ("/", "/login", "/healthz", "/events", "/metrics")]
    browser.log_in()
    answers += [browser.get("/"), browser.get("/nothing"), browser.post("/", {})]
    for answer in answers:
        policy = answer.headers["content-security-policy"].split("; ")
        assert policy[0] == "default-src 'none'"
        assert {"form-action 'self'", "frame-ancestors 'none'", "base-uri 'none'"} <= set(policy)
        assert not any("unsafe" in one for one in policy)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


def test_what_a_stranger_wrote_is_never_markup(here: Consoled) -> None:
    hostile = "<script>alert(1)</script>\"'><img src=x>{{ 'q'*9 }}{% raw %}\x1b[31m\u202eab"
    row = {"agent": hostile, "outcome": "javascript:alert(1)", "enabled": True}
    here.server.rows = [{**row, "running": False, "push": None, "ended": None, "next": None}]
    here.server.there = [Trouble("agent:isp", hostile)]
    browser = here.browser()
    browser.log_in()
    page = browser.get("/").text
    assert "<script>alert" not in page and "<img src=x" not in page and "qqqqqqqqq" not in page
    assert "\x1b" not in page and "\u202e" not in page
    assert html.escape(hostile[:25]).replace("&#x27;", "&#39;") in page, "it is there as text"


def test_an_error_page_shows_what_was_asked_for_as_text(here: Consoled) -> None:
    browser = here.browser()
    browser.log_in()
    answer = browser.get("/%3Cscript%3Ealert(1)%3C/script%3E")
    assert answer.status == 404 and "<script" not in answer.text


def test_a_static_file_has_a_hash_and_is_kept_and_no_other_file_is_served(here: Consoled) -> None:
    browser = here.browser()
    page = browser.get("/login").text
    path = page.partition('rel="stylesheet" href="')[2].partition('"')[0]
    answer = browser.get(path)
    assert answer.status == 200 and "immutable" in answer.headers["cache-control"]
    assert answer.headers["content-type"].startswith("text/css")
    stale = browser.get("/static/0000000000000000/console.css")
    assert "immutable" not in stale.headers["cache-control"]
    for path in (
        *("/static/x/../views.py", "/static/x/%2e%2e/views.py", "/static/x//etc/passwd"),
        *("/static/x/%00", f"/static/x/{'a' * 300}", f"/static/x/{'a/' * 3000}", "/static/x/."),
    ):
        answer = browser.get(path)
        assert answer.status == 404 and "/console/static" not in answer.text, path


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("no disk")])
def test_no_path_writes_lines_of_its_own_into_the_log(
    here: Consoled, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    def fails() -> Any:
        raise error

    monkeypatch.setattr(here.server, "agents", fails)
    browser = here.browser()
    browser.log_in()
    assert browser.get("/agents/%1B%5B2J%0Aanother%20line").status >= 500
    give_up, found = time.monotonic() + 60, list[str]()
    while not found:  # it is logged after the answer
        assert time.monotonic() < give_up
        time.sleep(0.02)
        found = [one.getMessage() for one in caplog.records if "/agents/" in one.getMessage()]
    assert all(one.isprintable() for one in found)


# -- passwords and links --------------------------------------------------------------------------


def test_a_hash_serves_as_the_password_does(tmp_path: Path) -> None:
    made = hashed(PASSWORD)
    assert made != hashed(PASSWORD), "each has a salt of its own"
    with console(tmp_path, password=made) as here:
        assert here.browser().log_in(made).status == 403
        assert here.browser().log_in("wrong").status == 403
        assert here.browser().log_in().status == 303
        assert here.browser().log_in().status == 303


@pytest.mark.parametrize(
    "wrong",
    [
        "scrypt$",
        "scrypt$16384$8$5$x",
        "scrypt$16383$8$5$AAAA$AAAAAAAAAAAAAAAAAAAAAA==",
        "scrypt$1073741824$8$1$AAAA$AAAAAAAAAAAAAAAAAAAAAA==",
        "scrypt$16384$8$5$AAAA$AAAA",
        "scrypt$a$8$5$AAAA$AAAAAAAAAAAAAAAAAAAAAA==",
    ],
)
def test_what_is_no_hash_is_said(wrong: str) -> None:
    with pytest.raises(BadHash):
        Password(wrong)


def test_who_guesses_has_to_wait(here: Consoled) -> None:
    browser = here.browser()
    for _ in range(attempts.MOST):
        assert "That is not the password." in browser.log_in("wrong").text
    answer = browser.log_in("wrong")
    assert "too many wrong passwords" in answer.text
    assert "too many wrong passwords" in browser.log_in().text, "no guess is looked at"
    basic = base64.b64encode(f"x:{PASSWORD}".encode()).decode()
    assert here.browser().get("/metrics", authorization=f"Basic {basic}").status == 401
    link = here.running.link().partition("/enter")[2]
    assert browser.get(f"/enter{link}").status == 303, "a link lets in all the same"
    assert here.browser().log_in().status == 303, "and forgives what came before from there"


def test_guesses_count_by_network_and_in_all_and_are_forgotten() -> None:
    now = [0.0]
    guard = Attempts(lambda: now[0])
    for number in range(attempts.MOST):
        assert guard.wait("2001:db8::1") == 0
        guard.begin(f"2001:db8::{number}")
    assert guard.wait("2001:db8::ffff") == attempts.WINDOW, "the same /64"
    assert guard.wait("192.0.2.1") == 0
    now[0] += attempts.WINDOW + 1
    assert guard.wait("2001:db8::1") == 0
    for number in range(attempts.MOST_IN_ALL):
        guard.begin(f"198.51.{number % 256}.1")
    assert guard.wait("192.0.2.1") > 0, "whoever it is"
    guard.right("198.51.0.1")
    assert guard.wait("192.0.2.1") == 0


def test_a_stranger_with_many_networks_keeps_no_one_out_who_was_let_in() -> None:
    guard = Attempts(lambda: 0.0)
    guard.right("2001:db8::1")
    for number in range(attempts.MOST_IN_ALL):
        guard.begin(f"198.51.{number % 256}.1")
    assert guard.wait("192.0.2.1") > 0
    assert guard.wait("2001:db8::2") == 0, "the same /64"
    for _ in range(attempts.MOST):
        guard.begin("2001:db8::1")
    assert guard.wait("2001:db8::1") > 0, "who guesses from there has to wait, too"


def test_many_checks_at_the_same_time_are_made_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, most = [0], [0]
    lock = threading.Lock()

    def check(self: Password, text: str) -> bool:
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        time.sleep(0.05)
        with lock:
            at_work[0] -= 1
        return False

    monkeypatch.setattr(Password, "check", check)
    with console(tmp_path, password=hashed(PASSWORD)) as here:
        pages = [(one, one.get("/login").csrf) for one in (here.browser() for _ in range(8))]
        threads = [
            threading.Thread(target=one.post, args=("/login", {"password": "x", "csrf": csrf}))
            for one, csrf in pages
        ]
        for thread in threads:
            thread.start()
        assert here.browser().get("/healthz").text == "ok\n", "and hold no one else up"
        for thread in threads:
            thread.join()
    assert most[0] == 2


def test_no_link_of_anyone_is_followed_where_the_secret_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever owns the folder may put one there between two calls; root would follow it."""
    (tmp_path / "run").mkdir()
    other = tmp_path / "other"
    other.write_text("mine")
    beside = tmp_path / "run" / f".{links.FILE.name}"
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    beside.symlink_to(other)
    with pytest.raises(FileExistsError):
        Running("http://localhost:1", ("localhost", 1), b"x" * 32).write(tmp_path)
    assert other.read_text() == "mine"


def test_a_link_lets_in_once(here: Consoled, tmp_path: Path) -> None:
    assert (tmp_path / links.FILE).stat().st_mode & 0o777 == 0o600
    path = here.running.link().partition(f":{here.running.listen[1]}")[2]
    browser, other = here.browser(), here.browser()
    assert browser.get(path).status == 303 and browser.get("/").status == 200
    answer = other.get(path)
    assert answer.status == 403 and "lets no one in any more" in answer.text
    assert other.get("/").status == 303


def test_a_link_is_good_for_five_minutes_and_only_of_this_server() -> None:
    now = [1000.0]
    ours = Links(lambda: now[0])
    running = Running("http://x", ("127.0.0.1", 1), ours.secret)
    token = running.link(now[0]).partition("token=")[2]
    assert not Links(lambda: now[0]).take(token), "another secret"
    until, nonce, mac = token.split(".")
    for wrong in (f"{int(until) + 1}.{nonce}.{mac}", f"{until}.{nonce}x.{mac}", "", "a.b.c", mac):
        assert not ours.take(wrong)
    now[0] += links.LASTS + 1
    assert not ours.take(token)
    token = running.link(now[0]).partition("token=")[2]
    assert ours.take(token) and not ours.take(token)


def test_without_a_password_only_a_link_lets_in(tmp_path: Path) -> None:
    with console(tmp_path, password=None) as here:
        page = here.browser().get("/login").text
        assert "There is no password. Run" in page and "<form" not in page
        for guess in ("", "None", "x"):
            assert here.browser().post("/login", {"password": guess, "csrf": ""}).status == 403
        path = here.running.link().partition(f":{here.running.listen[1]}")[2]
        assert here.browser().get(path).status == 303


def test_the_file_of_the_link_goes_with_the_console(tmp_path: Path) -> None:
    with console(tmp_path):
        assert (tmp_path / links.FILE).exists()
    assert not (tmp_path / links.FILE).exists()


# -- programs -------------------------------------------------------------------------------------


def test_probes_hear_ok_by_whatever_name_and_nothing_else(here: Consoled) -> None:
    browser = here.browser()
    browser.host = "10.1.2.3"
    assert browser.get("/healthz").text == browser.get("/readyz").text == "ok\n"
    here.server.well = False
    assert browser.get("/healthz").status == 200
    answer = browser.get("/readyz")
    assert (answer.status, answer.text) == (503, "not ok\n")


def test_metrics_need_the_password_or_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from salmon_revsmtp.console import app

    monkeypatch.setattr(app, "_exposition", lambda: (b"up 1\n", "text/plain; version=0.0.4"))
    with console(tmp_path, metrics_token=TOKEN) as here:
        browser = here.browser()

        def asked(authorization: str) -> int:
            answer = browser.get("/metrics", authorization=authorization)
            assert ("up 1" in answer.text) == (answer.status == 200)
            return answer.status

        def basic(password: str) -> str:
            return f"Basic {base64.b64encode(f'me:{password}'.encode()).decode()}"

        assert asked(f"Bearer {TOKEN}") == asked(basic(PASSWORD)) == 200
        for wrong in ("", "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", basic("x"), "Basic \xff"):
            assert asked(wrong) == 401
        assert browser.log_in().status == 303
        assert asked("") == 200
        monkeypatch.undo()
        assert browser.get("/metrics").status == 404, "no server here has metrics"


# -- behind a reverse proxy -----------------------------------------------------------------------

PROXY: dict[str, Any] = {"proxies": ["127.0.0.0/8"], "hosts": ["www.example.org"]}


@pytest.mark.parametrize("base", ["/mail", ""])
def test_behind_a_proxy_under_a_path_that_it_takes_away_or_leaves_on(
    tmp_path: Path, base: str
) -> None:
    with console(tmp_path, base_path="/mail", **PROXY) as here:
        browser = here.browser()
        browser.base = base
        forwarded = {"x_forwarded_proto": "https", "x_forwarded_host": "www.example.org"}
        answer = browser.get("/", **forwarded)
        assert answer.headers["location"] == "/mail/login"
        page = browser.get("/login", **forwarded)
        assert 'action="/mail/login"' in page.text and 'href="/mail/static/' in page.text
        answer = browser.post(
            "/login",
            {"password": PASSWORD, "csrf": page.csrf},
            origin="https://www.example.org",
            **forwarded,
        )
        assert answer.headers["location"] == "/mail/"
        [cookie] = [one for one in answer.cookies if "login" not in one]
        assert {"Path=/mail", "Secure"} <= set(cookie.split("; "))
        assert browser.get("/", **forwarded).status == 200


def test_what_only_a_proxy_may_say_is_believed_of_no_one_else(tmp_path: Path) -> None:
    with console(tmp_path, proxies=["192.0.2.0/24"], user_header="X-Remote-User") as here:
        browser = here.browser()
        lies = {
            "x_forwarded_host": "localhost",
            "x_forwarded_proto": "https",
            "x_remote_user": "ann",
        }
        assert browser.get("/", **lies).status == 303
        browser.host = "evil.example"
        assert browser.get("/", **lies).status == 421
        browser.host = "localhost"
        assert not any("Secure" in one for one in browser.log_in(**lies).cookies)
        for number in range(attempts.MOST):
            here.browser().log_in("wrong", x_forwarded_for=f"198.51.100.{number}")
        answer = here.browser().log_in("wrong", x_forwarded_for="203.0.113.1")
        assert "too many" in answer.text


def test_guesses_behind_a_proxy_count_for_who_makes_them(tmp_path: Path) -> None:
    with console(tmp_path, **PROXY) as here:
        for _ in range(attempts.MOST):
            here.browser().log_in("wrong", x_forwarded_for="6.6.6.6, 198.51.100.7, 127.0.0.9")
        answer = here.browser().log_in("wrong", x_forwarded_for="7.7.7.7, 198.51.100.7")
        assert "too many" in answer.text, "what the browser says itself does not count"
        assert here.browser().log_in(x_forwarded_for="198.51.100.8").status == 303


def test_who_has_logged_in_at_the_proxy_is_in(tmp_path: Path) -> None:
    with console(tmp_path, user_header="X-Remote-User", **PROXY) as here:
        browser = here.browser()
        ann = {"x_remote_user": "ann"}
        assert browser.get("/").status == 303
        page = browser.get("/", **ann)
        assert page.status == 200 and page.cookies
        form = {"csrf": page.csrf, "enabled": "no"}
        assert browser.post("/agents/isp/enable", form).status == 303
        assert here.server.enabled == [], "not any more without the proxy's word"
        assert browser.post("/agents/isp/enable", form, x_remote_user="eve").status == 403
        assert here.server.enabled == []
        assert browser.post("/agents/isp/enable", form, **ann).status == 403, "another session"
        form["csrf"] = browser.get("/", **ann).csrf
        assert browser.post("/agents/isp/enable", form, **ann).status == 303
        assert here.server.enabled == [("isp", False)]


# -- who is slow, or many -------------------------------------------------------------------------


def test_who_says_nothing_or_half_of_it_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "REQUEST_TIMEOUT", 0.2)
    half = b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc"
    with console(tmp_path) as here:
        for said in (b"", b"GET / HTTP/1.1\r\nHos", half):
            with socket.create_connection(("127.0.0.1", here.running.listen[1]), 10) as one:
                one.sendall(said)
                assert ended(one)
        assert here.browser().get("/healthz").status == 200


def test_connections_of_one_address_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "CONNECTIONS_PER_ADDRESS", 3)
    with console(tmp_path) as here, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", here.running.listen[1])
        many = [stack.enter_context(socket.create_connection(address, 10)) for _ in range(5)]
        assert sum(ended(one, 0.5) for one in many) == 2
        many[0].close()
        many[1].close()


def test_connections_of_all_addresses_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever proxies there are, and also of those that ask for nothing."""
    monkeypatch.setattr(accepting, "CONNECTIONS", 3)
    monkeypatch.setattr(accepting, "CONNECTIONS_PER_ADDRESS", 1)
    with (
        console(tmp_path, proxies=["127.0.0.0/8"]) as here,
        contextlib.ExitStack() as stack,
    ):
        address = ("127.0.0.1", here.running.listen[1])
        many = [stack.enter_context(socket.create_connection(address, 10)) for _ in range(5)]
        assert sum(ended(one, 0.5) for one in many) == 2


def test_who_does_not_begin_with_tls_has_no_more_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "CONNECTIONS_PER_ADDRESS", 3)
    pem = tmp_path / "server.pem"
    made = trustme.CA().issue_cert("localhost")
    made.private_key_and_cert_chain_pem.write_to_path(str(pem))
    with console(tmp_path, tls_cert=pem) as here, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", here.running.listen[1])
        many = [stack.enter_context(socket.create_connection(address, 10)) for _ in range(5)]
        assert sum(ended(one, 0.5) for one in many) == 2
        many.pop(0).close()
        give_up = time.monotonic() + 60
        while ended(stack.enter_context(socket.create_connection(address, 10)), 0.5):
            assert time.monotonic() < give_up, "there is room again"


def test_a_child_of_a_handler_does_not_keep_its_address(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        with console(tmp_path) as here:
            address = here.running.listen
            stack.enter_context(living_child())
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, 5).close()


def ended(connection: socket.socket, seconds: float = 10) -> bool:
    """Whether the other side ends it in time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def test_who_reads_nothing_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "SEND_TIMEOUT", 0.3)
    with console(tmp_path) as here:
        browser = here.browser()
        browser.log_in()
        one = listening(here, browser)
        [hub] = here.server.plugins
        loop = here.console._loop
        assert loop is not None
        for _ in range(20):
            event = {"kind": "log", "lines": ["x" * 1_000_000]}
            loop.call_soon_threadsafe(hub._tell, [event])
        give_up = time.monotonic() + 60
        while hub._waiting:
            assert time.monotonic() < give_up
            time.sleep(0.02)
        one.close()


def test_a_header_that_does_not_end_is_cut_off(here: Consoled) -> None:
    with socket.create_connection(("127.0.0.1", here.running.listen[1]), 10) as one:
        with contextlib.suppress(ConnectionError):
            one.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 10 * http.MOST_HEADER)
        assert ended(one)
    assert here.browser().get("/healthz").status == 200


# -- its end, and who else has its port -----------------------------------------------------------


def test_it_ends_with_browsers_that_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "PATIENCE", LONG)
    with console(tmp_path) as here:
        browser = here.browser()
        browser.log_in()
        streams = [listening(here, browser) for _ in range(10)]
        began = time.monotonic()
        here.console.stop()
        assert time.monotonic() - began < LONG / 2
        assert all(ended(one) for one in streams)
        for one in streams:
            one.close()


def listening(here: Consoled, browser: Browser) -> socket.socket:
    """A browser that hears events, from the first of them."""
    one = socket.create_connection(("127.0.0.1", here.running.listen[1]), 20)
    cookie = "; ".join(f"{name}={value}" for name, value in browser.jar.items())
    request = f"GET /events HTTP/1.1\r\nHost: {browser.host}\r\nCookie: {cookie}\r\n\r\n"
    one.sendall(request.encode())
    heard = b""
    while b": hello" not in heard:
        heard += one.recv(4096)
    assert heard.startswith(b"HTTP/1.1 200")
    return one


def test_a_port_that_is_taken_is_a_trouble_until_it_is_free(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from support.console import FakeServer

    from salmon_revsmtp.console.serving import TROUBLE, Console
    from salmon_revsmtp.console.settings import ConsoleSettings

    taken = socket.create_server(("127.0.0.1", 0))
    server: Any = FakeServer(tmp_path)
    listen = f"127.0.0.1:{taken.getsockname()[1]}"
    one = Console(server, ConsoleSettings(listen=listen), again=0.05)
    one.start()
    try:
        give_up = time.monotonic() + 60
        while TROUBLE not in server.reported and time.monotonic() < give_up:
            time.sleep(0.01)
        assert listen in server.reported[TROUBLE] and "Mail goes on" in server.reported[TROUBLE]
        time.sleep(0.2)
        assert caplog.text.count("cannot listen") == 1
        taken.close()
        started(tmp_path)
        assert server.reported == {}
    finally:
        taken.close()
        one.stop()


def test_of_several_that_say_who_it_is_the_proxy_is_believed(tmp_path: Path) -> None:
    with (
        console(tmp_path, user_header="X-Remote-User", **PROXY) as here,
        socket.create_connection(("127.0.0.1", here.running.listen[1]), 10) as one,
    ):
        one.sendall(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Remote-User: admin\r\n"
            b"X-Remote-User: \r\nConnection: close\r\n\r\n"
        )
        answer = b"".join(iter(lambda: one.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 303"), "the proxy says that no one has logged in"


def test_pages_that_follow_what_happens_rest_and_those_of_a_person_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from salmon_revsmtp.console import app

    monkeypatch.setattr(app, "REST", 1e9)
    monkeypatch.setattr(app, "LONGEST_REST", 1.0)
    with console(tmp_path) as here:
        browser = here.browser()
        browser.log_in()
        assert browser.get("/", x_live="1").status == 200
        began = time.monotonic()
        waits = threading.Thread(target=browser.get, args=("/",), kwargs={"x_live": "1"})
        waits.start()
        for _ in range(5):
            assert browser.get("/").status == 200
        assert waits.is_alive(), "that of a person did not wait for it"
        waits.join()
        assert time.monotonic() - began > 0.8
