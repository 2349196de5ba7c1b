"""Accounts: who may log in, and whose mail is held for whom."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

from salmon_revsmtp.provider.settings import AccountSettings
from salmon_revsmtp.smtp import sasl
from salmon_revsmtp.smtp.sasl import Secret
from salmon_revsmtp.smtp.verifier import Verifier

__all__ = ["Account", "Accounts"]


class Account:
    """A customer's account, as its ``settings`` have it."""

    def __init__(self, settings: AccountSettings) -> None:
        self.settings = settings
        self.name, self.domains = settings.name, settings.domains
        text = settings.password.get_secret_value()
        verifier = Verifier.parse(text)
        self.has_password = verifier is None
        self.secret = Secret(self.name, None if verifier else text, verifier)

    def __repr__(self) -> str:
        return f"<Account {self.name}>"


class Accounts:
    """All accounts, by name and by domain.

    ``keepalive``  seconds of silence in a push session.
    """

    def __init__(self, accounts: Iterable[AccountSettings], keepalive: float = 60) -> None:
        self._accounts = {one.name: Account(one) for one in accounts}
        self._keepalive = math.ceil(keepalive)
        self._of_domains = {
            domain: account for account in self._accounts.values() for domain in account.domains
        }
        # CRAM-MD5 and its like are of no use to those who have verifiers only.
        self._passwords = any(one.has_password for one in self._accounts.values())
        self._made_up = functools.lru_cache(maxsize=1000)(functools.partial(Secret, known=False))

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts.values())

    def find(self, name: str) -> Account | None:
        """The account of that name, if there is one."""
        return self._accounts.get(name)

    def of_domain(self, domain: str) -> Account | None:
        """The account whose mail for this domain (A-labels) is held."""
        return self._of_domains.get(domain)

    def mechanisms(self, tls: bool) -> tuple[str, ...]:
        """The SASL mechanisms that are offered; a password travels under TLS only."""
        return sasl.offered(tls, self._passwords)

    def secret(self, name: str) -> Secret:
        """What proves that one is this account.  A disabled one cannot log in."""
        account = self._accounts.get(name)
        if account is None or not account.settings.enabled:
            return self._made_up(name)
        return account.secret

    def domains(self, name: str) -> tuple[str, ...]:
        """The domains of an account, as IDNA A-labels."""
        return self._accounts[name].domains

    def keepalive(self, name: str) -> int | None:
        """The longest silence in an account's push sessions in seconds; ``None`` if it has
        none."""
        return self._keepalive if self._accounts[name].settings.push else None
