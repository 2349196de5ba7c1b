"""The console: pages to look at, and to act from, in a browser; a plugin as a third party would
write it.

It uses nothing but what is exported by the package, and nothing of the package knows it.  What is
imported is little until a server runs that has ``console`` in its settings; starlette, uvicorn and
jinja2 come after that, in a thread of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from salmon_revsmtp import hookimpl

if TYPE_CHECKING:
    import click

    from salmon_revsmtp import Server
    from salmon_revsmtp.console.serving import Console
    from salmon_revsmtp.console.settings import ConsoleSettings

__all__ = [
    "check_settings",
    "list_addresses",
    "register_commands",
    "server_started",
    "server_stopping",
]

# What comes with the extra.
PACKAGES = ("jinja2", "starlette", "uvicorn")

_consoles: dict[Server, Console] = {}


@hookimpl
def check_settings(settings: ModuleType) -> Sequence[str]:
    problems: list[str] = []
    if settings_of(settings, problems) is not None and (missing := _missing()):
        problems.append(missing)
    return problems


@hookimpl
def list_addresses(settings: ModuleType) -> Sequence[tuple[str, int]]:
    found = settings_of(settings, [])
    return [] if found is None else [(found.address.host, found.address.port)]


@hookimpl
def server_started(server: Server) -> None:
    settings = settings_of(server.settings, [])
    if settings is not None:
        from salmon_revsmtp.console.serving import Console

        console = _consoles[server] = Console(server, settings)
        console.start()


@hookimpl
def server_stopping(server: Server) -> None:
    if console := _consoles.pop(server, None):
        console.stop()


@hookimpl
def register_commands(cli: click.Group) -> None:
    from salmon_revsmtp.console.command import console

    cli.add_command(console)


def settings_of(module: ModuleType, problems: list[str]) -> ConsoleSettings | None:
    """The console's settings; ``None`` if there is to be none, or they are wrong."""
    found = getattr(module, "console", None)
    if found is None:
        return None
    from salmon_revsmtp import validated
    from salmon_revsmtp.console.settings import ConsoleSettings

    settings: ConsoleSettings | None = validated(ConsoleSettings, found, "console", problems)
    return settings


def _missing() -> str:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    *first, last = missing
    named = f"{', '.join(first)} and {last} are" if first else f"{last} is"
    return f"console: {named} not installed; pip install 'salmon-revsmtp[console]'"
