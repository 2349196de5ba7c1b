"""The settings of a Salmon project, read and validated: agents and services.

Every wrong setting is one sentence with the agent and the key; all of them are reported at once.
No sentence, repr or exception holds a password: values of secret or unknown keys are not quoted.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import ssl
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from salmon_revsmtp.smtp.addresses import to_ascii

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from salmon_revsmtp.agents.base import Agent
    from salmon_revsmtp.plugins import Plugins

__all__ = ["Configuration", "ServiceSettings", "SettingsError", "load"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ANY_DOMAIN = "*"

_HOST_AND_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]]*)):([0-9]{1,5})")


class SettingsError(Exception):
    """The settings are wrong; ``problems`` has a sentence for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class ServiceSettings(BaseModel):
    """One entry of ``smtp_services``: the policy and the delivery of an inbound SMTP service."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    hostname: Annotated[
        str | None, Field(description="a host name, or None for this machine's")
    ] = None
    domains: Annotated[
        tuple[str, ...],
        Field(description="a list of domain names, or ['*'] for any; empty: the agent's"),
    ] = ()
    allow: Annotated[
        tuple[str, ...], Field(description="a list of networks such as '192.0.2.0/24'")
    ] = ()
    deny: Annotated[
        tuple[str, ...], Field(description="a list of networks such as '192.0.2.0/24'")
    ] = ()
    max_message_size: Annotated[int, Field(gt=0, description="octets, a whole number above 0")] = (
        50 * 1024 * 1024
    )
    max_recipients: Annotated[int, Field(gt=0, description="a whole number above 0")] = 1000
    delivery: Annotated[Literal["router", "queue"], Field(description="'router' or 'queue'")] = (
        "router"
    )
    queue: Annotated[str, Field(min_length=1, description="the folder of a Salmon Queue")] = (
        "run/inbound"
    )
    handler_timeout: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="seconds above 0")
    ] = 300
    repeat_window: Annotated[
        float, Field(gt=0, le=3650, allow_inf_nan=False, description="days above 0, up to 3650")
    ] = 7
    listen: Annotated[
        str | None, Field(description="'host:port' such as '0.0.0.0:25' or '[::]:25', or None")
    ] = None
    tls_cert: Annotated[
        Path | None, Field(description="a PEM file: our certificate, and those up to its CA")
    ] = None
    tls_key: Annotated[
        Path | None, Field(description="a PEM file: the key of tls_cert, if that has it not")
    ] = None

    @field_validator("domains", "allow", "deny", mode="before")
    @classmethod
    def _a_list(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError("a single text is no list")
        return value

    @field_validator("hostname")
    @classmethod
    def _hostname(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[!-~]{1,255}", value):
            raise ValueError("a host name has no spaces or control characters")
        return value

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str | None) -> str | None:
        if value is not None and not _HOST_AND_PORT.fullmatch(value):
            raise ValueError("that is no host and port")
        return value

    @model_validator(mode="after")
    def _tls(self) -> ServiceSettings:
        if self.tls_cert is None and self.tls_key is not None:
            raise ValueError("tls_key: there is no tls_cert that it could be the key of")
        try:
            self.tls_context()
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"tls_cert, tls_key: {error.strerror or error}") from None
        return self

    def tls_context(self) -> ssl.SSLContext | None:
        """What a listening service does TLS with, ``None`` without a certificate."""
        if self.tls_cert is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.tls_cert, self.tls_key)
        return context

    @property
    def repeat_seconds(self) -> float:
        """``repeat_window`` in seconds."""
        return self.repeat_window * 86400

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of ``listen``; the empty host is every address."""
        found = _HOST_AND_PORT.fullmatch(self.listen or "")
        return (found[1] or found[2], int(found[3])) if found else ("", 0)

    @field_validator("domains")
    @classmethod
    def _domains(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one if one == ANY_DOMAIN else to_ascii(one) for one in value)

    @field_validator("allow", "deny")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ipaddress.ip_network(one, strict=False)) for one in value)


@dataclass(frozen=True)
class Configuration:
    """Valid settings: agents in their order, services by name."""

    agents: tuple[Agent, ...]
    services: Mapping[str, ServiceSettings]

    def asked_for(self, service: str) -> tuple[str, ...]:
        """The domains that the agents of a service ask for."""
        agents = [agent for agent in self.agents if agent.settings.service == service]
        return tuple(dict.fromkeys(domain for agent in agents for domain in agent.domains))

    def agent(self, name: str) -> Agent | None:
        """The agent of that name, if there is one."""
        return next((agent for agent in self.agents if agent.name == name), None)


