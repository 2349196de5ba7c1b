"""SASL, the server's side: the mechanisms by which a client proves who it is (RFC 4954, RFC 4422).

A mechanism is a generator: it yields challenges, is sent the responses, and returns the name that
has proved itself, or ``None``.  Where it needs to know what proves a name it yields a
:class:`WhoIs`, and is sent the :class:`Secret`.  It knows no SMTP.

What is known of an account is a :class:`Secret`.  For a name that there is not, one is made up, so
that a stranger learns neither from the words nor from the time whether there is such an account.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from scramp import ScramException, ScramMechanism

from salmon_revsmtp.smtp.verifier import LEAST_ITERATIONS, SHA_256, Verifier

__all__ = ["MECHANISMS", "Exchange", "Mechanism", "Secret", "WhoIs", "offered"]


@dataclass(frozen=True)
class WhoIs:
    """What proves that one is ``name`` has to be known before an exchange can go on."""

    name: str


#: Challenges out, responses in; at the end the name, or ``None`` if the login failed.
Exchange = Generator[bytes | WhoIs, Any, str | None]

# Of verifiers that are made here.
ITERATIONS = LEAST_ITERATIONS

# Salts of names that there are not are the same each time one asks, as the others are.
_MADE_UP = secrets.token_bytes(32)


class Secret:
    """What proves that one is ``name``: a password, or a verifier of it.

    ``known``  there is such an account; otherwise nothing proves it.
    """

    def __init__(
        self,
        name: str,
        password: str | None = None,
        verifier: Verifier | None = None,
        known: bool = True,
    ) -> None:
        self.known = known
        self._name, self._password = name, password
        self._verifiers = {} if verifier is None else {SHA_256: verifier}

    def __repr__(self) -> str:
        return f"<Secret of {self._name}>"

    def verifier(self, mechanism: str) -> Verifier:
        """What SCRAM needs; one that nothing matches where there is no other.  Raises
        :class:`ScramException` for a password that SASLprep forbids."""
        found = self._verifiers.get(mechanism)
        if found is None:
            if self._password is None:
                found = _made_up(mechanism, self._name)
            else:
                found = _verifier(mechanism, self._password)
            self._verifiers[mechanism] = found
        return found

    def is_password(self, password: bytes) -> bool:
        """Whether this is the password (RFC 4616), prepared as SCRAM's are.  It takes as long for
        whatever is here."""
        try:
            text = password.decode()
            ours = self.verifier(SHA_256)
            theirs = _verifier(SHA_256, text, ours.iterations, ours.salt)
        except (ScramException, UnicodeDecodeError):
            # SASLprep knows no such password; it may be ours octet for octet all the same.
            ours_too = self._password is not None and self.known
            return ours_too and hmac.compare_digest(str(self._password).encode(), password)
        return self.known and hmac.compare_digest(ours.stored_key, theirs.stored_key)

    def digest(self, challenge: bytes) -> str:
        """What CRAM-MD5 (RFC 2195) makes of a challenge; of a verifier nothing can be made."""
        secret = self._password if self._password is not None else secrets.token_hex()
        return hmac.new(secret.encode(), challenge, hashlib.md5).hexdigest()


def _verifier(
    mechanism: str, password: str, iterations: int | None = None, salt: bytes | None = None
) -> Verifier:
    scram = ScramMechanism(mechanism)
    rounds = iterations or ITERATIONS
    return Verifier(*scram.make_auth_info(password, iteration_count=rounds, salt=salt))


def _made_up(mechanism: str, name: str) -> Verifier:
    """One that nothing matches, as like to the others as may be."""
    salt = hmac.new(_MADE_UP, name.encode("utf-8", "replace"), hashlib.sha256).digest()
    size = 20 if mechanism == "SCRAM-SHA-1" else 32
    return Verifier(salt, secrets.token_bytes(size), secrets.token_bytes(size), ITERATIONS)


@dataclass(frozen=True)
class Mechanism:
    """One way to log in.

    ``begin``           starts an exchange: its name, our host name, the initial response (``None``
                        without one).
    ``client_first``    the client has the first word, which may be an initial response.
    ``sends_password``  only to be offered under TLS (RFC 4954 4).
    ``needs_password``  a verifier of the password is not enough.
    """

    begin: Callable[[str, str, bytes | None], Exchange]
    client_first: bool = True
    sends_password: bool = False
    needs_password: bool = False


def offered(tls: bool, passwords: bool = True) -> tuple[str, ...]:
    """The mechanisms that may be offered, strongest first.  ``passwords``: there are accounts whose
    password is known, and not only a verifier of it."""
    return tuple(
        name
        for name, one in MECHANISMS.items()
        if (tls or not one.sends_password) and (passwords or not one.needs_password)
    )


def _proved(name: bytes, password: bytes) -> Exchange:
    text = name.decode("utf-8", "replace")
    secret: Secret = yield WhoIs(text)
    return text if secret.is_password(password) else None


def _plain(mechanism: str, hostname: str, initial: bytes | None) -> Exchange:
    """RFC 4616."""
    message = initial if initial is not None else (yield b"")
    parts = message.split(b"\0")
    # No one may act for another.
    if len(parts) != 3 or parts[0] not in (b"", parts[1]):
        return None
    return (yield from _proved(parts[1], parts[2]))


def _login(mechanism: str, hostname: str, initial: bytes | None) -> Exchange:
    name = initial if initial is not None else (yield b"Username:")
    password = yield b"Password:"
    return (yield from _proved(name, password))


def _cram_md5(mechanism: str, hostname: str, initial: bytes | None) -> Exchange:
    """RFC 2195 2: a number that is never the same, where others have a time."""
    challenge = f"<{secrets.randbits(64)}.{secrets.randbits(64)}@{hostname}>".encode()
    name, _, digest = (yield challenge).rpartition(b" ")
    text = name.decode("utf-8", "replace")
    secret: Secret = yield WhoIs(text)
    same = hmac.compare_digest(secret.digest(challenge).encode(), digest.lower())
    return text if same and secret.known else None


def _scram(mechanism: str, hostname: str, initial: bytes | None) -> Exchange:
    """RFC 5802, RFC 7677."""
    try:
        first = (initial or (yield b"")).decode()
        name = _scram_name(mechanism, first)
        secret: Secret = yield WhoIs(name)
        server = ScramMechanism(mechanism).make_server(lambda _: tuple(secret.verifier(mechanism)))
        server.set_client_first(first)
        final = yield server.get_server_first().encode()
        server.set_client_final(final.decode())
        yield server.get_server_final().encode()
    except (ScramException, UnicodeDecodeError):
        return None
    return name if secret.known else None


def _scram_name(mechanism: str, first: str) -> str:
    """Whom a client calls itself in its first message.  Raises :class:`ScramException`."""
    asked: list[str] = []

    def note(name: str) -> object:
        asked.append(name)
        return tuple(_made_up(mechanism, name))

    ScramMechanism(mechanism).make_server(note).set_client_first(first)
    return asked[0]


#: Strongest first.
MECHANISMS: Mapping[str, Mechanism] = {
    SHA_256: Mechanism(_scram),
    "SCRAM-SHA-1": Mechanism(_scram, needs_password=True),
    "CRAM-MD5": Mechanism(_cram_md5, client_first=False, needs_password=True),
    "PLAIN": Mechanism(_plain, sends_password=True),
    "LOGIN": Mechanism(_login, sends_password=True),
}
