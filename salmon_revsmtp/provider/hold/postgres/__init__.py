"""The hold store on PostgreSQL, for a provider on several hosts.

``database``  connections, transactions, and what they may take
``schema``    the tables, and how a newer version changes them
``lease``     which hosts are alive
``usages``    what is held for whom, as the event loop may ask
``reading``   how far an account's mail has been read
``wakeups``   how a host hears of mail that another has taken
``store``     the hold store
``accounts``  the customers' accounts, beside it
``nodes``     what the hosts tell one another of sessions and failed logins
"""

from salmon_revsmtp.provider.hold.postgres.store import PostgresStore

__all__ = ["PostgresStore"]
