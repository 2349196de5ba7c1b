"""The provider's SMTP before the reversal, without I/O: STARTTLS, AUTH, ATRN (RFC 2645 5).

The caller owns the connection::

    turn = Turn("odmr.example.net", customers)
    for event in turn.receive_bytes(data):
        StartTls           -> send the replies, see that nothing is pending, do the handshake,
                              say tls_started() and advance()
        WhoIs(name)        -> have the customers know that name, say looked_up() and advance()
        LoggedIn(...)      -> so it is
        LoginFailed(...)   -> wait a while, say refuse_login(reply or None) and advance()
        AtrnRequest(...)   -> look for mail, say answer(reply); after a 250 the session is over and
                              the customer is the server
        Quit               -> send the replies and close

How it works: ``commands`` has the theory, and what all server roles share.  Here are the rows of
the table for a customer, and the reader of AUTH's responses.

``XHOLD`` is ours.  After AUTH the answer to EHLO lists it with a number of seconds; a customer that
says it before ATRN wants the session to stay open when the mail that waits has been sent, so that
what comes later goes down it at once.  Neither side is silent for longer than those seconds.
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
from salmon_revsmtp.smtp.sasl import MECHANISMS, Exchange, Secret, WhoIs

__all__ = [
    "AtrnRequest",
    "Customer",
    "Customers",
    "Event",
    "LoggedIn",
    "LoginFailed",
    "Quit",
    "StartTls",
    "Turn",
    "WhoIs",
]

# RFC 4954 4: a line of an AUTH exchange may have this many octets.
AUTH_LINE = 12288
# Wrong passwords before 421.
MAX_LOGINS = 3


@dataclass(frozen=True)
class Customer:
    """Someone who may log in.

    ``secret``     what proves that one is this; nothing does if it is made up.
    ``domains``    whose mail it may have, as IDNA A-labels.
    ``keepalive``  the longest silence in its push sessions in seconds; ``None`` if it has none.
    ``account``    whatever the caller knows it by.
    """

    secret: Secret
    domains: tuple[str, ...] = ()
    keepalive: int | None = None
    account: Any = None


class Customers(Protocol):
    """Who may log in, and how."""

    def mechanisms(self, tls: bool) -> tuple[str, ...]:
        """The names of the SASL mechanisms that are offered."""

    def knows(self, name: str) -> bool:
        """Whether it can be told at once who that is; if not, :class:`WhoIs` asks for it."""

    def customer(self, name: str) -> Customer:
        """The customer of that name; a made-up one if there is none."""


@dataclass(frozen=True)
class AtrnRequest:
    """The customer may have this mail.

    ``account``  the name of its account.
    ``domains``  those to send.
    ``push``     it has said XHOLD: the session stays open for what comes later.
    """

    account: str
    domains: tuple[str, ...]
    push: bool = False


@dataclass(frozen=True)
class LoggedIn:
    """The customer has proved to be ``account``, by ``mechanism``."""

    account: str
    mechanism: str


@dataclass(frozen=True)
class LoginFailed:
    """It has not.  It waits for its answer: see :meth:`Turn.refuse_login`.  ``name`` is what it
    called itself, as far as that is known; anyone may have written it."""

    name: str
    mechanism: str


Event = StartTls | WhoIs | LoggedIn | LoginFailed | AtrnRequest | Quit

_CONNECTED, _IDLE, _CUSTOMER = State.CONNECTED, State.IDLE, State.CUSTOMER
_GREETED = (_IDLE, _CUSTOMER)
_ANYWHERE = (_CONNECTED, *_GREETED)
# RFC 4954 4: EHLO after AUTH keeps the login.
_GREETING = {**to(_IDLE, (_CONNECTED,)), **stay(_GREETED)}


class Turn(Commands):
    """One customer before the reversal.

    ``customers``  who may log in.
    ``customer``   who has logged in, or tried to the last time.
    ``starttls``   STARTTLS can be done; ``tls``: the connection is encrypted already.
    ``needs_tls``  AUTH and ATRN only under TLS.
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
        "any other end of AUTH": {State.LOGIN: _IDLE, State.SLOWED: _IDLE},
        "a wrong password": {State.LOGIN: State.SLOWED},
        "a name to look up": {State.LOGIN: State.ASKING},
        "the name was looked up": {State.ASKING: State.LOGIN},
        "250 to ATRN": {State.TURNING: State.CLOSED},
        "any other answer to ATRN": {State.TURNING: _CUSTOMER},
    }
    NO_BOUNDARY: ClassVar[frozenset[State]] = frozenset(
        {State.CLOSED, State.TURNING, State.SLOWED, State.ASKING}
    )

    def __init__(
        self,
        hostname: str,
        customers: Customers,
        *,
        starttls: bool = False,
        tls: bool = False,
        needs_tls: bool = False,
    ) -> None:
        super().__init__(
            hostname,
            Limits(command_line=AUTH_LINE),
            f"{hostname} ODMR",
            starttls=starttls and not tls,
        )
        self._customers = customers
        self._tls, self._needs_tls = tls, needs_tls
        self._account: str | None = None
        self._push = False
        self._exchange: Exchange | None = None
        self.customer: Customer | None = None
        self._mechanism = self._asked = ""
        self._failed_logins = 0

    # -- what the caller sees ---------------------------------------------------------------

    @property
    def paused(self) -> bool:
        """A customer that has said ATRN waits for us: nothing is kept of what it says."""
        return self._state in (State.TURNING, State.SLOWED, State.ASKING)

    def tls_started(self) -> None:
        """As for every role; and a login in the clear is forgotten too."""
        self._tls, self._account, self._push = True, None, False
        self.customer = None
        super().tls_started()

    def refuse_login(self, reply: Reply | None = None) -> None:
        """Answer a login that failed: with 535, or with a 421 that ends the session.
        :meth:`advance` then goes on with what has come since."""
        if self._state is not State.SLOWED:
            return
        if reply is None and self._failed_logins < MAX_LOGINS:
            self._cancel(Reply(535, "authentication credentials invalid", "5.7.8"))
        else:
            self._close(reply or Reply(421, "too many failed logins, closing", "4.7.0"))

    def looked_up(self, refusal: Reply | None = None) -> None:
        """The customers know the name of :class:`WhoIs` now; or they cannot, and ``refusal`` (454)
        says so.  :meth:`advance` then goes on with what has come since."""
        if self._state is not State.ASKING:
            return
        self._over("the name was looked up")
        if refusal is not None:
            self._cancel(refusal)
        else:
            self.customer = self._customers.customer(self._asked)
            self._exchanged(self.customer.secret)

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
        State.SLOWED: Commands._read_nothing,
        State.ASKING: Commands._read_nothing,
        State.TURNING: Commands._read_nothing,
        State.CLOSED: Commands._ignore,
    }

    # -- commands -------------------------------------------------------------------------------

    def _keywords(self) -> Iterable[str]:
        words = ["ENHANCEDSTATUSCODES", "ATRN", *super()._keywords()]
        if not self._lacks_tls:
            words.append(f"AUTH {' '.join(self._customers.mechanisms(self._tls))}")
        if self._keepalive:
            words.append(f"XHOLD {self._keepalive}")
        return words

    @property
    def _keepalive(self) -> int | None:
        """Of whoever is logged in."""
        return self.customer.keepalive if self._account is not None and self.customer else None

    @property
    def _lacks_tls(self) -> bool:
        return self._needs_tls and not self._tls

    def _on_auth(self, argument: str) -> Reply | None:
        if self._lacks_tls:
            raise CommandError(530, "send STARTTLS first", "5.7.0")  # RFC 3207 4
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
        self._mechanism, self._asked = name.upper(), ""
        self._exchange = mechanism.begin(self._mechanism, self.hostname, first)
        self._state = State.LOGIN
        self._exchanged(None)
        return None

    def _exchanged(self, response: object) -> None:
        """Go on with the exchange: a challenge, a name to look up, or its end."""
        assert self._exchange is not None
        try:
            step = self._exchange.send(response)
            while isinstance(step, WhoIs):
                self._asked = step.name
                if not self._customers.knows(step.name):
                    self._over("a name to look up")
                    self._events.append(step)
                    return
                self.customer = self._customers.customer(step.name)
                step = self._exchange.send(self.customer.secret)
        except StopIteration as end:
            self._exchange = None
            self._logged_in(end.value)
        else:
            self._reply(Reply(334, base64.b64encode(step).decode()))

    def _cancel(self, reply: Reply) -> None:
        self._exchange = None
        self._over("any other end of AUTH")
        self._refuse_command(reply)

    def _logged_in(self, account: str | None) -> None:
        if account is not None:
            self._account = account
            self._over("235 to AUTH")
            self._events.append(LoggedIn(account, self._mechanism))
            self._reply(Reply(235, "welcome", "2.7.0"))
            return
        self._failed_logins += 1
        self._over("a wrong password")
        self._events.append(LoginFailed(self._asked, self._mechanism))

    def _on_xhold(self, argument: str) -> Reply | None:
        if argument:
            raise CommandError(501, "XHOLD takes no argument", SYNTAX)
        if self._account is None:
            raise CommandError(530, "authentication required", "5.7.0")
        if not self._keepalive:
            raise CommandError(*NOT_IMPLEMENTED)
        self._push = True
        return Reply(250, "the session will stay open after ATRN", "2.0.0")

    def _on_atrn(self, argument: str) -> Reply | None:
        if self._account is None or self.customer is None:
            raise CommandError(530, "authentication required", "5.7.0")
        try:
            asked = tuple(to_ascii(one) for one in argument.split(",") if argument)
        except AddressError:
            raise CommandError(501, "malformed list of domains", SYNTAX) from None
        theirs = self.customer.domains
        # RFC 2645 5.2.1: for all of them, or not at all.
        if not set(asked) <= set(theirs):
            return Reply(450, "not authorised for all of these domains", "4.7.1")
        self._state = State.TURNING
        self._events.append(AtrnRequest(self._account, asked or theirs, self._push))
        return None

    # RFC 2645 4, RFC 4954 4.  A provider may refuse everything else before the reversal.
    VERBS: ClassVar[Mapping[str, Verb]] = {
        # verb      may come in, and leads to                     by
        "EHLO": Verb(_GREETING, Commands._on_ehlo, junk=True),
        "HELO": Verb(_GREETING, Commands._on_helo, junk=True),
        "STARTTLS": Verb(to(State.HANDSHAKE, _ANYWHERE), Commands._on_starttls),
        "AUTH": Verb(to(State.LOGIN, (_IDLE,)), _on_auth),
        "XHOLD": Verb(stay(_ANYWHERE), _on_xhold, junk=True),
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
