"""The provider's SMTP before the reversal, without I/O: STARTTLS, AUTH, ATRN (RFC 2645 5).

The caller owns the connection::

    turn = Turn("odmr.example.net", customers)
    for event in turn.receive_bytes(data):
        StartTls           -> send the replies, see that nothing is pending, do the handshake,
                              say tls_started() and advance()
        AtrnRequest(...)   -> look for mail, say answer(reply); after a 250 the session is over and
                              the customer is the server
        Quit               -> send the replies and close

How it works: ``commands`` has the theory, and what all server roles share.  Here are the rows of
the table for a customer, and the reader of AUTH's responses.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from salmon_revsmtp.smtp.addresses import AddressError, to_ascii
from salmon_revsmtp.smtp.commands import (
    NOT_IMPLEMENTED,
    SYNTAX,
    CommandError,
    Commands,
    Quit,
    StartTls,
    State,
    Verb,
    stay,
    to,
)
from salmon_revsmtp.smtp.limits import Limits
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.sasl import MECHANISMS, Exchange

__all__ = ["AtrnRequest", "Customers", "Event", "Quit", "StartTls", "Turn"]

# RFC 4954 4: a line of an AUTH exchange may have this many octets.
AUTH_LINE = 12288
# Wrong passwords before 421.
MAX_LOGINS = 3


class Customers(Protocol):
    """Who may log in, and how; and whose mail that is."""

    def mechanisms(self, tls: bool) -> tuple[str, ...]:
        """The names of the SASL mechanisms that are offered."""

    def password(self, name: str) -> str | None:
        """The password of an account, ``None`` if there is no such account."""

    def domains(self, name: str) -> tuple[str, ...]:
        """The domains of an account, as IDNA A-labels."""


@dataclass(frozen=True)
class AtrnRequest:
    """The customer may have this mail: the name of its account, and the domains to send."""

    account: str
    domains: tuple[str, ...]


Event = StartTls | AtrnRequest | Quit

_CONNECTED, _IDLE, _CUSTOMER = State.CONNECTED, State.IDLE, State.CUSTOMER
_GREETED = (_IDLE, _CUSTOMER)
_ANYWHERE = (_CONNECTED, *_GREETED)
# RFC 4954 4: EHLO after AUTH keeps the login.
_GREETING = {**to(_IDLE, (_CONNECTED,)), **stay(_GREETED)}


class Turn(Commands):
    """One customer before the reversal.

    ``customers``  who may log in.
    ``starttls``   STARTTLS can be done; ``tls``: the connection is encrypted already.
    """

    secret: ClassVar[bool] = True
    UNKNOWN: ClassVar[tuple[int, str, str]] = NOT_IMPLEMENTED

    OUT_OF_ORDER: ClassVar[Mapping[State, str]] = {
        State.CONNECTED: "send EHLO first",
        State.IDLE: "log in first",
        State.CUSTOMER: "you are logged in already",
    }
    ENDS: ClassVar[Mapping[str, Mapping[State, State]]] = {
        **Commands.ENDS,
        "235 to AUTH": {State.LOGIN: _CUSTOMER},
        "any other end of AUTH": {State.LOGIN: _IDLE},
        "250 to ATRN": {State.TURNING: State.CLOSED},
        "any other answer to ATRN": {State.TURNING: _CUSTOMER},
    }
    NO_BOUNDARY: ClassVar[frozenset[State]] = frozenset({State.CLOSED, State.TURNING})

    def __init__(
        self,
        hostname: str,
        customers: Customers,
        *,
        starttls: bool = False,
        tls: bool = False,
    ) -> None:
        super().__init__(
            hostname,
            Limits(command_line=AUTH_LINE),
            f"{hostname} ODMR",
            starttls=starttls and not tls,
        )
        self._customers = customers
        self._tls = tls
        self._account: str | None = None
        self._exchange: Exchange | None = None
        self._failed_logins = 0

    # -- what the caller sees ---------------------------------------------------------------

    @property
    def paused(self) -> bool:
        """A customer that has said ATRN waits for us: nothing is kept of what it says."""
        return self._state is State.TURNING

    def tls_started(self) -> None:
        """As for every role; and a login in the clear is forgotten too."""
        self._tls, self._account = True, None
        super().tls_started()

    def answer(self, reply: Reply) -> None:
        """Answer ATRN.  After 250 the session is over; after anything else :meth:`advance` goes on
        with what has come since."""
        if self._state is State.TURNING:
            self._over("250 to ATRN" if reply.positive else "any other answer to ATRN")
            self._reply(reply)

    # -- readers --------------------------------------------------------------------------------

    def _read_response(self) -> bool:
        """The next line is a response of the AUTH exchange (RFC 4954 4)."""
        line = self._next_line(AUTH_LINE)
        if line is None:
            return False
        self.steps += 1
        if isinstance(line, Reply):
            self._cancel(Reply(500, "a line of AUTH is too long", "5.5.6"))
        elif line == b"*":
            self._cancel(Reply(501, "the login was cancelled", "5.7.0"))
        elif (response := _decoded(line)) is None:
            self._cancel(Reply(501, "malformed base64", "5.5.2"))
        else:
            self._exchanged(response)
        return True

    READERS: ClassVar[Mapping[State, Callable[[Any], bool]]] = {
        **dict.fromkeys(_ANYWHERE, Commands._read_line),
        State.LOGIN: _read_response,
        State.HANDSHAKE: Commands._read_nothing,
        State.TURNING: Commands._read_nothing,
        State.CLOSED: Commands._ignore,
    }

    # -- commands -------------------------------------------------------------------------------

    def _keywords(self) -> Iterable[str]:
        mechanisms = " ".join(self._customers.mechanisms(self._tls))
        return ("ENHANCEDSTATUSCODES", "ATRN", *super()._keywords(), f"AUTH {mechanisms}")

    def _on_auth(self, argument: str) -> Reply | None:
        name, _, initial = argument.partition(" ")
        if not name:
            raise CommandError(501, "AUTH takes a mechanism", SYNTAX)
        if name.upper() not in self._customers.mechanisms(self._tls):
            raise CommandError(504, "no such mechanism", SYNTAX)
        mechanism = MECHANISMS[name.upper()]
        first: bytes | None = None
        if initial:
            if not mechanism.client_first:
                raise CommandError(501, "this mechanism takes no initial response", "5.7.0")
            first = _decoded(b"" if initial == "=" else initial.encode())
            if first is None:
                raise CommandError(501, "malformed base64", "5.5.2")
        self._exchange = mechanism.begin(
            name.upper(), self._customers.password, self.hostname, first
        )
        self._state = State.LOGIN
        self._exchanged(None)
        return None

    def _exchanged(self, response: bytes | None) -> None:
        """Go on with the exchange: a challenge, or its end."""
        assert self._exchange is not None
        try:
            challenge = next(self._exchange) if response is None else self._exchange.send(response)
        except StopIteration as end:
            self._exchange = None
            self._logged_in(end.value)
        else:
            self._reply(Reply(334, base64.b64encode(challenge).decode()))

    def _cancel(self, reply: Reply) -> None:
        self._exchange = None
        self._over("any other end of AUTH")
        self._refuse_command(reply)

    def _logged_in(self, account: str | None) -> None:
        if account is not None:
            self._account = account
            self._over("235 to AUTH")
            self._reply(Reply(235, "welcome", "2.7.0"))
            return
        self._failed_logins += 1
        if self._failed_logins >= MAX_LOGINS:
            self._close(Reply(421, "too many failed logins, closing", "4.7.0"))
        else:
            self._cancel(Reply(535, "authentication credentials invalid", "5.7.8"))

    def _on_atrn(self, argument: str) -> Reply | None:
        if self._account is None:
            raise CommandError(530, "authentication required", "5.7.0")
        try:
            asked = tuple(to_ascii(one) for one in argument.split(",") if argument)
        except AddressError:
            raise CommandError(501, "malformed list of domains", SYNTAX) from None
        theirs = self._customers.domains(self._account)
        # RFC 2645 5.2.1: for all of them, or not at all.
        if not set(asked) <= set(theirs):
            return Reply(450, "not authorised for all of these domains", "4.7.1")
        self._state = State.TURNING
        self._events.append(AtrnRequest(self._account, asked or theirs))
        return None

    # RFC 2645 4, RFC 4954 4.  A provider may refuse everything else before the reversal.
    VERBS: ClassVar[Mapping[str, Verb]] = {
        # verb      may come in, and leads to                     by
        "EHLO": Verb(_GREETING, Commands._on_ehlo, junk=True),
        "HELO": Verb(_GREETING, Commands._on_helo, junk=True),
        "STARTTLS": Verb(to(State.HANDSHAKE, _ANYWHERE), Commands._on_starttls),
        "AUTH": Verb(to(State.LOGIN, (_IDLE,)), _on_auth),
        "ATRN": Verb(to(State.TURNING, _ANYWHERE), _on_atrn),
        "NOOP": Verb(stay(_ANYWHERE), Commands._on_noop, junk=True),
        "RSET": Verb(stay(_ANYWHERE), Commands._on_rset, junk=True),
        "HELP": Verb(stay(_ANYWHERE), Commands._on_help, junk=True),
        "QUIT": Verb(to(State.CLOSED, _ANYWHERE), Commands._on_quit),
    }


def _decoded(text: bytes) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
