"""What a user may say of a provider: ``customer_accounts``, and ``provider``.

A field's ``description`` is what a wrong value is told is allowed; the string below the field is
its meaning, which the settings page of the documentation is made of.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from salmon_revsmtp.net.address import (
    ADDRESS,
    ADDRESSES,
    HostAndPort,
    domain_name,
    host_and_port,
    host_name,
    listed_addresses,
    network,
)
from salmon_revsmtp.net.certificate import certificate_problem
from salmon_revsmtp.provider.hold.places import scheme_of
from salmon_revsmtp.smtp.verifier import Verifier

__all__ = ["AccountSettings", "ProviderSettings"]

GIB = 1024**3


def _plain_text(text: str) -> str:
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError("control characters are refused")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("it is no UTF-8")
    return text


class AccountSettings(BaseModel):
    """One entry of ``customer_accounts``: who may collect, and whose mail is held for it."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: Annotated[
        str, Field(min_length=1, max_length=200, description="a text without control characters")
    ]
    """What the customer logs in as.  Each account has its own."""
    password: Annotated[
        SecretStr,
        Field(
            min_length=1,
            description="a text that is not empty (if it comes from .env: is it set there?), or "
            "what 'salmon-revsmtp provider password' prints",
        ),
    ]
    """Its password, or what ``salmon-revsmtp provider password`` makes of it.  With that alone,
    the mechanisms that need the password itself (CRAM-MD5, SCRAM-SHA-1) do not work."""
    domains: Annotated[
        tuple[str, ...],
        Field(min_length=1, description="a list of domain names such as 'example.org'"),
    ]
    """The domains whose mail is held for the account.  A domain belongs to one account only."""
    enabled: Annotated[bool, Field(strict=True, description="True or False")] = True
    """A disabled account cannot log in.  Its mail is still held."""
    quota_messages: Annotated[int, Field(gt=0, description="a whole number above 0")] = 100_000
    """Messages that are held for it.  A sender of more hears 452, keeps its mail and tries
    again."""
    quota_bytes: Annotated[int, Field(gt=0, description="octets, a whole number above 0")] = 5 * GIB
    """The same in octets; 5 GiB by default."""
    hold_days: Annotated[
        float, Field(gt=0, le=3650, allow_inf_nan=False, description="days above 0, up to 3650")
    ] = 30
    """How long a message is held.  After that its sender is told that it was not delivered."""
    warn_hours: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=False, description="hours above 0, or None for no warning"),
    ] = None
    """After so many hours the sender of a message is told that it is delayed."""
    push: Annotated[
        Literal[True, False, "always"], Field(description="True, False or 'always'")
    ] = True
    """``True`` keeps the session open with customers that ask for it (``XHOLD``), and sends mail
    down it as it comes; ``"always"`` with all customers of the account, for those that do not
    know how to ask; ``False`` with none."""
    live: Annotated[bool, Field(strict=True, description="True or False")] = True
    """While a push session is open, senders hear the customer's own answers: at ``RCPT``, and at
    the end of the message, which is not held then.  With ``False``, or while there is no session,
    or where the customer says nothing in time, messages are held, and pushed."""
    sessions: Annotated[int, Field(ge=1, le=100, description="1 to 100")] = 1
    """Reversed sessions at a time.  The newest wins: one more ends the oldest."""
    etrn: Annotated[str | None, Field(description=ADDRESS)] = None
    """Where held mail is sent when anyone asks for it by ``ETRN`` on a service with ``delivery:
    "hold"``.  With ``None`` such a request is refused."""

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if re.search(r"[\x00-\x1f\x7f]", value) or any(
            "\ud800" <= one <= "\udfff" for one in value
        ):
            raise ValueError("control characters are refused")
        return value

    @field_validator("password")
    @classmethod
    def _password(cls, value: SecretStr) -> SecretStr:
        Verifier.parse(_plain_text(value.get_secret_value()))
        return value

    @field_validator("domains", mode="before")
    @classmethod
    def _a_list(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError("a single string is not a list")
        return value

    @field_validator("domains")
    @classmethod
    def _domains(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(domain_name(one) for one in value))

    @field_validator("etrn")
    @classmethod
    def _etrn(cls, value: str | None) -> str | None:
        if value is not None and not all(host_and_port(value)):
            raise ValueError("a host and a port are needed")
        return value


class ProviderSettings(BaseModel):
    """``provider``: how customers reach us, and where their mail is held."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    hostname: Annotated[
        str | None,
        Field(
            description="a host name such as 'mx.example.net', an address such as '[192.0.2.1]' "
            "or '[IPv6:2001:db8::1]', or None for this machine's",
        ),
    ] = None
    """Our name in the greeting and in ``EHLO``.  With ``None``, the machine's fully qualified
    name."""
    listen: Annotated[tuple[str, ...], Field(description=ADDRESSES)] = ("0.0.0.0:366",)
    """The addresses on which customers call, with ``STARTTLS`` if there is a certificate."""
    listen_implicit: Annotated[tuple[str, ...], Field(description=ADDRESSES)] = ()
    """The same with TLS from the first octet."""
    tls_cert: Annotated[
        Path | None, Field(description="a PEM file: our certificate, and those up to its CA")
    ] = None
    """Our certificate.  A file that changes is read again, without a restart.  Without one,
    customers can log in by SCRAM and CRAM-MD5 only, and what they collect is not encrypted."""
    tls_key: Annotated[
        Path | None, Field(description="a PEM file: the key of tls_cert, if that lacks it")
    ] = None
    """The private key, unless ``tls_cert`` holds it."""
    require_tls: Annotated[
        bool | None, Field(strict=True, description="True, False, or None: True with a certificate")
    ] = None
    """Whether ``AUTH`` and ``ATRN`` need TLS.  With a certificate they do; ``False`` is for
    customers that have none, as fetchmail's ODMR."""
    hold: Annotated[
        str,
        Field(
            min_length=1,
            repr=False,
            description="a folder, or a URL such as 'postgresql://user:password@host/database'",
        ),
    ] = "run/hold"
    """Where mail is held: a folder, or the URL of a database that several hosts share
    (:doc:`several-hosts`).  Take a URL with a password from the environment, as you do with
    passwords."""
    keepalive: Annotated[
        float,
        Field(ge=1, le=3600, allow_inf_nan=False, description="seconds, 1 to 3600"),
    ] = 60
    """Seconds of silence in a push session after which it is seen whether the customer is still
    there.  Many routers forget a silent connection after four minutes."""
    max_sessions: Annotated[int, Field(gt=0, description="a whole number above 0")] = 10_000
    """Connections of customers at a time; one more hears 421."""
    max_sessions_per_address: Annotated[int, Field(gt=0, description="a whole number above 0")] = 50
    """The same from one address."""
    proxy_from: Annotated[
        tuple[str, ...], Field(description="a list of networks such as '192.0.2.0/24'")
    ] = ()
    """Networks of load balancers before the provider (:doc:`several-hosts`).  Each connection from
    there has to begin with a PROXY header, of version 1 or 2, and its customer is the one that the
    header names; one without it is dropped.  Nothing that others say is a PROXY header."""

    @field_validator("proxy_from", mode="before")
    @classmethod
    def _networks_listed(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError("a single string is not a list")
        return value

    @field_validator("proxy_from")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(network(one) for one in value)

    @field_validator("listen", "listen_implicit", mode="before")
    @classmethod
    def _a_list(cls, value: object) -> object:
        return listed_addresses(value)

    @field_validator("listen", "listen_implicit")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            host_and_port(one)
        return value

    @field_validator("tls_cert", "tls_key")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        # The files are read again, and a handler may have changed the folder of the process.
        return value.absolute() if value is not None else None

    @field_validator("hostname")
    @classmethod
    def _hostname(cls, value: str | None) -> str | None:
        return value if value is None else host_name(value)

    @field_validator("hold")
    @classmethod
    def _hold(cls, value: str) -> str:
        scheme_of(value)
        return value

    @model_validator(mode="after")
    def _tls(self) -> ProviderSettings:
        if problem := certificate_problem(self.tls_cert, self.tls_key):
            raise ValueError(problem)
        if self.tls_cert is None:
            if self.listen_implicit:
                raise ValueError("listen_implicit: it needs a tls_cert")
            if self.require_tls:
                raise ValueError("require_tls: it needs a tls_cert")
        if not self.listen and not self.listen_implicit:
            raise ValueError("listen: found nothing, and no listen_implicit; name an address")
        return self

    @property
    def hold_scheme(self) -> str | None:
        """The scheme of ``hold`` if that is a URL; ``None``: it is a folder."""
        return scheme_of(self.hold)

    @property
    def hold_folder(self) -> str | None:
        """``hold`` if that is a folder."""
        return self.hold if self.hold_scheme is None else None

    @property
    def needs_tls(self) -> bool:
        """``require_tls``, or what is right without it."""
        return self.tls_cert is not None if self.require_tls is None else self.require_tls

    @property
    def addresses(self) -> tuple[tuple[HostAndPort, bool], ...]:
        """Where to listen, and whether TLS is from the start."""
        return tuple(
            (host_and_port(one), implicit)
            for listed, implicit in ((self.listen, False), (self.listen_implicit, True))
            for one in listed
        )
