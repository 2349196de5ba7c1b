"""A service that listens: the same sessions as on a reversed connection, many at once.

What ETRN needs, for the server that was asked opens connections of its own.
"""

from __future__ import annotations

from salmon_revsmtp.delivery.dispatcher import Deliverer
from salmon_revsmtp.delivery.trace import Origin
from salmon_revsmtp.net.certificate import Certificate
from salmon_revsmtp.net.expected import Expected
from salmon_revsmtp.net.listener import Admit, Listener, places_for
from salmon_revsmtp.safelog import LogBudget
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.service.recipients import Recipients
from salmon_revsmtp.service.session import AnswerEtrn, Session, Tally
from salmon_revsmtp.smtp.limits import COMMAND_TIMEOUT
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["listeners"]

_ACCESS_DENIED = Reply(554, "access denied", "5.7.1")


def listeners(
    service: Service,
    recipients: Recipients,
    deliverer: Deliverer,
    idle_timeout: float = COMMAND_TIMEOUT,
    etrn: AnswerEtrn | None = None,
) -> list[Listener]:
    """The listeners of a service, one for each ``listen`` address; not started.

    ``recipients`` says who is accepted; ``etrn`` answers ETRN, where that is offered.
    """
    settings = service.settings
    certificate = Certificate(f"service={service.name}", settings.tls_cert, settings.tls_key)

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
            recipients,
            deliverer,
            origin,
            Tally(),
            idle_timeout,
            starttls=certificate.context(),
            admit=admitted,
            log=lines,
            etrn=etrn,
        )

    service.listens = True
    service.expected.look_up()
    places = places_for(settings.max_connections, service.expected)
    name = f"service={service.name}"
    balancers = Expected(settings.proxy_from) if settings.proxy_from else None
    listening = [
        Listener(name, connect, *address, places=places, refuse=refuse, balancers=balancers)
        for address in settings.addresses
    ]

    def hurry() -> None:
        for one in listening:
            one.hurry()

    service.memory.short = service.strangers.short = hurry
    return listening
