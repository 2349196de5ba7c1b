"""The metrics: what Prometheus reads while mail comes, and who may ask."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.children import living_child
from support.ends import Ends, both_ends, message
from support.project import Project, isp
from support.salmon import Salmon
from support.serving import RUN, server, wait_for

from salmon_revsmtp import Server, Trouble, hookimpl, metrics
from salmon_revsmtp.metrics.meters import OTHER, Meters
from salmon_revsmtp.metrics.serving import Serving, _Answer, unready, write
from salmon_revsmtp.metrics.settings import MetricsSettings
from salmon_revsmtp.plugins.manager import Plugins

DOCS = Path(__file__).parent.parent / "docs"

Samples = dict[str, float]


class Metered:
    """A plugin that has metrics, as the settings would."""

    def __init__(self, **settings: Any) -> None:
        self.settings = MetricsSettings(listen="127.0.0.1:0", **settings)
        self.serving: Serving | None = None
        self.there = threading.Event()

    @hookimpl
    def server_started(self, server: Server) -> None:
        self.serving = Serving(server, self.settings)
        self.serving.start()
        self.there.set()

    @hookimpl
    def server_stopping(self, server: Server) -> None:
        if self.serving is not None:
            self.serving.stop()

    def get(self, path: str) -> tuple[int, str]:
        assert self.there.wait(30) and self.serving is not None
        return get(self.serving.port or 0, path)

    def samples(self) -> Samples:
        return samples(self.get("/metrics")[1])


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def samples(text: str) -> Samples:
    """Each sample as Prometheus writes it: ``name{label="value"}``."""
    found = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(one.labels.items()))
            found[one.name + (f"{{{labels}}}" if labels else "")] = one.value
    return found


def plugins_with(plugin: object) -> Plugins:
    plugins = Plugins.load()
    plugins.register(plugin)
    return plugins


def test_mail_that_goes_through_is_counted_at_both_ends(salmon: Salmon) -> None:
    salmon.handle(".*")
    there, home = Metered(), Metered()

    async def work(ends: Ends) -> None:
        await ends.open()
        await ends.send(message("live"), "b", "c")
        [refused] = await ends.send(message("no"), "x@nowhere.example")
        assert refused.code == 550
        await ends.until(lambda: len(ends.handled) == 2)
        at_home = await asyncio.to_thread(home.samples)
        assert at_home['revsmtp_messages_total{agent="isp"}'] == 1
        assert at_home['revsmtp_deliveries_total{agent="isp",reply="2yz"}'] == 2
        assert at_home["revsmtp_handler_seconds_count"] == 2
        assert at_home['revsmtp_message_bytes_total{agent="isp"}'] > 20
        assert at_home['revsmtp_push_sessions{agent="isp"}'] == 1
        assert at_home['revsmtp_agent_running{agent="isp"}'] == 1
        assert at_home["revsmtp_up"] == 1
        assert 0 <= at_home["revsmtp_event_loop_lag_seconds"] < 60
        out = await asyncio.to_thread(there.samples)
        assert out['revsmtp_handed_over_total{account="acme",reply="2yz",way="live"}'] == 2
        assert out['revsmtp_intake_replies_total{code="250",service="mx"}'] == 1
        assert out['revsmtp_intake_replies_total{code="550",service="mx"}'] == 1
        assert out['revsmtp_intake_bytes_total{service="mx"}'] > 20
        assert (out["revsmtp_provider_sessions"], out["revsmtp_accounts_online"]) == (1, 1)
        assert out["revsmtp_accounts"] == 1

    both_ends(salmon, work, plugins=plugins_with(home), at_provider=plugins_with(there))


def test_what_is_held_is_counted_and_how_long_it_took(salmon: Salmon) -> None:
    salmon.handle(".*")
    there, late = Metered(), Plugins.load()

    class NotYet:
        here = False

        @hookimpl
        def may_collect(self) -> str | None:
            return None if self.here else "not yet"

    door = NotYet()
    late.register(door)

    async def work(ends: Ends) -> None:
        await ends.send(message("held"))
        held = await asyncio.to_thread(there.samples)
        assert held['revsmtp_held_messages{account="acme"}'] == 1
        assert held['revsmtp_held_bytes{account="acme"}'] > 20
        assert held['revsmtp_held_oldest_timestamp_seconds{account="acme"}'] > 1e9
        assert 0 < held['revsmtp_held_quota_ratio{account="acme"}'] < 0.001
        assert held['revsmtp_held_messages_taken_total{account="acme"}'] == 1
        assert held["revsmtp_handover_seconds_count"] == 0
        door.here = True
        await ends.until(lambda: ends.handled == ["held"])
        await ends.until(lambda: not ends.held)
        out = await asyncio.to_thread(there.samples)
        assert out['revsmtp_held_messages{account="acme"}'] == 0
        assert 'revsmtp_held_oldest_timestamp_seconds{account="acme"}' not in out
        assert out['revsmtp_handed_over_total{account="acme",reply="2yz",way="held"}'] == 1
        assert out["revsmtp_handover_seconds_count"] == 1
        assert 0 < out["revsmtp_handover_seconds_sum"] < 60

    both_ends(salmon, work, plugins=late, at_provider=plugins_with(there), agent={"every": 0.01})


def test_failed_logins_are_counted_for_the_account_that_they_are_tried_on(salmon: Salmon) -> None:
    there = Metered()

    async def work(ends: Ends) -> None:
        line = 'revsmtp_failed_logins_total{account="acme"}'
        while not (await asyncio.to_thread(there.samples))[line]:
            await asyncio.sleep(0.05)

    wrong = {"password": "wrong", "every": 0.01}
    both_ends(salmon, work, at_provider=plugins_with(there), agent=wrong)


def test_a_collection_that_fails_is_counted_by_its_outcome(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    project.configure(isp(1, every="None"))
    file = tmp_path / "out.prom"
    with (project.folder / "config/settings.py").open("a") as settings:
        settings.write(f"\nmetrics = {{'textfile': {str(file)!r}, 'every': 1}}\n")
    with server(project, RUN):
        wait_for(file.exists)
        assert file.stat().st_mode & 0o777 == 0o644
        wait_for(lambda: samples(file.read_text())["revsmtp_up"] == 1)
        project.run("collect", "isp")
        line = 'revsmtp_collections_total{agent="isp",outcome="failed",protocol="odmr"}'
        wait_for(lambda: samples(file.read_text()).get(line) == 1)
        failing = 'revsmtp_agent_failing{agent="isp"}'
        wait_for(lambda: samples(file.read_text()).get(failing) == 1)
        assert [one.name for one in tmp_path.iterdir() if "prom" in one.name] == ["out.prom"]
    assert not file.exists(), "a file that no one writes says what is not so any more"


def test_the_file_is_for_all_whatever_the_umask_and_never_half_of_one(tmp_path: Path) -> None:
    file, before = tmp_path / "x.prom", os.umask(0o077)
    try:
        write(file, b"1\n")
        assert file.stat().st_mode & 0o777 == 0o644
        with pytest.raises(TypeError):
            write(file, "no octets")  # type: ignore[arg-type]
    finally:
        os.umask(before)
    assert file.read_bytes() == b"1\n" and list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake: Any = Fake()
    fake.project = tmp_path
    serving = Serving(fake, MetricsSettings(textfile=Path("nowhere/x.prom"), every=1))
    serving.start()
    wait_for(lambda: "cannot be written: " in caplog.text)
    (tmp_path / "nowhere").mkdir()
    wait_for((tmp_path / "nowhere/x.prom").exists)
    serving.stop()
    assert caplog.text.count("cannot be written") == 1


# -- alive and ready -------------------------------------------------------------------------------


def test_a_server_that_runs_is_alive_and_ready(salmon: Salmon) -> None:
    home = Metered()

    async def work(ends: Ends) -> None:
        for path, said in (("/healthz", "alive"), ("/readyz", "ready")):
            assert await asyncio.to_thread(home.get, path) == (200, said + "\n")
        assert (await asyncio.to_thread(home.get, "/elsewhere"))[0] == 404

    both_ends(salmon, work, plugins=plugins_with(home))


class Fake:
    """A server that says what the test sets."""

    def __init__(self) -> None:
        self.version, self.started = "1.2", 1_795_700_000.0
        self.found: list[Trouble] = []
        self.alive, self.away = True, False
        self.held: list[dict[str, Any]] = []
        self.provider: list[dict[str, Any]] = []
        self.plugins: list[object] = []
        self.reported: list[str] = []

    def register(self, plugin: object) -> None:
        self.plugins.append(plugin)

    def answers(self, seconds: float) -> bool:
        return self.alive

    def report(self, trouble: Trouble) -> None:
        self.reported.append(trouble.key)

    def troubles(self) -> list[Trouble]:
        self.status()
        return self.found

    def status(self) -> list[dict[str, Any]]:
        if not self.alive:
            raise RuntimeError("no answer")
        return [*({"status": "trouble", "trouble": one.key} for one in self.found), *self.provider]

    def accounts(self) -> list[dict[str, Any]]:
        if self.away:
            raise OSError("accounts cannot be looked up")
        return self.held


@pytest.fixture
def fake() -> Iterator[tuple[Any, Callable[[str], tuple[int, str]]]]:
    found: Any = Fake()
    serving = Serving(found, MetricsSettings(listen="127.0.0.1:0", accounts=2))
    serving.start()
    yield found, lambda path: get(serving.port or 0, path)
    serving.stop()


Faked = tuple[Any, Callable[[str], tuple[int, str]]]


def test_a_loop_that_does_not_answer_is_said_and_nothing_breaks(fake: Faked) -> None:
    there, ask = fake
    there.alive = False
    assert ask("/healthz")[0] == 503
    assert ask("/readyz") == (503, "server\n")
    status, text = ask("/metrics")
    assert status == 200 and samples(text)["revsmtp_up"] == 0
    assert "revsmtp_troubles" not in text


def test_without_the_database_of_accounts_all_else_is_said(fake: Faked) -> None:
    there, ask = fake
    there.away = True
    status, text = ask("/metrics")
    assert status == 200 and samples(text)["revsmtp_up"] == 1
    assert "revsmtp_troubles" in text and "revsmtp_held_messages{" not in text


def test_who_says_a_request_slowly_keeps_no_one_from_asking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_Answer, "timeout", 0.5)
    there: Any = Fake()
    serving = Serving(there, MetricsSettings(listen="127.0.0.1:0"))
    serving.start()
    port = serving.port or 0
    with socket.create_connection(("127.0.0.1", port), 10) as slow:
        give_up = time.monotonic() + 60
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < give_up:
                slow.sendall(b"G")
                slow.settimeout(0.1)
                with contextlib.suppress(TimeoutError):
                    if not slow.recv(100):
                        break
        assert time.monotonic() < give_up, "each octet gave it more time"
    serving.stop()


@pytest.mark.parametrize("key", ["disk:run", "hold"])
def test_a_server_without_room_is_not_ready(fake: Faked, key: str) -> None:
    there, ask = fake
    there.found = [Trouble("agent:isp", "?"), Trouble(key, "?")]
    assert ask("/readyz") == (503, f"{key}\n")
    assert ask("/healthz")[0] == 200
    there.found = there.found[:1]
    assert ask("/readyz")[0] == 200, "a restart would not mend the agent"
    found = samples(ask("/metrics")[1])
    assert found['revsmtp_troubles{kind="agent"}'] == 1
    assert found['revsmtp_troubles{kind="disk"}'] == 0
    assert unready(there) == []


def test_accounts_that_are_elsewhere_too_are_not_counted(fake: Faked) -> None:
    there, ask = fake
    row = {"status": "provider", "accounts": None, "online": 2, "sessions": 3, "aside": 0}
    there.provider = [row]
    status, text = ask("/metrics")
    found = samples(text)
    assert status == 200
    assert (found["revsmtp_provider_sessions"], found["revsmtp_accounts_online"]) == (3, 2)
    assert "revsmtp_accounts" not in found


def test_accounts_beyond_the_bound_are_summed(fake: Faked) -> None:
    there, ask = fake
    there.held = [
        {
            **{"account": f"a{number}", "messages": 1, "bytes": 10, "quota_messages": 10},
            **{"quota_bytes": 100, "oldest": None, "failed_logins": number},
        }
        for number in range(5)
    ]
    there.held[4]["messages"] = 9
    meters: Meters = there.plugins[0]
    meters.message_held("a4", 10)
    found = samples(ask("/metrics")[1])
    named = [name for name in found if name.startswith("revsmtp_held_messages{")]
    assert named == [f'revsmtp_held_messages{{account="{one}"}}' for one in ("a0", OTHER, "a4")]
    assert found[f'revsmtp_held_messages{{account="{OTHER}"}}'] == 3
    assert found[f'revsmtp_failed_logins_total{{account="{OTHER}"}}'] == 1 + 2 + 3
    assert found['revsmtp_held_quota_ratio{account="a4"}'] == pytest.approx(0.9)


def test_an_address_that_is_taken_costs_the_metrics_and_not_the_server(
    fake: Faked, caplog: pytest.LogCaptureFixture
) -> None:
    there, _ = fake
    first = Serving(there, MetricsSettings(listen="127.0.0.1:0"))
    first.start()
    second = Serving(there, MetricsSettings(listen=f"127.0.0.1:{first.port}"))
    second.start()
    assert "cannot listen" in caplog.text and second.port is None
    assert there.reported == ["metrics:listen"], "it needs a person"
    second.stop()
    first.stop()


def test_a_child_of_a_handler_does_not_keep_their_address() -> None:
    there: Any = Fake()
    serving = Serving(there, MetricsSettings(listen="127.0.0.1:0"))
    serving.start()
    port = serving.port or 0
    with living_child():
        serving.stop()
        with pytest.raises(ConnectionRefusedError):
            get(port, "/")


# -- settings --------------------------------------------------------------------------------------


def said_of(value: object) -> str:
    module: Any = ModuleType("settings")
    module.metrics = value
    return "\n".join(metrics.check_settings(module))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"listen": "9366"}, "metrics: listen"),
        ({"listen": "host:99999"}, "metrics: listen"),
        ({"textfile": "x.txt"}, "metrics: textfile"),
        ({"every": 0}, "metrics: every: found 0, allowed: seconds, 1 to 3600"),
        ({"port": 1}, "metrics: port"),
        ("127.0.0.1:9366", "metrics: found"),
    ],
)
def test_a_wrong_setting_is_said(value: object, said: str) -> None:
    assert said in said_of(value)


def test_either_way_is_enough_and_so_is_none() -> None:
    assert not said_of({"listen": "[::1]:9366"}) and not said_of({"textfile": "/x/y.prom"})
    assert not said_of({}), "the console may have them"
    assert MetricsSettings(listen="[::1]:9366").address == ("::1", 9366)


def test_without_prometheus_client_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("salmon_revsmtp.metrics._installed", lambda: False)
    assert "pip install 'salmon-revsmtp[console]'" in said_of({"listen": "127.0.0.1:9366"})


def test_without_a_server_there_is_nothing_to_read() -> None:
    with pytest.raises(RuntimeError, match="no server runs"):
        metrics.exposition()


# -- the documentation -----------------------------------------------------------------------------


def documented() -> set[str]:
    return set(re.findall(r"^   \* - ``(revsmtp_\w+)``", (DOCS / "metrics.rst").read_text(), re.M))


def test_every_metric_is_documented_and_every_documented_one_is_there(salmon: Salmon) -> None:
    salmon.handle(".*")
    there = Metered()

    async def work(ends: Ends) -> None:
        await ends.open()
        await ends.send(message("one"))
        _, text = await asyncio.to_thread(there.get, "/metrics")
        told = set()
        for family in text_string_to_metric_families(text):
            counter = family.type == "counter"
            told.add(family.name + "_total" * counter + "_info" * (family.type == "info"))
        ours = {name for name in told if name.startswith("revsmtp_")}
        assert ours == documented()

    both_ends(salmon, work, at_provider=plugins_with(there))


def test_the_dashboard_and_the_alerts_name_what_there_is() -> None:
    dashboard = json.loads((DOCS / "metrics/dashboard.json").read_text())
    expressions = [one["expr"] for panel in dashboard["panels"] for one in panel["targets"]]
    text = "\n".join([*expressions, (DOCS / "metrics/alerts.yml").read_text()])
    named = {re.sub(r"_(bucket|sum|count)$", "", one) for one in re.findall(r"revsmtp_\w+", text)}
    assert named and named <= documented()
