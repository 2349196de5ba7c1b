"""Salmon's relay, through which notifications go out: is it there, and what its errors mean."""

from __future__ import annotations

import contextlib
import smtplib
import socket
import ssl
from typing import Any

from salmon_revsmtp.net.words import came_back, reach_advice

__all__ = ["address_of", "try_relay", "why"]


def address_of(relay: Any) -> str:
    """``host:port`` of a relay; its kind where it is none of Salmon's."""
    host, port = getattr(relay, "hostname", None), getattr(relay, "port", None)
    if not isinstance(host, str):
        return type(relay).__name__
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def why(error: BaseException) -> str:
    """What :mod:`smtplib` raised, in words: what came back, and what to try."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return "; ".join(_said(*one) for one in error.recipients.values())
    if isinstance(error, smtplib.SMTPAuthenticationError):
        said = _said(error.smtp_code, error.smtp_error)
        return f"logging in, {said}; check username and password of relay_config"
    if isinstance(error, smtplib.SMTPResponseException):
        return _said(error.smtp_code, error.smtp_error)
    if isinstance(error, smtplib.SMTPServerDisconnected):
        return f"it broke the connection off ({error}); is it an SMTP server, is the port right?"
    if isinstance(error, smtplib.SMTPNotSupportedError):
        return f"{error}; check relay_config"
    if isinstance(error, ssl.SSLCertVerificationError):
        said = f"its certificate was not accepted ({error.verify_message})"
        return f"{said}; check host of relay_config"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({error.reason}); check ssl, starttls and port of relay_config"
    advice = reach_advice(error, "host of relay_config")
    return came_back(error) + (f"; {advice}" if advice else "")


def _said(code: int, text: bytes | str) -> str:
    words = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    return f"it said {code} {' '.join(words.split())}".rstrip()


def try_relay(relay: Any, timeout: float) -> None:
    """Connect to one of Salmon's relays as a notification would: the greeting, TLS and the login if
    it has them, QUIT.  ``timeout`` in seconds for each step.  Blocks; raises :class:`OSError`, of
    which smtplib's errors are some."""
    kind: Any = smtplib.SMTP_SSL if relay.ssl else smtplib.LMTP if relay.lmtp else smtplib.SMTP
    given: dict[str, Any] = {"timeout": timeout}
    host = relay.hostname
    if kind is smtplib.LMTP and host.startswith("/"):  # the name of a socket
        given = {}
    connection = kind(host, relay.port, **given)
    try:
        connection.ehlo_or_helo_if_needed()
        if relay.starttls:
            connection.starttls()
        if relay.username and relay.password:
            connection.login(relay.username, relay.password)
        with contextlib.suppress(OSError, socket.timeout):
            connection.quit()
    finally:
        connection.close()
