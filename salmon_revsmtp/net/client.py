"""The customer's side before the reversal: dial, TLS, EHLO, AUTH, one more command.

Dialling, STARTTLS and AUTH are aiosmtplib's.  What is added here: SCRAM (scramp), the choice of the
strongest mechanism, a transcript without secrets, the refusal of bytes that come glued to an
answer, and errors that say what to try.  Whoever wants the transport for another protocol asks
:meth:`Connection.last_command` and gets it handed over.
"""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import base64
import contextlib
import logging
import re
import ssl
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import aiosmtplib
from aiosmtplib.typing import Default
from pydantic import SecretStr
from scramp import ScramClient, ScramException
from scramp.core import saslprep

from salmon_revsmtp.net.certificate import fingerprint
from salmon_revsmtp.net.dial import dial
from salmon_revsmtp.net.handover import GLUED, Handover, StartTlsWatch
from salmon_revsmtp.net.mechanisms import CHALLENGES, PASSWORDS, VERIFIED
from salmon_revsmtp.net.outcome import CollectionError, Deferred, Failed, NotTrusted, Refused
from salmon_revsmtp.net.pinned import OtherCertificate, described, pinned
from salmon_revsmtp.net.trace import tell
from salmon_revsmtp.net.words import certificate_refused
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Connection", "Server", "error_for"]

log = logging.getLogger(__name__)

# Stands for a secret in the dialogue.
HIDDEN = "***"

# Letters of a secret word; a shorter one is hidden only where it stands alone.
SHORT = 4

# Seconds for the answer to a QUIT whose outcome changes nothing.
GOODBYE = 5.0

# RFC 4954 4 (538: RFC 2554): the server does not do this mechanism after all; another may work.
TRY_ANOTHER = (504, 534, 538)


# asyncio's TLS has a buffer of so many octets for what is read from each connection, for as long as
# that is open.  It would be 256 KiB; two records (RFC 8446 5.1) are read faster.
cast(Any, asyncio.sslproto.SSLProtocol).max_size = 32 * 1024

# The EHLO keywords that something depends on.
OURS = ("ATRN", "AUTH", "ETRN", "STARTTLS", "XHOLD")

# What EHLO may be answered if the name in it is not good enough.
NOT_THIS_NAME = (501, 504, 550, 553, 554)


