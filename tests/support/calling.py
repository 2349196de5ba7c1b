"""Customers that a test plays, by AUTH PLAIN: a provider that offers TLS from the start, or
SCRAM-SHA-256 in the clear."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator

from scramp import ScramClient

from support.configuration import PASSWORD
from support.dialogue import Dialogue

__all__ = ["called", "log_in", "push_session"]


@contextlib.asynccontextmanager
async def called(port: int) -> AsyncIterator[Dialogue]:
    """A customer that has greeted."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    customer = Dialogue(reader, writer)
    try:
        await customer.replied(220)
        customer.say("EHLO x")
        await customer.replied(250)
        yield customer
    finally:
        writer.close()


async def log_in(customer: Dialogue, name: str = "acme", password: str = PASSWORD) -> str:
    """Log in by SCRAM-SHA-256; returns the last reply."""
    scram = ScramClient(["SCRAM-SHA-256"], name, password)
    first = base64.b64encode(scram.get_client_first().encode()).decode()
    customer.say(f"AUTH SCRAM-SHA-256 {first}")
    heard = await customer.hear()
    if not heard.startswith("334 "):
        return heard
    scram.set_server_first(base64.b64decode(heard[4:]).decode())
    customer.say(base64.b64encode(scram.get_client_final().encode()).decode())
    heard = await customer.hear()
    if not heard.startswith("334 "):
        return heard
    scram.set_server_final(base64.b64decode(heard[4:]).decode())
    customer.say("")
    return await customer.hear()


@contextlib.asynccontextmanager
async def push_session(
    port: int, name: str = "acme", password: str = PASSWORD
) -> AsyncIterator[Dialogue]:
    """A customer with a session that stays open; the next that it hears is a message, or QUIT."""
    async with called(port) as customer:
        assert (await log_in(customer, name, password))[:3] == "235"
        customer.say("XHOLD")
        await customer.replied(250)
        customer.say("ATRN")
        await customer.replied(250)
        customer.say("220 customer")
        await customer.asks("EHLO", "250 HELP")
        yield customer
