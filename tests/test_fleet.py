"""What the simulation of a provider with very many customers counts."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import fleet

PAGE = Path(__file__).parent.parent / "docs/several-hosts.rst"


@pytest.mark.parametrize("down", [0.0, 5.0, 600.0])
def test_each_customer_comes_back_once_and_each_dial_is_counted(down: float) -> None:
    found = fleet.come_back(3000, random.Random(1), down=down)
    assert len(found.back) == 3000
    assert sum(found.dials.values()) == 3000 + found.refused + found.gave_up
    assert min(found.back) >= down
    waits = [later - sooner for sooner, later in pairwise(sorted(found.back))]
    assert min(waits) > 0.9 * fleet.LOGIN, "one core does the logins"


def test_customers_wait_as_their_schedule_has_it() -> None:
    """At once, a little varied; where no one answers, a minute, and then two."""
    few = fleet.come_back(10, random.Random(1))
    assert min(few.back) >= 1.6 and max(few.back) <= 2.4 + 11 * fleet.LOGIN
    refused = fleet.come_back(10, random.Random(1), down=5.0)
    assert refused.refused == 10
    assert min(refused.back) >= 1.6 + 48 and max(refused.back) <= 2.4 + 72 + 1
    twice = fleet.come_back(10, random.Random(1), down=100.0)
    assert twice.refused == 20


def test_who_waits_for_too_long_gives_up() -> None:
    least = int(fleet.PATIENCE / fleet.LOGIN)
    assert fleet.come_back(least, random.Random(1)).gave_up == 0
    assert fleet.come_back(2 * least, random.Random(1)).gave_up > 0


def test_the_same_arguments_print_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--customers", "20000", "--nodes", "4"]
    for seed in ("1", "1", "2"):
        fleet.main([*arguments, "--seed", seed])
    first, again, other = capsys.readouterr().out.split("20,000 customers")[1:]
    assert first == again != other


def test_the_page_has_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    fleet.main(["--customers", "1000000", "--nodes", "20"])
    printed = "".join(
        f"    {line}".rstrip() + "\n" for line in capsys.readouterr().out.splitlines()
    )
    assert printed in PAGE.read_text()