class Server(Protocol):
    """A server to dial, and how to log in there; an agent's settings are one.

    ``timeout`` in seconds, for connecting and for each command.
    """

    @property
    def server(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def tls(self) -> Literal["implicit", "starttls", "opportunistic", "none"]: ...
    @property
    def ca_file(self) -> Path | None: ...
    @property
    def fingerprint(self) -> str | None: ...
    @property
    def account(self) -> str | None: ...
    @property
    def password(self) -> SecretStr | None: ...
    @property
    def auth(self) -> Sequence[str] | None: ...
    @property
    def hidden_words(self) -> Sequence[str]: ...
    @property
    def timeout(self) -> float: ...


def error_for(reply: Reply, doing: str, advice: str = "") -> CollectionError:
    """The error for a reply that is not the one hoped for: 4yz later, 5yz no, others broken."""
    kind = Deferred if reply.transient else Refused if reply.permanent else Failed
    return kind(f"{doing}: the server said {reply}" + (f"; {advice}" if advice else ""))


class Connection:
    """An SMTP connection in the client role, up to the command that ends that role.

    ``tls``         the TLS version, or ``None``.
    ``auth``        the SASL mechanism that let us in, or ``None``.
    ``extensions``  the server's EHLO keywords in upper case, with their parameters.
    ``peer``        the server's address and port.
    ``fingerprint`` that of the server's certificate; ``None`` without TLS.
    """

    def __init__(
        self,
        settings: Server,
        hostname: str,
        let_in_by: str | None = None,
        tls_context: ssl.SSLContext | None = None,
    ) -> None:
        self.settings = settings
        self._let_in_by = let_in_by
        self.tls: str | None = None
        self.auth: str | None = None
        self.extensions: dict[str, str] = {}
        self.peer: tuple[str, int] = ("", 0)
        self.fingerprint: str | None = None
        host = f"[{settings.server}]" if ":" in settings.server else settings.server
        self._where = f"{host}:{settings.port}"
        #: Blanks secrets in a text that is shown.
        self.hide = _hider(settings)
        self._dialled: asyncio.Transport | None = None
        self._injected = False
        self._mechanisms: list[str] = []
        self._hostname = hostname
        self._smtp = _SMTP(
            self.hide,
            hostname=settings.server,
            use_tls=settings.tls == "implicit",
            start_tls=False,
            tls_context=tls_context or _tls_context(settings),
            timeout=settings.timeout,
            local_hostname=hostname,
        )

    @classmethod
    async def open(
        cls, settings: Server, hostname: str, let_in_by: str | None = None
    ) -> Connection:
        """Dial, TLS as ``tls`` says, EHLO, AUTH if there is an account.

        ``hostname`` is what we call ourselves; ``let_in_by`` the mechanism that worked the last
        time, which is tried first.  Raises
        :class:`~salmon_revsmtp.net.outcome.CollectionError`; nothing is left open then.
        """
        try:
            return await cls._open_one(settings, hostname, let_in_by)
        except _NoTls as error:
            # RFC 7435 5: without TLS is better than not at all.  No one was verified before, so no
            # password is lost now.
            log.info("%s; calling again in the clear", error)
            return await cls._open_one(settings, hostname, let_in_by, clear=True)

    @classmethod
    async def try_out(
        cls, settings: Server, hostname: str, let_in_by: str | None = None
    ) -> Connection:
        """The same for a check.  Where the server's certificate is not trusted, the error says
        which one it has."""
        try:
            return await cls.open(settings, hostname, let_in_by)
        except NotTrusted as error:
            if error.fingerprint is not None:
                raise
            certificate = await cls._certificate(settings, hostname)
            if certificate is None:
                raise
            found = fingerprint(certificate)
            raise NotTrusted(
                f"{error}; the certificate has the fingerprint {found} "
                f"({described(certificate) or 'it cannot be read'}); if the provider says that "
                "this is its own, you may set fingerprint to it instead",
                found,
            ) from None

    @classmethod
    async def _certificate(cls, settings: Server, hostname: str) -> bytes | None:
        """The certificate that a server shows, whoever it is; nothing else is asked or told."""
        looking = cls(settings, hostname, tls_context=_unverified())
        try:
            await looking._dial()
            if settings.tls != "implicit":
                await looking._ehlo()
                await looking._begin_tls()
            return looking._peer_certificate()
        except CollectionError:
            return None
        finally:
            looking.close()

    @classmethod
    async def _open_one(
        cls, settings: Server, hostname: str, let_in_by: str | None, *, clear: bool = False
    ) -> Connection:
        connection = cls(settings, hostname, let_in_by)
        try:
            await connection._open(clear)
        except CollectionError:
            await connection._leave()
            raise
        except BaseException:
            connection.close()
            raise
        return connection

    async def _open(self, clear: bool) -> None:
        await self._dial()
        await self._ehlo()
        if self.settings.tls == "starttls":
            await self._starttls()
        elif self.settings.tls == "opportunistic" and "STARTTLS" in self.extensions and not clear:
            await self._try_starttls()
        if self.settings.account is not None:
            await self._authenticate()
            await self._ehlo_after_login()

    async def _leave(self) -> None:
        """End a connection that is of no use: with QUIT if the server waits for a command (RFC 5321
        4.1.1.10), without a word if it is in the middle of something else."""
        try:
            if self._smtp.is_connected and self._smtp.in_step:
                await self.quit()
        finally:
            self.close()

    def close(self) -> None:
        """Drop the connection without a word."""
        self._smtp.close()
        if self._dialled is not None:
            # A close under TLS waits half a minute for the other side's, and aiosmtplib lets go of
            # a transport that it closes itself.
            self._dialled.abort()

    async def quit(self) -> None:
        """Say QUIT, wait a little for the answer, and close (RFC 5321 4.1.1.10)."""
        with contextlib.suppress(aiosmtplib.SMTPException, OSError):
            await self._smtp.execute_command(b"QUIT", timeout=GOODBYE)
        self.close()

    # -- the steps ----------------------------------------------------------------------------

    async def _dial(self) -> None:
        doing = f"connecting to {self._where}"
        settings = self.settings
        try:
            self._smtp.sock = await dial(settings.server, settings.port, settings.timeout)
        except Failed as error:
            raise Failed(f"{doing}: {error}") from None
        try:
            greeting = await self._smtp.connect()
        except aiosmtplib.SMTPConnectResponseError as error:
            raise error_for(self._reply(error.code, error.message), doing) from None
        except aiosmtplib.SMTPException as error:
            raise self._broken(doing, error) from None
        tell("S: %s", self._reply(greeting.code, greeting.message))
        self.peer = self._transport().get_extra_info("peername")[:2]
        self._note_tls()

    async def _ehlo(self, doing: str = "greeting {} with EHLO") -> None:
        doing = doing.format(self._where)
        try:
            answer = await self._smtp.ehlo()
        except aiosmtplib.SMTPHeloError as error:
            advice = ""
            if error.code in NOT_THIS_NAME:
                advice = (
                    f"if it does not like the name {self._hostname!r}, set hostname of the service"
                )
            raise error_for(self._reply(error.code, error.message), doing, advice) from None
        except (aiosmtplib.SMTPException, OSError) as error:
            raise self._broken(doing, error) from None
        found = _extensions(answer.message)
        # aiosmtplib looks for STARTTLS among its own.
        self._smtp.esmtp_extensions = {keyword.lower(): text for keyword, text in found.items()}
        self._mechanisms = found.get("AUTH", "").split()
        self.extensions = {
            keyword if keyword in OURS else self.hide(keyword): self.hide(text)
            for keyword, text in found.items()
        }

    async def _ehlo_after_login(self) -> None:
        """What was said before may not hold any more (RFC 4954 4): some providers list ATRN now.

        Others do not take a second EHLO.  It was not necessary: what they said before holds.
        """
        try:
            await self._ehlo("greeting {} again after logging in")
        except (Refused, Deferred) as error:
            if self._smtp.closing:
                raise
            log.debug("%s; going on with what it said before", error)

    async def _try_starttls(self) -> None:
        try:
            await self._starttls()
        except CollectionError as error:
            said_under_tls = self.tls is not None and not isinstance(error, Failed)
            if self._injected or self._smtp.closing or said_under_tls:
                raise
            raise _NoTls(str(error)) from None

    async def _starttls(self) -> None:
        await self._begin_tls()
        await self._ehlo()  # RFC 3207 4.2: forget what was said in the clear

    async def _begin_tls(self) -> None:
        if "STARTTLS" not in self.extensions:
            raise Failed(
                f"{self._where} offers no STARTTLS; set tls to 'implicit' if it speaks TLS from "
                "the start, or to 'none' to send everything in the clear"
            )
        doing = f"STARTTLS with {self._where}"
        transport = self._transport()
        watch = StartTlsWatch(transport)
        transport.set_protocol(watch)
        tell("C: STARTTLS")
        self._smtp.in_step = False
        try:
            response = await self._smtp.starttls()
        except aiosmtplib.SMTPResponseException as error:
            watch.step_aside()
            self._smtp.in_step = error.code >= 200
            self._smtp.closing = error.code == 421
            raise error_for(self._reply(error.code, error.message, doing), doing) from None
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            self._injected = watch.glued
            if watch.glued:
                raise Failed(f"{doing}: {GLUED}") from None
            raise self._broken(doing, error) from None
        tell("S: %s", self._reply(response.code, response.message))
        self._note_tls()

    async def _authenticate(self) -> None:
        offered = self._mechanisms
        usable = self._usable(offered)
        if not usable:
            raise Failed(self._no_mechanism(offered))
        wrong: list[tuple[str, Reply]] = []
        while True:
            mechanism = usable.pop(0)
            try:
                reply = await self._try_mechanism(mechanism)
            except CollectionError:
                if wrong:  # it breaks off after a wrong try, so that was its answer
                    raise self._login_error(wrong) from None
                raise
            if reply.positive:
                self._let_in(mechanism, wrong)
                return
            if usable and reply.code in TRY_ANOTHER:
                continue
            wrong.append((mechanism, reply))
            # A server may hold the password in a form that some mechanisms cannot be done with, and
            # say 535.  More than one further try would soon lock the account.
            if not usable or not reply.permanent or len(wrong) > 1:
                raise self._login_error(wrong)
            if self.settings.auth is None:
                # Those that need no form of it are the surest.
                usable.sort(key=lambda name: name in CHALLENGES)

    def _usable(self, offered: Sequence[str]) -> list[str]:
        """The mechanisms to try, in this order."""
        wanted = self.settings.auth or (*CHALLENGES, *PASSWORDS)
        usable = [
            name
            for name in wanted
            if name in offered
            and (name in CHALLENGES or self._verified)
            # RFC 5802 2.2: it is done with names and passwords of some characters only.
            and not (name.startswith("SCRAM-") and self._unprepared)
        ]
        return sorted(usable, key=lambda name: name != self._let_in_by)

    def _let_in(self, mechanism: str, wrong: Sequence[tuple[str, Reply]]) -> None:
        self.auth = mechanism
        for refused, reply in wrong:
            log.warning(
                "%s refuses %s (%s) and takes %s; set auth to [%r] to spare the wrong try",
                *(self._where, refused, reply, mechanism, mechanism),
            )

    def _login_error(self, wrong: Sequence[tuple[str, Reply]]) -> CollectionError:
        (mechanism, reply), *others = wrong
        doing = f"logging in to {self._where} as {self.settings.account} with {mechanism}"
        advice = [f"with {other} it said {said}" for other, said in others]
        if reply.permanent:
            advice.append("check account and password")
        return error_for(reply, doing, "; ".join(advice))

    @property
    def _unprepared(self) -> str:
        """Which of ``account`` and ``password`` SCRAM cannot be done with (SASLprep, RFC 4013)."""
        password = self.settings.password.get_secret_value() if self.settings.password else ""
        for key, text in (("account", self.settings.account or ""), ("password", password)):
            try:
                prepared = saslprep(text)
            except ScramException:
                return key
            if text and not prepared:
                return key
        return ""

    @property
    def _verified(self) -> bool:
        """The other end has proved by its certificate that it is the server that is meant."""
        return self.tls is not None and self.settings.tls in VERIFIED

    def _no_mechanism(self, offered: Sequence[str]) -> str:
        if not offered:
            if "STARTTLS" in self.extensions and not self.tls:
                return f"{self._where} offers no AUTH without TLS; set tls to 'starttls'"
            return f"{self._where} offers no AUTH, so {self.settings.account} cannot log in"
        methods = " ".join(offered)
        if self.settings.auth and any(name in offered for name in CHALLENGES + PASSWORDS):
            wanted = " ".join(self.settings.auth)
            return f"{self._where} offers AUTH {methods} only, and auth allows {wanted} only"
        if any(name.startswith("SCRAM-") for name in offered) and (key := self._unprepared):
            return (
                f"{self._where} offers AUTH {methods}, and this {key} is not for SCRAM: it "
                f"has characters that SASLprep (RFC 4013) forbids; change {key}, or set tls to "
                "'starttls' or 'implicit' if the server offers PLAIN then"
            )
        if any(name in offered for name in PASSWORDS):
            return (
                f"{self._where} offers AUTH {methods} only, which sends the password as it is, and "
                f"tls {self.settings.tls!r} does not verify whom it is sent to; set tls to "
                "'starttls' or 'implicit'"
            )
        known = " ".join((*CHALLENGES, *PASSWORDS))
        return f"{self._where} offers AUTH {methods} only; we can do {known}"

    async def _try_mechanism(self, mechanism: str) -> Reply:
        account = self.settings.account or ""
        password = self.settings.password.get_secret_value() if self.settings.password else ""
        doing = f"logging in to {self._where} as {account} with {mechanism}"
        try:
            if mechanism.startswith("SCRAM-"):
                response = await self._scram(mechanism, account, password)
            elif mechanism == "CRAM-MD5":
                response = await self._smtp.auth_crammd5(account, password)
            elif mechanism == "PLAIN":
                response = await self._smtp.auth_plain(account, password)
            else:
                response = await self._login(account, password)
        except aiosmtplib.SMTPAuthenticationError as error:
            return self._reply(error.code, error.message)
        except ScramException as error:
            raise Failed(
                f"{doing}: {self.hide(str(error))}; the server did not prove that it knows the "
                "password"
            ) from None
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            raise self._broken(doing, error) from None
        return self._reply(response.code, response.message)

    async def _scram(self, mechanism: str, account: str, password: str) -> aiosmtplib.SMTPResponse:
        """RFC 5802 over RFC 4954: two exchanges, and the server proves itself in the second."""
        client = ScramClient([mechanism], account, password)
        first = base64.b64encode(client.get_client_first().encode())
        response = await self._smtp.execute_command(b"AUTH", mechanism.encode(), first)
        if response.code == 334:
            client.set_server_first(_challenge(response))
            # PBKDF2 with as many rounds as the server likes, some seconds of them at most (scramp
            # refuses more): not on the event loop.
            final = await asyncio.to_thread(client.get_client_final)
            response = await self._smtp.execute_command(base64.b64encode(final.encode()))
            if response.code == 334:
                client.set_server_final(_challenge(response))
                response = await self._smtp.execute_command(b"")
            elif response.code == 235:
                raise ScramException("it let us in without its own proof")
        if response.code != 235:
            raise aiosmtplib.SMTPAuthenticationError(response.code, response.message)
        return response

    async def _login(self, account: str, password: str) -> aiosmtplib.SMTPResponse:
        """draft-murchison-sasl-login: the server asks for the name and the password, each once.

        Some do not read the name that comes with the command, and ask for it all the same.
        """
        name = base64.b64encode(account.encode())
        answers = {"name": name, "password": base64.b64encode(password.encode())}
        response = await self._smtp.execute_command(b"AUTH", b"LOGIN", name)
        while response.code == 334:
            answer = answers.pop(_asked_for(response.message), None)
            if answer is None:
                await self._smtp.execute_command(b"*")  # RFC 4954 4: give up
                raise aiosmtplib.SMTPException(
                    "the server asks for something else than a user name and then a password"
                )
            response = await self._smtp.execute_command(answer)
        if response.code != 235:
            raise aiosmtplib.SMTPAuthenticationError(response.code, response.message)
        return response

    async def command(self, line: str) -> Reply:
        """Send a command line and wait for its reply, ``timeout`` seconds at most.

        Raises :class:`~salmon_revsmtp.net.outcome.Failed` when none comes.
        """
        verb = line.partition(" ")[0]
        try:
            response = await self._smtp.execute_command(line.encode("ascii"))
        except (aiosmtplib.SMTPException, OSError) as error:
            raise self._broken(f"sending {verb} to {self._where}", error) from None
        return self._reply(response.code, response.message)

    # -- the last command ---------------------------------------------------------------------

    async def last_command(self, line: str, timeout: float) -> tuple[Reply, Handover]:
        """Send a command after which the transport may belong to another protocol, and wait
        ``timeout`` seconds for its answer.

        Returns the reply and the :class:`Handover` that hands the transport over.  Raises
        :class:`~salmon_revsmtp.net.outcome.Failed` when no answer comes, or no SMTP reply.
        """
        verb = line.partition(" ")[0]
        doing = f"waiting for the answer of {self._where} to {verb}"
        answer = Handover(self._transport(), doing)
        tell("C: %s", self.hide(line))
        try:
            reply = await asyncio.wait_for(answer.ask(line.encode("ascii") + b"\r\n"), timeout)
        except (asyncio.TimeoutError, TimeoutError):
            raise Failed(f"{doing}: nothing in {timeout:g} seconds") from None
        except Failed as error:
            raise Failed(self.hide(str(error))) from None
        reply = Reply(reply.code, self.hide(reply.text))
        tell("S: %s", reply)
        return reply, answer

    async def say_goodbye(self, answer: Handover) -> None:
        """QUIT after a last command that was answered with no; waits a little for the answer."""
        tell("C: QUIT")
        with contextlib.suppress(CollectionError, asyncio.TimeoutError, TimeoutError):
            reply = await asyncio.wait_for(answer.ask(b"QUIT\r\n"), GOODBYE)
            tell("S: %s", Reply(reply.code, self.hide(reply.text)))
        self.close()

    # -- details ------------------------------------------------------------------------------

    def _transport(self) -> asyncio.Transport:
        transport = self._smtp.transport
        if transport is None or transport.is_closing():
            raise Failed(f"{self._where} closed the connection")
        return cast(asyncio.Transport, transport)

    def _note_tls(self) -> None:
        self._dialled = self._transport()
        tls = self._dialled.get_extra_info("ssl_object")
        self.tls = tls.version() if tls is not None else None
        certificate = self._peer_certificate()
        self.fingerprint = fingerprint(certificate) if certificate is not None else None

    def _peer_certificate(self) -> bytes | None:
        tls = self._transport().get_extra_info("ssl_object")
        return tls.getpeercert(binary_form=True) if tls is not None else None

    def _reply(self, code: int, message: str, doing: str = "") -> Reply:
        try:
            return Reply(code, self.hide(message))
        except ValueError:
            prefix = f"{doing}: " if doing else ""
            said = self.hide(message)[:80]
            raise Failed(f"{prefix}{self._where} sent no SMTP reply: {said}") from None

    def _broken(self, doing: str, error: Exception) -> CollectionError:
        text = f"{doing}: {self.hide(_network_reason(error, self.settings))}"
        for cause in _causes(error):
            if isinstance(cause, OtherCertificate):
                return NotTrusted(text, fingerprint(cause.certificate))
            if isinstance(cause, ssl.SSLCertVerificationError):
                return NotTrusted(text)
        return Failed(text)


class _NoTls(Failed):
    """Opportunistic TLS did not come about; the connection is of no use any more."""


class _SMTP(aiosmtplib.SMTP):
    """aiosmtplib's client with a transcript in which no secret stands."""

    def __init__(self, hide: Callable[[str], str], **options: Any) -> None:
        super().__init__(**options)
        self._hide_secrets = hide
        self._in_auth = False
        #: The last command has its answer: the server waits for another.
        self.in_step = False
        #: The last reply was 421: no more will come (RFC 5321 3.8).
        self.closing = False

    async def execute_command(
        self,
        *args: bytes,
        timeout: Any = Default.token,
    ) -> aiosmtplib.SMTPResponse:
        if self._in_auth:
            shown = HIDDEN
        else:
            public = args[:2] if args[:1] == (b"AUTH",) else args
            shown = self._hide_secrets(b" ".join(public).decode("utf-8", "replace"))
            shown += f" {HIDDEN}" if len(public) < len(args) else ""
        tell("C: %s", shown)
        self._in_auth = self.in_step = False
        response = await super().execute_command(*args, timeout=timeout)
        self._in_auth = response.code == 334
        self.closing = response.code == 421
        self.in_step = 200 <= response.code < 600 and not self._in_auth
        text = HIDDEN if self._in_auth else self._hide_secrets(response.message)
        tell("S: %d %s", response.code, " / ".join(text.splitlines()))
        return response

    async def _create_connection(self, timeout: float | None) -> aiosmtplib.SMTPResponse:
        """aiosmtplib closes at once after a greeting that is no 220; RFC 5321 3.1 wants a QUIT."""
        try:
            return await super()._create_connection(timeout)
        except aiosmtplib.SMTPConnectResponseError as error:
            if 200 <= error.code < 600 and error.code != 421:
                with contextlib.suppress(aiosmtplib.SMTPException, OSError):
                    await self.execute_command(b"QUIT", timeout=GOODBYE)
            raise


def _extensions(answer: str) -> dict[str, str]:
    """The keywords of an EHLO answer in upper case, with their parameters (RFC 5321 4.1.1.1).

    Servers write them with tabs, and AUTH on several lines, some with a "=" for clients that were
    old in 1999: all that it says counts.
    """
    found: dict[str, str] = {}
    for line in answer.split("\n")[1:]:
        if line[:5].upper() == "AUTH=":
            line = f"AUTH {line[5:]}"
        keyword, *rest = line.split(None, 1) or [""]
        keyword, parameters = keyword.upper(), rest[0].strip() if rest else ""
        if keyword == "AUTH":
            names = f"{found.get(keyword, '')} {parameters}".upper().split()
            parameters = " ".join(dict.fromkeys(names))
        if keyword:
            found[keyword] = parameters
    return found


def _challenge(response: aiosmtplib.SMTPResponse) -> str:
    try:
        return base64.b64decode(response.message, validate=True).decode()
    except ValueError:
        raise ScramException("the server's challenge is no base64") from None


def _asked_for(challenge: str) -> str:
    """What a challenge of AUTH LOGIN asks for: ``name``, ``password``, or nothing that we know.

    Their texts differ: ``Username:``, ``User Name`` with a NUL, also without the base64.
    """
    texts = [challenge]
    with contextlib.suppress(ValueError):
        texts.insert(0, base64.b64decode(challenge, validate=True).decode())
    for text in texts:
        if found := re.search(r"user|login|name|account|pass", text, re.IGNORECASE):
            return "password" if found[0].lower() == "pass" else "name"
    return ""


def _hider(settings: Server) -> Callable[[str], str]:
    """A function that blanks the password, and what else is secret, in a text that is shown."""
    secrets: list[str] = []
    if settings.password is not None:
        password = settings.password.get_secret_value()
        plain = f"\0{settings.account or ''}\0{password}"
        secrets += [password, *map(_in_base64, (password, plain))]
    patterns = [re.escape(secret) for secret in secrets]
    for word in settings.hidden_words:
        if len(word) < SHORT:  # it may be a part of many a word
            patterns.append(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])")
        else:
            patterns += [re.escape(word), re.escape(_in_base64(word))]
    if not patterns:
        return lambda text: text
    every = re.compile("|".join(sorted(patterns, key=len, reverse=True)), re.IGNORECASE)
    return lambda text: every.sub(HIDDEN, text)


