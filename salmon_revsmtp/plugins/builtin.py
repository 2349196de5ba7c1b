"""The built-in agent types and hold stores, registered as a third party's would be: an entry point
for each.

A type's module is imported when agents are first needed, and a store's when it is opened, so that a
command that is not about them starts without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from salmon_revsmtp.hooks import hookimpl

if TYPE_CHECKING:
    from salmon_revsmtp.provider.hold.store import HoldStore, OpenHoldStore

__all__ = ["POSTGRES", "POSTGRES_PLUGIN", "etrn", "odmr", "postgres"]

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
    """A plugin that registers the hold store on PostgreSQL."""

    @hookimpl
    def register_hold_stores(self, register: Callable[[str, OpenHoldStore], None]) -> None:
        register(POSTGRES, _open_postgres)


def _open_postgres(url: str, folder: Path) -> HoldStore:
    from salmon_revsmtp.provider.hold.places import without_secrets
    from salmon_revsmtp.provider.hold.store import HoldStoreError

    try:
        from salmon_revsmtp.provider.hold.postgres import PostgresStore
    except ImportError as error:
        raise HoldStoreError(
            f"opening the hold store {without_secrets(url)}: {error}; it needs psycopg: "
            "pip install 'salmon-revsmtp[postgres]'"
        ) from None
    return PostgresStore(url, folder)


etrn = _AgentType("salmon_revsmtp.customer.etrn", "EtrnAgent")
odmr = _AgentType("salmon_revsmtp.customer.odmr", "OdmrAgent")
postgres = _Postgres()
