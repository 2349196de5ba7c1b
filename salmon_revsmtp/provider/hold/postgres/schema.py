"""The tables, and how a newer version changes them.

``hold_messages``  a message: its envelope, and its octets if they are few
``hold_chunks``    the octets of the others, in pieces
``hold_queue``     what is held for whom; the only rows that are written again and again
``hold_usage``     how much that is, in some parts each, so that hosts do not wait for one another
``hold_nodes``     the processes that use the store, as long as they are heard of
``hold_clock``     the store's clock
"""

from __future__ import annotations

from collections.abc import Sequence

from salmon_revsmtp.provider.hold.postgres.database import Transaction
from salmon_revsmtp.provider.hold.store import HoldStoreError

__all__ = ["MIGRATIONS", "migrate"]

# The number of our advisory lock ("revs"); the schema's own number is beside it.
LOCK = 0x72657673

# In a database that is in use, each must also be bearable for programs of the version before.
MIGRATIONS = (
    """
    CREATE SEQUENCE hold_ids;
    CREATE TABLE hold_messages (
        id bigint PRIMARY KEY,
        sender text NOT NULL,
        said text NOT NULL,
        size bigint NOT NULL,
        streams boolean NOT NULL,
        ascii boolean NOT NULL,
        body bytea NOT NULL,
        chunks integer NOT NULL,
        accounts integer NOT NULL
    );
    -- Most mail is compressed already, or too small for it to be worth the time.
    ALTER TABLE hold_messages ALTER COLUMN body SET STORAGE EXTERNAL;
    CREATE TABLE hold_chunks (
        message bigint NOT NULL,
        number integer NOT NULL,
        data bytea NOT NULL,
        PRIMARY KEY (message, number)
    );
    ALTER TABLE hold_chunks ALTER COLUMN data SET STORAGE EXTERNAL;
    -- That a row is taken is in no index, so that taking it writes none (a HOT update).
    CREATE TABLE hold_queue (
        id bigint PRIMARY KEY,
        message bigint NOT NULL,
        account text NOT NULL,
        recipients text NOT NULL,
        size bigint NOT NULL,
        arrived double precision NOT NULL,
        state smallint NOT NULL DEFAULT 0,
        strikes integer NOT NULL DEFAULT 0,
        reason text NOT NULL DEFAULT '',
        warned boolean NOT NULL DEFAULT false,
        node bigint,
        ticket bigint
    ) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02,
            autovacuum_vacuum_cost_delay = 0);
    CREATE INDEX hold_queue_by_account ON hold_queue (account, state, id);
    CREATE TABLE hold_usage (
        account text NOT NULL,
        part smallint NOT NULL,
        messages bigint NOT NULL,
        octets bigint NOT NULL,
        PRIMARY KEY (account, part)
    ) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02);
    -- After a crash, and in a replica that takes over, it is empty.
    CREATE UNLOGGED TABLE hold_nodes (
        id bigint PRIMARY KEY,
        name text NOT NULL,
        expires timestamptz NOT NULL
    ) WITH (fillfactor = 50);
    CREATE TABLE hold_clock (
        id integer PRIMARY KEY CHECK (id = 1),
        now double precision NOT NULL,
        wall double precision NOT NULL
    );
    INSERT INTO hold_clock
        SELECT 1, extract(epoch FROM clock_timestamp()), extract(epoch FROM clock_timestamp())
    """,
)


def migrate(
    transaction: Transaction,
    shown: str,
    part: str = "hold",
    migrations: Sequence[str] | None = None,
) -> None:
    """Make the tables, or bring them up to date; one process at a time does it, the others wait.

    ``part``        what the tables are for, which is how the name of the table with their version
                    begins: other tables in the same database have a version of their own.
    ``migrations``  from nothing to each version; those of the hold store unless given.

    Raises :class:`HoldStoreError` for tables that a newer version has made."""
    migrations = MIGRATIONS if migrations is None else migrations
    [[schema]] = transaction.rows("SELECT current_schema()::text")
    if schema is None:
        raise HoldStoreError(
            f"opening the hold store {shown}: none of the schemas of the search_path is there; "
            "make one, and let our user create tables in it"
        )
    transaction.rows(
        "SELECT pg_advisory_xact_lock(%s, (SELECT (oid::bigint %% 2147483648)::int "
        "FROM pg_namespace WHERE nspname = current_schema()))",
        LOCK,
    )
    versions = f"{part}_schema"
    [[there]] = transaction.rows("SELECT to_regclass(%s) IS NOT NULL", versions)
    if not there:
        transaction.run(f"CREATE TABLE {versions} (version integer NOT NULL)")
        transaction.run(f"INSERT INTO {versions} VALUES (0)")
    [[version]] = transaction.rows(f"SELECT version FROM {versions}")
    if version > len(migrations):
        raise HoldStoreError(
            f"opening the hold store {shown}: its tables have version {version}, and this program "
            f"knows those up to {len(migrations)}: a newer salmon-revsmtp has been here; install "
            "that on this host, too"
        )
    for migration in migrations[version:]:
        transaction.run(migration)
    if version < len(migrations):
        transaction.run(f"UPDATE {versions} SET version = %s", len(migrations))
