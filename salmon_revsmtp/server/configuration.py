"""The settings of a Salmon project, read and validated: agents, services, accounts, the provider.

Every wrong setting is one sentence with the agent and the key; all of them are reported at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from salmon_revsmtp.customer.agent import Agent
from salmon_revsmtp.customer.settings import AgentSettings
from salmon_revsmtp.foreign import without_login
from salmon_revsmtp.plugins.builtin import POSTGRES, POSTGRES_PLUGIN
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.settings import AccountSettings, ProviderSettings
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.service.settings import ServiceSettings
from salmon_revsmtp.settings import SettingsError, kind_of, quote, validated, words_of

__all__ = ["Configuration", "account_named", "domain_taken", "load"]

# The names in a settings module that are ours.
_OURS = ("collection_agents", "smtp_services", "customer_accounts", "provider", "alert")
# Names of Salmon's own settings, which are none of ours misspelt.
_SALMONS = (
    *("handlers", "receiver", "receiver_config", "relay", "relay_config", "router_defaults"),
    *("queue_config", "template_config", "owner_email"),
)
# How alike a name has to be to one of ours: "smtp_service", "agents", "COLLECTION_AGENTS".
_ALIKE = 0.75
_OTHER_NAMES = {
    "agents": "collection_agents",
    "services": "smtp_services",
    "accounts": "customer_accounts",
}


@dataclass(frozen=True)
class Configuration:
    """Valid settings: agents in their order, services by name.

    ``accounts``  the customers whose mail is held; ``provider``: how they reach us, if they do.
    ``elsewhere`` the plugins that may have accounts, too.
    ``module``   the settings module itself, in which plugins have settings of their own.
    ``written``  the domains of each service, and then those that its agents ask for, as a person
                 wrote them: handlers route by these.
    ``warnings`` sentences about what is allowed, and hardly meant.
    """

    agents: tuple[Agent, ...]
    services: Mapping[str, ServiceSettings]
    written: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    accounts: tuple[AccountSettings, ...] = ()
    provider: ProviderSettings | None = None
    module: ModuleType | None = field(default=None, repr=False)
    warnings: tuple[str, ...] = ()
    elsewhere: frozenset[str] = frozenset()

    @property
    def holds(self) -> bool:
        """Mail is held here."""
        return self.provider is not None or any(
            one.delivery == "hold" for one in self.services.values()
        )

    @property
    def routed(self) -> tuple[str, ...]:
        """The domains whose mail the project's handlers get, as a person wrote them; ``("*",)`` for
        any.  Empty if they get none."""
        used = {agent.settings.service for agent in self.agents}
        found = [
            self.written.get(name) or ("*",)
            for name, one in self.services.items()
            if one.delivery != "hold" and (one.listen or name in used)
        ]
        return tuple(dict.fromkeys(domain for domains in found for domain in domains))

    def asked_for(self, service: str) -> tuple[str, ...]:
        """The domains that the agents of a service ask for."""
        agents = [agent for agent in self.agents if agent.settings.service == service]
        return tuple(dict.fromkeys(domain for agent in agents for domain in agent.domains))

    def agent(self, name: str) -> Agent | None:
        """The agent of that name, if there is one."""
        return next((agent for agent in self.agents if agent.name == name), None)


def load(module: ModuleType, plugins: Plugins) -> Configuration:
    """Read ``collection_agents``, ``smtp_services``, ``customer_accounts`` and ``provider`` of a
    settings module.

    Raises :class:`SettingsError` with every problem that there is.
    """
    problems: list[str] = []
    handlers = getattr(module, "handlers", None)
    if isinstance(handlers, str):
        hint = f"put brackets around it: handlers = [{quote(handlers)}]"
        problems.append(f"handlers: found {quote(handlers)}, allowed: a list of modules; {hint}")
    services = _services(getattr(module, "smtp_services", None), problems)
    found = getattr(module, "smtp_services", None)
    known = set(services) | set(found if isinstance(found, Mapping) else ())
    agents = _agents(getattr(module, "collection_agents", None), known, plugins, problems)
    for agent in agents:
        if settings := services.get(agent.settings.service):
            found = agent.problems(Service(agent.settings.service, settings))
            problems += [f'agent "{agent.name}": {problem}' for problem in found]
    written = {name: tuple(_written(module, name)) for name in services}
    accounts = _accounts(getattr(module, "customer_accounts", None), problems)
    provider = getattr(module, "provider", None)
    if provider is not None:
        provider = validated(ProviderSettings, provider, "provider", problems)
    if provider is not None and provider.hold_scheme not in (None, *plugins.hold_stores):
        problems.append(_unknown_store(provider.hold_scheme, plugins))
    configuration = Configuration(
        *(tuple(agents), services, written, accounts, provider),
        module=module,
        warnings=tuple(_misspelt(module)),
        elsewhere=frozenset(_elsewhere(provider, plugins)),
    )
    problems += [
        f'service "{name}": domains: empty, and no agent of the service asks for any, so every '
        "recipient would be refused; name the domains"
        for name, settings in services.items()
        if settings.listen
        and not settings.domains
        and settings.delivery != "hold"
        and not configuration.asked_for(name)
    ]
    named = getattr(module, "customer_accounts", None) or configuration.elsewhere
    if configuration.holds and not named:
        problems.append(
            "customer_accounts: missing, so there is no one to hold mail for; allowed: a list of "
            "dicts with name, password and domains"
        )
    for said in plugins.call("check_settings", settings=module) or ():
        problems += [str(one) for one in said]
    if problems:
        raise SettingsError(problems)
    return configuration


def _elsewhere(provider: ProviderSettings | None, plugins: Plugins) -> set[str]:
    """The plugins that may have accounts.  That of PostgreSQL has those of the database in which
    mail is held, and none where mail is held elsewhere."""
    found = plugins.who_has("find_account") | plugins.who_has("account_for")
    held_there = provider is not None and provider.hold_scheme == POSTGRES
    return found if held_there else found - {POSTGRES_PLUGIN}


def _unknown_store(scheme: str, plugins: Plugins) -> str:
    """``hold`` has the URL of a store that no plugin has."""
    known = ", ".join(f"'{one}://...'" for one in sorted(plugins.hold_stores))
    broken = [f"; plugin {one.plugin}: {one.error}" for one in plugins.loaded if one.error]
    return (
        f"provider: hold: found a URL that begins with '{scheme}://', allowed: a folder, "
        f"{known}{''.join(broken)}"
    )


def _misspelt(module: ModuleType) -> Iterator[str]:
    """Names in the settings that are nearly one of ours which is not there, or empty: what
    they have is ignored.  Where ours is there, the other is somebody's own."""
    missing = [name for name in _OURS if not getattr(module, name, None)]
    for name, value in vars(module).items():
        if name in _OURS or name in _SALMONS or name.startswith("_"):
            continue
        near = difflib.get_close_matches(name.lower(), missing, 1, _ALIKE)
        meant = near[0] if near else _OTHER_NAMES.get(name.lower())
        if meant in missing and isinstance(value, Mapping | list | tuple) and value:
            yield f"{name}: there is no such setting, so it is ignored; did you mean {meant}?"


