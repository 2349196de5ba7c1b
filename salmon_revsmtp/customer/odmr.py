"""On-Demand Mail Relay, the customer's side (RFC 2645).

Connect, TLS, AUTH, ``ATRN``; the roles reverse, and the provider sends the waiting mail down the
same connection.  An agent type as any other: nothing here that a third party's could not use.
What only a collection needs is imported by it, so that a list of the agents is there at once.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, SecretStr, field_validator

from salmon_revsmtp.customer.agent import Agent, Check
from salmon_revsmtp.customer.settings import (
    ACCOUNT,
    PASSWORD,
    ServerSettings,
    without_control_characters,
)
from salmon_revsmtp.net.address import domain_name
from salmon_revsmtp.net.outcome import Deferred, Failed, Outcome, Refused
from salmon_revsmtp.smtp.addresses import AddressError, to_ascii
from salmon_revsmtp.smtp.limits import COMMAND_TIMEOUT

if TYPE_CHECKING:
    from salmon_revsmtp.customer.collection import Collection
    from salmon_revsmtp.net.client import Connection
    from salmon_revsmtp.service.policy import Service
    from salmon_revsmtp.service.session import Session
    from salmon_revsmtp.smtp.replies import Reply

__all__ = ["OdmrAgent", "OdmrSettings"]

# RFC 2645 5.2.1: the customer waits at least this long for the answer to ATRN.
ATRN_TIMEOUT = 600.0

NO_MAIL = 453

# RFC 5321 4.5.3.1.4: a command line has 512 octets with its CRLF.
MAX_COMMAND = 510

# Sessions of one collection.  Some providers send one message a session, so that it takes many; but
# a handler that mails back into a collected domain makes new mail for ever, and the rest of it can
# wait for the next collection.
MAX_SESSIONS = 1000

# After mail, a session that the provider breaks off before it brings anything is followed by
# another one, so often and after so many seconds.  Exim's process of the session before may still
# be at the next message: the new one finds that locked, has nothing else to send, and ends.
CALLS_AGAIN = 3
AFTER_MAIL = 1.0

# Seconds of silence in a push session that a provider may offer.
LEAST_SILENCE, MOST_SILENCE = 1.0, 3600.0

log = logging.getLogger(__name__)


class OdmrSettings(ServerSettings):
    """The keys of an agent with ``protocol: "odmr"``."""

    port: Annotated[int, Field(ge=1, le=65535, description="a TCP port, 1 to 65535")] = 366
    # RFC 2645 5.1.1: ATRN is for those who have logged in.
    account: Annotated[str, Field(min_length=1, description=ACCOUNT)]
    """The name of your account at the provider."""
    password: Annotated[SecretStr, Field(min_length=1, description=PASSWORD)]
    parameters: Annotated[
        str | None, Field(repr=False, description="a text that is sent after ATRN as it is")
    ] = None
    """Sent after ``ATRN`` instead of ``domains``, for a provider that wants something else
    there.  Words that are no domain names are hidden wherever the password is."""

    push: Annotated[bool, Field(strict=True, description="True or False")] = True
    """Keep the session open where the provider offers that (``XHOLD``): mail comes down it the
    moment that the provider has it.  Otherwise, or while there is no such session, the agent
    collects ``every`` minutes.  Only a running server does that."""

    @field_validator("domains")
    @classmethod
    def _domains(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(domain_name(domain) for domain in value)

    @field_validator("parameters")
    @classmethod
    def _parameters(cls, value: str | None) -> str | None:
        if value is not None:
            without_control_characters(value)
            if not value.isascii():
                raise ValueError("only ASCII goes on the wire; write a domain's xn-- form")
        return value


class OdmrAgent(Agent):
    """Collects by ODMR."""

    protocol: ClassVar[str] = "odmr"
    Settings = OdmrSettings
    # The mechanism that let us in the last time.
    _let_in_by: str | None = None

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that ATRN names, those of ``parameters`` too if they read as domains."""
        settings = self.settings
        if settings.domains or not settings.parameters:
            return tuple(settings.domains)
        try:
            return tuple(to_ascii(domain) for domain in settings.parameters.split(","))
        except AddressError:
            return ()

    @property
    def commands(self) -> tuple[str, ...]:
        """The ATRN that is sent (RFC 2645 5.2.1); several, a session each, if one command line
        cannot hold all domains."""
        if self.settings.parameters is not None:
            return (f"ATRN {self.settings.parameters}".rstrip(" "),)
        commands = ["ATRN"]
        for domain in self.settings.domains:
            longer = f"{commands[-1]},{domain}"
            if commands[-1] == "ATRN":
                commands[-1] = f"ATRN {domain}"
            elif len(longer) <= MAX_COMMAND:
                commands[-1] = longer
            else:
                commands.append(f"ATRN {domain}")
        return tuple(commands)

    def problems(self, service: Service) -> list[str]:
        if service.settings.domains or self.domains:
            return []
        return [
            "domains: empty, and service "
            f'"{self.settings.service}" has no domains either, so every recipient would be '
            "refused; name the domains in one of the two"
        ]

    async def collect(self, collection: Collection) -> Outcome:
        """Collect until the provider has no more.

        A session that took messages is followed by another, also when it broke: some providers
        send one message and break off.  A session that brought nothing is the last, unless it came
        after mail and broke off before anything happened.
        """
        for command in self.commands:
            if not await self._drain(collection, command):
                break
        tally = collection.tally
        if tally.accepted:
            return Outcome.COLLECTED
        if collection.push_since is not None and tally.deferred is None:
            return Outcome.NO_MAIL
        if tally.deferred is not None:
            raise Failed(
                f"receiving from {self.address}: all that came was deferred, the last with "
                f"{tally.deferred}; the provider keeps it, the log says why"
            )
        return Outcome.COLLECTED if tally.refused else Outcome.NO_MAIL

    async def _drain(self, collection: Collection, command: str) -> bool:
        """Sessions with this ATRN until it brings no more; ``False`` if the collection is over."""
        from asyncio import sleep

        calls_again = 0  # the first session follows no mail
        while True:
            before = collection.tally.answered
            try:
                session = await self._session(collection, command)
            except (Refused, Deferred) as error:
                # What follows mail is never worse than the mail.
                if not collection.tally.accepted:
                    raise
                log.warning("agent=%s after the mail: %s", self.name, error)
                return False
            if collection.stopping or collection.push_since is not None:
                return False
            if session is None:
                return True
            if session.served:
                calls_again = CALLS_AGAIN
            elif session.broken is None:
                return True
            elif session.broken_off and calls_again and collection.tally.answered == before:
                calls_again -= 1
                log.info("agent=%s after the mail: %s; calling again", self.name, session.broken)
                collection.does(f"waiting before calling {self.address} again")
                await sleep(AFTER_MAIL)
            else:
                raise Failed(f"receiving from {self.address}: {session.broken}")
            if collection.report.sessions >= MAX_SESSIONS:
                log.warning(
                    "agent=%s sessions=%d and still more mail, the next collection goes on; does a "
                    "handler mail back into a domain that is collected?",
                    *(self.name, collection.report.sessions),
                )
                return False

    async def _session(self, collection: Collection, command: str) -> Session | None:
        """One connection; ``None`` when the provider has no mail for us (453)."""
        from salmon_revsmtp.net.client import Connection

        report, settings = collection.report, self.settings
        collection.does(f"connecting to {self.address}")
        connection = await Connection.open(settings, collection.service.hostname, self._let_in_by)
        try:
            report.sessions += 1
            report.tls, report.auth = connection.tls, connection.auth
            self._let_in_by = connection.auth
            try:
                self._admit(collection.service, connection)
            except Failed:
                await connection.quit()
                raise
            silence = await self._ask_for_push(collection, connection)
            collection.does(f"waiting for the answer of {self.address} to ATRN")
            reply, answer = await connection.last_command(
                command, max(ATRN_TIMEOUT, settings.timeout)
            )
            if reply.code == 250:
                if silence is not None:
                    return await collection.receive_pushed(answer, silence)
                return await collection.receive(answer, settings.idle_timeout(COMMAND_TIMEOUT))
            await connection.say_goodbye(answer)
            if reply.code == NO_MAIL:
                return None
            raise self._atrn_error(connection.hide(command), reply)
        finally:
            connection.close()

    async def _ask_for_push(self, collection: Collection, connection: Connection) -> float | None:
        """Ask for a session that stays open, where that is wanted and offered; returns the longest
        silence in it in seconds, ``None``: it will be a session as any other."""
        offered = connection.extensions.get("XHOLD")
        wanted = collection.may_push and self.settings.push and len(self.commands) == 1
        if offered is None or not wanted:
            return None
        silence = float(offered) if re.fullmatch(r"[0-9]{1,5}", offered) else 0.0
        if not LEAST_SILENCE <= silence <= MOST_SILENCE:
            log.warning("agent=%s the provider offers XHOLD %.40r: no time", self.name, offered)
            return None
        reply = await connection.command("XHOLD")
        return silence if reply.positive else None

    def _admit(self, service: Service, connection: Connection) -> None:
        if rule := service.refuses_client(connection.peer[0]):
            raise Failed(
                f"{self.address} is {connection.peer[0]}, which service "
                f'"{self.settings.service}" shuts out by its rule "{rule}"'
            )

    def _atrn_error(self, command: str, reply: Reply) -> Exception:
        """RFC 2645 5.2.1: what else may be answered, and what to do about it."""
        from salmon_revsmtp.net.client import error_for

        advice = {
            450: "the provider refuses to reverse now; the next collection tries again",
            451: "the provider cannot do it now; the next collection tries again",
            500: "it does not know ATRN: is this its ODMR port?",
            502: "it does not do ATRN: is this its ODMR port?",
            530: "it wants a login first: check account and password",
            550: "it does not hold mail of these domains for this account: check domains",
        }.get(reply.code, "")
        return error_for(reply, f"asking {self.address} for mail with {command}", advice)

    async def check(self, service: Service) -> Check:
        """Dial, TLS, EHLO, AUTH; no ATRN."""
        from salmon_revsmtp.net.client import Connection

        connection = await Connection.try_out(
            self.settings, await service.find_hostname(), self._let_in_by
        )
        result = Check(connection.tls, connection.auth, connection.extensions)
        result.fingerprint = connection.fingerprint
        try:
            self._admit(service, connection)
        except Failed as error:
            result.problems.append(str(error))
        if "ATRN" not in connection.extensions:
            result.problems.append(
                f"{self.address} does not list ATRN; a collection tries it all the same"
            )
        await connection.quit()
        return result
