"""Services that listen: the same sessions as on a reversed connection, many at once.

What ETRN needs, for the server that was asked opens connections of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

from salmon_revsmtp.delivery.dispatcher import Answer, Dispatcher, Errand
from salmon_revsmtp.delivery.trace import Hop
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.service.session import Session
from salmon_revsmtp.service.tally import Tally
from salmon_revsmtp.smtp.limits import COMMAND_TIMEOUT
from salmon_revsmtp.smtp.receiver import Transaction
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Listener"]

log = logging.getLogger(__name__)

# A session holds one message and a little more: this many of them must fit into memory.
MAX_CONNECTIONS = 100
# What one provider opens at once; Postfix has 20, Exim 10.
MAX_PER_ADDRESS = 25

_ACCESS_DENIED = Reply(554, "access denied", "5.7.1")
_TOO_MANY = Reply(421, "too many connections, try again later", "4.7.0")


class Listener:
    """Takes mail for a service on its ``listen`` address.

    ``policy``  accepts or refuses a recipient.
    """

    def __init__(
        self,
        service: Service,
        policy: Callable[[str], Reply | None],
        dispatcher: Dispatcher,
        idle_timeout: float = COMMAND_TIMEOUT,
    ) -> None:
        self.service = service
        self._policy = policy
        self._dispatcher = dispatcher
        self._idle_timeout = idle_timeout
        self._tls = service.settings.tls_context()
        self._server: asyncio.Server | None = None
        self._sessions: set[Session] = set()
        self._per_address: Counter[str] = Counter()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Listen.  Raises :class:`OSError` when the address cannot be had."""
        host, port = self.service.settings.address
        await self.service.find_hostname()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._session, host or None, port)
        log.info("service=%s listens on %s", self.service.name, self.service.settings.listen)

    async def stop(self, grace: float) -> None:
        """Take no more connections; end every session at its next message boundary, and break off
        what has not ended after ``grace`` seconds."""
        if self._server is not None:
            self._server.close()
        sessions = list(self._sessions)
        for session in sessions:
            session.shut_down()
        if sessions:
            _, late = await asyncio.wait([session.ended for session in sessions], timeout=grace)
            for session in sessions if late else ():
                session.abort("the server is shutting down")

    def _session(self) -> Session:
        session = Session(
            self.service,
            self._policy,
            self._deliver,
            Tally(),
            self._idle_timeout,
            starttls=self._tls,
            admit=self._admit,
        )
        session.ended.add_done_callback(lambda _: self._ended(session))
        self._sessions.add(session)
        return session

    def _admit(self, session: Session) -> Reply | None:
        address = session.peer[0]
        self._per_address[address] += 1
        if self.service.refuses_client(address):
            return _ACCESS_DENIED
        if len(self._sessions) > MAX_CONNECTIONS or self._per_address[address] > MAX_PER_ADDRESS:
            return _TOO_MANY
        return None

    def _ended(self, session: Session) -> None:
        self._sessions.discard(session)
        address = session.peer[0]
        self._per_address[address] -= 1
        if self._per_address[address] <= 0:
            del self._per_address[address]

    def _deliver(
        self,
        transaction: Transaction,
        session: Session,
        answered: Callable[[Answer | RuntimeError], None],
    ) -> None:
        via = f"service {self.service.name}"
        hop = Hop(session.peer[0], self.service.hostname, via, session.tls, authenticated=False)
        errand = Errand(None, session.peer, hop, transaction.envelope, transaction.data)
        self._dispatcher.deliver(errand, answered)
