"""Reach a host by its name: all its addresses, none of which can hold up the others (RFC 8305)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from typing import Any

from salmon_revsmtp.net.outcome import Failed
from salmon_revsmtp.net.words import came_back, reach_advice

__all__ = ["dial"]

# Seconds before the next address is tried beside those that have not answered (RFC 8305 5).
HEAD_START = 0.25

# Family, type, protocol and address, as getaddrinfo has them.
_Address = tuple[int, int, int, Any]


async def dial(host: str, port: int, timeout: float, setting: str = "server") -> socket.socket:
    """A connected socket.  ``timeout`` in seconds, for finding the addresses and for each of them;
    ``setting`` is where a person wrote the host.

    Raises :class:`~salmon_revsmtp.net.outcome.Failed`, which says how each address failed.
    """
    addresses = await _addresses(host, port, timeout, setting)
    connecting: set[asyncio.Task[socket.socket]] = set()
    failures: list[_NotReached] = []
    try:
        while addresses or connecting:
            if addresses:
                connecting.add(asyncio.create_task(_connected(addresses.pop(0), timeout)))
            done, connecting = await asyncio.wait(
                connecting,
                timeout=HEAD_START if addresses else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            failures += [_failure(error) for one in done if (error := one.exception())]
            if found := [one.result() for one in done if not one.exception()]:
                for superfluous in found[1:]:
                    superfluous.close()
                return found[0]
    finally:
        for one in connecting:
            one.cancel()
        for result in await asyncio.gather(*connecting, return_exceptions=True):
            if isinstance(result, socket.socket):
                result.close()
    every = [str(one) for one in failures]
    every += dict.fromkeys(one.advice for one in failures if one.advice)  # each once
    raise Failed("; ".join(every))


class _NotReached(Failed):
    """An address failed; ``advice`` says what to try."""

    def __init__(self, text: str, advice: str) -> None:
        super().__init__(text)
        self.advice = advice


def _failure(error: BaseException) -> _NotReached:
    return error if isinstance(error, _NotReached) else _NotReached(str(error), "")


async def _addresses(host: str, port: int, timeout: float, setting: str) -> list[_Address]:
    """The addresses of a host, those of IPv6 and IPv4 in turn (RFC 8305 4)."""
    looking = asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    try:
        found = await asyncio.wait_for(looking, timeout)
    except (asyncio.TimeoutError, TimeoutError):
        raise Failed(
            f"its name was not resolved in {timeout:g} seconds; is this machine online, and does "
            "DNS work here?"
        ) from None
    except (OSError, UnicodeError) as error:
        raise Failed(
            f"its name was not resolved ({came_back(error)}); {reach_advice(error, setting)}"
        ) from None
    every = dict.fromkeys((family, kind, proto, where) for family, kind, proto, _, where in found)
    families: dict[int, list[_Address]] = {}
    for one in every:
        families.setdefault(one[0], []).append(one)
    turns = itertools.zip_longest(*families.values())
    return [one for turn in turns for one in turn if one is not None]


async def _connected(address: _Address, timeout: float) -> socket.socket:
    family, kind, proto, where = address
    try:
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(socket.socket(family, kind, proto))
            connection.setblocking(False)
            reaching = asyncio.get_running_loop().sock_connect(connection, where)
            await asyncio.wait_for(reaching, timeout)
            stack.pop_all()  # it stays open
            return connection
    except (asyncio.TimeoutError, TimeoutError) as error:
        text = f"no connection in {timeout:g} seconds"
        if isinstance(error, OSError) and error.errno:  # the system has waited long enough
            text = came_back(error)
        raise _NotReached(f"{where[0]}: {text}", reach_advice(TimeoutError())) from None
    except OSError as error:
        raise _NotReached(f"{where[0]}: {came_back(error)}", reach_advice(error)) from None
