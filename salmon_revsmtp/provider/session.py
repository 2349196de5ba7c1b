"""The provider's SMTP before the reversal, without I/O: EHLO, STARTTLS, AUTH, ATRN (RFC 2645 5).

The caller owns the connection::

    for event in session.receive_bytes(data):
        StartTls           -> send the replies, see that nothing is pending, do the handshake,
                              say tls_started()
        AtrnRequest(...)   -> look for mail, say answer(reply); after a 250 the session is over and
                              the customer is the server
        Goodbye            -> send the replies and close
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from salmon_revsmtp.provider.accounts import Account, Accounts, Exchange
from salmon_revsmtp.smtp.addresses import AddressError, to_ascii
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["AtrnRequest", "Event", "Goodbye", "Session", "StartTls"]

# RFC 4954 4: a line of an AUTH exchange may have this many octets.
MAX_LINE = 12288
# Wrong passwords before 421; errors of any kind before 421.
MAX_LOGINS = 3
MAX_ERRORS = 20


@dataclass(frozen=True)
class StartTls:
    """The customer was told to begin the handshake."""


@dataclass(frozen=True)
class AtrnRequest:
    """The customer may have this mail: its account, and the domains to send."""

    account: Account
    domains: tuple[str, ...]


@dataclass(frozen=True)
class Goodbye:
    """The session is over."""


Event = StartTls | AtrnRequest | Goodbye


class Session:
    """One customer before the reversal.  ``tls_offered``: STARTTLS can be done; ``tls``: it has."""

    def __init__(
        self, hostname: str, accounts: Accounts, *, tls_offered: bool = False, tls: bool = False
    ) -> None:
        self._hostname = hostname
        self._accounts = accounts
        self._tls_offered, self._tls = tls_offered, tls
        self._account: Account | None = None
        self._exchange: Exchange | None = None
        self._greeted = False
        self._waiting = False  # for the caller: a handshake, or the answer to ATRN
        self._over = False
        self._errors = self._failed_logins = 0
        self._buffer = bytearray()
        self._out = bytearray()
        self._events: list[Event] = []
        self._reply(Reply(220, f"{hostname} ODMR", ""))

    # -- what the caller sees ---------------------------------------------------------------

    def data_to_send(self) -> bytes:
        """The reply bytes that may go out now."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def receive_bytes(self, data: bytes) -> list[Event]:
        """Take what came from the customer; returns what happened, in order."""
        if not self._over:
            self._buffer += data
        return self._run()

    @property
    def pending(self) -> bool:
        """Bytes came that nobody has looked at.  Before a handshake that is an attack: what was
        said in the clear must not be taken for said under TLS (CVE-2011-0411)."""
        return bool(self._buffer)

    def tls_started(self) -> list[Event]:
        """The handshake is done: what was said before is forgotten (RFC 3207 4.2).  Returns the
        events of what the customer has said since."""
        self._tls, self._waiting, self._greeted = True, False, False
        self._account = None
        return self._run()

    def answer(self, reply: Reply) -> list[Event]:
        """Answer ATRN.  After 250 the session is over."""
        self._waiting = False
        self._reply(reply)
        if reply.positive:
            self._over = True
        return self._run()

    # -- the loop -----------------------------------------------------------------------------

    def _run(self) -> list[Event]:
        while not self._over and not self._waiting:
            end = self._buffer.find(b"\r\n", 0, MAX_LINE)
            if end < 0:
                if len(self._buffer) >= MAX_LINE:
                    # RFC 4954 4 has its own code for a line of an AUTH exchange.
                    self._leave(
                        Reply(421, "a line is too long, closing", "4.5.0")
                        if self._exchange is None
                        else Reply(500, "a line of AUTH is too long, closing", "5.5.6")
                    )
                break
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 2]
            if self._exchange is not None:
                self._on_response(line)
            else:
                self._on_command(line)
        events, self._events = self._events, []
        return events

    def _reply(self, reply: Reply) -> None:
        self._out += reply.encode()

    def _error(self, reply: Reply) -> None:
        self._errors += 1
        if self._errors >= MAX_ERRORS:
            self._leave(Reply(421, "too many errors, closing", "4.7.0"))
        else:
            self._reply(reply)

    def _leave(self, reply: Reply) -> None:
        self._reply(reply)
        self._over = True
        self._buffer.clear()
        self._events.append(Goodbye())

    def _on_command(self, line: bytes) -> None:
        verb, _, argument = line.decode("ascii", "replace").partition(" ")
        handler = self._HANDLERS.get(verb.upper())
        if handler is None:
            self._error(Reply(502, "only EHLO, STARTTLS, AUTH, ATRN and QUIT", "5.5.1"))
        else:
            handler(self, argument.strip(" \t"))

    # -- commands -------------------------------------------------------------------------------

    def _on_ehlo(self, argument: str) -> None:
        if not argument:
            self._error(Reply(501, "EHLO takes a host name", "5.5.4"))
            return
        self._greeted = True
        lines = [self._hostname, "ENHANCEDSTATUSCODES", "ATRN"]
        if self._tls_offered and not self._tls:
            lines.append("STARTTLS")
        lines.append("AUTH " + " ".join(self._accounts.mechanisms(self._tls)))
        self._reply(Reply(250, "\n".join(lines), ""))

    def _on_helo(self, argument: str) -> None:
        if not argument:
            self._error(Reply(501, "HELO takes a host name", "5.5.4"))
            return
        self._greeted = True
        self._reply(Reply(250, self._hostname, ""))

    def _on_starttls(self, argument: str) -> None:
        if not self._tls_offered or self._tls:
            self._error(Reply(502, "no STARTTLS here", "5.5.1"))
        elif argument:
            self._error(Reply(501, "STARTTLS takes no parameter", "5.5.4"))
        elif self.pending:
            self._leave(Reply(421, "bytes behind STARTTLS, closing", "4.7.0"))
        else:
            self._reply(Reply(220, "go ahead", ""))
            self._waiting = True
            self._events.append(StartTls())

    def _on_auth(self, argument: str) -> None:
        mechanism, _, initial = argument.partition(" ")
        if not self._greeted or self._account is not None:
            self._error(Reply(503, "not now", "5.5.1"))
        elif not mechanism:
            self._error(Reply(501, "AUTH takes a mechanism", "5.5.4"))
        elif mechanism.upper() not in self._accounts.mechanisms(self._tls):
            self._error(Reply(504, "no such mechanism", "5.5.4"))
        elif initial and not self._accounts.client_first(mechanism):
            self._error(Reply(501, "the first word is the server's in this one", "5.7.0"))
        else:
            first: bytes | None = None
            if initial:
                first = _decoded(b"" if initial == "=" else initial.encode())
                if first is None:
                    self._error(Reply(501, "that is no base64", "5.5.2"))
                    return
            self._exchange = self._accounts.begin(mechanism, first)
            self._advance(None)

    def _on_response(self, line: bytes) -> None:
        response = _decoded(line)
        if response is not None:
            self._advance(response)
            return
        self._exchange = None
        if line == b"*":
            self._error(Reply(501, "the login was cancelled", "5.7.0"))
        else:
            self._error(Reply(501, "that is no base64", "5.5.2"))

    def _advance(self, response: bytes | None) -> None:
        assert self._exchange is not None
        try:
            challenge = next(self._exchange) if response is None else self._exchange.send(response)
        except StopIteration as end:
            self._exchange = None
            self._logged_in(end.value)
        else:
            self._reply(Reply(334, base64.b64encode(challenge).decode()))

    def _logged_in(self, account: Account | None) -> None:
        if account is not None:
            self._account = account
            self._reply(Reply(235, "welcome", "2.7.0"))
            return
        self._failed_logins += 1
        if self._failed_logins >= MAX_LOGINS:
            self._leave(Reply(421, "too many failed logins, closing", "4.7.0"))
        else:
            self._error(Reply(535, "authentication credentials invalid", "5.7.8"))

    def _on_atrn(self, argument: str) -> None:
        if self._account is None:
            self._error(Reply(530, "authentication required", "5.7.0"))
            return
        try:
            domains = tuple(to_ascii(one) for one in argument.split(",") if argument)
        except AddressError:
            self._error(Reply(501, "that is no list of domains", "5.5.4"))
            return
        # RFC 2645 5.2.1: for all of them, or not at all.
        if not set(domains) <= set(self._account.domains):
            self._reply(Reply(450, "not authorised for all of these domains", "4.7.1"))
            return
        self._waiting = True
        self._events.append(AtrnRequest(self._account, domains or self._account.domains))

    def _on_noop(self, argument: str) -> None:
        self._reply(Reply(250, "ok", "2.0.0"))

    def _on_quit(self, argument: str) -> None:
        self._leave(Reply(221, "bye", "2.0.0"))

    _HANDLERS: Mapping[str, Callable[[Session, str], None]] = {
        "EHLO": _on_ehlo,
        "HELO": _on_helo,
        "STARTTLS": _on_starttls,
        "AUTH": _on_auth,
        "ATRN": _on_atrn,
        "NOOP": _on_noop,
        "RSET": _on_noop,
        "QUIT": _on_quit,
    }


def _decoded(text: bytes) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
