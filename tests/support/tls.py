"""A certificate for localhost, and a server that shows it."""

from __future__ import annotations

import ssl
from pathlib import Path

import salmon_revsmtp.demo

DEMO = Path(salmon_revsmtp.demo.__file__).parent
CERTIFICATE = DEMO / "localhost-certificate.pem"
PRIVATE_KEY = DEMO / "localhost-key.pem"


def server_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE, PRIVATE_KEY)
    return context
