"""The certificate of a server, read again when it was renewed; its end, and its fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import ssl
from pathlib import Path
from typing import Any

__all__ = [
    "RENEWED_BY",
    "Certificate",
    "certificate_ends",
    "certificate_names",
    "certificate_problem",
    "fingerprint",
    "is_for",
    "own_certificate",
]

# Seconds before the end of a certificate: whoever renews it automatically does so 30 days before,
# and has failed for nine then.
RENEWED_BY = 21 * 86400.0

# X509_V_FLAG_NO_CHECK_TIME, which Python has no name for.
_WHATEVER_THE_TIME = 0x200000

# What PEM files begin their parts with.
_CERTIFICATE, _KEY = b"CERTIFICATE-----", b"PRIVATE KEY-----"

log = logging.getLogger(__name__)


def certificate_problem(certificate: Path | None, key: Path | None) -> str | None:
    """What is wrong with the keys ``tls_cert`` and ``tls_key``, for a person."""
    if certificate is None:
        return "tls_key: it needs a tls_cert that it is the key of" if key is not None else None
    try:
        shown = _read("tls_cert", certificate)
        secret = shown if key is None else _read("tls_key", key)
        _check_kinds(certificate, key, shown, secret)
        _context(certificate, key)
    except ValueError as error:  # before OSError: it may be an SSLError as well
        if not isinstance(error, ssl.SSLError):
            return str(error)
        return _refused(certificate, key, error)
    except OSError as error:
        return _refused(certificate, key, error)
    return None


def _read(setting: str, path: Path) -> bytes:
    if "-----BEGIN" in str(path):  # and no part of it is shown
        raise ValueError(f"{setting}: found what is in a PEM file, allowed: the name of the file")
    try:
        return path.read_bytes()
    except OSError as error:
        hint = ""
        if isinstance(error, PermissionError):
            hint = (
                "; the user that runs the server has to be able to read it, and the folders above "
                "it: give it a copy, or the group"
            )
        raise ValueError(f"{setting}: {path} cannot be read: {error.strerror}{hint}") from None


def _check_kinds(certificate: Path, key: Path | None, shown: bytes, secret: bytes) -> None:
    """Raises :class:`ValueError` where the files are not what they should be."""
    if _CERTIFICATE not in shown:
        raise ValueError(
            f"tls_cert: {certificate} holds no certificate in PEM form "
            "(-----BEGIN CERTIFICATE-----)" + ("; it holds a key" if _KEY in shown else "")
        )
    if _KEY not in secret:
        if key is None:
            raise ValueError(
                f"tls_key: missing, and {certificate} holds no private key; name the file that has "
                "the key of the certificate"
            )
        raise ValueError(f"tls_key: {key} holds no private key in PEM form")
    if b"ENCRYPTED" in secret:
        raise ValueError(
            f"tls_key: the key in {key or certificate} needs a passphrase, and there is no one to "
            f"type it; take it away: openssl pkey -in {key or certificate} -out NEW_FILE"
        )


def _refused(certificate: Path, key: Path | None, error: OSError) -> str:
    """What OpenSSL does not like of a certificate and its key."""
    text = re.sub(r"^\[\w+\] | \(_ssl[.]c:[0-9]+\)$", "", error.strerror or str(error))
    reason = getattr(error, "reason", None) or text
    if reason == "KEY_VALUES_MISMATCH":
        return (
            f"tls_cert, tls_key: the key in {key or certificate} is not that of the first "
            f"certificate in {certificate}; the server's own comes first, then those up to its CA"
        )
    if reason in ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK", "EE_MD_TOO_WEAK"):
        return (
            f"tls_cert: {certificate} is too weak for today's TLS ({reason}); it needs a key of "
            "2048 bits of RSA, or of an elliptic curve, and SHA-256"
        )
    return (
        f"tls_cert, tls_key: OpenSSL cannot use {certificate}"
        + (f" with {key}" if key else "")
        + f" ({reason}); are the files whole?"
    )


def certificate_ends(certificate: Path, key: Path | None) -> float:
    """The end of a server's certificate (notAfter), in seconds since the epoch, also when that is
    in the past.  Raises :class:`OSError`, of which :class:`ssl.SSLError` is one."""
    return certificate_lasts(certificate, key)[1]


def certificate_lasts(certificate: Path, key: Path | None) -> tuple[float, float]:
    """From when (notBefore) until when a server's certificate is valid; see
    :func:`certificate_ends`."""
    found: Any = _shown(certificate, key, _itself(certificate)).getpeercert()
    begins, ends = (ssl.cert_time_to_seconds(found[one]) for one in ("notBefore", "notAfter"))
    return float(begins), float(ends)


def is_for(certificate: Path, key: Path | None, hostname: str) -> bool:
    """Whether a server's certificate is for a host name, or an address.  Raises :class:`OSError`,
    but not :class:`ssl.SSLCertVerificationError`."""
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


def certificate_names(certificate: Path, key: Path | None) -> tuple[str, ...]:
    """The names and addresses that a server's certificate is for.  Raises :class:`OSError`."""
    found: Any = _shown(certificate, key, _itself(certificate)).getpeercert()
    alternatives = [str(value) for _, value in found.get("subjectAltName", ())]
    subject = dict(pair for part in found.get("subject", ()) for pair in part)
    return tuple(alternatives) or tuple(filter(None, [subject.get("commonName")]))


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
    # Without a password OpenSSL would ask for one on the terminal, and wait.
    context.load_cert_chain(certificate, key, password="")
    return context


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
