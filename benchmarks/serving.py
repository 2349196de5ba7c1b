"""Our provider as its owners run it: ``salmon-revsmtp run`` in a project."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import COMMAND, free_port
from benchmarks.processes import Child, module, wait_for_port
from benchmarks.project import ACCOUNT, CERTIFICATE, DOMAIN, KEY, PASSWORD, project

__all__ = ["Serving", "account", "fill", "host", "running"]

# Seconds to wait for a provider with a large hold to begin.
BEGIN = 120.0


@dataclass
class Serving:
    """A provider that runs: where it takes mail (``smtp``), where customers call (``odmr``), its
    process and its folder."""

    smtp: int
    odmr: int
    child: Child
    folder: Path

    @property
    def log(self) -> str:
        """What it has logged."""
        return (self.folder / "logs/salmon.log").read_text()


def account(name: str = ACCOUNT, domain: str = DOMAIN, **keys: Any) -> dict[str, Any]:
    """One of ``customer_accounts``, with room for whatever comes."""
    room = {"quota_messages": 10**9, "quota_bytes": 10**15}
    return {"name": name, "password": PASSWORD, "domains": [domain], **room, **keys}


@contextmanager
def host(
    *accounts: dict[str, Any], tls: bool = False, relay: int = 0, hold: str = "run/hold"
) -> Iterator[Path]:
    """The project of a provider.

    ``hold``   its hold store.
    ``relay``  the port of the loopback to which its notifications go.
    """
    certificate = {"tls_cert": str(CERTIFICATE), "tls_key": str(KEY)} if tls else {}
    smtp, odmr = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    settings = {
        "customer_accounts": accounts or [account()],
        "provider": {
            "hostname": "provider.example.net",
            "listen": odmr,
            "hold": hold,
            "max_sessions_per_address": 10_000,
            **certificate,
        },
        **({"relay_config": {"host": "127.0.0.1", "port": relay}} if relay else {}),
    }
    places = {"max_connections": 300, "keep_places_for": ["127.0.0.0/8"]}
    service: dict[str, Any] = {"domains": [], "listen": [smtp], "delivery": "hold", **places}
    with project(settings=settings, **service) as folder:
        yield folder


def fill(folder: Path, messages: int, octets: int, timeout: float) -> None:
    """Have a provider that does not run hold messages."""
    with module("filling", folder / "run/hold", messages, octets) as child:
        child.says(timeout)


@contextmanager
def running(folder: Path) -> Iterator[Serving]:
    """The provider of a project."""
    keys = json.loads((folder / "bench.json").read_text())
    smtp, odmr = (
        int(address.rpartition(":")[2])
        for address in (keys["service"]["listen"][0], keys["settings"]["provider"]["listen"])
    )
    command = [str(COMMAND), "--chdir", str(folder), "run"]
    with Child(command, name="salmon-revsmtp run") as child:
        for port in (smtp, odmr):
            wait_for_port(port, child, BEGIN)
        yield Serving(smtp, odmr, child, folder)
