"""What a user may say of the console: ``console``."""

from __future__ import annotations

import ipaddress
import re
import ssl
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from salmon_revsmtp.console.passwords import BadHash, Password

__all__ = ["Address", "ConsoleSettings", "Network"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAME = re.compile(
    r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?([.][A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*"
)
_HEADER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")

# Letters of a token at least: no one guesses 96 bits.
SHORTEST_TOKEN = 16


class Address(NamedTuple):
    """Where it listens."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """No other machine reaches it."""
        return self.host == "localhost" or _is_loopback(self.host)

    @property
    def anywhere(self) -> bool:
        """It is all addresses of the machine."""
        return self.host in ("0.0.0.0", "::")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class ConsoleSettings(BaseModel):
    """``console``: pages to look at, and to act from, in a browser."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    listen: Annotated[
        str, Field(description="an address and a TCP port such as '127.0.0.1:8366' or '[::1]:8366'")
    ] = "127.0.0.1:8366"
    """Where it listens.  Other machines do not reach it unless you say so."""
    password: Annotated[
        SecretStr | None,
        Field(
            description="a text that is not empty (if it comes from .env: is it set there?), or "
            "what 'salmon-revsmtp console password' prints"
        ),
    ] = None
    """The password to log in with.  Keep it in ``.env``, or write here what ``salmon-revsmtp
    console password`` makes of it, which no one can log in with.  Without one, a link that
    ``salmon-revsmtp console`` prints lets you in once."""
    tls_cert: Annotated[Path | None, Field(description="a readable file in PEM form")] = None
    """The certificate, with those above it, for ``https``.  A file that changes is read again."""
    tls_key: Annotated[Path | None, Field(description="a readable file in PEM form")] = None
    """Its private key, if that is not in ``tls_cert``."""
    plain_http: Annotated[bool, Field(strict=True, description="True or False")] = False
    """Allows a ``listen`` that other machines reach without ``tls_cert``: a reverse proxy on
    another machine does TLS, or you trust everyone on the way."""
    hosts: Annotated[
        tuple[str, ...], Field(description="a list of host names such as 'mail.example.org'")
    ] = ()
    """Names by which browsers reach it, beside ``localhost`` and the address that it listens on.
    Under any other name there is no answer, so that no web site can act as if it were the
    console."""
    base_path: Annotated[
        str, Field(description="a path that begins with / and does not end with one, or ''")
    ] = ""
    """The path under which a reverse proxy has it, such as ``"/mail"``.  The proxy may leave it on
    or take it away."""
    proxies: Annotated[
        tuple[str, ...], Field(description="a list of networks such as '10.0.0.0/8'")
    ] = ()
    """The reverse proxies before it, whose ``X-Forwarded-For``, ``X-Forwarded-Proto`` and
    ``X-Forwarded-Host`` are believed."""
    user_header: Annotated[
        str | None, Field(description="the name of a header such as 'X-Remote-User', or None")
    ] = None
    """The header in which one of the ``proxies`` says who has logged in there, which is enough
    here.  The proxy has to take it away from what a browser sends."""
    metrics_token: Annotated[
        SecretStr | None,
        Field(description="a text of 16 letters or more without spaces, or None"),
    ] = None
    """What Prometheus says as a bearer token to read ``/metrics``.  It may log in by HTTP Basic
    with the password instead."""
    idle_minutes: Annotated[int, Field(ge=1, le=1440, description="minutes, 1 to 1440")] = 120
    """Minutes without a click after which you have to log in again.  You have to after a day in any
    case."""

    @property
    def address(self) -> Address:
        """``listen`` in parts."""
        host, _, port = self.listen.rpartition(":")
        return Address(host.removeprefix("[").removesuffix("]"), int(port))

    @property
    def networks(self) -> tuple[Network, ...]:
        """``proxies`` in parts."""
        return tuple(ipaddress.ip_network(one) for one in self.proxies)

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str) -> str:
        host, colon, port = value.rpartition(":")
        if not (colon and re.fullmatch(r"[0-9]{1,5}", port) and int(port) <= 65535):
            raise ValueError("it does not end with a colon and a port")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if ":" in bare and bare == host:
            raise ValueError("an address of IPv6 has brackets around it")
        if not (_is_address(bare) or _NAME.fullmatch(bare)):
            raise ValueError("before the port is no address")
        return value

    @field_validator("password", "metrics_token")
    @classmethod
    def _a_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value():
            raise ValueError("it is empty")
        return value

    @field_validator("password")
    @classmethod
    def _password(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            try:
                Password(value.get_secret_value())
            except BadHash as error:
                raise ValueError(str(error)) from None
        return value

    @field_validator("metrics_token")
    @classmethod
    def _token(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            text = value.get_secret_value()
            if len(text) < SHORTEST_TOKEN:
                raise ValueError("it is too short")
            if not re.fullmatch(r"[!-~]+", text):
                raise ValueError("it has something in it that no header takes")
        return value

    @field_validator("hosts", "proxies", mode="before")
    @classmethod
    def _a_list(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError("a single string is not a list")
        return value

    @field_validator("hosts")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not (_is_address(name) or _NAME.fullmatch(name)):
                raise ValueError("one of them is no host name; leave scheme, port and path out")
        return tuple(name.lower() for name in value)

    @field_validator("proxies")
    @classmethod
    def _proxies(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            ipaddress.ip_network(one)
        return value

    @field_validator("base_path")
    @classmethod
    def _base_path(cls, value: str) -> str:
        if value and (not _PATH.fullmatch(value) or {".", ".."} & set(value.split("/"))):
            raise ValueError("that is no such path")
        return value

    @field_validator("user_header")
    @classmethod
    def _user_header(cls, value: str | None) -> str | None:
        if value is not None and not _HEADER.fullmatch(value):
            raise ValueError("that is no name of a header")
        return value

    @model_validator(mode="after")
    def _together(self) -> ConsoleSettings:
        if self.tls_key is not None and self.tls_cert is None:
            raise ValueError("tls_key: it is there, and no tls_cert")
        if self.tls_cert is not None:
            self._load()
        elif not self.address.loopback and not self.plain_http:
            raise ValueError(
                f"listen: found {self.listen!r}, which other machines reach, and no tls_cert: "
                "passwords would go in the clear; set tls_cert, or 'plain_http': True if a "
                "reverse proxy does TLS"
            )
        if self.user_header is not None and not self.proxies:
            raise ValueError(
                "user_header: it is there, and no proxies, so no one would be believed; name the "
                "networks of your reverse proxies"
            )
        return self

    def _load(self) -> None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(str(self.tls_cert), self.tls_key, _no_passphrase)
        except (OSError, ssl.SSLError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(f"tls_cert: it cannot be used: {reason}") from None


def _no_passphrase() -> str:
    raise ValueError("its key has a passphrase, for which no one can be asked")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_loopback(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False