def _in_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


# What is done TLS with, and what it was made of: see _shared.
_contexts: dict[tuple[str, str], tuple[object, ssl.SSLContext]] = {}


def _tls_context(settings: Server) -> ssl.SSLContext | None:
    if settings.tls == "none":
        return None
    if settings.tls == "opportunistic":
        # RFC 7435: encrypted is better than not, whoever is at the other end.
        return _shared("any", "", (), _unverified)
    if (expected := settings.fingerprint) is not None:
        return _shared("pinned", expected, (), lambda: pinned(expected))
    if (authority := settings.ca_file) is not None:
        return _shared("ca", str(authority), (authority,), lambda: _trusting(authority))
    found = ssl.get_default_verify_paths()
    files = tuple(Path(one) for one in (found.cafile, found.capath) if one)
    return _shared("system", "", files, ssl.create_default_context)


def _shared(
    kind: str, name: str, files: Sequence[Path], make: Callable[[], ssl.SSLContext]
) -> ssl.SSLContext:
    """The context for all connections that trust the same, made again when one of the files has
    changed: that of the system's authorities takes 900 KiB, and tens of milliseconds to make."""
    state = tuple(map(_state, files))
    known = _contexts.get((kind, name))
    if known is not None and known[0] == state:
        return known[1]
    context = make()
    _contexts[kind, name] = state, context
    return context


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _trusting(authority: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority))
    # A server's own certificate may be the anchor, and one made by hand lacks what the strict
    # checks of Python 3.13 ask of a CA.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


