"""Customers' accounts in the database of the hold store.

``hold_accounts``         who they are; of a password only a verifier
``hold_account_domains``  whose domains are whose: each is of one account only
``hold_account_changes``  which have changed, by a number that grows

The database notes changes itself, so one that is made by SQL is seen, too.  Changes are made one
after the other: whoever makes one has the row of ``hold_account_revision`` until it is committed,
so that their numbers grow in the order in which others see them.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from salmon_revsmtp.provider.hold.postgres.database import Database, Transaction
from salmon_revsmtp.provider.hold.postgres.schema import migrate
from salmon_revsmtp.provider.hold.store import HoldStoreError

__all__ = [
    "CHANNEL",
    "DomainTakenError",
    "NameTakenError",
    "PostgresAccounts",
    "accounts_at",
    "close_all",
    "open_tables",
]

# Connections for accounts, beside those of the hold store.
CONNECTIONS = 3
# Accounts that are read at a time, where all are.
PAGE = 500

#: How a host hears of changes: this, and the number of the schema.
CHANNEL = "salmon_revsmtp_accounts_"

_CHANGES = """
    CREATE TABLE hold_account_revision (
        id integer PRIMARY KEY CHECK (id = 1),
        number bigint NOT NULL
    );
    INSERT INTO hold_account_revision VALUES (1, 0);
    CREATE TABLE hold_account_changes (
        number bigint PRIMARY KEY,
        account text NOT NULL,
        at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    -- Before any row is locked, so that no two wait for one another.
    CREATE FUNCTION hold_account_alone() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        EXECUTE format('SELECT FROM %I.hold_account_revision FOR UPDATE', TG_TABLE_SCHEMA);
        RETURN NULL;
    END $$;
    CREATE FUNCTION hold_account_note(place text, space oid, names text[]) RETURNS void
    LANGUAGE plpgsql AS $$
    BEGIN
        EXECUTE format(
            'WITH next AS (UPDATE %I.hold_account_revision SET number = number + $2 '
            'RETURNING number - $2 AS before) INSERT INTO %I.hold_account_changes '
            '(number, account) SELECT before + one.place, one.name FROM next, '
            'unnest($1) WITH ORDINALITY AS one (name, place)', place, place
        ) USING names, cardinality(names);
        PERFORM pg_notify('salmon_revsmtp_accounts_' || space, '');
    END $$;
    CREATE FUNCTION hold_account_changed() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        was text; is_now text; space oid;
    BEGIN
        SELECT relnamespace INTO space FROM pg_class WHERE pg_class.oid = TG_RELID;
        IF TG_OP <> 'INSERT' THEN
            was := coalesce(to_jsonb(OLD) ->> 'account', to_jsonb(OLD) ->> 'name');
        END IF;
        IF TG_OP <> 'DELETE' THEN
            is_now := coalesce(to_jsonb(NEW) ->> 'account', to_jsonb(NEW) ->> 'name');
        END IF;
        EXECUTE format('SELECT %I.hold_account_note($1, $2, $3)', TG_TABLE_SCHEMA)
        USING TG_TABLE_SCHEMA, space,
            (SELECT array_agg(DISTINCT one) FROM unnest(ARRAY[was, is_now]) AS one
             WHERE one IS NOT NULL);
        RETURN NULL;
    END $$;
    CREATE TRIGGER hold_account_alone BEFORE INSERT OR UPDATE OR DELETE ON hold_accounts
        FOR EACH STATEMENT EXECUTE FUNCTION hold_account_alone();
    CREATE TRIGGER hold_account_alone BEFORE INSERT OR UPDATE OR DELETE ON hold_account_domains
        FOR EACH STATEMENT EXECUTE FUNCTION hold_account_alone();
    CREATE TRIGGER hold_account_changed AFTER INSERT OR UPDATE OR DELETE ON hold_accounts
        FOR EACH ROW EXECUTE FUNCTION hold_account_changed();
    CREATE TRIGGER hold_account_changed AFTER INSERT OR UPDATE OR DELETE ON hold_account_domains
        FOR EACH ROW EXECUTE FUNCTION hold_account_changed();
"""

# After a crash, and in a replica that takes over, the tables of sessions are empty: all begin anew.
_NODES = """
    CREATE UNLOGGED TABLE hold_session_nodes (
        id bigint PRIMARY KEY,
        name text NOT NULL,
        seen timestamptz NOT NULL
    ) WITH (fillfactor = 50);
    CREATE UNLOGGED TABLE hold_sessions (
        node bigint NOT NULL,
        number bigint NOT NULL,
        account text NOT NULL,
        peer text NOT NULL,
        began timestamptz NOT NULL,
        push boolean NOT NULL,
        tls text,
        most integer NOT NULL,
        gives_way boolean NOT NULL DEFAULT false,
        PRIMARY KEY (node, number)
    );
    CREATE INDEX hold_sessions_by_account ON hold_sessions (account);
    CREATE UNLOGGED TABLE hold_login_failures (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        node bigint NOT NULL,
        network text NOT NULL,
        failures integer NOT NULL,
        at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    CREATE INDEX hold_login_failures_by_time ON hold_login_failures (at);
"""

# In a database that is in use, each must also be bearable for programs of the version before.
MIGRATIONS = (
    """
    CREATE TABLE hold_accounts (
        name text PRIMARY KEY,
        password text NOT NULL CHECK (password LIKE 'SCRAM-SHA-256$%%'),
        enabled boolean NOT NULL DEFAULT true,
        quota_messages bigint,
        quota_bytes bigint,
        hold_days double precision,
        warn_hours double precision,
        push text CHECK (push IN ('true', 'false', 'always')),
        live boolean,
        sessions integer,
        etrn text
    );
    CREATE TABLE hold_account_domains (
        domain text PRIMARY KEY,
        account text NOT NULL REFERENCES hold_accounts ON UPDATE CASCADE ON DELETE CASCADE,
        place integer NOT NULL DEFAULT 0
    );
    CREATE INDEX hold_account_domains_by_account ON hold_account_domains (account);
    """.replace("%%", "%")
    + _CHANGES
    + _NODES,
)

# The keys of an account that are columns, too; NULL is the default.
_KEYS = (
    *("name", "password", "enabled", "quota_messages", "quota_bytes", "hold_days"),
    *("warn_hours", "push", "live", "sessions", "etrn"),
)
_PUSH = {"true": True, "false": False, "always": "always"}
_SELECT = (
    f"SELECT {', '.join(f'a.{one}' for one in _KEYS)}, ARRAY(SELECT domain "
    "FROM hold_account_domains d WHERE d.account = a.name ORDER BY place, domain) "
    "FROM hold_accounts a "
)

#: An account as ``customer_accounts`` has it.
Keys = dict[str, Any]


class NameTakenError(Exception):
    """There is an account of that name."""


class DomainTakenError(Exception):
    """A domain is that of another account.

    ``domain``, ``owner``  which, and whose.
    """

    def __init__(self, domain: str, owner: str) -> None:
        super().__init__(domain, owner)
        self.domain, self.owner = domain, owner


def open_tables(url: str, connections: int) -> Database:
    """The database, with the tables of accounts in it.  Raises
    :class:`~salmon_revsmtp.provider.hold.store.HoldStoreError`."""
    database = Database(url, connections)
    try:
        with database.transaction() as transaction:
            migrate(transaction, database.shown, "hold_account", MIGRATIONS)
    except BaseException as error:
        database.close()
        if isinstance(error, OSError) and not isinstance(error, HoldStoreError):
            raise HoldStoreError(f"opening the accounts in {database.shown}: {error}") from error
        raise
    return database


class PostgresAccounts:
    """The accounts in the database of ``url``.  Its methods block, and raise :class:`OSError`."""

    def __init__(self, url: str) -> None:
        self._database = open_tables(url, CONNECTIONS)

    def close(self) -> None:
        self._database.close()

    # -- what there is ----------------------------------------------------------------------------

    def find(self, name: str) -> Keys | None:
        """The account of that name, as ``customer_accounts`` would have it."""
        return self._one("WHERE a.name = %s", name)

    def of_domain(self, domain: str) -> Keys | None:
        """The account that has a domain (in A-labels)."""
        where = "WHERE a.name = (SELECT account FROM hold_account_domains WHERE domain = %s)"
        return self._one(where, domain)

    def _one(self, where: str, value: str) -> Keys | None:
        with self._database.transaction(synced=False) as transaction:
            rows = transaction.rows(_SELECT + where, value)
        return _keys(rows[0]) if rows else None

    def all(self) -> Iterator[Keys]:
        """All of them, by name."""
        after = ""
        while True:
            with self._database.transaction(synced=False) as transaction:
                rows = transaction.rows(
                    f"{_SELECT} WHERE a.name > %s ORDER BY a.name LIMIT %s", after, PAGE
                )
            yield from (keys for keys in map(_keys, rows) if keys is not None)
            if len(rows) < PAGE:
                return
            after = rows[-1][0]

    # -- what changes -----------------------------------------------------------------------------

    def add(self, account: Keys) -> None:
        """A new one, which is valid, with a verifier for its password.  Raises
        :class:`NameTakenError` and :class:`DomainTakenError`."""
        values = _columns(account)
        marks = ", ".join(["%s"] * len(values))
        with self._changing() as transaction:
            if not transaction.run(
                f"INSERT INTO hold_accounts ({', '.join(values)}) VALUES ({marks}) "
                "ON CONFLICT (name) DO NOTHING",
                *values.values(),
            ):
                raise NameTakenError(account["name"])
            _write_domains(transaction, account)

    def edit(self, name: str, change: Callable[[Keys], Keys]) -> Keys | None:
        """Make of an account what ``change`` makes of it, which may raise whatever it likes.
        Returns what it is then, ``None`` if there is none.  Raises :class:`DomainTakenError`."""
        with self._changing() as transaction:
            rows = transaction.rows(f"{_SELECT} WHERE a.name = %s", name)
            if not rows:
                return None
            account = change(_keys_of(rows[0]))
            values = _columns(account)
            sets = ", ".join(f"{one} = %s" for one in values)
            transaction.run(
                f"UPDATE hold_accounts SET {sets} WHERE name = %s", *values.values(), name
            )
            _write_domains(transaction, account)
        return account

    def remove(self, name: str) -> bool:
        """Returns whether it was there."""
        with self._changing() as transaction:
            return transaction.run("DELETE FROM hold_accounts WHERE name = %s", name) > 0

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Transaction]:
        with self._database.transaction() as transaction:
            transaction.rows("SELECT FROM hold_account_revision FOR UPDATE")
            transaction.run(
                "DELETE FROM hold_account_changes WHERE at < clock_timestamp() - interval '1 day'"
            )
            yield transaction


def _keys_of(row: tuple[Any, ...]) -> Keys:
    keys = {name: value for name, value in zip(_KEYS, row, strict=False) if value is not None}
    if "push" in keys:
        keys["push"] = _PUSH[keys["push"]]
    return {**keys, "domains": list(row[-1])}


def _keys(row: tuple[Any, ...]) -> Keys | None:
    """As ``customer_accounts`` has it; one without a domain is none."""
    return _keys_of(row) if row[-1] else None


def _columns(account: Keys) -> Keys:
    """What its columns have; a key that was not given has the default, whatever that is."""
    found = {name: account.get(name) for name in _KEYS}
    found["enabled"] = account.get("enabled", True)
    if found["push"] is not None:
        found["push"] = str(found["push"]).lower()
    return found


def _write_domains(transaction: Transaction, account: Keys) -> None:
    """Its domains are these.  Raises :class:`DomainTakenError`."""
    name, domains = account["name"], list(account["domains"])
    transaction.run(
        "DELETE FROM hold_account_domains WHERE account = %s AND domain <> ALL(%s::text[])",
        *(name, domains),
    )
    # Another may add the same at this moment; then this waits for it.
    transaction.run(
        "INSERT INTO hold_account_domains (domain, account, place) "
        "SELECT domain, %s, place FROM unnest(%s::text[]) WITH ORDINALITY AS new (domain, place) "
        "ON CONFLICT (domain) DO NOTHING",
        *(name, domains),
    )
    for domain, owner in transaction.rows(
        "SELECT domain, account FROM hold_account_domains "
        "WHERE domain = ANY(%s::text[]) AND account <> %s ORDER BY domain",
        *(domains, name),
    ):
        raise DomainTakenError(domain, owner)


# -- one for each database, however often it is asked for ------------------------------------------

_open: dict[str, PostgresAccounts] = {}
_opening = threading.Lock()


def accounts_at(url: str) -> PostgresAccounts:
    """The accounts in the database of ``url``, which stay open.  Raises :class:`OSError`."""
    if (found := _open.get(url)) is not None:
        return found
    with _opening:
        if url not in _open:
            _open[url] = PostgresAccounts(url)
        return _open[url]


@atexit.register
def close_all() -> None:
    """Close them all; who asks again has them opened."""
    with _opening:
        while _open:
            _open.popitem()[1].close()
