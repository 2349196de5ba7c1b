"""A service that listens, in this process."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from salmon_revsmtp.net.listener import Listener
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from support.configuration import agent_keys, configuration
from support.salmon import Salmon


@contextlib.asynccontextmanager
async def listener(
    salmon: Salmon, *, plugins: Plugins | None = None, **service: Any
) -> AsyncIterator[Listener]:
    keys = {"hostname": "mail.example.org", "listen": "127.0.0.1:0", **service}
    plugins = plugins or Plugins.load()
    valid = configuration(agent_keys(366), default=keys, plugins=plugins)
    with Collector(valid, plugins, lambda: salmon.relay) as collector:
        [one] = await collector.listeners()
        await one.start()
        yield one
        await one.stop(5)