# What OpenSSL calls a peer without a TLS version that we take.
_OLD_TLS = ("PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "VERSION_TOO_LOW")
# What it says of a peer that answers the beginning of TLS in the clear: "220 ...", or a web page.
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "PACKET_LENGTH_TOO_LONG")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it comes from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _other_certificate(error: OtherCertificate) -> str:
    about = described(error.certificate)
    return (
        f"its certificate is not the one that fingerprint names: it has "
        f"{fingerprint(error.certificate)}{f' ({about})' if about else ''}, and "
        f"{error.expected} is expected; if the provider has renewed its certificate, ask it for "
        "the new fingerprint and set fingerprint to that; if not, someone else answers in its place"
    )


def _network_reason(error: BaseException, settings: Server) -> str:
    """What went wrong below SMTP, and what to try."""
    for cause in _causes(error):
        if isinstance(cause, OtherCertificate):
            return _other_certificate(cause)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return certificate_refused(cause, pins=hasattr(settings, "fingerprint"))
        if isinstance(cause, ssl.SSLError) and any(
            word in (cause.reason or "") for word in _OLD_TLS
        ):
            return (
                f"TLS failed ({cause.reason}): it has no TLS version that is safe today; it has to "
                "learn TLS 1.2"
            )
        if isinstance(cause, ssl.SSLError) and cause.reason in _NO_TLS:
            hint = "; set tls to 'starttls', or check port" if settings.tls == "implicit" else ""
            return f"it does not speak TLS there: it answered in the clear{hint}"
        if isinstance(cause, ssl.SSLError):
            hint = "'starttls'" if settings.tls == "implicit" else "'implicit'"
            return (
                f"TLS failed ({cause.reason or cause}); does it want tls {hint}, or another port?"
            )
        if isinstance(cause, ConnectionAbortedError):  # asyncio's word for a silent TLS handshake
            return f"no TLS handshake in {settings.timeout:g} seconds"
    other = "set tls to 'implicit'" if settings.tls != "implicit" else "set tls to 'starttls'"
    if isinstance(error, aiosmtplib.SMTPResponseException):
        said = error.message.removeprefix("Malformed SMTP response line: ")
        if said[:2] in ("\x15\x03", "\x16\x03"):
            return f"it speaks TLS; {other}, or check port"
        hint = "; it is a web server: check port" if said.startswith("HTTP/") else ""
        return f"it sent no SMTP reply: {error.message[:80]}{hint}"
    text = str(error).strip()
    if "server ready" in text:  # aiosmtplib's word for the greeting
        return (
            f"no greeting in {settings.timeout:g} seconds; a server that speaks TLS, or no SMTP, "
            f"waits for us: {other}, or check port"
        )
    if text.startswith("Timed out connecting"):  # the connection is there; TLS was to begin
        return (
            f"no TLS handshake in {settings.timeout:g} seconds; if it speaks no TLS there, "
            f"{other}, or check port"
        )
    if isinstance(error, aiosmtplib.SMTPTimeoutError):
        waited = "no TLS handshake" if "upgrading" in text else "no whole answer"
        return f"{waited} in {settings.timeout:g} seconds"
    text = re.sub(r"^Error connecting to \S+ on port \S+:", "", text).strip()
    if isinstance(error, aiosmtplib.SMTPConnectError) and "EOF" in text:
        return (
            "it closed the connection without a greeting; if it always does, "
            f"{other}, or check port"
        )
    if text.startswith("Connection reset while upgrading") or (
        not text and settings.tls == "implicit"
    ):
        hint = "'starttls'" if settings.tls == "implicit" else "'implicit'"
        return (
            "TLS failed (it broke the connection off in the handshake); does it know TLS 1.2, "
            f"and does it want tls {hint}?"
        )
    return text or f"it broke the connection off ({type(error).__name__})"
