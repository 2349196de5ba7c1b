"""A service that listens: the same sessions as on a reversed connection, many at once.

What ETRN needs, for the server that was asked opens connections of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from salmon_revsmtp.delivery.dispatcher import Dispatcher
from salmon_revsmtp.delivery.trace import Origin
from salmon_revsmtp.net.certificate import Certificate
from salmon_revsmtp.net.driver import Driver
from salmon_revsmtp.net.listener import Admit, Listener
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.service.session import Session, Tally
from salmon_revsmtp.service.settings import ServiceSettings
from salmon_revsmtp.smtp.limits import COMMAND_TIMEOUT
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["address_problems", "listener"]

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


def listener(
    service: Service,
    policy: Callable[[str], Reply | None],
    dispatcher: Dispatcher,
    idle_timeout: float = COMMAND_TIMEOUT,
) -> Listener:
    """The listener of a service on its ``listen`` address; not started.

    ``policy`` accepts or refuses a recipient.
    """
    settings = service.settings
    certificate = Certificate(f"service={service.name}", settings.tls_cert, settings.tls_key)

    def connect(admit: Admit) -> Session:
        def admitted(driver: Driver) -> Reply | None:
            too_many = admit(driver)
            return _ACCESS_DENIED if service.refuses_client(driver.peer[0]) else too_many

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
        )

    host, port = service.settings.address
    return Listener(f"service={service.name}", connect, host, port)
