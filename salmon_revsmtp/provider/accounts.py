"""Accounts: who may log in, and whose mail is held for whom.

Those of the settings are known at once.  Plugins may have others (``provider.lookups``), which have
to be asked for; the settings win.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

from salmon_revsmtp.provider.lookups import AccountsUnavailableError, Lookups
from salmon_revsmtp.provider.settings import AccountSettings
from salmon_revsmtp.smtp import sasl
from salmon_revsmtp.smtp.sasl import Secret
from salmon_revsmtp.smtp.turn import Customer
from salmon_revsmtp.smtp.verifier import Verifier

__all__ = ["Account", "Accounts", "AccountsUnavailableError"]

# Accounts of plugins that are kept ready, with what was computed of their passwords.
READY = 10_000

BY_NAME, BY_DOMAIN = "find_account", "account_for"


class Account:
    """A customer's account, as its ``settings`` have it.

    ``domains``  those whose mail is held for it.
    """

    def __init__(self, settings: AccountSettings, domains: tuple[str, ...] | None = None) -> None:
        self.settings = settings
        self.name = settings.name
        self.domains = settings.domains if domains is None else domains
        text = settings.password.get_secret_value()
        verifier = Verifier.parse(text)
        self.has_password = verifier is None
        self.secret = Secret(self.name, None if verifier else text, verifier)

    def __repr__(self) -> str:
        return f"<Account {self.name}>"

    def lets_in(self, before: Account) -> bool:
        """Whether who logged in to the account as it was ``before`` could do so now."""
        ours, theirs = self.settings, before.settings
        return ours.enabled and ours.password == theirs.password


class Accounts:
    """All accounts, by name and by domain.

    ``keepalive``  seconds of silence in a push session.
    ``lookups``    asks plugins for those that the settings do not have.
    ``verifiers``  these are known by verifiers only.
    """

    def __init__(
        self,
        accounts: Iterable[AccountSettings],
        keepalive: float = 60,
        lookups: Lookups | None = None,
        verifiers: bool = False,
    ) -> None:
        self._accounts = {one.name: Account(one) for one in accounts}
        self._keepalive = math.ceil(keepalive)
        self._of_domains = {
            domain: account for account in self._accounts.values() for domain in account.domains
        }
        self.lookups = lookups
        # CRAM-MD5 and its like are of no use to those who have verifiers only.
        self._passwords = any(one.has_password for one in self._accounts.values()) or (
            lookups is not None and not verifiers
        )
        self._made_up = functools.lru_cache(maxsize=1000)(functools.partial(Secret, known=False))
        self._ready = functools.lru_cache(maxsize=READY)(self._made)

    def __iter__(self) -> Iterator[Account]:
        """Those of the settings."""
        return iter(self._accounts.values())

    def _made(self, settings: AccountSettings) -> Account:
        ours = tuple(one for one in settings.domains if one not in self._of_domains)
        return Account(settings, ours)

    def _account(self, settings: AccountSettings | None) -> Account | None:
        """One that a plugin has; the settings win."""
        if settings is None or settings.name in self._accounts:
            return None
        return self._ready(settings)

    # -- what is known --------------------------------------------------------------------------

    def in_settings(self, name: str) -> bool:
        """Whether the settings have an account of that name."""
        return name in self._accounts

    def find(self, name: str) -> Account | None:
        """The account of that name, if there is one; of those that have to be asked for, what was
        said last."""
        found = self._accounts.get(name)
        if found is None and self.lookups is not None:
            found = self._account(self.lookups.last(BY_NAME, name))
        return found

    def of_domain(self, domain: str) -> Account | None:
        """The account whose mail for this domain (A-labels) is held; as :meth:`find`."""
        found = self._of_domains.get(domain)
        if found is None and self.lookups is not None:
            found = self._account(self.lookups.last(BY_DOMAIN, domain))
        return found

    def knows(self, name: str) -> bool:
        """Whether it need not be asked for: :meth:`find` is up to date."""
        return (
            self.lookups is None
            or name in self._accounts
            or not _is_name(name)
            or self.lookups.fresh(BY_NAME, name)
        )

    def knows_domain(self, domain: str) -> bool:
        """The same of a domain, and :meth:`of_domain`."""
        return (
            self.lookups is None
            or domain in self._of_domains
            or not domain
            or self.lookups.fresh(BY_DOMAIN, domain)
        )

    # -- what has to be asked for ---------------------------------------------------------------

    async def look_up(self, name: str) -> Account | None:
        """The account of that name.  Raises :class:`AccountsUnavailableError`."""
        if self.lookups is not None and not self.knows(name):
            return self._account(await self.lookups.look_up(BY_NAME, name))
        return self.find(name)

    async def look_up_domain(self, domain: str) -> Account | None:
        """The account of a domain.  Raises :class:`AccountsUnavailableError`."""
        if self.lookups is not None and not self.knows_domain(domain):
            return self._account(await self.lookups.look_up(BY_DOMAIN, domain))
        return self.of_domain(domain)

    def fetch(self, name: str) -> Account | None:
        """As :meth:`look_up`; blocks."""
        if self.lookups is not None and not self.knows(name):
            return self._account(self.lookups.fetch(BY_NAME, name))
        return self.find(name)

    def fetch_domain(self, domain: str) -> Account | None:
        """As :meth:`look_up_domain`; blocks."""
        if self.lookups is not None and not self.knows_domain(domain):
            return self._account(self.lookups.fetch(BY_DOMAIN, domain))
        return self.of_domain(domain)

    def listing(self) -> Iterator[tuple[str, Account]]:
        """All that the settings do not have, each with the name of its plugin.  Blocks.  Raises
        :class:`AccountsUnavailableError`."""
        for plugin, settings in self.lookups.listing() if self.lookups is not None else ():
            if (account := self._account(settings)) is not None:
                yield plugin, account

    def where(self, name: str) -> list[tuple[str, Account]]:
        """The account of that name that a plugin has, with the name of the plugin, if there is
        one.  Blocks.  Raises :class:`AccountsUnavailableError`."""
        said = self.lookups.each(name) if self.lookups is not None else ()
        found = ((plugin, self._account(one)) for plugin, one in said)
        return [(plugin, account) for plugin, account in found if account is not None][:1]

    # -- for logins -----------------------------------------------------------------------------

    def mechanisms(self, tls: bool) -> tuple[str, ...]:
        """The SASL mechanisms that are offered; a password travels under TLS only."""
        return sasl.offered(tls, self._passwords)

    def secret(self, name: str) -> Secret:
        """What proves that one is this account.  A disabled one cannot log in."""
        account = self.find(name)
        if account is None or not account.settings.enabled:
            return self._made_up(name)
        return account.secret

    def customer(self, name: str) -> Customer:
        """The account of that name for who wants to log in; a made-up one if there is none."""
        account = self.find(name)
        if account is None:
            return Customer(self._made_up(name))
        keepalive = self._keepalive if account.settings.push else None
        return Customer(self.secret(name), account.domains, keepalive, account)


def _is_name(name: str) -> bool:
    """Whether an account may be called so: what strangers send need not be."""
    return 0 < len(name) <= 200 and name.isprintable() and "\ufffd" not in name
