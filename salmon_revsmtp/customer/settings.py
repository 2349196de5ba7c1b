"""The keys of an agent, as a third party's agent type has them too."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator

from salmon_revsmtp.net.fingerprint import FINGERPRINT, normal_fingerprint
from salmon_revsmtp.net.mechanisms import PASSWORDS, VERIFIED, Mechanism
from salmon_revsmtp.smtp.addresses import AddressError, to_ascii

__all__ = [
    "ACCOUNT",
    "PASSWORD",
    "AgentSettings",
    "ServerSettings",
    "TlsMode",
    "without_control_characters",
]

TlsMode = Literal["implicit", "starttls", "opportunistic", "none"]

ACCOUNT = "a text: the name to log in with"
PASSWORD = "a text that is not empty (if it comes from .env: is it set there?)"
AUTH = (
    "a list of 'SCRAM-SHA-256', 'SCRAM-SHA-1', 'CRAM-MD5', 'PLAIN' and 'LOGIN', each once; or None"
)

# Of parameters: whatever may stand between a name and a password.
_SEPARATORS = re.compile(r"[\s,;:=|&/\\\"'<>(){}]+")

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def without_control_characters(text: str) -> str:
    """``text``, or :class:`ValueError`: a line end in it would be another SMTP command."""
    if _CONTROL.search(text):
        raise ValueError("control characters are refused")
    return text


def _what_is_no_host(text: str) -> str:
    """What to write instead of a URL; what else stands in it may be a password."""
    text = re.sub(r"(?s)\A(\w+://).*@", r"\1", text)
    host = re.fullmatch(r"\w+://(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::([0-9]+))?/?\S*", text)
    if host is None:
        return "a host name has no spaces, no slash and no @"
    port = f", and port: {host[2]}" if host[2] else ""
    return f"that is a URL; write {host[1]!r} here{port}"


def _is_domain(word: str) -> bool:
    """A domain name of two labels or more; ``@`` before it is ETRN's."""
    try:
        return "." in to_ascii(word.removeprefix("@"))
    except AddressError:
        return False


class AgentSettings(BaseModel):
    """The keys that every agent has.

    A field's ``description`` is what a wrong value is told is allowed; the string below the field
    is its meaning, which the settings page of the documentation is made of.
    """

    # What no settings use is not built: it takes longer than all the rest of a command's start.
    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, defer_build=True
    )

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="letters, digits, - and _")]
    """What commands, the log and the journal call the agent.  Each agent has its own."""
    protocol: Annotated[str, Field(description="an agent type")]
    """How it collects: ``"odmr"``, ``"etrn"``, or an agent type that a plugin adds."""
    enabled: Annotated[bool, Field(strict=True, description="True or False")] = True
    """A disabled agent does not collect.  ``salmon-revsmtp enable`` and ``disable`` win over this
    key."""
    service: Annotated[str, Field(description="a key of smtp_services")] = "default"
    """The inbound service that receives the mail."""
    every: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="minutes above 0, or None for only on demand",
        ),
    ] = 10
    """Minutes from the start of one scheduled collection to the start of the next.  With ``None``
    the agent collects only when you run ``salmon-revsmtp collect``."""


