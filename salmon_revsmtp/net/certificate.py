"""The certificate of a server, read again when it was renewed; its end, and its fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import ssl
from pathlib import Path
from typing import Any

__all__ = [
    "Certificate",
    "certificate_ends",
    "certificate_problem",
    "fingerprint",
    "is_for",
    "own_certificate",
]

# X509_V_FLAG_NO_CHECK_TIME, which Python has no name for.
_WHATEVER_THE_TIME = 0x200000

log = logging.getLogger(__name__)


def certificate_problem(certificate: Path | None, key: Path | None) -> str | None:
    """What is wrong with the keys ``tls_cert`` and ``tls_key``, for a person."""
    if certificate is None:
        return "tls_key: it needs a tls_cert that it is the key of" if key is not None else None
    try:
        _context(certificate, key)
    except (OSError, ssl.SSLError) as error:
        return f"tls_cert, tls_key: {error.strerror or error}"
    return None


def certificate_ends(certificate: Path, key: Path | None) -> float:
    """The end of a server's certificate (notAfter), in seconds since the epoch, also when that is
    in the past.  Raises :class:`OSError`, of which :class:`ssl.SSLError` is one."""
    found: Any = _shown(certificate, key, _itself(certificate)).getpeercert()
    return float(ssl.cert_time_to_seconds(found["notAfter"]))


def is_for(certificate: Path, key: Path | None, hostname: str) -> bool:
    """Whether a server's certificate is for a host name.  Raises :class:`OSError`, but not
    :class:`ssl.SSLCertVerificationError`."""
    theirs = _itself(certificate)
    theirs.check_hostname = True
    try:
        _shown(certificate, key, theirs, hostname)
    except ssl.SSLCertVerificationError:
        return False
    return True


def own_certificate(certificate: Path, key: Path | None, hostname: str) -> tuple[bytes, bool]:
    """A server's certificate in DER form; and whether this machine's certificate authorities vouch
    for it, for a host name and now.  Raises :class:`OSError`."""
    shown = _shown(certificate, key, _itself(certificate)).getpeercert(binary_form=True)
    assert shown is not None
    try:
        _shown(certificate, key, ssl.create_default_context(), hostname)
    except ssl.SSLCertVerificationError:
        return shown, False
    return shown, True


def _itself(certificate: Path) -> ssl.SSLContext:
    """A client's context that takes one certificate, whoever has signed it, whatever the time."""
    # Python shows what is in a certificate to the client of a handshake only, and only if it was
    # verified: against itself.
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    theirs.check_hostname = False
    theirs.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(_WHATEVER_THE_TIME)
    theirs.load_verify_locations(certificate)
    return theirs


def _shown(
    certificate: Path, key: Path | None, theirs: ssl.SSLContext, hostname: str | None = None
) -> ssl.SSLObject:
    """The client of a handshake with a server that has this certificate, in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = _context(certificate, key).wrap_bio(to_server, to_client, server_side=True)
    client = theirs.wrap_bio(to_client, to_server, server_hostname=hostname)
    for side in (client, server, client):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return client


def fingerprint(certificate: bytes) -> str:
    """``sha256:...`` of a certificate in DER form, as the agents' key ``fingerprint`` has it."""
    return f"sha256:{hashlib.sha256(certificate).hexdigest()}"


class Certificate:
    """The certificate of a server, read again when a file of it has changed: a renewed one is
    served from the next connection on.

    ``name``  the server's, for the log.
    """

    def __init__(self, name: str, certificate: Path | None, key: Path | None) -> None:
        self._name = name
        self._files = (certificate, key)
        self._seen = self._state()
        self._context = None if certificate is None else _context(certificate, key)

    def context(self) -> ssl.SSLContext | None:
        """What to do TLS with now, ``None`` without a certificate; that of before while the new
        files are no good, as when only one of them has been replaced."""
        seen = self._state()
        certificate, key = self._files
        if certificate is not None and seen != self._seen:
            self._seen = seen
            try:
                self._context = _context(certificate, key)
            except (OSError, ssl.SSLError, ValueError) as error:
                log.warning(
                    "%s tls_cert, tls_key: %s; the certificate of before is used",
                    *(self._name, error.strerror or error if isinstance(error, OSError) else error),
                )
            else:
                log.info("%s the certificate was read again", self._name)
        return self._context

    def _state(self) -> list[tuple[int, ...] | None]:
        return [_state(path) for path in self._files if path]


def _context(certificate: Path, key: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    # RFC 8996; whatever the system's OpenSSL still allows.
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    # TLS 1.2 has it; a client could have us do one handshake after another.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.load_cert_chain(certificate, key)
    return context


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
