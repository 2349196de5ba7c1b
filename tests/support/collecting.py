"""Collections in this process: from any provider, or from one that follows a script."""

from __future__ import annotations

import asyncio
from typing import Any

from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from support.configuration import DEFAULT, agent_keys, configuration
from support.dialogue import Dialogue, Script, scripted
from support.messages import MESSAGE
from support.salmon import Salmon
from support.tls import server_tls


async def collect(
    salmon: Salmon,
    *agents: dict[str, Any],
    plugins: Plugins | None = None,
    **services: dict[str, Any],
) -> list[Report]:
    plugins = plugins or Plugins.load()
    given: dict[str, Any] = services
    valid = configuration(*agents, plugins=plugins, **given)
    with Collector(valid, plugins, lambda: salmon.relay) as collector:
        return await collector.collect(valid.agents)


def collect_from(
    salmon: Salmon, *scripts: Script, plugins: Plugins | None = None, **keys: Any
) -> Report:
    """Collect once from a provider with these scripts."""
    tls = server_tls() if keys.get("tls") == "implicit" else None

    async def main() -> Report:
        async with scripted(*scripts, tls=tls) as port:
            [report] = await collect(salmon, agent_keys(port, **keys), plugins=plugins)
        return report

    return asyncio.run(main())


def exchange(
    salmon: Salmon,
    *recipients: str,
    data: bytes = MESSAGE,
    sender: str = "ann@example.net",
    mail: str = "",
    rcpt: str = "",
    times: int = 1,
    plugins: Plugins | None = None,
    agent: dict[str, Any] | None = None,
    **service: Any,
) -> tuple[list[str], Report]:
    """Send one message in one session, ``times`` over; the replies to its data, the report."""
    heard: list[str] = []

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        for _ in range(times):
            provider.say(f"MAIL FROM:<{sender}>{mail}")
            await provider.replied(250)
            for recipient in recipients:
                provider.say(f"RCPT TO:<{recipient}>{rcpt}")
                await provider.replied(250)
            provider.say(b"BDAT %d LAST\r\n%s" % (len(data), data[:-2]))
            heard.append(await provider.hear())
            if heard[-1].startswith("353"):
                heard.extend([await provider.hear() for _ in (*recipients, "all")])
        await provider.quit()

    async def done(provider: Dialogue) -> None:
        await provider.up_to_atrn()
        await provider.asks("ATRN", "453 no mail")

    async def main() -> Report:
        # A second session comes only if the first has taken anything.
        async with scripted(script, done) as port:
            [report] = await collect(
                salmon,
                agent_keys(port, **(agent or {})),
                plugins=plugins,
                default={**DEFAULT, **service},
            )
            if report.sessions == 1:
                reader, writer = await asyncio.open_connection("localhost", port)
                await finish(Dialogue(reader, writer))
        return report

    return heard, asyncio.run(main())


async def finish(customer: Dialogue) -> None:
    """Play the customer of the script ``done``."""
    await customer.hear("220")
    customer.say("EHLO x")
    await customer.replied(250)
    for line in ("AUTH CRAM-MD5", "x", "EHLO x", "ATRN"):
        customer.say(line)
        await customer.hear()
        if line == "EHLO x":
            await customer.hear()
            await customer.hear()
