"""A hold store with accounts, and a provider on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from salmon_revsmtp.net.address import HostAndPort
from salmon_revsmtp.net.certificate import Certificate
from salmon_revsmtp.provider.accounts import Accounts
from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.provider.hold.store import Arrival, Held, HoldStore, State
from salmon_revsmtp.provider.server import Provider
from salmon_revsmtp.provider.settings import AccountSettings
from salmon_revsmtp.smtp.addresses import domain_of
from salmon_revsmtp.smtp.content import Content, whole
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply
from support.configuration import PASSWORD
from support.tls import CERTIFICATE, PRIVATE_KEY

__all__ = ["ACME", "Holding", "NoHooks", "account", "arrival"]


def account(
    name: str = "acme",
    password: str = PASSWORD,
    domains: Sequence[str] = ("example.org",),
    **keys: Any,
) -> AccountSettings:
    keys = {"name": name, "password": password, "domains": list(domains), **keys}
    return AccountSettings.model_validate(keys)


ACME = account()


class NoHooks:
    """There are no plugins."""

    def call(self, hook: str, **arguments: Any) -> Any:
        raise AssertionError(hook)

    async def call_apart(self, hook: str, agent: Any, **arguments: Any) -> Any:
        raise AssertionError(hook)

    def implemented(self, hook: str) -> bool:
        return False


def arrival(accounts: Accounts, envelope: Envelope, data: bytes) -> Arrival:
    """A message for the accounts that have its recipients' domains."""
    names = []
    for recipient in envelope.recipients:
        found = accounts.of_domain(domain_of(recipient))
        assert found is not None, recipient
        names.append(found.name)
    return Arrival(envelope, tuple(names), [data])


class Holding:
    """Held mail of some accounts.

    ``told``  the notifications that were asked for: the sender, and who refused.
    """

    def __init__(
        self,
        folder: Path,
        *accounts: AccountSettings,
        kind: type[Accounts] = Accounts,
        keepalive: float = 60,
    ) -> None:
        self.accounts = kind(accounts or (ACME,), keepalive)
        self.keepalive = keepalive
        self.store: HoldStore = EmbeddedStore(folder)
        self.told: list[tuple[str, dict[str, Reply]]] = []

    def put(self, envelope: Envelope, data: bytes) -> int:
        """Hold a message; returns its key."""
        [[key, *_]] = self.store.put([arrival(self.accounts, envelope, data)])
        return key

    def notify(
        self, envelope: Envelope, refused: dict[str, Reply], data: bytes | Content
    ) -> Reply | None:
        self.told.append((envelope.reverse_path, refused))
        return None

    def waiting(self, name: str = "acme") -> list[Held]:
        """What is held for an account, the oldest first."""
        return list(self.store.listing(name, messages=10_000))

    def data(self, key: int) -> bytes:
        return whole(self.store.load([key])[key])

    def retry(self) -> None:
        """Have what was set aside wait again, as `provider retry` does."""
        self.store.retry(held.key for held in self.store.listing(state=State.ASIDE))

    def close(self) -> None:
        self.store.close()

    def __len__(self) -> int:
        return sum(used.messages for used in self.store.usages().values())

    def provider(
        self, hostname: str = "odmr.example.net", tls: str = "none", **options: Any
    ) -> Provider:
        """A provider of this mail, on a free port."""
        options.setdefault("addresses", [(HostAndPort("127.0.0.1", 0), tls == "implicit")])
        if tls != "none":
            options.setdefault("certificate", Certificate("provider", CERTIFICATE, PRIVATE_KEY))
        return Provider(
            self.accounts,
            self.store,
            self.notify,
            NoHooks(),
            hostname,
            keepalive=self.keepalive,
            **options,
        )
