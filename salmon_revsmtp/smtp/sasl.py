"""SASL, the server's side: the mechanisms by which a client proves who it is (RFC 4954, RFC 4422).

A mechanism is a generator: it yields challenges, is sent the responses, and returns the name that
has proved itself, or ``None``.  It knows no SMTP.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

from scramp import ScramException, ScramMechanism

__all__ = ["MECHANISMS", "Exchange", "Mechanism", "Passwords", "offered"]

#: Challenges out, responses in; at the end the name, or ``None`` if the login failed.
Exchange = Generator[bytes, bytes, str | None]

#: Name -> password, ``None`` for a name that there is not.
Passwords = Callable[[str], str | None]

# RFC 7677 4: at least this many.
ITERATIONS = 4096


@dataclass(frozen=True)
class Mechanism:
    """One way to log in.

    ``begin``           starts an exchange: its name, the passwords, our host name, the initial
                        response (``None`` without one).
    ``client_first``    the client has the first word, which may be an initial response.
    ``sends_password``  only to be offered under TLS (RFC 4954 4).
    """

    begin: Callable[[str, Passwords, str, bytes | None], Exchange]
    client_first: bool = True
    sends_password: bool = False


def offered(tls: bool) -> tuple[str, ...]:
    """The mechanisms that may be offered, strongest first."""
    return tuple(name for name, one in MECHANISMS.items() if tls or not one.sends_password)


def _proved(passwords: Passwords, name: bytes, password: bytes) -> str | None:
    text = name.decode("utf-8", "replace")
    known = passwords(text)
    expected = secrets.token_hex() if known is None else known
    return text if hmac.compare_digest(expected.encode(), password) and known is not None else None


def _plain(mechanism: str, passwords: Passwords, hostname: str, initial: bytes | None) -> Exchange:
    """RFC 4616."""
    message = initial if initial is not None else (yield b"")
    parts = message.split(b"\0")
    # No one may act for another.
    if len(parts) != 3 or parts[0] not in (b"", parts[1]):
        return None
    return _proved(passwords, parts[1], parts[2])


def _login(mechanism: str, passwords: Passwords, hostname: str, initial: bytes | None) -> Exchange:
    name = initial if initial is not None else (yield b"Username:")
    password = yield b"Password:"
    return _proved(passwords, name, password)


def _cram_md5(
    mechanism: str, passwords: Passwords, hostname: str, initial: bytes | None
) -> Exchange:
    """RFC 2195 2: a number that is never the same, where others have a time."""
    challenge = f"<{secrets.randbits(64)}.{secrets.randbits(64)}@{hostname}>".encode()
    name, _, digest = (yield challenge).rpartition(b" ")
    text = name.decode("utf-8", "replace")
    known = passwords(text)
    secret = secrets.token_hex() if known is None else known
    expected = hmac.new(secret.encode(), challenge, hashlib.md5).hexdigest()
    same = hmac.compare_digest(expected.encode(), digest.lower())
    return text if same and known is not None else None


def _scram(mechanism: str, passwords: Passwords, hostname: str, initial: bytes | None) -> Exchange:
    """RFC 5802, RFC 7677."""
    scram = ScramMechanism(mechanism)
    found: list[str] = []

    def stored(name: str) -> object:
        known = passwords(name)
        found.extend([] if known is None else [name])
        password = secrets.token_hex() if known is None else known
        return scram.make_auth_info(password, iteration_count=ITERATIONS)

    server = scram.make_server(stored)
    try:
        server.set_client_first((initial or (yield b"")).decode())
        final = yield server.get_server_first().encode()
        server.set_client_final(final.decode())
        yield server.get_server_final().encode()
    except (ScramException, UnicodeDecodeError):
        return None
    return found[0] if found else None


#: Strongest first.
MECHANISMS: Mapping[str, Mechanism] = {
    "SCRAM-SHA-256": Mechanism(_scram),
    "SCRAM-SHA-1": Mechanism(_scram),
    "CRAM-MD5": Mechanism(_cram_md5, client_first=False),
    "PLAIN": Mechanism(_plain, sends_password=True),
    "LOGIN": Mechanism(_login, sends_password=True),
}
