"""The loop that a server has, whatever a boot module has set for others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from salmon_revsmtp.server.eventloop import run


class Others(asyncio.DefaultEventLoopPolicy):
    """As uvloop's, which ``uvloop.install()`` sets."""

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        raise AssertionError("another loop is made")


@pytest.fixture
def others() -> Iterator[Others]:
    before, others = asyncio.get_event_loop_policy(), Others()
    asyncio.set_event_loop_policy(others)
    yield others
    asyncio.set_event_loop_policy(before)


def test_the_loop_is_asyncios_own(others: Others) -> None:
    async def main() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert type(run(main())) is asyncio.SelectorEventLoop
    assert asyncio.get_event_loop_policy() is others


def test_what_it_raises_is_raised(others: Others) -> None:
    async def main() -> None:
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        run(main())
