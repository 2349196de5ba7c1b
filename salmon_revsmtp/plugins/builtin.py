"""The built-in agent types and hold stores, registered as a third party's would be: an entry point
for each.

A type's module is imported when agents are first needed, and a store's when it is opened, so that a
command that is not about them starts without it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from salmon_revsmtp.hooks import hookimpl

if TYPE_CHECKING:
    from salmon_revsmtp.provider.hold.postgres.accounts import PostgresAccounts
    from salmon_revsmtp.provider.hold.store import HoldStore, OpenHoldStore
    from salmon_revsmtp.provider.nodes import Nodes

__all__ = [
    "POSTGRES",
    "POSTGRES_PLUGIN",
    "etrn",
    "odmr",
    "postgres",
    "postgres_accounts",
    "psycopg_is_there",
]

#: The scheme of a URL of PostgreSQL, and the name of the plugin for it.
POSTGRES, POSTGRES_PLUGIN = "postgresql", "postgres"


class _AgentType:
    """A plugin that registers one agent type."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    @hookimpl
    def register_agent_types(self, register: Callable[[type], None]) -> None:
        register(getattr(importlib.import_module(self._module), self._name))


class _Postgres:
    """A plugin that registers the hold store on PostgreSQL, and has the accounts in its database,
    and what its hosts tell one another."""

    @hookimpl
    def register_hold_stores(self, register: Callable[[str, OpenHoldStore], None]) -> None:
        register(POSTGRES, _open_postgres)

    @hookimpl
    def find_account(self, name: str, settings: ModuleType) -> Mapping[str, Any] | None:
        accounts = postgres_accounts(settings)
        return accounts.find(name) if accounts is not None else None

    @hookimpl
    def account_for(self, domain: str, settings: ModuleType) -> Mapping[str, Any] | None:
        accounts = postgres_accounts(settings)
        return accounts.of_domain(domain) if accounts is not None else None

    @hookimpl
    def list_accounts(self, settings: ModuleType) -> Iterable[Mapping[str, Any]] | None:
        accounts = postgres_accounts(settings)
        return accounts.all() if accounts is not None else None

    @hookimpl
    def open_nodes(self, settings: ModuleType) -> Nodes | None:
        if (url := _postgres_url(settings)) is None:
            return None
        with _needing_psycopg(url):
            from salmon_revsmtp.provider.hold.postgres.nodes import PostgresNodes

        return PostgresNodes(url)


def _postgres_url(settings: ModuleType) -> str | None:
    """The URL of the database in which mail is held, if it is."""
    from salmon_revsmtp.provider.hold.places import scheme_of

    provider = getattr(settings, "provider", None)
    hold = provider.get("hold") if isinstance(provider, Mapping) else None
    return hold if isinstance(hold, str) and scheme_of(hold) == POSTGRES else None


def postgres_accounts(settings: ModuleType) -> PostgresAccounts | None:
    """The accounts in the database in which mail is held; ``None`` if it is held elsewhere.  Raises
    :class:`OSError`."""
    if (url := _postgres_url(settings)) is None:
        return None
    with _needing_psycopg(url):
        from salmon_revsmtp.provider.hold.postgres.accounts import accounts_at

    return accounts_at(url)


def psycopg_is_there() -> bool:
    """Whether the packages of the extra ``postgres`` are installed."""
    return all(importlib.util.find_spec(name) for name in ("psycopg", "psycopg_pool"))


@contextlib.contextmanager
def _needing_psycopg(url: str) -> Iterator[None]:
    """Raises :class:`HoldStoreError` where it is not installed."""
    from salmon_revsmtp.provider.hold.places import without_secrets
    from salmon_revsmtp.provider.hold.store import HoldStoreError

    try:
        yield
    except ImportError as error:
        raise HoldStoreError(
            f"opening the hold store {without_secrets(url)}: {error}; it needs psycopg: "
            "pip install 'salmon-revsmtp[postgres]'"
        ) from None


def _open_postgres(url: str, folder: Path) -> HoldStore:
    with _needing_psycopg(url):
        from salmon_revsmtp.provider.hold.postgres import PostgresStore

    return PostgresStore(url, folder)


etrn = _AgentType("salmon_revsmtp.customer.etrn", "EtrnAgent")
odmr = _AgentType("salmon_revsmtp.customer.odmr", "OdmrAgent")
postgres = _Postgres()
