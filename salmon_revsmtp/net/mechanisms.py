"""The SASL mechanisms that a client of ours can do, by name: what settings may say.

It imports nothing, so that settings are read without what only a login needs.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["CHALLENGES", "PASSWORDS", "VERIFIED", "Mechanism"]

Mechanism = Literal["SCRAM-SHA-256", "SCRAM-SHA-1", "CRAM-MD5", "PLAIN", "LOGIN"]

# Strongest first.  The challenges prove the password without sending it; the others send it, and
# are used only with a server whose certificate was verified (RFC 4954 4; RFC 2645 5.1.1 wants
# CRAM-MD5 of every provider).
CHALLENGES: tuple[Mechanism, ...] = ("SCRAM-SHA-256", "SCRAM-SHA-1", "CRAM-MD5")
PASSWORDS: tuple[Mechanism, ...] = ("PLAIN", "LOGIN")

# What tls may be where the server's certificate is verified.
VERIFIED = ("implicit", "starttls")
