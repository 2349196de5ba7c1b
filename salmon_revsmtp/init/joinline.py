"""The join line: all that a customer needs to know of its provider, in one line to copy.

``revsmtp://account:password@host:port?domains=a,b&fingerprint=sha256:...``

It is a URL (RFC 3986): what has a meaning in one is percent-encoded.  There is a password in it, so
no error here quotes any part of it but the names of its keys.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urlsplit

from salmon_revsmtp.net.address import host_name
from salmon_revsmtp.smtp.addresses import to_ascii

__all__ = ["ODMR_PORT", "JoinLine", "JoinLineError", "parse"]

#: RFC 2645 4.
ODMR_PORT = 366

SCHEME = "revsmtp"
SHAPE = f"{SCHEME}://account:password@host:port?domains=a,b&fingerprint=sha256:..."
KEYS = ("domains", "fingerprint")

# Octets; with a password of 8,192, the longest that there is, percent-encoded.
LONGEST = 64 * 1024

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class JoinLineError(ValueError):
    """Not a join line; the text says what is wrong with it, and quotes nothing of it."""


@dataclass(frozen=True)
class JoinLine:
    """``fingerprint``  of the provider's certificate, ``sha256:`` and 64 hexadecimal digits;
    ``None`` where the system's certificate authorities vouch for it."""

    account: str
    password: str = field(repr=False)
    host: str
    port: int
    domains: tuple[str, ...]
    fingerprint: str | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        login = f"{quote(self.account, safe='')}:{quote(self.password, safe='')}"
        query = f"domains={','.join(self.domains)}"
        if self.fingerprint:
            query += f"&fingerprint={self.fingerprint}"
        return f"{SCHEME}://{login}@{host}:{self.port}?{query}"


def parse(text: str) -> JoinLine:
    """A join line, with white space around it.  Raises :class:`JoinLineError`."""
    text = text.strip()
    if not text:
        raise JoinLineError(f"it is empty; allowed: {SHAPE}")
    if len(text) > LONGEST:
        raise JoinLineError(f"it has more than {LONGEST:,} characters")
    if re.search(r"\s", text) or _CONTROL.search(text):
        raise JoinLineError("there is a space or a line break in it; copy it in one piece")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise JoinLineError("it is no UTF-8; copy it in one piece")
    if not text.lower().startswith(f"{SCHEME}://"):
        raise JoinLineError(f"it does not begin with {SCHEME}://; allowed: {SHAPE}")
    try:
        parts = urlsplit(text)
        port = parts.port or ODMR_PORT
    except ValueError:
        raise JoinLineError(f"its host or port is none; allowed: {SHAPE}") from None
    if parts.path or parts.fragment or "?" not in text:
        raise JoinLineError(f"its end is missing or is something else; allowed: {SHAPE}")
    login, at, _ = parts.netloc.rpartition("@")
    name, colon, password = login.partition(":")
    if not (at and colon and name and password):
        raise JoinLineError(f"it has no account or no password; allowed: {SHAPE}")
    keys = _keys(parts.query)
    return JoinLine(
        _decoded(name, "account"),
        _decoded(password, "password"),
        _host(parts.hostname or ""),
        port,
        _domains(keys.get("domains", "")),
        _fingerprint(keys.get("fingerprint")),
    )


def _keys(query: str) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for one in query.split("&"):
        key, equals, value = one.partition("=")
        if not equals:
            raise JoinLineError("one of its keys has no value; copy it in one piece")
        if key not in KEYS:
            shown = f"a key {key!r}" if re.fullmatch("[a-z_]{1,20}", key) else "a key"
            raise JoinLineError(
                f"it has {shown} that this version does not know; known: {', '.join(KEYS)}"
            )
        if key in found:
            raise JoinLineError(f"its key {key!r} is there twice")
        found[key] = _decoded(value, key)
    return found


def _decoded(text: str, what: str) -> str:
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise JoinLineError(f"its {what} has a '%' that is none of URL's; write it as %25")
    try:
        found = unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise JoinLineError(f"its {what} is no UTF-8") from None
    if _CONTROL.search(found):
        raise JoinLineError(f"its {what} has control characters, which are refused")
    return found


def _host(host: str) -> str:
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(host))
    try:
        return host_name(host)
    except ValueError:
        raise JoinLineError(f"its host is none; allowed: {SHAPE}") from None


def _domains(listed: str) -> tuple[str, ...]:
    try:
        domains = tuple(dict.fromkeys(to_ascii(one) for one in listed.split(",")))
    except ValueError:
        raise JoinLineError("its domains are missing, or one of them is no domain name") from None
    return domains


def _fingerprint(found: str | None) -> str | None:
    if found is None:
        return None
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", found.lower()):
        raise JoinLineError(
            "its fingerprint is not whole: sha256: and 64 hexadecimal digits; copy it in one piece"
        )
    return found.lower()