def load(module: ModuleType, plugins: Plugins) -> Configuration:
    """Read ``collection_agents`` and ``smtp_services`` of a settings module.

    Raises :class:`SettingsError` with every problem that there is.
    """
    from salmon_revsmtp.service import Service

    problems: list[str] = []
    services = _services(getattr(module, "smtp_services", None), problems)
    known = set(services) | set(getattr(module, "smtp_services", None) or ())
    agents = _agents(getattr(module, "collection_agents", None), known, plugins, problems)
    for agent in agents:
        if settings := services.get(agent.settings.service):
            found = agent.problems(Service(agent.settings.service, settings))
            problems += [f'agent "{agent.name}": {problem}' for problem in found]
    configuration = Configuration(tuple(agents), services)
    problems += [
        f'service "{name}": domains: empty, and no agent of the service asks for any, so every '
        "recipient would be refused; name the domains"
        for name, settings in services.items()
        if settings.listen and not settings.domains and not configuration.asked_for(name)
    ]
    if problems:
        raise SettingsError(problems)
    return configuration


def _services(found: object, problems: list[str]) -> dict[str, ServiceSettings]:
    if found is None:
        found = {}
    if not isinstance(found, Mapping):
        problems.append(f"smtp_services: found {_quote(found)}, allowed: a dict of services")
        found = {}
    services = {}
    for name, keys in {"default": {}, **found}.items():
        where = f'service "{name}"'
        if service := _validated(ServiceSettings, keys, where, problems):
            services[name] = service
    return services


def _agents(
    found: object, services: Collection[str], plugins: Plugins, problems: list[str]
) -> list[Agent]:
    if found is None:
        found = []
    if isinstance(found, str | Mapping) or not isinstance(found, Sequence):
        problems.append(f"collection_agents: found {_quote(found)}, allowed: a list of dicts")
        return []
    agents: list[Agent] = []
    names: set[str] = set()
    for number, keys in enumerate(found, 1):
        name = keys.get("name") if isinstance(keys, Mapping) else None
        where = f'agent "{name}"' if isinstance(name, str) and name else f"agent number {number}"
        if isinstance(name, str) and name in names:
            problems.append(f"{where}: name: found twice, allowed: a name of its own for each")
        names.add(str(name))
        service = keys.get("service", "default") if isinstance(keys, Mapping) else "default"
        if service not in services:
            problems.append(
                f"{where}: service: found {_quote(service)}, allowed: {_words(services)}"
            )
        if agent := _agent(keys, where, plugins, problems):
            agents.append(agent)
    return agents


def _agent(keys: Any, where: str, plugins: Plugins, problems: list[str]) -> Agent | None:
    if not isinstance(keys, Mapping):
        problems.append(f"{where}: found {_quote(keys)}, allowed: a dict")
        return None
    agent_type = None
    protocol = keys.get("protocol")
    if isinstance(protocol, str):
        agent_type = plugins.agent_types.get(protocol)
    if agent_type is None:
        found = "missing" if protocol is None else f"found {_quote(protocol)}"
        broken = [f"; plugin {one.plugin}: {one.error}" for one in plugins.loaded if one.error]
        known = _words(plugins.agent_types)
        problems.append(f"{where}: protocol: {found}, allowed: {known}{''.join(broken)}")
        return None
    settings = _validated(agent_type.Settings, keys, where, problems)
    return agent_type(settings) if settings is not None else None


def _validated(model: type[BaseModel], keys: object, where: str, problems: list[str]) -> Any:
    if not isinstance(keys, Mapping):
        problems.append(f"{where}: found {_quote(keys)}, allowed: a dict")
        return None
    try:
        return model.model_validate(dict(keys))
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=True):
            problems.append(f"{where}: {_sentence(model, keys, detail)}")
        return None


def _sentence(model: type[BaseModel], keys: Mapping[str, Any], detail: ErrorDetails) -> str:
    """One error of pydantic's in our words: the key, what was found, what is allowed."""
    key = str(detail["loc"][0]) if detail["loc"] else ""
    kind = detail["type"]
    if not key:
        return _reason(detail)
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, model.model_fields, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key}: unknown key, allowed: {', '.join(model.model_fields)}{hint}"
    allowed = model.model_fields[key].description if key in model.model_fields else None
    if kind == "missing":
        return f"{key}: missing, allowed: {allowed}"
    found = "that value" if _secret(key) else _quote(_at(keys, detail["loc"]))
    reason = f" ({_reason(detail)})" if kind == "value_error" else ""
    return f"{key}: found {found}{reason}, allowed: {allowed}"


def _reason(detail: ErrorDetails) -> str:
    return detail["msg"].removeprefix("Value error, ")


def _secret(key: str) -> bool:
    return re.search("pass|secret|token|key", key, re.IGNORECASE) is not None


def _at(keys: Any, location: Sequence[int | str]) -> Any:
    for step in location:
        try:
            keys = keys[step]
        except (KeyError, IndexError, TypeError):
            break
    return keys


def _quote(value: object) -> str:
    """A value for a person; a container only by its kind, for it may hold a secret."""
    if isinstance(value, str | int | float | bool | None):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    return f"a {type(value).__name__}"


def _words(words: Collection[str]) -> str:
    return ", ".join(repr(word) for word in sorted(words)) or "none is installed"
