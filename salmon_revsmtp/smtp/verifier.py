"""What a server may keep instead of a password (RFC 5802 3)."""

from __future__ import annotations

import base64
import binascii
import re
from typing import NamedTuple

__all__ = ["LEAST_ITERATIONS", "SHA_256", "Verifier"]

# RFC 7677 4: at least this many.
LEAST_ITERATIONS = 4096
# More than this would keep the event loop for half a second at a login.
MOST_ITERATIONS = 1_000_000

SHA_256 = "SCRAM-SHA-256"

_VERIFIER = re.compile(r"SCRAM-SHA-256\$([0-9]{1,9}):([^$:]+)\$([^$:]+):([^$:]+)")


class Verifier(NamedTuple):
    """What a server keeps for SCRAM instead of a password (RFC 5802 3): who has it can check a
    password, and not log in with it."""

    salt: bytes
    stored_key: bytes
    server_key: bytes
    iterations: int

    @classmethod
    def parse(cls, text: str) -> Verifier | None:
        """``SCRAM-SHA-256$iterations:salt$stored:server``, as PostgreSQL writes it; ``None`` for a
        text that does not begin like one.  Raises :class:`ValueError` for one that is broken."""
        if not text.startswith(f"{SHA_256}$"):
            return None
        found = _VERIFIER.fullmatch(text)
        if found is None:
            raise ValueError(f"it is no {SHA_256}$iterations:salt$stored:server")
        try:
            salt, stored, server = (
                base64.b64decode(one, validate=True) for one in found.groups()[1:]
            )
        except binascii.Error:
            raise ValueError("a part of it is no base64") from None
        iterations = int(found[1])
        if not LEAST_ITERATIONS <= iterations <= MOST_ITERATIONS:
            raise ValueError(
                f"{iterations} iterations; {LEAST_ITERATIONS} to {MOST_ITERATIONS} are taken"
            )
        if len(stored) != 32 or len(server) != 32:
            raise ValueError("its keys are no SHA-256")
        return cls(salt, stored, server, iterations)

    def __str__(self) -> str:
        salt, stored, server = (base64.b64encode(one).decode() for one in self[:3])
        return f"{SHA_256}${self.iterations}:{salt}${stored}:{server}"
