"""Links that let someone in once: for whoever may read the project's ``run`` folder.

The console that runs writes where it is, and a secret that lasts as long as it runs, into a file
for its owner only.  ``salmon-revsmtp console`` makes a link of these, and the console takes each
once.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

__all__ = ["FILE", "LASTS", "Links", "Running"]

FILE = Path("run/console.json")

# Seconds that a link is good for.
LASTS = 300
# Octets of the secret, and of what makes each link another one.
SECRET, NONCE = 32, 16

_TOKEN = re.compile(r"([0-9]{1,12})[.]([A-Za-z0-9_-]{10,64})[.]([0-9a-f]{64})")
# Never what someone has put there meanwhile, such as a link to another file.
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class Running(NamedTuple):
    """The console that runs.

    ``url``     its address, without a slash at the end.
    ``listen``  where it listens: an address and a port.
    ``secret``  what its links are made of.
    """

    url: str
    listen: tuple[str, int]
    secret: bytes

    def link(self, now: float | None = None) -> str:
        """A new link."""
        until = int((time.time() if now is None else now) + LASTS)
        nonce = secrets.token_urlsafe(NONCE)
        return f"{self.url}/enter?token={until}.{nonce}.{_sign(self.secret, until, nonce)}"

    def write(self, project: Path) -> None:
        """Into the file.  Raises :class:`OSError`."""
        path = project / FILE
        beside = path.with_name(f".{path.name}")
        row = {"url": self.url, "listen": self.listen, "secret": self.secret.hex()}
        beside.unlink(missing_ok=True)  # one of before may have another mode
        with os.fdopen(os.open(beside, _NEW, 0o600), "w") as file:
            json.dump(row, file)
        _give_to_owner(beside)
        beside.rename(path)

    @classmethod
    def read(cls, project: Path) -> Running | None:
        """What the file says, if there is one.  Raises :class:`OSError`."""
        try:
            row = json.loads((project / FILE).read_text())
            host, port = row["listen"]
            return cls(str(row["url"]), (str(host), int(port)), bytes.fromhex(row["secret"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None

    @staticmethod
    def remove(project: Path) -> None:
        """It runs no more."""
        with contextlib.suppress(OSError):
            (project / FILE).unlink(missing_ok=True)


class Links:
    """Takes links.  On one thread.  ``clock`` gives seconds since the epoch, as that of the command
    does."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.secret = secrets.token_bytes(SECRET)
        self._clock = clock
        self._used: dict[str, int] = {}  # until when each would have been good

    def take(self, token: str) -> bool:
        """Whether it is one of ours, good still, and not used before.  It is used now."""
        found = _TOKEN.fullmatch(token)
        if found is None:
            return False
        until, nonce = int(found[1]), found[2]
        if not hmac.compare_digest(found[3], _sign(self.secret, until, nonce)):
            return False
        now = self._clock()
        self._used = {one: good for one, good in self._used.items() if good >= now}
        # What is good for longer was made when the clock was wrong.
        if not now <= until <= now + LASTS + 1 or nonce in self._used:
            return False
        self._used[nonce] = until
        return True


def _sign(secret: bytes, until: int, nonce: str) -> str:
    return hmac.digest(secret, f"link {until} {nonce}".encode(), "sha256").hex()


def _give_to_owner(path: Path) -> None:
    """What root makes in someone's folder belongs to whom the folder belongs to."""
    if os.geteuid() == 0:
        above = path.parent.stat()
        os.chown(path, above.st_uid, above.st_gid)
