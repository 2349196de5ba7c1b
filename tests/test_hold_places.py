"""Where mail is held: a folder, or the URL of a store that a plugin has; its password is no one
else's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.configuration import configuration
from support.salmon import Salmon
from support.world import ACME, world

from salmon_revsmtp import hookimpl
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.provider.hold.places import without_secrets
from salmon_revsmtp.provider.hold.store import HoldStore, HoldStoreError
from salmon_revsmtp.server.eventloop import run
from salmon_revsmtp.settings import SettingsError

URL = "postgresql://us:s3cret@db.example.net:5433/mail?sslpassword=s3cret"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, "postgresql://db.example.net:5433/mail"),
        ("postgresql://u:s3cret@a:1,b:2/mail", "postgresql://a:1,b:2/mail"),
        ("postgresql:///mail?host=/run&password=s3cret", "postgresql:///mail"),
        ("postgresql://u:s3cret/@/x@[::1]/mail", "postgresql://[::1]/mail"),
        ("postgresql:///mail?password=a@s3cret", "postgresql://..."),
        ("postgresql://u:a?s3cret@host/mail", "postgresql://..."),
        ("postgresql://u:a#s3cret@host/mail", "postgresql://..."),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


def provider(**keys: Any) -> Any:
    plugins = Plugins.load()
    return configuration(plugins=plugins, accounts=[ACME], provider={"listen": "[::1]:0", **keys})


def test_a_url_of_no_store_is_one_sentence_without_the_url() -> None:
    with pytest.raises(SettingsError) as raised:
        provider(hold=URL.replace("postgresql", "mysql"))
    assert str(raised.value) == (
        "provider: hold: found a URL that begins with 'mysql://', allowed: a folder, "
        "'postgresql://...'"
    )
    with pytest.raises(SettingsError) as raised:
        provider(hold="?" + URL)
    assert "hold: found that value (a URL begins with a scheme" in str(raised.value)
    assert "s3cret" not in str(raised.value)


def test_no_repr_has_the_url() -> None:
    assert "s3cret" not in repr(provider(hold=URL))


class Elsewhere:
    """A third party's plugin, with a store that is ours in a folder beside."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, Path]] = []

    def open(self, url: str, folder: Path) -> HoldStore:
        self.opened.append((url, folder))
        return EmbeddedStore(folder.with_name("elsewhere"))

    @hookimpl
    def register_hold_stores(self, register: Any) -> None:
        register("elsewhere", self.open)


def test_mail_is_held_in_the_store_of_a_plugin(salmon: Salmon) -> None:
    plugin, plugins = Elsewhere(), Plugins.load()
    plugins.register(plugin)
    place = "ELSEWHERE://u:p@host/x"

    async def main() -> None:
        async with world(salmon, plugins, provider={"hold": place}) as here:
            await here.send("b@example.org")
            [held] = here.held()
            assert b"Received:" in here.data(held)

    run(main())
    assert plugin.opened == [(place, salmon.folder / "run/hold")]
    assert (salmon.folder / "run/elsewhere/index.sqlite3").exists()


def test_two_plugins_with_one_scheme(caplog: pytest.LogCaptureFixture) -> None:
    plugins = Plugins.load()
    plugins.register(Elsewhere(), "first")
    plugins.register(Elsewhere(), "second")
    assert set(plugins.hold_stores) == {"elsewhere", "postgresql"}
    assert "the scheme 'elsewhere' is taken by another plugin" in caplog.text


def test_without_psycopg_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [one for one in sys.modules if one.startswith("salmon_revsmtp.provider.hold.p")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(HoldStoreError) as raised:
        Plugins.load().hold_stores["postgresql"](URL, tmp_path)
    assert str(raised.value).startswith("opening the hold store postgresql://db.example.net:5433")
    assert "pip install 'salmon-revsmtp[postgres]'" in str(raised.value)
    assert "s3cret" not in str(raised.value)


def test_a_provider_with_a_folder_does_without_psycopg(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from types import SimpleNamespace as N\n"
        "from salmon_revsmtp.plugins.manager import Plugins\n"
        "from salmon_revsmtp.server.collector import Collector\n"
        "from salmon_revsmtp.server.configuration import load\n"
        "accounts = [{'name': 'a', 'password': 'b', 'domains': ['example.org']}]\n"
        "plugins = Plugins.load()\n"
        "module = N(customer_accounts=accounts, provider={'listen': '[::1]:0'})\n"
        "with Collector(load(module, plugins), plugins, None) as collector:\n"
        "    print(collector.providing.store.usages())\n"
        "    collector.providing.close_store()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("{}\n", "", 0)