def _no_list(name: str, found: object, key: str) -> str:
    """``key`` is one that each dict in the list has."""
    hint = ""
    if isinstance(found, Mapping):
        inner = all(isinstance(one, Mapping) for one in found.values())
        if key in found or not inner:
            hint = f"; put brackets around it: {name} = [{{...}}]"
        elif found:
            hint = f'; each with its name among its keys: {name} = [{{"name": ...}}, ...]'
    return f"{name}: found {kind_of(found)}, allowed: a list of dicts{hint}"


def _named(name: str) -> str:
    """A name as it is said; that of an account may be a mail address, but is no login."""
    return without_login(name) if ":" in name else name


def account_named(name: str) -> str:
    """An account, where a sentence about it begins."""
    return f'account "{_named(name)}"'


def domain_taken(where: str, domain: str, owner: str) -> str:
    """The account that ``where`` names has a domain that is another's."""
    return (
        f"{where}: domains: {quote(domain)} is that of account "
        f"{quote(owner, address=True)}, allowed: a domain of one account only"
    )


def _written(module: ModuleType, service: str) -> Iterator[str]:
    """The domains that the settings name for a service; they may be wrong in any way."""
    services = getattr(module, "smtp_services", None)
    agents = getattr(module, "collection_agents", None)
    keys = [services.get(service)] if isinstance(services, Mapping) else []
    keys += [
        one
        for one in (agents if isinstance(agents, Sequence) else ())
        if isinstance(one, Mapping) and one.get("service", "default") == service
    ]
    for one in keys:
        if not isinstance(one, Mapping):
            continue
        parameters = one.get("parameters")  # odmr's may be a list of domains, as ATRN takes it
        named = parameters.split(",") if isinstance(parameters, str) else []
        domains = one.get("domains")
        named += domains if isinstance(domains, list | tuple) else []
        yield from (domain for domain in named if isinstance(domain, str))


