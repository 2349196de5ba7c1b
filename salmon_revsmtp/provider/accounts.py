"""Accounts, and the SASL mechanisms by which a customer proves to be one (RFC 4954).

A mechanism is a generator: it yields challenges, is sent the responses, and returns the account or
``None``.  It knows no SMTP.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field

from scramp import ScramException, ScramMechanism

from salmon_revsmtp.smtp.addresses import to_ascii

__all__ = ["Account", "Accounts", "Exchange"]

#: Challenges out, responses in; at the end the account, or ``None`` if the login failed.
Exchange = Generator[bytes, bytes, "Account | None"]

# RFC 7677 4: at least this many.
ITERATIONS = 4096


@dataclass(frozen=True)
class Account:
    """A customer: name, password, and the domains whose mail is held for it."""

    name: str
    password: str = field(repr=False)
    domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", tuple(to_ascii(one) for one in self.domains))


class Accounts:
    """All accounts, and the mechanisms that they may use."""

    def __init__(self, accounts: Iterable[Account], hostname: str = "localhost") -> None:
        self._accounts = {account.name: account for account in accounts}
        self._hostname = hostname

    def mechanisms(self, tls: bool) -> tuple[str, ...]:
        """What is offered; a password travels under TLS only."""
        return tuple(_CHALLENGES) + (tuple(_PASSWORDS) if tls else ())

    def client_first(self, mechanism: str) -> bool:
        """Whether the customer has the first word, which may be an initial response."""
        return mechanism.upper() != "CRAM-MD5"

    def begin(self, mechanism: str, initial: bytes | None) -> Exchange:
        """Start a login; ``initial`` is the initial response, ``None`` without one.

        Raises :class:`KeyError` for a mechanism that there is not.
        """
        mechanism = mechanism.upper()
        return {**_CHALLENGES, **_PASSWORDS}[mechanism](self, mechanism, initial)

    def _check(self, name: bytes, password: bytes) -> Account | None:
        account = self._accounts.get(name.decode("utf-8", "replace"))
        expected = account.password if account else secrets.token_hex()
        same = hmac.compare_digest(expected.encode(), password)
        return account if same else None

    def _plain(self, mechanism: str, initial: bytes | None) -> Exchange:
        """RFC 4616."""
        message = initial if initial is not None else (yield b"")
        parts = message.split(b"\0")
        # Nobody may act for another.
        if len(parts) != 3 or parts[0] not in (b"", parts[1]):
            return None
        return self._check(parts[1], parts[2])

    def _login(self, mechanism: str, initial: bytes | None) -> Exchange:
        name = initial if initial is not None else (yield b"Username:")
        password = yield b"Password:"
        return self._check(name, password)

    def _cram_md5(self, mechanism: str, initial: bytes | None) -> Exchange:
        """RFC 2195."""
        challenge = f"<{secrets.randbits(64)}.{int(time.time())}@{self._hostname}>".encode()
        name, _, digest = (yield challenge).rpartition(b" ")
        account = self._accounts.get(name.decode("utf-8", "replace"))
        secret = account.password if account else secrets.token_hex()
        expected = hmac.new(secret.encode(), challenge, hashlib.md5).hexdigest()
        return account if hmac.compare_digest(expected.encode(), digest.lower()) else None

    def _scram(self, mechanism: str, initial: bytes | None) -> Exchange:
        """RFC 5802, RFC 7677."""
        scram = ScramMechanism(mechanism)
        found: list[Account] = []

        def stored(name: str) -> object:
            account = self._accounts.get(name)
            found.extend([account] if account else [])
            password = account.password if account else secrets.token_hex()
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


_Mechanism = Callable[[Accounts, str, bytes | None], Exchange]

_CHALLENGES: dict[str, _Mechanism] = {
    "SCRAM-SHA-256": Accounts._scram,
    "SCRAM-SHA-1": Accounts._scram,
    "CRAM-MD5": Accounts._cram_md5,
}
_PASSWORDS: dict[str, _Mechanism] = {"PLAIN": Accounts._plain, "LOGIN": Accounts._login}
