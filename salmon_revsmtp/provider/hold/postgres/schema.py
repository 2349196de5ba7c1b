"""The tables, and how a newer version changes them.

``hold_messages``  a message: its envelope, and its octets if they are few
``hold_chunks``    the octets of the others, in pieces
``hold_queue``     what is held for whom; the only rows that are written again and again
``hold_changes``   how much more or less that has become, each time
``hold_usage``     how much it was, for all changes up to ``hold_counted``
``hold_nodes``     the processes that use the store, as long as they are heard of
``hold_heard``     until when each of them is, if no more is heard
``hold_clock``     the store's clock

An old transaction
------------------

While any transaction of the server is open for long, none of the rows that were deleted or written
anew since can be removed.  Whatever finds its rows by going through such remains gets slower with
each message that comes and goes.  So nothing here does, in one of two ways.

1. *No row that is looked at for each message is written again and again.*  What is held is a sum of
   changes, which are rows of their own; every now and then they are added up.  That a process is
   there is noted beside the row that says so.

2. *Whoever reads on reads from where it was*, in the order of the keys: a feed its account's mail,
   and whoever adds up, the changes.  That needs to be known: below which number nothing can come
   any more, as transactions end in another order than that in which they took their numbers.
   So each that takes some holds, until its end, an advisory lock with a number that is below them
   (``hold_numbers``).  The lowest of these locks is where one reads on from the next time
   (``hold_horizon``).

Measured beside other designs: 20,000 messages come and go, 50 at a time, after a transaction that
stays open, and what counts is how many pages of 8 KiB one look for the next 50 goes through.  From
the beginning each time it is 54 without the transaction, and beside it 79 at first and 464 at last.
From where one was it is 54, always.  With three tables in turn, of which the next is emptied
(TRUNCATE) every 5,000 messages, as other queues on PostgreSQL do it, it is from 79 to 135 in each
turn.  But TRUNCATE waits for whoever has only read the table, such as pg_dump, and all others wait
for it: with such a transaction none could be emptied, and it went up to 245.  And a table can be
emptied only when its last message has gone: ours may be held for a month, and would have to move.
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
    """
    CREATE TABLE hold_changes (
        id bigint PRIMARY KEY,
        account text NOT NULL,
        messages bigint NOT NULL,
        octets bigint NOT NULL
    ) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
            autovacuum_vacuum_cost_delay = 0);
    CREATE TABLE hold_counted (
        id integer PRIMARY KEY CHECK (id = 1),
        number bigint NOT NULL
    ) WITH (fillfactor = 10);
    INSERT INTO hold_counted VALUES (1, 0);
    CREATE UNLOGGED TABLE hold_heard (
        id bigint PRIMARY KEY,
        expires timestamptz NOT NULL
    ) WITH (fillfactor = 50);
    ALTER TABLE hold_messages SET (autovacuum_vacuum_scale_factor = 0.02,
        autovacuum_vacuum_cost_delay = 0, toast.autovacuum_vacuum_scale_factor = 0.02,
        toast.autovacuum_vacuum_cost_delay = 0);

    -- So many numbers.  None that is taken later can be lower than the horizon of someone else.
    CREATE FUNCTION hold_numbers(many integer) RETURNS bigint[] LANGUAGE plpgsql AS $$
    DECLARE
        numbers bigint[];
    BEGIN
        PERFORM pg_advisory_xact_lock_shared(
            ('hold_ids'::regclass::oid::bigint & 2147483647)::integer,
            ((last_value - (NOT is_called)::integer) & 2147483647)::integer
        ) FROM hold_ids;
        SELECT array_agg(nextval('hold_ids')) INTO numbers FROM generate_series(1, many);
        RETURN numbers;
    END $$;

    -- Whatever has a number up to this one can be seen by the statement that comes next, or will
    -- never be there.
    CREATE FUNCTION hold_horizon() RETURNS bigint LANGUAGE plpgsql AS $$
    DECLARE
        last bigint;
        below bigint;
    BEGIN
        -- The order matters: who locks after we have looked takes higher numbers than this.
        SELECT last_value - (NOT is_called)::integer INTO last FROM hold_ids;
        SELECT max(distance) INTO below FROM (
            SELECT (last - objid::bigint) & 2147483647 AS distance FROM pg_locks
            WHERE locktype = 'advisory' AND objsubid = 2
            AND classid::bigint = ('hold_ids'::regclass::oid::bigint & 2147483647)
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        ) AS locks WHERE distance < 1073741824;  -- the others are above it
        RETURN last - coalesce(below, 0);
    END $$;

    -- Keep messages; returns the keys of what is held.  The first arrays are about that: which of
    -- the messages it is (from 1), and for whom.  The numbers are given if they were taken before.
    CREATE FUNCTION hold_put(
        numbers bigint[], message integer[], account text[], recipients text[],
        arrived double precision, first integer[], accounts integer[], sender text[],
        said text[], size bigint[], streams boolean[], ascii boolean[], body bytea[],
        chunks integer[]
    ) RETURNS bigint[] LANGUAGE plpgsql AS $$
    DECLARE
        keys bigint[] := coalesce(numbers, hold_numbers(cardinality(message)));
    BEGIN
        INSERT INTO hold_messages (id, sender, said, size, streams, ascii, body, chunks, accounts)
            SELECT keys[one.first], one.sender, one.said, one.size, one.streams, one.ascii,
                one.body, one.chunks, one.accounts
            FROM unnest(first, accounts, sender, said, size, streams, ascii, body, chunks)
            AS one (first, accounts, sender, said, size, streams, ascii, body, chunks);
        INSERT INTO hold_queue (id, message, account, recipients, size, arrived)
            SELECT keys[one.number], keys[first[one.message]], one.account, one.recipients,
                size[one.message], arrived
            FROM unnest(message, account, recipients) WITH ORDINALITY
            AS one (message, account, recipients, number);
        INSERT INTO hold_changes (id, account, messages, octets)
            SELECT nextval('hold_ids'), one.account, count(*), sum(size[one.message])
            FROM unnest(message, account) AS one (message, account) GROUP BY one.account;
        RETURN keys;
    END $$;

    -- What is held under these keys, which are locked, is not needed any more.
    CREATE FUNCTION hold_forget(keys bigint[]) RETURNS void LANGUAGE plpgsql AS $$
    DECLARE
        ids bigint[];
        numbers bigint[];
        shared boolean;
    BEGIN
        PERFORM hold_numbers(0);
        WITH gone AS (
            DELETE FROM hold_queue WHERE id = ANY(keys) RETURNING message, account, size
        ), changes AS (
            INSERT INTO hold_changes (id, account, messages, octets)
            SELECT nextval('hold_ids'), account, -count(*), -sum(size) FROM gone GROUP BY account
        ), messages AS (
            SELECT message, count(*) AS number FROM gone GROUP BY message
        )
        SELECT array_agg(message), array_agg(number) INTO ids, numbers FROM messages;
        -- In one order, so that none waits for one that waits.
        PERFORM FROM hold_messages WHERE id = ANY(ids) AND accounts > 1 ORDER BY id FOR UPDATE;
        shared := FOUND;
        WITH over AS (
            DELETE FROM hold_messages USING unnest(ids, numbers) AS less (id, number)
            WHERE hold_messages.id = less.id AND accounts <= less.number
            RETURNING hold_messages.id, chunks
        )
        DELETE FROM hold_chunks WHERE message IN (SELECT id FROM over WHERE chunks > 0);
        IF shared THEN
            UPDATE hold_messages SET accounts = accounts - less.number
                FROM unnest(ids, numbers) AS less (id, number)
                WHERE hold_messages.id = less.id;
        END IF;
    END $$;

    -- Add up what has changed, unless another does; returns how many changes there were.
    CREATE FUNCTION hold_count() RETURNS bigint LANGUAGE plpgsql AS $$
    DECLARE
        upto bigint;
        since bigint;
        changes bigint;
    BEGIN
        SELECT number INTO since FROM hold_counted FOR UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            RETURN 0;
        END IF;
        upto := hold_horizon();
        WITH gone AS (
            DELETE FROM hold_changes WHERE id > since AND id <= upto
            RETURNING account, messages, octets
        ), sums AS (
            INSERT INTO hold_usage (account, part, messages, octets)
            SELECT account, 0, sum(messages), sum(octets) FROM gone GROUP BY account
            ORDER BY account
            ON CONFLICT (account, part) DO UPDATE SET
                messages = hold_usage.messages + excluded.messages,
                octets = hold_usage.octets + excluded.octets
        )
        SELECT count(*) INTO changes FROM gone;
        UPDATE hold_counted SET number = upto;
        RETURN changes;
    END $$
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
