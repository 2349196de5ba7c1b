"""A certificate on the spot, by the command ``openssl``: for a provider whose customers pin it."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

__all__ = ["CertificateError", "make_certificate"]

# Days.  No one renews it: the customers have its fingerprint.
VALID = 3650

# Seconds; it takes a fraction of one.
PATIENCE = 60

# A subject's common name has no more (RFC 5280 A.1, ub-common-name); what counts is the other name.
COMMON_NAME = 64

REQUEST = """\
[req]
distinguished_name = subject
x509_extensions = extensions
prompt = no
[subject]
CN = {common_name}
[extensions]
subjectAltName = DNS:{hostname}
basicConstraints = critical, CA:FALSE
subjectKeyIdentifier = hash
extendedKeyUsage = serverAuth
"""


class CertificateError(Exception):
    """No certificate could be made; the text says why, and what to do."""


def make_certificate(hostname: str) -> tuple[bytes, bytes]:
    """A self-signed certificate for a host name, and its key (EC P-256), both in PEM form.

    Raises :class:`CertificateError`.
    """
    # The folder is its owner's only, so the key is never anyone else's.
    with tempfile.TemporaryDirectory(prefix="salmon-revsmtp-") as name:
        request, certificate, key = (Path(name, one) for one in ("request", "cert.pem", "key.pem"))
        common_name = hostname if len(hostname) <= COMMON_NAME else "provider"
        request.write_text(REQUEST.format(common_name=common_name, hostname=hostname))
        command = [
            "openssl",
            "req",
            "-x509",
            "-config",
            str(request),
            "-days",
            str(VALID),
            "-nodes",
        ]
        command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        command += ["-keyout", str(key), "-out", str(certificate)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=PATIENCE
            )
        except FileNotFoundError:
            raise CertificateError(
                "making a certificate: the command openssl is not there; install the package "
                "openssl, or name a certificate of yours with --tls-cert and --tls-key"
            ) from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CertificateError(f"making a certificate with openssl: {error}") from None
        if done.returncode or not certificate.exists():
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise CertificateError(
                f"making a certificate: openssl ended with status {done.returncode}: {last}; "
                "or name a certificate of yours with --tls-cert and --tls-key"
            )
        return certificate.read_bytes(), key.read_bytes()
