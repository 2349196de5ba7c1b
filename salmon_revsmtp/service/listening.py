"""A service that listens: the same sessions as on a reversed connection, many at once.

What ETRN needs, for the server that was asked opens connections of its own.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path

from salmon_revsmtp.delivery.dispatcher import Dispatcher
from salmon_revsmtp.delivery.trace import Origin
from salmon_revsmtp.net.driver import Driver
from salmon_revsmtp.net.listener import Admit, Listener
from salmon_revsmtp.safelog import LogBudget
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.service.session import Session, Tally
from salmon_revsmtp.service.settings import ServiceSettings
from salmon_revsmtp.smtp.limits import COMMAND_TIMEOUT
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["address_problems", "listener"]

log = logging.getLogger(__name__)

_ACCESS_DENIED = Reply(554, "access denied", "5.7.1")


async def address_problems(services: Mapping[str, ServiceSettings]) -> list[str]:
    """Which addresses cannot be listened on now, each with the reason."""
    problems = []
    for name, settings in services.items():
        if settings.listen:
            unused = Listener(f"service={name}", _unconnected, *settings.address)
            try:
                await unused.start(quietly=True)
            except OSError as error:
                problems.append(error.strerror or str(error))
            await unused.stop(0)
    return problems


def _unconnected(admit: Admit) -> Driver:
    raise ConnectionAbortedError("nothing is served here yet")


class Certificate:
    """The certificate of a service, read again when a file of it has changed: a renewed one is
    served from the next connection on."""

    def __init__(self, name: str, settings: ServiceSettings) -> None:
        self._name = name
        self._settings = settings
        self._seen = self._state()
        self._context = settings.tls_context()

    def context(self) -> ssl.SSLContext | None:
        """What to do TLS with now; that of before while the new files are no good, as when only one
        of them has been replaced."""
        seen = self._state()
        if seen != self._seen:
            self._seen = seen
            try:
                self._context = self._settings.tls_context()
            except (OSError, ssl.SSLError, ValueError) as error:
                log.warning(
                    "service=%s tls_cert, tls_key: %s; the certificate of before is used",
                    *(self._name, error.strerror or error if isinstance(error, OSError) else error),
                )
            else:
                log.info("service=%s the certificate was read again", self._name)
        return self._context

    def _state(self) -> list[tuple[int, ...] | None]:
        return [_state(path) for path in (self._settings.tls_cert, self._settings.tls_key) if path]


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def listener(
    service: Service,
    policy: Callable[[str], Reply | None],
    dispatcher: Dispatcher,
    idle_timeout: float = COMMAND_TIMEOUT,
) -> Listener:
    """The listener of a service on its ``listen`` address; not started.

    ``policy`` accepts or refuses a recipient.
    """
    certificate = Certificate(service.name, service.settings)

    lines = LogBudget()

    def refuse(address: str) -> Reply | None:
        return _ACCESS_DENIED if service.refuses_client(address) else None

    def connect(admit: Admit) -> Session:
        def admitted(session: Session) -> Reply | None:
            expected = session.peer[0] in service.expected
            session.memory = service.memory if expected else service.strangers
            return admit(session)

        origin = Origin(service.name, service.hostname)
        return Session(
            service,
            policy,
            dispatcher,
            origin,
            Tally(),
            idle_timeout,
            starttls=certificate.context(),
            admit=admitted,
            log=lines,
        )

    service.expected.look_up()
    listening = Listener(
        f"service={service.name}",
        connect,
        *service.settings.address,
        max_connections=service.settings.max_connections,
        expected=service.expected,
        refuse=refuse,
    )
    service.memory.short = service.strangers.short = listening.hurry
    return listening
