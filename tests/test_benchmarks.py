"""The benchmarks' table: what is said of a peer that is not here, or failed, and of the targets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.feeding import message
from benchmarks.table import Case, Section, Target, as_json, as_markdown


def sections() -> list[Section]:
    ours, limit = Case("ours", lambda: 0.0), Case("limit", lambda: 0.0)
    ours.figures, limit.figures = [30.0, 10.0, 20.0], [40.0]
    peer = Case("peer", lambda: 0.0)
    peer.figures = [5.0]
    absent = Case("absent", lambda: 0.0, missing="not installed: Debian's package absent")
    broken = Case("broken", lambda: 0.0, failed="failed: it hung")
    cases = [ours, peer, absent, broken, limit]
    return [Section("Intake", "messages/s", cases, ours="ours", limit="limit")]


TARGETS = [
    Target("twice the peer", lambda found: found["Intake"].median("ours"), lambda _: 10.0),
    Target("at most 10", lambda found: found["Intake"].median("ours"), lambda _: 10.0, False),
    Target("at most 20", lambda found: found["Intake"].median("ours"), lambda _: 20.0, False),
    Target("none", lambda _: 0.0, lambda _: 0.0, False),
    Target("of what is not here", lambda found: found["Intake"].median("absent"), lambda _: 1.0),
]


def test_medians_spread_ratios_and_what_is_not_here() -> None:
    lines = as_markdown(sections(), TARGETS, {"date": "today"}, 3).splitlines()
    assert "| ours | 20.0 | 10.0 to 30.0 |  | 50 % |" in lines
    assert "| peer | 5.00 | 5.00 to 5.00 | 4.00 times as good | 12 % |" in lines
    assert "| absent | not installed: Debian's package absent |  |  |  |" in lines
    assert "| broken | failed: it hung |  |  |  |" in lines
    assert "| twice the peer | 10.0 | 20.0 | yes |" in lines
    assert "| at most 10 | 10.0 | 20.0 | no |" in lines
    assert "| at most 20 | 20.0 | 20.0 | yes |" in lines
    assert "| none | 0 | 0 | yes |" in lines
    assert "| of what is not here | 1.00 | - | not measured |" in lines


def test_the_same_for_programs() -> None:
    found = json.loads(as_json(sections(), TARGETS, {"date": "today"}, 3))
    [section] = found["sections"]
    assert [case["median"] for case in section["cases"]] == [20.0, 5.0, None, None, 40.0]
    assert section["cases"][0]["figures"] == [30.0, 10.0, 20.0]
    assert [target["reached"] for target in found["targets"]] == [
        "yes",
        "no",
        "yes",
        "yes",
        "not measured",
    ]


def test_every_message_is_its_own_and_has_its_size() -> None:
    for octets in (1000, 4000, 100_001):
        made = [b"".join(message(number, octets)) for number in range(3)]
        assert [len(one) for one in made] == [octets] * 3
        assert len(set(made)) == 3
        assert all(one.endswith(b"\r\n") and b"\n." not in one for one in made)
