"""ETRN, the client's side (RFC 1985): ask a server to start its queue for our domains.

The server opens new connections to us for the mail itself, so a service has to listen where it
can reach us; our own connection ends right after the acknowledgement.  What only a request needs
is imported by it, so that a list of the agents is there at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, field_validator, model_validator

from salmon_revsmtp.customer.agent import Agent, Check
from salmon_revsmtp.customer.settings import (
    ServerSettings,
    TlsMode,
    without_control_characters,
)
from salmon_revsmtp.foreign import without_login
from salmon_revsmtp.net.address import domain_name
from salmon_revsmtp.net.outcome import Failed, Outcome

if TYPE_CHECKING:
    from salmon_revsmtp.customer.collection import Collection
    from salmon_revsmtp.service.policy import Service
    from salmon_revsmtp.smtp.replies import Reply

__all__ = ["EtrnAgent", "EtrnSettings"]

NO_MESSAGES = 251
# Its first digit says "later", its meaning is that it will never be: "node not allowed".
NOT_ALLOWED = 459

# Of several answers the worst is the outcome of the collection.
_FROM_BEST_TO_WORST = (
    Outcome.NO_MAIL,
    Outcome.REQUESTED,
    Outcome.DEFERRED,
    Outcome.REFUSED,
    Outcome.FAILED,
)


class EtrnSettings(ServerSettings):
    """The keys of an agent with ``protocol: "etrn"``."""

    port: Annotated[int, Field(ge=1, le=65535, description="a TCP port, 1 to 65535")] = 25
    tls: Annotated[
        TlsMode, Field(description="'implicit', 'starttls', 'opportunistic' or 'none'")
    ] = "opportunistic"
    domains: Annotated[
        tuple[str, ...],
        Field(description="a list of names: 'example.org', '@example.org' or '#queue'"),
    ] = ()
    """What is asked for, with one ``ETRN`` each: a domain, a domain with its subdomains
    (``"@example.org"``), or a queue by its name (``"#queue"``).  Required unless ``parameters`` is
    given."""
    parameters: Annotated[
        tuple[str, ...] | None,
        Field(
            repr=False, description="a text, or a list of texts, each sent after an ETRN as it is"
        ),
    ] = None
    """Sent after ``ETRN`` instead of ``domains``, with one ``ETRN`` for each text.  Words that are
    no domain names are hidden wherever the password is."""

    @field_validator("domains")
    @classmethod
    def _domains(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_node(name) for name in value)

    @field_validator("parameters", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("parameters")
    @classmethod
    def _parameters(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for one in value or ():
            without_control_characters(one)
            if not one.isascii() or not one.strip():
                raise ValueError("only ASCII goes on the wire, and not nothing")
        return value

    @model_validator(mode="after")
    def _asks_for_something(self) -> EtrnSettings:
        if not self.domains and not self.parameters:
            raise ValueError("domains: empty, so nothing would be asked for; name at least one")
        if (self.account is None) != (self.password is None):
            raise ValueError("account and password: give both, or neither")
        return self


def _node(name: str) -> str:
    """RFC 1985 5.2: a domain; ``@`` before it adds its subdomains; ``#`` a queue by its name."""
    if name.startswith("#"):
        without_control_characters(name)
        if not name.isascii() or len(name.split()) != 1 or name == "#":
            raise ValueError(f"{without_login(name)!r}: the name of a queue is one word of ASCII")
        return name
    return "@" + domain_name(name[1:]) if name.startswith("@") else domain_name(name)


class EtrnAgent(Agent):
    """Asks by ETRN."""

    protocol: ClassVar[str] = "etrn"
    Settings = EtrnSettings
    # The mechanism that let us in the last time.
    _let_in_by: str | None = None

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains asked for; ``@example.org`` stands for its subdomains, too."""
        return tuple(name for name in self.settings.domains if not name.startswith("#"))

    @property
    def senders(self) -> tuple[str, ...]:
        return (self.settings.server,)

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(self.settings.parameters or self.settings.domains)

    def problems(self, service: Service) -> list[str]:
        if service.settings.domains or self.domains:
            return []
        return [
            f'domains: names no domain, and service "{self.settings.service}" has none either, so '
            "every recipient would be refused; name the domains in one of the two"
        ]

    async def collect(self, collection: Collection) -> Outcome:
        """One ETRN per name; the outcome is that of the worst answer."""
        from salmon_revsmtp.net.client import Connection

        report = collection.report
        collection.does(f"connecting to {self.address}")
        connection = await Connection.open(
            self.settings, collection.service.hostname, self._let_in_by
        )
        try:
            report.sessions += 1
            report.tls, report.auth = connection.tls, connection.auth
            self._let_in_by = connection.auth
            collection.service.expected.meet(connection.peer[0])
            if "ETRN" not in connection.extensions:
                raise Failed(f"{self.address} does not offer ETRN; is it the host that holds mail?")
            outcomes = {}
            collection.does(f"waiting for the answer of {self.address} to ETRN")
            for name in self._names:
                reply = await connection.command(f"ETRN {name}")
                answer = f"{connection.hide(name)}: {reply}"
                report.answers.append(answer)
                outcomes[answer] = _outcome(reply)
        finally:
            await connection.quit()
        worst = max(outcomes.values(), key=_FROM_BEST_TO_WORST.index)
        if not worst.good:
            bad = [answer for answer, outcome in outcomes.items() if not outcome.good]
            report.error = f"asking {self.address} to start its queue: {'; '.join(bad)}"
        elif worst is Outcome.REQUESTED:
            report.error = self._why_no_mail(collection.service)
        return worst

    def _why_no_mail(self, service: Service) -> str | None:
        """Why the mail that is asked for does not come here; ``None`` if it can."""
        if service.listens:
            return None
        what = f"{self.address} sends the mail over a connection of its own"
        if not service.settings.listen:
            return (
                f'{what}, and service "{service.name}" does not listen, so it will not come here; '
                "set listen of the service, unless another mail server takes it"
            )
        return (
            f"{what}, and no server of this project listens (service "
            f'"{service.name}", listen {", ".join(service.settings.listen)}), so it will not come '
            "here; start it with `salmon start` or `salmon-revsmtp run`"
        )

    async def check(self, service: Service) -> Check:
        """Dial, TLS, EHLO, AUTH; no ETRN."""
        from salmon_revsmtp.net.client import Connection

        connection = await Connection.try_out(
            self.settings, await service.find_hostname(), self._let_in_by
        )
        result = Check(connection.tls, connection.auth, connection.extensions)
        result.fingerprint = connection.fingerprint
        if "ETRN" not in connection.extensions:
            result.problems.append(f"{self.address} does not offer ETRN")
        if why := self._why_no_mail(service):
            result.problems.append(why)
        if rule := service.refuses_client(connection.peer[0]):
            result.problems.append(
                f"{self.address} is {connection.peer[0]}, which service "
                f'"{self.settings.service}" shuts out by its rule "{rule}"'
            )
        await connection.quit()
        return result


def _outcome(reply: Reply) -> Outcome:
    """RFC 1985 5.3: 250, 252, 253 started; 251 nothing waits; 458 later; 459 and 5yz no."""
    if reply.code == NO_MESSAGES:
        return Outcome.NO_MAIL
    if reply.positive:
        return Outcome.REQUESTED
    if reply.permanent or reply.code == NOT_ALLOWED:
        return Outcome.REFUSED
    return Outcome.DEFERRED if reply.transient else Outcome.FAILED
