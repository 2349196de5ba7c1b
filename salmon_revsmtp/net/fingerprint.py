"""The fingerprint of a certificate, as it is written in settings."""

from __future__ import annotations

import re

__all__ = ["FINGERPRINT", "normal_fingerprint"]

#: What may be said for one.
FINGERPRINT = (
    "'sha256:' and 64 hexadecimal digits, with or without a colon between each two of them"
)

_SAID = re.compile(r"sha256:([0-9a-f]{64}|[0-9a-f]{2}(?::[0-9a-f]{2}){31})", re.IGNORECASE)


def normal_fingerprint(said: str) -> str:
    """A fingerprint in the one form in which it is compared: lower case, no colons between octets.
    Raises :class:`ValueError` for what is none."""
    found = _SAID.fullmatch(said.strip())
    if not found:
        raise ValueError("that is no SHA-256 fingerprint")
    return "sha256:" + found[1].replace(":", "").lower()
