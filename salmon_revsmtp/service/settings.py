"""One entry of ``smtp_services``: what a user may say of an inbound service.

A field's ``description`` is what a wrong value is told is allowed; the string below the field is
its meaning, which the settings page of the documentation is made of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from salmon_revsmtp.net.address import (
    ADDRESSES,
    HostAndPort,
    domain_name,
    host_and_port,
    host_name,
    listed_addresses,
    network,
)

__all__ = ["ANY_DOMAIN", "ServiceSettings"]

ANY_DOMAIN = "*"

# Octets: five of the largest messages by default.
LEAST_MEMORY = 256 * 1024 * 1024

_NETWORKS = ("allow", "deny", "keep_places_for", "forwarded_from", "proxy_from")


class ServiceSettings(BaseModel):
    """One entry of ``smtp_services``: the policy and the delivery of an inbound SMTP service."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, defer_build=True
    )

    hostname: Annotated[
        str | None,
        Field(
            description="a host name such as 'mail.example.org', an address such as '[192.0.2.1]' "
            "or '[IPv6:2001:db8::1]', or None for this machine's",
        ),
    ] = None
    """Our name: in the greeting, in ``EHLO`` and in ``Received:`` lines.  With ``None``, the
    machine's fully qualified name, or its address if it has none."""
    domains: Annotated[
        tuple[str, ...],
        Field(description="a list of domain names, or ['*'] for any; empty: the agents'"),
    ] = ()
    """Recipients in these domains are accepted, all others are refused with 550.  An empty list
    accepts the domains that the agents of this service ask for."""
    allow: Annotated[
        tuple[str, ...], Field(description="a list of networks such as '192.0.2.0/24'")
    ] = ()
    """The networks that may send us mail; after a reversal that is the provider's.  An empty list
    admits everyone."""
    deny: Annotated[
        tuple[str, ...], Field(description="a list of networks such as '192.0.2.0/24'")
    ] = ()
    """The networks that may not.  ``deny`` wins over ``allow``."""
    max_message_size: Annotated[int, Field(gt=0, description="octets, a whole number above 0")] = (
        50 * 1024 * 1024
    )
    """The largest message in octets; 50 MiB by default.  It is announced as ``SIZE`` and enforced
    while the message arrives.  A larger one is refused with 552."""
    max_recipients: Annotated[int, Field(gt=0, description="a whole number above 0")] = 1000
    """Recipients of one message.  Those above it are answered 452, and the sender sends them a
    second copy."""
    delivery: Annotated[
        Literal["router", "queue", "hold"], Field(description="'router', 'queue' or 'hold'")
    ] = "router"
    """``"router"`` runs your handlers before the 250.  ``"queue"`` stores the message in ``queue``
    before the 250, and a ``QueueConsumer`` runs the handlers later.  With ``"hold"`` the account in
    ``customer_accounts`` that has the recipient's domain takes it before the 250, or it is held for
    that account."""
    queue: Annotated[str, Field(min_length=1, description="the folder of a Salmon Queue")] = (
        "run/inbound"
    )
    """The Salmon Queue that ``delivery: "queue"`` stores messages in."""
    unknown_recipients: Annotated[
        Literal["keep", "refuse"], Field(description="'keep' or 'refuse'")
    ] = "keep"
    """What becomes of a recipient that no route of your handlers matches.  ``"keep"`` takes the
    message into the undeliverable queue; ``"refuse"`` answers ``RCPT`` with 550, and the sender
    keeps the message and is told by its own server.  It is for services whose server has the routes
    loaded; where there are none at all, nothing is refused."""
    handler_timeout: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="seconds above 0")
    ] = 300
    """How long the provider waits for the answer to a message.  After that it hears 451 and tries
    again later; the handler goes on.  Most providers give up after 600 seconds (RFC 5321
    4.5.3.2.6), so stay well below that."""
    delivery_threads: Annotated[
        int, Field(strict=True, ge=1, le=256, description="a whole number from 1 to 256")
    ] = 1
    """How many messages of the service may be in handlers at the same time.  With 1, Salmon's
    habits are safe whatever your handlers do: all services that have 1 share one thread.  More than
    1 gives the service threads of its own, and messages are then not handled in the order in which
    they arrive.  It is for handlers that wait, for a database or a web service, and that are marked
    ``@nolocking``: :doc:`delivery` says what they and the state storage must allow.  In queue mode
    so many messages are stored at the same time.  A session reads 256 messages ahead of their
    answers, so more threads would have no work."""
    repeat_window: Annotated[
        float, Field(gt=0, le=3650, allow_inf_nan=False, description="days above 0, up to 3650")
    ] = 7
    """How long a delivery is remembered.  A message that is redelivered in this time is answered
    as before, and no handler sees it again."""
    notifications: Annotated[bool, Field(strict=True, description="True or False")] = True
    """Whether a sender is told of recipients that failed when the provider has heard 250.  If not,
    the message is kept in the undeliverable queue for them, and the log says so."""
    listen: Annotated[tuple[str, ...], Field(description=ADDRESSES)] = ()
    """The addresses on which the service takes mail as well, while a server runs.  ETRN needs
    one."""
    max_connections: Annotated[int, Field(gt=0, description="a whole number above 0")] = 100
    """Connections to the listening service at a time; no more than 25 of them from one network (a
    /24, or an IPv6 /64).  When all are taken, a newcomer gets the place of one that is idle, or is
    answered 421."""
    max_memory: Annotated[
        int | None, Field(gt=0, description="octets, a whole number above 0, or None")
    ] = None
    """Octets of messages that the service holds at a time: those that are coming, and those that
    wait for a handler.  Of a large message in queue mode 256 KiB count, for the rest goes into the
    queue as it comes.  With ``None``, 256 MiB, or four times ``max_message_size`` if that is more.
    What finds no room is answered 452, and the sender tries again later.  A quarter is kept for
    reversed connections, and for the clients that places are kept for."""
    keep_places_for: Annotated[
        tuple[str, ...], Field(description="a list of networks such as '192.0.2.0/24'")
    ] = ()
    """Networks for whose connections there is always a place, whoever else is there.  The addresses
    of an ``etrn`` agent's server always belong to them."""
    forwarded_from: Annotated[
        tuple[str, ...], Field(description="a list of networks such as '192.0.2.0/24'")
    ] = ()
    """Networks whose ``XFORWARD`` is believed: hosts of yours that pass mail on to the listening
    service, and say which host it came from.  That is then the client that handlers and hooks see.
    All others are refused it.  On a reversed connection the provider is always believed."""
    proxy_from: Annotated[
        tuple[str, ...], Field(description="a list of networks such as '192.0.2.0/24'")
    ] = ()
    """Networks of load balancers before the listening service (:doc:`several-hosts`).  Each
    connection from there has to begin with a PROXY header, of version 1 or 2, and its client is the
    one that the header names; one without it is dropped.  Nothing that others say is a PROXY
    header."""
    tls_cert: Annotated[
        Path | None, Field(description="a PEM file: our certificate, and those up to its CA")
    ] = None
    """With a certificate, the listening service offers ``STARTTLS``.  A file that changes is read
    again, without a restart."""
    tls_key: Annotated[
        Path | None,
        Field(description="a PEM file: the key of tls_cert, if that lacks it"),
    ] = None
    """The private key, unless ``tls_cert`` holds it."""

    @field_validator(
        "domains", "allow", "deny", "keep_places_for", "forwarded_from", "proxy_from", mode="before"
    )
    @classmethod
    def _a_list(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError("a single string is not a list")
        return value

    @field_validator("hostname")
    @classmethod
    def _hostname(cls, value: str | None) -> str | None:
        return value if value is None else host_name(value)

    @field_validator("listen", mode="before")
    @classmethod
    def _addresses(cls, value: object) -> object:
        return listed_addresses(value)

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            host_and_port(one)
        return value

    @field_validator("tls_cert", "tls_key")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        # The files are read again, and a handler may have changed the folder of the process.
        return value.absolute() if value is not None else None

    @model_validator(mode="after")
    def _memory(self) -> ServiceSettings:
        if self.memory < 2 * self.max_message_size:
            raise ValueError(
                f"max_memory: found {self.memory}, allowed is twice max_message_size "
                f"({self.max_message_size}) or more, or no message of that size could come"
            )
        return self

    @model_validator(mode="after")
    def _tls(self) -> ServiceSettings:
        if self.tls_cert is None and self.tls_key is None:
            return self
        from salmon_revsmtp.net.certificate import certificate_problem  # and ssl

        if problem := certificate_problem(self.tls_cert, self.tls_key):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _routes(self) -> ServiceSettings:
        if self.unknown_recipients == "refuse" and self.delivery == "hold":
            raise ValueError(
                "unknown_recipients: found 'refuse', allowed with delivery 'hold' is 'keep': held "
                "mail has no routes; a customer at home refuses its own unknown recipients"
            )
        return self

    @model_validator(mode="after")
    def _threads(self) -> ServiceSettings:
        if self.delivery_threads > 1 and self.delivery == "hold":
            raise ValueError(
                f"delivery_threads: found {self.delivery_threads}, allowed with delivery 'hold' is "
                "1: no handlers run, and what comes at the same time is stored together"
            )
        return self

    @property
    def memory(self) -> int:
        """``max_memory``, or what it is by default."""
        return self.max_memory or max(LEAST_MEMORY, 4 * self.max_message_size)

    @property
    def repeat_seconds(self) -> float:
        """``repeat_window`` in seconds."""
        return self.repeat_window * 86400

    @property
    def addresses(self) -> tuple[HostAndPort, ...]:
        """Hosts and ports of ``listen``."""
        return tuple(map(host_and_port, self.listen))

    @field_validator("domains")
    @classmethod
    def _domains(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one if one == ANY_DOMAIN else domain_name(one) for one in value)

    @field_validator(*_NETWORKS)
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(network(one) for one in value)
