"""An agent's keys, and the configuration that they make."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.configuration import Configuration, load

PASSWORD = "correct horse battery"
DEFAULT = {"hostname": "mail.example.org"}


def agent_keys(port: Any, /, **keys: Any) -> dict[str, Any]:
    return {
        "name": "isp",
        "protocol": "odmr",
        "server": "localhost",
        "port": port,
        "tls": "none",
        "account": "acme",
        "password": PASSWORD,
        "domains": ["example.org"],
        **keys,
    }


def etrn_keys(port: int, *domains: str) -> dict[str, Any]:
    """The keys of an agent that asks a server on this machine, without a login."""
    keys = agent_keys(port, name="mx", protocol="etrn", server="127.0.0.1", domains=list(domains))
    del keys["account"], keys["password"]
    return keys


def configuration(
    *agents: dict[str, Any],
    plugins: Plugins | None = None,
    accounts: list[dict[str, Any]] | None = None,
    provider: dict[str, Any] | None = None,
    **services: dict[str, Any],
) -> Configuration:
    services.setdefault("default", DEFAULT)
    module: Any = SimpleNamespace(
        collection_agents=list(agents),
        smtp_services=services,
        customer_accounts=accounts,
        provider=provider,
    )
    return load(module, plugins or Plugins.load())
