"""What ``salmon-revsmtp check`` tries by the network: the addresses to listen on, the relay, what
handlers need, the agents.  All at the same time, each with a limit.

A module of handlers may have a function ``check_handler(network: bool)``, with which it is asked
whether it could do its work now.  It returns a sentence, or ``None`` where nothing was tried
because ``network`` is false; it raises an exception that says what would keep it from taking mail.
It is called in a thread of its own, and leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from salmon_revsmtp.customer.agent import Agent, Check
from salmon_revsmtp.delivery.relay import address_of, try_relay, why
from salmon_revsmtp.net.listener import why_not_listen
from salmon_revsmtp.net.outcome import CollectionError
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.checks import FAILED, OK, SKIPPED, WARNING, Finding
from salmon_revsmtp.server.configuration import Configuration
from salmon_revsmtp.service.policy import Service

__all__ = [
    "NOT_MADE",
    "Place",
    "agent_finding",
    "handler_checks",
    "has_check",
    "places",
    "places_of_plugins",
    "reached",
    "skipped",
]

#: What a module of handlers may have.
HandlerCheck = Callable[[bool], "str | None"]
CHECK = "check_handler"

# Seconds that an agent has for all of its check.  Its timeout is for each step of it, and who waits
# at a terminal has had enough by then.
AGENT_PATIENCE = 60.0

# Seconds that the relay has for each answer.
RELAY_PATIENCE = 10.0

MOST_PORT = 65535

# In the place of a relay that the boot module would have made.
NOT_MADE = object()


def has_check(agent: Agent) -> bool:
    """Whether its type has a check of its own."""
    return type(agent).check is not Agent.check


@dataclass(frozen=True)
class Place:
    """An address to listen on.

    ``name``    who listens there.
    ``needed``  the server does not start without.
    """

    name: str
    host: str
    port: int
    needed: bool = True

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host or "*"
        return f"{host}:{self.port}"


def places(configuration: Configuration) -> list[Place]:
    """Where the server is to listen."""
    found = [
        Place(f"service={name}", host, port)
        for name, one in configuration.services.items()
        for host, port in one.addresses
    ]
    if configuration.provider is not None:
        found += [Place("provider", *address) for address, _ in configuration.provider.addresses]
    return found


def places_of_plugins(plugins: Plugins, settings: ModuleType) -> list[Place]:
    """Where they are to listen.  Raises :class:`~salmon_revsmtp.hooks.HookFailedError`, and
    :class:`ValueError` where one says what is no address."""
    found: list[Place] = []
    for name, addresses in plugins.ask_each("list_addresses", settings=settings):
        try:
            listed = [Place(name, str(host), int(port), False) for host, port in addresses]
        except Exception as error:  # it may be a generator
            raise ValueError(
                f"plugin={name} hook=list_addresses returned no pairs of host and port: {error}"
            ) from None
        for place in listed:
            if not 0 <= place.port <= MOST_PORT or "\0" in place.host:
                raise ValueError(f"plugin={name} hook=list_addresses returned {str(place)!r}")
        found += listed
    return found


async def reached(
    configuration: Configuration,
    listening: Sequence[Place],
    handlers: Mapping[str, HandlerCheck],
    enabled: Mapping[str, bool],
    relay: Any,
    running: bool,
    tell: Callable[[Finding], None],
) -> None:
    """Try all of it, and ``tell`` of each in the order of the settings.

    ``listening``  where the server and its plugins are to listen.
    ``handlers`` those that can be asked, by module.
    ``enabled``  by agent: what the journal and the settings say.
    ``relay``    Salmon's, or ``None``; :data:`NOT_MADE` where the boot module failed.
    ``running``  a server of this project runs, and has the addresses.
    """
    services = {name: Service(name, one) for name, one in configuration.services.items()}
    for one in services.values():
        one.listens = running and bool(one.settings.listen)
    tasks: list[asyncio.Future[Finding]] = []

    def begin(work: Awaitable[Finding]) -> None:
        tasks.append(asyncio.ensure_future(work))

    taken: dict[str, Place] = {}
    for place in listening:
        begin(_address(place, taken.get(str(place)), running))
        if place.port:
            taken.setdefault(str(place), place)
    begin(_relay(relay))
    for name, ask in handlers.items():
        begin(_handler(name, ask))
    for agent in configuration.agents:
        begin(agent_finding(agent, services[agent.settings.service], enabled[agent.name]))
    for task in tasks:
        tell(await task)


def handler_checks(modules: Iterable[Any]) -> dict[str, HandlerCheck]:
    """By module, the functions of those that have one and that could be imported."""
    found = {str(name): getattr(sys.modules.get(str(name)), CHECK, None) for name in modules}
    return {name: ask for name, ask in found.items() if callable(ask)}


def skipped(
    configuration: Configuration,
    listening: Sequence[Place],
    handlers: Mapping[str, HandlerCheck],
    enabled: Mapping[str, bool],
) -> list[Finding]:
    """The same without the network."""
    offline = "not tried, as --offline says"
    found = [Finding("listen", str(place), SKIPPED, offline) for place in listening]
    found.append(Finding("relay", "settings.relay", SKIPPED, offline))
    for name, ask in handlers.items():
        asked = _asked(name, ask, False)
        found.append(asked or Finding("handler", name, SKIPPED, offline))
    for agent in configuration.agents:
        text = offline if enabled[agent.name] else DISABLED
        found.append(Finding("agent", agent.name, SKIPPED, text))
    return found


DISABLED = "disabled, so it was not tried"


async def _address(place: Place, before: Place | None, running: bool) -> Finding:
    """``before`` is to listen there, too."""
    subject, bad = str(place), FAILED if place.needed else WARNING
    if before is not None:
        text = f"{place.name} is to listen there, and so is {before.name}; give one another port"
        return Finding("listen", subject, bad, text)
    try:
        problem = await why_not_listen(place.name, place.host, place.port)
    except ValueError as error:  # a name that no resolver takes
        problem = f"{place.name} cannot listen on {place}: {error}"
    if not running:
        if problem and not place.needed:
            problem += "; mail goes on without it"
        if problem:
            return Finding("listen", subject, bad, problem)
        return Finding("listen", subject, OK, f"{place.name} can listen there")
    if problem or place.port == 0:
        return Finding("listen", subject, OK, "the server that runs has it")
    return Finding(
        "listen",
        subject,
        WARNING,
        f"{place.name} does not listen there, although the server runs; restart it after a change "
        "of the settings",
    )


async def _relay(relay: Any) -> Finding:
    """Mail is collected without a relay, too: only a warning."""
    cost = (
        " (mail is taken all the same, but senders are not told of what fails, and what your "
        "handlers send does not go out)"
    )
    if relay is NOT_MADE:
        text = "not tried, for the boot module, which makes it, failed"
        return Finding("relay", "settings.relay", SKIPPED, text)
    if relay is None:
        return Finding("relay", "settings.relay", WARNING, f"there is none{cost}")
    subject = address_of(relay)
    if not all(hasattr(relay, key) for key in ("hostname", "port", "ssl", "starttls", "lmtp")):
        return Finding("relay", subject, SKIPPED, "it is none of Salmon's, so it was not tried")
    try:
        trying = asyncio.to_thread(try_relay, relay, RELAY_PATIENCE)
        await asyncio.wait_for(trying, AGENT_PATIENCE)
    except (asyncio.TimeoutError, OSError, ValueError) as error:
        return Finding("relay", subject, WARNING, f"{why(error)}{cost}")
    return Finding("relay", subject, OK, "it answers")


async def _handler(name: str, ask: HandlerCheck) -> Finding:
    try:
        trying = asyncio.to_thread(_asked, name, ask, True)
        found = await asyncio.wait_for(trying, AGENT_PATIENCE)
    except (asyncio.TimeoutError, TimeoutError):
        text = f"its check did not end in {AGENT_PATIENCE:g} seconds; mail would wait as long"
        return Finding("handler", name, FAILED, text)
    return found or Finding("handler", name, SKIPPED, "it has tried nothing")


def _asked(name: str, ask: HandlerCheck, network: bool) -> Finding | None:
    """What a handler says of itself, or has raised."""
    try:
        said = ask(network)
    except Exception as error:
        text = str(error) or type(error).__name__
        return Finding("handler", name, FAILED, f"{text}; until that is mended, it takes no mail")
    return None if said is None else Finding("handler", name, OK, str(said))


async def agent_finding(agent: Agent, service: Service, enabled: bool = True) -> Finding:
    """What an agent's own check says."""
    if not enabled:
        return Finding("agent", agent.name, SKIPPED, DISABLED)
    if not has_check(agent):
        text = f"the agent type {agent.protocol!r} has no check, so nothing was tried"
        return Finding("agent", agent.name, SKIPPED, text)
    try:
        result = await asyncio.wait_for(agent.check(service), AGENT_PATIENCE)
    except CollectionError as error:
        return Finding("agent", agent.name, FAILED, str(error))
    except (asyncio.TimeoutError, TimeoutError):
        text = f"{agent.address or agent.protocol}: no end of it in {AGENT_PATIENCE:g} seconds"
        return Finding(
            "agent", agent.name, FAILED, f"{text}; `check {agent.name} -v` shows how far"
        )
    except Exception as error:
        text = f"bug in agent type {agent.protocol!r}: {type(error).__name__}: {error}"
        return Finding("agent", agent.name, FAILED, text)
    if result.problems:
        return Finding("agent", agent.name, WARNING, "; ".join(result.problems))
    return Finding("agent", agent.name, OK, reached_by(agent, result))


def reached_by(agent: Agent, result: Check) -> str:
    """How far a check has come."""
    secured = f"by {result.tls}" if result.tls else "in the clear"
    login = f"logged in with {result.auth}" if result.auth else "not logged in"
    return f"{agent.address} reached {secured}, {login}".lstrip()
