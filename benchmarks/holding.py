"""Our own provider with messages to send: a process.

``python -m benchmarks.holding MESSAGES OCTETS FOLDER`` prints its port, and, when a customer has
them all, the seconds from the reversal to the last answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

from benchmarks.feeding import RECIPIENT, SENDER, message
from benchmarks.processes import end_with_parent
from benchmarks.project import ACCOUNT, DOMAIN, PASSWORD
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.accounts import Accounts
from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.provider.hold.store import Arrival
from salmon_revsmtp.provider.server import Provider
from salmon_revsmtp.provider.settings import AccountSettings
from salmon_revsmtp.smtp.envelope import Envelope

__all__: list[str] = []


class _Clock(logging.Handler):
    """Reads the time from the provider's own log: the reversal, and each message's answer."""

    def __init__(self, messages: int) -> None:
        super().__init__()
        self._messages, self._answered = messages, 0
        self._reversed_at = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "the connection is reversed" in text and not self._reversed_at:
            self._reversed_at = record.created
        elif " key=" in text:
            self._answered += 1
            if "'250 " not in text:
                print(json.dumps({"failure": text}), flush=True)
            if self._answered == self._messages:
                seconds = record.created - self._reversed_at
                print(json.dumps({"messages": self._messages, "seconds": seconds}), flush=True)


async def main(messages: int, octets: int, folder: Path) -> None:
    """The process."""
    store = EmbeddedStore(folder)
    envelope = Envelope(SENDER, (RECIPIENT,))
    for number in range(messages):
        store.put([Arrival(envelope, (ACCOUNT,), message(number, octets))])
    log = logging.getLogger("salmon_revsmtp.provider")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(_Clock(messages))
    account = AccountSettings.model_validate(
        {"name": ACCOUNT, "password": PASSWORD, "domains": [DOMAIN]}
    )
    provider = Provider(
        Accounts([account]), store, lambda *_: None, Plugins(), "provider.example.net"
    )
    async with provider:
        print(json.dumps({"port": provider.port}), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    end_with_parent()
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
