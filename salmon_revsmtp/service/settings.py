"""One entry of ``smtp_services``: what a user may say of an inbound service."""

from __future__ import annotations

import ipaddress
import re
import ssl
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from salmon_revsmtp.smtp.addresses import to_ascii

__all__ = ["ANY_DOMAIN", "ServiceSettings"]

ANY_DOMAIN = "*"

_HOST_AND_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]]*)):([0-9]{1,5})")


class ServiceSettings(BaseModel):
    """One entry of ``smtp_services``: the policy and the delivery of an inbound SMTP service."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    hostname: Annotated[
        str | None, Field(description="a host name, or None for this machine's")
    ] = None
    domains: Annotated[
        tuple[str, ...],
        Field(description="a list of domain names, or ['*'] for any; empty: the agent's"),
    ] = ()
    allow: Annotated[
        tuple[str, ...], Field(description="a list of networks such as '192.0.2.0/24'")
    ] = ()
    deny: Annotated[
        tuple[str, ...], Field(description="a list of networks such as '192.0.2.0/24'")
    ] = ()
    max_message_size: Annotated[int, Field(gt=0, description="octets, a whole number above 0")] = (
        50 * 1024 * 1024
    )
    max_recipients: Annotated[int, Field(gt=0, description="a whole number above 0")] = 1000
    delivery: Annotated[Literal["router", "queue"], Field(description="'router' or 'queue'")] = (
        "router"
    )
    queue: Annotated[str, Field(min_length=1, description="the folder of a Salmon Queue")] = (
        "run/inbound"
    )
    handler_timeout: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="seconds above 0")
    ] = 300
    repeat_window: Annotated[
        float, Field(gt=0, le=3650, allow_inf_nan=False, description="days above 0, up to 3650")
    ] = 7
    listen: Annotated[
        str | None, Field(description="'host:port' such as '0.0.0.0:25' or '[::]:25', or None")
    ] = None
    tls_cert: Annotated[
        Path | None, Field(description="a PEM file: our certificate, and those up to its CA")
    ] = None
    tls_key: Annotated[
        Path | None, Field(description="a PEM file: the key of tls_cert, if that has it not")
    ] = None

    @field_validator("domains", "allow", "deny", mode="before")
    @classmethod
    def _a_list(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError("a single text is no list")
        return value

    @field_validator("hostname")
    @classmethod
    def _hostname(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[!-~]{1,255}", value):
            raise ValueError("a host name has no spaces or control characters")
        return value

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str | None) -> str | None:
        if value is not None and not _HOST_AND_PORT.fullmatch(value):
            raise ValueError("that is no host and port")
        return value

    @model_validator(mode="after")
    def _tls(self) -> ServiceSettings:
        if self.tls_cert is None and self.tls_key is not None:
            raise ValueError("tls_key: there is no tls_cert that it could be the key of")
        try:
            self.tls_context()
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"tls_cert, tls_key: {error.strerror or error}") from None
        return self

    def tls_context(self) -> ssl.SSLContext | None:
        """What a listening service does TLS with, ``None`` without a certificate."""
        if self.tls_cert is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.tls_cert, self.tls_key)
        return context

    @property
    def repeat_seconds(self) -> float:
        """``repeat_window`` in seconds."""
        return self.repeat_window * 86400

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of ``listen``; the empty host is every address."""
        found = _HOST_AND_PORT.fullmatch(self.listen or "")
        return (found[1] or found[2], int(found[3])) if found else ("", 0)

    @field_validator("domains")
    @classmethod
    def _domains(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one if one == ANY_DOMAIN else to_ascii(one) for one in value)

    @field_validator("allow", "deny")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ipaddress.ip_network(one, strict=False)) for one in value)
