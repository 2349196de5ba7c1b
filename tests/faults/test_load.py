"""Much mail, large mail, many agents: all of it arrives once, and memory has bounds.

The bounds are those that hold on any machine: a factor of the message's size, and a constant.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from load import LOADS, MB, Result, parser_alone, run

pytestmark = pytest.mark.long

# What Python, its allocator and the books on what has been served may take beside the messages.
CONSTANT = 60 * MB


def loaded(folder: Path, name: str) -> Result:
    """The result of a load of which every message has come once, or has been refused."""
    load = LOADS[name]
    result = run(load, folder)
    expected = load.agents * (load.messages + load.then)
    assert (result.handled, result.twice) == (expected - result.refused, 0)
    assert (result.outcomes, result.left) == ({"collected": load.agents}, 0)
    assert result.sessions == 2 * load.agents, "one for the mail, one that says there is no more"
    return result


@pytest.mark.parametrize("name", ["many", "many-queued", "agents"])
def test_memory_does_not_grow_with_the_number_of_messages(tmp_path: Path, name: str) -> None:
    result = loaded(tmp_path, name)
    assert result.refused == 0
    assert result.grown < CONSTANT
    assert result.provider < CONSTANT


@pytest.mark.parametrize("name", ["refused", "refused-data", "refused-chunks"])
def test_a_message_over_the_limit_is_refused_and_the_session_goes_on(
    tmp_path: Path, name: str
) -> None:
    load, result = LOADS[name], loaded(tmp_path, name)
    assert result.refused == 1
    if load.wire == "provider":  # it has announced the SIZE, and nothing else has come
        assert result.grown < CONSTANT / 4
    else:
        assert result.heard == {"552": 1, "250": 1}
        assert result.grown < load.limit + CONSTANT


@pytest.mark.parametrize("name", ["large-queued", "large-queued-data"])
def test_a_large_message_in_queue_mode(tmp_path: Path, name: str) -> None:
    """It is in the queue when it has come, and not in memory."""
    load, result = LOADS[name], loaded(tmp_path, name)
    assert result.grown < CONSTANT
    assert result.provider < 1.2 * load.octets + CONSTANT


def test_a_large_message_in_router_mode(tmp_path: Path) -> None:
    """Salmon's own parser is most of it; ours is what stands beside that."""
    load = LOADS["large"]
    (tmp_path / "alone").mkdir()
    alone = parser_alone(tmp_path / "alone", load.octets)
    result = loaded(tmp_path, "large")
    assert result.grown - alone["grown"] < 3.2 * load.octets + CONSTANT


def test_a_provider_that_is_faster_than_the_handlers(tmp_path: Path) -> None:
    """It is not read from while enough is unanswered."""
    load, result = LOADS["slow"], loaded(tmp_path, "slow")
    assert result.heard == {"250": load.messages}
    assert load.messages * load.octets > 2 * CONSTANT
    assert result.grown < CONSTANT / 2
