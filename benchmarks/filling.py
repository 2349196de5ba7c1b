"""A hold store with messages in it: a process.

``python -m benchmarks.filling FOLDER MESSAGES OCTETS`` fills it, for the benchmarks' account, and
prints the seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from benchmarks.feeding import RECIPIENT, SENDER, message
from benchmarks.project import ACCOUNT
from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.provider.hold.store import Arrival
from salmon_revsmtp.smtp.envelope import Envelope

__all__: list[str] = []

# Messages that are committed together.
BATCH = 1000


def main(folder: Path, messages: int, octets: int) -> float:
    """Seconds for so many messages."""
    store = EmbeddedStore(folder)
    envelope = Envelope(SENDER, (RECIPIENT,))
    started = time.perf_counter()
    for first in range(0, messages, BATCH):
        numbers = range(first, min(first + BATCH, messages))
        store.put([Arrival(envelope, (ACCOUNT,), message(one, octets)) for one in numbers])
    store.close()
    return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps({"seconds": main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))}))
