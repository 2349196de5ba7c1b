"""A process that brings up providers to be killed: imports everything once, then forks.

    python -m support.killable_provider FOLDER SETTINGS

SETTINGS are JSON: the accounts, the provider's and those of the service ``mx``, and whether what
has a limit with the database has a short one (``soon``).  A line of JSON on standard input forks a
provider in FOLDER: ``{"die_at": 17, "after": "provider/intake.py:deliver"}`` is one that kills
itself at the 17th line, from the first call of that function on, of the code that makes a message
safe or hands it over.  Answers: ``pid 4711``, ``up`` when it listens, and at its death ``ended
-9``.  SIGTERM stops it, and it ends with status 0.  In ``ledger`` there is a line for each
notification that the relay was given.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from typing import Any

from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.daemon import Daemon
from support.configuration import configuration
from support.dying import die_at
from support.killable import Sent

# Where a death may cost or double a message.
PERILOUS = ("provider/", "delivery/", "net/driver.py", "service/", "files.py")

IDLE = "idle_in_transaction_session_timeout"


async def serve(settings: dict[str, Any]) -> None:
    if settings["lease"] is not None:
        from salmon_revsmtp.provider.hold.postgres import lease, store

        lease.LEASE, lease.MARGIN = settings["lease"], settings["lease"] / 3
        store.RENEW = settings["lease"] / 5
    if settings["soon"]:
        from salmon_revsmtp.provider import settling
        from salmon_revsmtp.provider.hold.postgres import database

        # What a connection had locked that no one hears of any more is free after the last of them.
        limits: dict[str, int] = {"statement_timeout": 3, "lock_timeout": 1, IDLE: 4}
        text = "; ".join(f"SET LOCAL {name} = '{seconds}s'" for name, seconds in limits.items())
        vars(database)["_LIMITS"] = text if isinstance(database._LIMITS, str) else limits
        database.ANSWER, database.LOOK, database.WAIT, database.TRY = 2, 0.1, 1.0, 1.0
        settling.RETRY = 0.2
    plugins = Plugins.load()
    valid = configuration(
        plugins=plugins,
        accounts=settings["accounts"],
        provider=settings["provider"],
        mx=settings["mx"],
    )
    with Collector(valid, plugins, Sent) as collector:
        daemon = Daemon(collector, plugins)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, daemon.stop)
        await daemon.run(lambda: print("up", flush=True))


def main() -> None:
    folder, settings = sys.argv[1:]
    os.chdir(folder)
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            if request.get("die_at"):
                die_at(request["die_at"], PERILOUS, request["after"])
            asyncio.run(serve(json.loads(settings)))
            os._exit(0)
        print("pid", pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print("ended", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