class ServerSettings(AgentSettings):
    """The keys of an agent that calls out to an SMTP server."""

    server: Annotated[str, Field(min_length=1, description="a host name or address")]
    """The provider's host.  Its certificate must be for this name."""
    port: Annotated[int, Field(ge=1, le=65535, description="a TCP port, 1 to 65535")]
    """The provider's TCP port."""
    tls: Annotated[
        TlsMode, Field(description="'implicit', 'starttls', 'opportunistic' or 'none'")
    ] = "starttls"
    """``"starttls"`` requires STARTTLS; ``"implicit"`` speaks TLS from the first octet.  Both
    verify the certificate, and only they ever send the password itself.  ``"opportunistic"`` uses
    STARTTLS if it is offered and works, and verifies nothing.  ``"none"`` sends everything in the
    clear."""
    ca_file: Annotated[
        Path | None, Field(description="a readable file of certificates in PEM form")
    ] = None
    """Trust these certificates instead of the system's: those of a CA, or the server's own
    self-signed one.  It needs a ``tls`` that verifies."""
    fingerprint: Annotated[str | None, Field(description=FINGERPRINT)] = None
    """Trust the certificate with this fingerprint, ``"sha256:..."``, and no other.  No CA, name or
    date in it matters.  ``salmon-revsmtp check`` shows the one that the server has.  It needs a
    ``tls`` that verifies, and takes the place of ``ca_file``."""
    account: Annotated[str | None, Field(min_length=1, description=ACCOUNT)] = None
    """The name of your account at the provider.  Without one, the agent does not log in."""
    password: Annotated[SecretStr | None, Field(min_length=1, description=PASSWORD)] = None
    """Its password.  Keep it in ``.env`` and write ``os.environ["..."]`` here."""
    auth: Annotated[
        tuple[Mechanism, ...] | None,
        Field(description=AUTH),
    ] = None
    """The mechanisms to log in with, in this order.  With ``None`` the strongest that the provider
    offers comes first, and one other is tried if it is refused.  ``"PLAIN"`` and ``"LOGIN"`` need a
    ``tls`` that verifies."""
    domains: Annotated[
        tuple[str, ...], Field(description="a list of domain names such as 'example.org'")
    ] = ()
    """The domains whose mail is asked for, in one ``ATRN``, or in several sessions if one command
    line cannot hold them (512 octets, RFC 5321).  An empty list asks for whatever the
    provider holds for the account."""
    timeout: Annotated[
        float,
        Field(gt=0, le=86400, allow_inf_nan=False, description="seconds, above 0 and up to 86400"),
    ] = 60
    """Seconds to wait for a connection to each address of the server, and for the answer to a
    command.  The answer to ``ATRN`` may take this long or 10 minutes (RFC 2645), whichever is
    longer.  On a reversed connection the provider may be silent for 5 minutes (RFC 5321); if you
    set ``timeout``, for that long."""

    @field_validator("domains", mode="before")
    @classmethod
    def _domains_are_a_list(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError("a single string is not a list")
        return value

    @field_validator("auth", mode="before")
    @classmethod
    def _mechanisms_are_a_list(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError("a single string is not a list")
        if isinstance(value, list | tuple):
            return tuple(one.upper() if isinstance(one, str) else one for one in value)
        return value

    @field_validator("auth")
    @classmethod
    def _auth(
        cls, value: tuple[Mechanism, ...] | None, info: ValidationInfo
    ) -> tuple[Mechanism, ...] | None:
        if value is None:
            return None
        if not value:
            raise ValueError("it is empty, so there would be no login")
        if len(set(value)) < len(value):
            raise ValueError("one of them is there twice")
        if info.data.get("account", "") is None:
            raise ValueError("without an account there is no login")
        tls = info.data.get("tls")
        if tls not in (None, *VERIFIED) and (sent := [one for one in value if one in PASSWORDS]):
            raise ValueError(
                f"{sent[0]} sends the password, and tls {tls!r} verifies no certificate"
            )
        return value

    @field_validator("server")
    @classmethod
    def _server(cls, value: str) -> str:
        if re.search(r"[\s/@\x00-\x1f\x7f]", value):
            raise ValueError(_what_is_no_host(value))
        host = value[1:-1] if value.startswith("[") and value.endswith("]") else value
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(host)
            return host
        if found := re.fullmatch(r"(.*[^:]):([0-9]+)", value):
            raise ValueError(
                f"the port has a key of its own: port; write {found[1]!r} here, and port: "
                f"{found[2]}"
            )
        return to_ascii(host)

    @field_validator("account")
    @classmethod
    def _account(cls, value: str | None) -> str | None:
        return value if value is None else without_control_characters(value)

    @field_validator("password")
    @classmethod
    def _password(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            text = without_control_characters(value.get_secret_value())
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError("it is no UTF-8")
        return value

    @field_validator("ca_file")
    @classmethod
    def _ca_file(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None:
            if (tls := info.data.get("tls")) not in (None, *VERIFIED):
                raise ValueError(f"tls {tls!r} verifies no certificate; set 'starttls'")
            import ssl

            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(value)
            except (OSError, ssl.SSLError) as error:
                raise ValueError(str(error.strerror or error)) from None
            value = value.absolute()  # a handler may change the folder of the process
        return value

    @field_validator("fingerprint")
    @classmethod
    def _fingerprint(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        if (tls := info.data.get("tls")) not in (None, *VERIFIED):
            raise ValueError(f"tls {tls!r} verifies no certificate; set 'starttls'")
        if info.data.get("ca_file") is not None:
            raise ValueError("ca_file is set, too, and only one of the two can say whom to trust")
        return normal_fingerprint(value)

    @property
    def hidden_words(self) -> tuple[str, ...]:
        """What is shown no more than the password: the words of ``parameters`` that are no domain
        names."""
        given = getattr(self, "parameters", None) or ()
        texts = (given,) if isinstance(given, str) else given
        words = [word for text in texts for word in _SEPARATORS.split(text)]
        return tuple(dict.fromkeys(word for word in words if word and not _is_domain(word)))

    def idle_timeout(self, least: float) -> float:
        """Seconds to wait for a peer that RFC 5321 4.5.3.2 gives ``least``: ``timeout`` rules where
        the user has set it, the RFC where not."""
        return self.timeout if "timeout" in self.model_fields_set else max(least, self.timeout)
