"""Prometheus' own promtool reads the metrics, the alert rules, and what becomes of them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.ends import Ends, both_ends, message
from support.salmon import Salmon
from test_metrics import Metered, plugins_with

pytestmark = pytest.mark.interop

METRICS = Path(__file__).parent.parent.parent / "docs/metrics"


@pytest.fixture(autouse=True)
def tool() -> None:
    if shutil.which("promtool") is None:
        reason = "promtool is missing; tests/interop/install-server prometheus"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def promtool(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run(
        ["promtool", *arguments], input=text, capture_output=True, text=True, cwd=METRICS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_alert_rules_are_rules_and_do_what_they_say() -> None:
    assert "SUCCESS" in promtool("check", "rules", "alerts.yml")
    assert "SUCCESS" in promtool("test", "rules", "alerts-test.yml")
    rules = [line for line in (METRICS / "alerts.yml").read_text().split("\n") if "- alert" in line]
    tested = (METRICS / "alerts-test.yml").read_text()
    assert all(line.split()[-1] in tested for line in rules), "each is tried"


def test_the_metrics_are_named_as_prometheus_likes_them(salmon: Salmon) -> None:
    salmon.handle(".*")
    there, home = Metered(), Metered()

    async def work(ends: Ends) -> None:
        await ends.open()
        await ends.send(message("one"))
        await ends.until(lambda: ends.handled)
        for end in (there, home):
            _, text = await asyncio.to_thread(end.get, "/metrics")
            assert promtool("check", "metrics", text=text) == ""

    both_ends(salmon, work, plugins=plugins_with(home), at_provider=plugins_with(there))


def test_what_the_dashboard_asks_is_a_question_that_prometheus_understands(tmp_path: Path) -> None:
    dashboard = json.loads((METRICS / "dashboard.json").read_text())
    asked = [one["expr"] for panel in dashboard["panels"] for one in panel["targets"]]
    rules = "".join(
        f"  - record: asked:{number}\n    expr: >-\n      "
        + expression.replace("$__rate_interval", "5m").replace("$instance", ".+")
        + "\n"
        for number, expression in enumerate(asked)
    )
    file = tmp_path / "rules.yml"
    file.write_text(f"groups:\n- name: dashboard\n  rules:\n{rules}")
    assert f"{len(asked)} rules found" in promtool("check", "rules", str(file))
