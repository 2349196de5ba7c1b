"""Accounts: who may log in, and whose mail is held for whom."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from salmon_revsmtp.smtp import sasl
from salmon_revsmtp.smtp.addresses import to_ascii

__all__ = ["Account", "Accounts"]


@dataclass(frozen=True)
class Account:
    """A customer: name, password, and the domains whose mail is held for it."""

    name: str
    password: str = field(repr=False)
    domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", tuple(to_ascii(one) for one in self.domains))


class Accounts:
    """All accounts, by name."""

    def __init__(self, accounts: Iterable[Account]) -> None:
        self._accounts = {account.name: account for account in accounts}

    def mechanisms(self, tls: bool) -> tuple[str, ...]:
        """The SASL mechanisms that are offered; a password travels under TLS only."""
        return sasl.offered(tls)

    def password(self, name: str) -> str | None:
        """The password of an account, ``None`` if there is no such account."""
        account = self._accounts.get(name)
        return account.password if account else None

    def domains(self, name: str) -> tuple[str, ...]:
        """The domains of an account, as IDNA A-labels."""
        return self._accounts[name].domains
