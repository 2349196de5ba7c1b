"""A real browser, Debian's Chromium, looks at the console and acts from it.

What it saw is in ``build/screenshots``.  axe-core looks at each page for what keeps someone from
reading it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support.serving import wait_for
from support.site import SECRET, Site, running_site

pytestmark = pytest.mark.interop

AXE = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text()
SHOTS = Path(__file__).parent.parent.parent / "build/screenshots"

#: Milliseconds for what takes moments.
PATIENCE = 60_000
expect.set_options(timeout=PATIENCE)

AWAY = "/provider/account?name=away%2F%3Ci%3E"
PAGES: tuple[str, ...] = (
    "/",
    "/agents",
    "/agents/vps",
    "/provider",
    AWAY,
    "/provider/message?key=1",
    "/queues",
)
PAGES += ("/log",)

# What a sender may write.
MARKUP = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        reason = "chromium is missing; tests/interop/install-server chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as play:
        # Its sandbox refuses root, which these tests are run as.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        started = play.chromium.launch(executable_path=program, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    for one in running_site(tmp_path_factory.mktemp("site") / "mail-at-home"):
        one.send("x@away.example", MARKUP)
        one.send("y@away.example", "another", sender="b@example.net")
        yield one


@pytest.fixture(scope="module")
def known(browser: Browser, site: Site) -> Any:
    """What a browser keeps that has logged in."""
    context = browser.new_context()
    log_in(context.new_page(), site)
    state = context.storage_state()
    context.close()
    return state


Opened = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, site: Site, known: Any) -> Iterator[Opened]:
    """Opens a page in a browser that has logged in; no error of a script, and no answer of 400 and
    above, goes unnoticed."""
    contexts, wrong = [], []

    def opened(path: str, **options: Any) -> Page:
        context = browser.new_context(storage_state=known, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}"))
        page.on("response", lambda one: wrong.append(one.url) if one.status >= 400 else None)
        page.goto(site.url + path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def log_in(page: Page, site: Site) -> None:
    page.goto(site.url + "/agents")
    page.get_by_label("Password").fill("wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("That is not the password")
    page.get_by_label("Password").fill(SECRET)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Agents")


def row(page: Page, name: str) -> Any:
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name))


# -- acting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [True, False])
def test_send_collects(open_page: Opened, site: Site, script: bool) -> None:
    before = len(site.project.got())
    site.send("b@example.com", "for the office")
    page = open_page("/agents", java_script_enabled=script)
    row(page, "office").get_by_role("button", name="Send").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("office")
    expect(page.locator("p.said")).to_contain_text("It collects now.")
    wait_for(lambda: len(site.project.got()) == before + 1)
    history = page.get_by_role("table")
    if not script:
        page.wait_for_timeout(100)
        wait_for(lambda: page.reload() and "collected" in page.content())
    expect(history.get_by_role("row").nth(1)).to_contain_text("collected")


def test_a_push_arrives_live(open_page: Opened, site: Site) -> None:
    page = open_page("/")
    expect(page.locator("[data-live-state]")).to_have_text("live")
    tile = page.locator(".tile").filter(has_text="Collected today").locator(".figure")
    before = int(tile.inner_text())
    page.evaluate("window.stays = true")
    for number in (1, 2):  # the stream may have begun with the first
        site.send("b@example.org", "pushed")
        expect(tile).to_have_text(str(before + number))
    assert page.evaluate("window.stays"), "it was not loaded again"
    expect(page.locator("#heard")).to_have_text(re.compile(r"vps: \d new"))


def test_disable_and_enable(open_page: Opened, site: Site) -> None:
    page = open_page("/agents")
    row(page, "isp").get_by_role("button", name="Disable").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("isp (Disabled)")
    assert '"enabled": false' in site.project.run("agents", "--json").stdout
    page.get_by_role("button", name="Enable").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("isp")
    expect(page.locator("p.said")).to_have_text("It is enabled.")
    page.reload()
    expect(page.locator("p.said")).to_have_count(0)


def test_a_failure_is_what_one_sees_first(open_page: Opened, site: Site) -> None:
    site.project.run("collect", "isp")
    page = open_page("/agents/isp")
    expect(page.locator(".head .state")).to_have_text("failed")
    page.get_by_role("button", name="Check").click()
    expect(page.get_by_role("heading", level=2)).to_have_text("It would not work")
    page.goto(site.url + "/")
    trouble = page.locator(".trouble")
    expect(trouble).to_contain_text("The agent isp has not collected")
    expect(page).to_have_title("(1) Health \u00b7 mail-at-home")
    others = page.locator("main h2, main .tile")
    assert others.first.bounding_box() == trouble.locator("h2").bounding_box()


def test_a_held_message_is_bounced_when_it_is_meant(open_page: Opened, site: Site) -> None:
    site.send("z@away.example", "to be bounced", sender="wrong@example.net")
    page = open_page("/provider")
    page.get_by_role("link", name="away/<i>").click()
    chosen = row(page, "wrong@example.net")
    expect(chosen).to_contain_text("z@away.example")
    chosen.get_by_role("checkbox").check()
    page.get_by_role("button", name="Bounce").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Return to the sender?")
    page.get_by_role("link", name="Leave it").click()
    expect(row(page, "wrong@example.net")).to_have_count(1)
    row(page, "wrong@example.net").get_by_role("checkbox").check()
    page.get_by_role("button", name="Bounce").click()
    page.get_by_role("button", name="Bounce 1 message").click()
    expect(page.locator("p.said")).to_have_text("1 message was returned to the sender.")
    expect(row(page, "wrong@example.net")).to_have_count(0)
    page.goto(site.url + "/queues")
    expect(page.get_by_role("table", name="Unsent")).to_contain_text("wrong@example.net")


def test_without_a_message_chosen_nothing_is_done(open_page: Opened) -> None:
    page = open_page(AWAY, java_script_enabled=False)
    page.get_by_role("button", name="Drop").click()
    expect(page.locator("p.said")).to_have_text("No message was chosen.")


def test_what_a_sender_wrote_is_text(open_page: Opened, site: Site) -> None:
    page = open_page("/provider/message?key=1")
    expect(page.locator("pre")).to_contain_text(MARKUP)
    assert page.locator("main img, main script").count() == 0
    assert "owned" not in page.title()


def test_the_log_is_live_and_filtered(open_page: Opened, site: Site) -> None:
    page = open_page("/log?q=TO=<live-line@away.example>")
    expect(page.locator(".log")).to_contain_text("No such line")
    site.send("live-line@away.example", "x")
    expect(page.locator(".log li")).to_have_count(1)
    expect(page.locator(".log li")).to_contain_text("held as")


# -- for everyone ----------------------------------------------------------------------------------

# Beside axe-core's rules: what a finger can hit (WCAG 2.5.8), and a page that fits.
SIZES = """
() => {
  const found = [];
  for (const one of document.querySelectorAll("button, input:not([type=hidden]), select"))
    if (one.checkVisibility() && one.getBoundingClientRect().height < 18) found.push(one.outerHTML);
  if (document.documentElement.scrollWidth > innerWidth) found.push("it scrolls sideways");
  return found;
}
"""


def findings(page: Page) -> list[str]:
    """What axe-core, with all its rules, and :data:`SIZES` find."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE)
    found = page.evaluate("axe.run()")
    assert len(found["passes"]) > 10, "it looked"
    return [
        f"{one['impact']} {one['id']}: {node['html'][:200]} {node['failureSummary']}"
        for one in found["violations"]
        for node in one["nodes"]
    ] + list(page.evaluate(SIZES))


