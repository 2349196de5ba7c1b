"""A server that is known by the fingerprint of its certificate, and by nothing else.

No CA says who the server is, and neither its name nor its dates matter: it is that certificate, or
it is not the server.  The comparison is a part of the handshake.  So nothing is sent to a server
with another certificate, and aiosmtplib and asyncio take it for what it is: a failed handshake.
"""

from __future__ import annotations

import datetime
import ssl
from typing import NamedTuple

from salmon_revsmtp.foreign import printable, shortened
from salmon_revsmtp.net.certificate import fingerprint

__all__ = ["OtherCertificate", "described", "pinned"]

# Characters of a name in a certificate that are shown.
LONGEST_NAME = 100


class OtherCertificate(ssl.SSLError):
    """The server has another certificate than the one that is expected.

    ``expected``     the fingerprint of that one.
    ``certificate``  the one that the server has, in DER form; ``b""``: it has none.
    """

    def __init__(self, expected: str, certificate: bytes) -> None:
        super().__init__(ssl.SSL_ERROR_SSL, "the server has another certificate")
        self.expected, self.certificate = expected, certificate


def pinned(expected: str) -> ssl.SSLContext:
    """The context of a client whose handshakes fail with :class:`OtherCertificate` unless the
    server's certificate has this fingerprint.  It is for memory BIOs, as asyncio's are."""

    class Pinned(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            certificate = self.getpeercert(binary_form=True) or b""
            if not certificate or fingerprint(certificate) != expected:
                raise OtherCertificate(expected, certificate)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.sslobject_class = Pinned
    return context


# -- what is in a certificate that was not verified, of which Python says nothing ------------------

_VERSION = 0xA0
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_COMMON_NAME = bytes((0x55, 0x04, 0x03))
# How the strings of X.520 are encoded: BMPString is the one that is not as good as UTF-8.
_BMP_STRING = 0x1E


class _Value(NamedTuple):
    tag: int
    content: bytes


def described(certificate: bytes) -> str:
    """Whose a certificate (DER form) says that it is, and until when it is good, in words for a
    person; ``""`` where it cannot be read.  Nothing of it is proved."""
    try:
        [whole] = _values(certificate)
        fields = _values(_values(whole.content)[0].content)
        if fields[0].tag == _VERSION:
            del fields[0]
        _, _, _, validity, subject, *_ = fields  # RFC 5280 4.1
        end = _time(_values(validity.content)[1])
        name = _common_name(subject.content)
    except (ValueError, IndexError):
        return ""
    whose = f"for {shortened(printable(name), LONGEST_NAME)}, " if name else ""
    return f"{whose}its end date is {end:%Y-%m-%d}"


def _values(octets: bytes) -> list[_Value]:
    """The values that stand one after another in DER (X.690 8.1)."""
    found = []
    at = 0
    while at < len(octets):
        tag, length, at = octets[at], octets[at + 1], at + 2
        if length & 0x80:
            count = length & 0x7F
            length = int.from_bytes(octets[at : at + count], "big")
            at += count
        if at + length > len(octets):
            raise ValueError("cut off")
        found.append(_Value(tag, octets[at : at + length]))
        at += length
    return found


def _time(value: _Value) -> datetime.datetime:
    """RFC 5280 4.1.2.5: UTCTime has two digits for the year, of 1950 to 2049."""
    text = value.content.decode("ascii")
    if value.tag == _UTC_TIME:
        text = ("20" if text < "50" else "19") + text
    elif value.tag != _GENERALIZED_TIME:
        raise ValueError("no time")
    return datetime.datetime.strptime(text, "%Y%m%d%H%M%SZ")


def _common_name(subject: bytes) -> str:
    """The last common name of a subject; any other names where it has none."""
    names = []
    for one in _values(subject):
        for attribute in _values(one.content):
            kind, value = _values(attribute.content)
            coding = "utf-16-be" if value.tag == _BMP_STRING else "utf-8"
            names.append((kind.content == _COMMON_NAME, value.content.decode(coding, "replace")))
    common = [name for is_common, name in names if is_common]
    return common[-1] if common else ", ".join(name for _, name in names)