def _services(found: object, problems: list[str]) -> dict[str, ServiceSettings]:
    if found is None:
        found = {}
    if not isinstance(found, Mapping):
        problems.append(
            f"smtp_services: found {kind_of(found)}, allowed: a dict of services, each with its "
            'name: {"default": {...}}'
        )
        found = {}
    if set(found) & set(ServiceSettings.model_fields) and not any(
        isinstance(keys, Mapping) for keys in found.values()
    ):
        problems.append(
            "smtp_services: found the keys of one service, allowed: a dict of services, each with "
            'its name: {"default": {...}}'
        )
        found = {}
    services = {}
    for name, keys in {"default": {}, **found}.items():
        where = f'service "{without_login(str(name))}"'
        if service := validated(ServiceSettings, keys, where, problems):
            services[name] = service
    return services


def _accounts(found: object, problems: list[str]) -> tuple[AccountSettings, ...]:
    if found is None:
        return ()
    if isinstance(found, str | bytes | Mapping) or not isinstance(found, Sequence):
        problems.append(_no_list("customer_accounts", found, "name"))
        return ()
    accounts: list[AccountSettings] = []
    names: set[str] = set()
    owners: dict[str, str] = {}
    for number, keys in enumerate(found, 1):
        name = keys.get("name") if isinstance(keys, Mapping) else None
        where = account_named(name) if isinstance(name, str) and name else f"account {number}"
        if isinstance(name, str) and name in names:
            problems.append(f"{where}: name: found twice, allowed: a name of its own for each")
        names.add(str(name))
        account = validated(AccountSettings, keys, where, problems)
        if account is None:
            continue
        accounts.append(account)
        for domain in account.domains:
            owner = owners.setdefault(domain, account.name)
            if owner != account.name:
                problems.append(domain_taken(where, domain, owner))
    return tuple(accounts)


def _agents(
    found: object, services: Collection[str], plugins: Plugins, problems: list[str]
) -> list[Agent]:
    if found is None:
        found = []
    if isinstance(found, str | bytes | Mapping) or not isinstance(found, Sequence):
        problems.append(_no_list("collection_agents", found, "protocol"))
        return []
    agents: list[Agent] = []
    names: set[str] = set()
    for number, keys in enumerate(found, 1):
        name = keys.get("name") if isinstance(keys, Mapping) else None
        where = (
            f'agent "{without_login(name)}"'
            if isinstance(name, str) and name
            else f"agent number {number}"
        )
        if isinstance(name, str) and name in names:
            problems.append(f"{where}: name: found twice, allowed: a name of its own for each")
        names.add(str(name))
        service = keys.get("service", "default") if isinstance(keys, Mapping) else "default"
        if isinstance(service, str) and service not in services:
            near = difflib.get_close_matches(service, services, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(
                f"{where}: service: found {quote(service)}, allowed: {words_of(services)}{hint}"
            )
        if agent := _agent(keys, where, plugins, problems):
            agents.append(agent)
    return agents


def _agent(keys: Any, where: str, plugins: Plugins, problems: list[str]) -> Agent | None:
    if not isinstance(keys, Mapping):
        validated(AgentSettings, keys, where, problems)
        return None
    agent_type = None
    protocol = keys.get("protocol")
    if isinstance(protocol, str):
        agent_type = plugins.agent_types.get(protocol)
    if agent_type is None:
        found = "missing" if protocol is None else f"found {quote(protocol)}"
        broken = [f"; plugin {one.plugin}: {one.error}" for one in plugins.loaded if one.error]
        known = words_of(plugins.agent_types)
        near = difflib.get_close_matches(str(protocol).lower(), plugins.agent_types, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        problems.append(f"{where}: protocol: {found}, allowed: {known}{''.join(broken)}{hint}")
        return None
    settings = validated(agent_type.Settings, keys, where, problems)
    return agent_type(settings) if settings is not None else None