@pytest.mark.parametrize(
    ("scheme", "width", "height", "looks"),
    [
        ("light", 1280, 800, True),
        ("dark", 390, 844, True),
        ("dark", 1280, 800, False),
        ("light", 390, 844, False),
    ],
)
def test_everyone_can_read_it(
    open_page: Opened, site: Site, scheme: str, width: int, height: int, looks: bool
) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    size = {"width": width, "height": height}
    page = open_page("/", viewport=size, color_scheme=scheme, reduced_motion="reduce")
    found = {}
    for path in PAGES:
        page.goto(site.url + path)
        name = path.partition("?")[0].strip("/").replace("/", "-") or "health"
        page.screenshot(path=SHOTS / f"{name}-{scheme}-{width}.png", full_page=True)
        found[path] = findings(page) if looks else page.evaluate(SIZES)
    assert found == {path: [] for path in PAGES}


def test_the_login_can_be_read(browser: Browser, site: Site) -> None:
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        page.goto(site.url + "/login")
        assert findings(page) == []
        page.screenshot(path=SHOTS / f"login-{scheme}.png")
        context.close()


def test_the_keyboard_is_enough(open_page: Opened, site: Site) -> None:
    page = open_page("/agents")
    at = "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
    page.keyboard.press("Tab")
    assert page.evaluate(at) == "Skip to the content"
    assert page.locator(".skip").bounding_box()["y"] >= 0, "it is seen"  # type: ignore[index]
    page.keyboard.press("Enter")
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(at))
        style = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(style) != "none", "where one is can be seen"
    assert reached == ["vps", "Send vps", "Disable vps", "Check vps"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("vps")
    expect(page.locator("p.said")).to_have_text("It collects already.")


def test_out_is_out(browser: Browser, site: Site) -> None:
    context = browser.new_context()
    page = context.new_page()
    log_in(page, site)
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Log in")
    page.goto(site.url + "/agents")
    expect(page.get_by_role("heading", level=1)).to_have_text("Log in")
    context.close()
