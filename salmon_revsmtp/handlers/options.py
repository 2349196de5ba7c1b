"""The settings of the handlers: names in the project's settings module.

A wrong one is one sentence when the handler is imported, which the boot module does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from salmon import utils

from salmon_revsmtp.handlers.names import Mailbox
from salmon_revsmtp.handlers.nexthop import Server
from salmon_revsmtp.net.address import host_and_port
from salmon_revsmtp.service.settings import ServiceSettings
from salmon_revsmtp.settings import SettingsError, kind_of, quote

__all__ = ["addresses", "folder", "handler_timeout", "hostname", "server"]

# The project's folder: a handler may change that of the process.
PROJECT = Path.cwd()

# This machine as it is called in settings.
HERE = ("127.0.0.1", "::1", "localhost")

FOLDER = "a folder such as 'run/mail'"
ADDRESSES = "a list of addresses such as 'bob@example.org', or no such setting for every address"


def _setting(name: str) -> Any:
    return getattr(utils.import_settings(False), name, None)


def _wrong(name: str, value: object, allowed: str, reason: str = "") -> SettingsError:
    return _refused(name, quote(value), allowed, reason)


def _refused(name: str, found: str, allowed: str, reason: str = "") -> SettingsError:
    why = f" ({reason})" if reason else ""
    return SettingsError([f"{name}: found {found}{why}, allowed: {allowed}"])


def folder(name: str, default: str) -> Path:
    """A folder; one that is not absolute is below the project's.  Raises :class:`SettingsError`."""
    value = _setting(name)
    if value is None:
        value = default
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        raise _wrong(name, value, FOLDER)
    try:
        return PROJECT / Path(value).expanduser()
    except RuntimeError as error:  # ~someone, who is not there
        raise _wrong(name, value, FOLDER, str(error)) from None


def addresses(name: str) -> list[Mailbox] | None:
    """A list of addresses; ``None`` where there is no such setting.  Raises
    :class:`SettingsError`."""
    value = _setting(name)
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, list | tuple | set | frozenset):
        raise _refused(name, kind_of(value), ADDRESSES)
    if not value:
        raise _wrong(name, value, ADDRESSES, "it is empty, so there would be no mailbox at all")
    found = []
    for one in value:
        try:
            found.append(Mailbox.of_setting(one))
        except ValueError as error:
            raise _refused(name, quote(one, address=True), ADDRESSES, str(error)) from None
    return found


def server(name: str, allowed: str, *, unix: bool) -> Server:
    """A server to hand mail on to; with ``unix`` it may be a socket on this machine.  Raises
    :class:`SettingsError`."""
    value = _setting(name)
    if value is None:
        raise SettingsError([f"{name}: missing, allowed: {allowed}"])
    try:
        found = Server.of_setting(value, unix=unix, below=PROJECT)
    except ValueError as error:
        raise _wrong(name, value, allowed, str(error)) from None
    if found.host in HERE and any(found.port == port for port in _own_ports()):
        reason = "a service of this project listens there, and mail would go round in circles"
        raise _wrong(name, value, allowed, reason)
    return found


def _own_ports() -> Iterator[int]:
    """Where the services listen on this machine; whatever is wrong there is said elsewhere."""
    for keys in _services():
        listen = keys.get("listen") or ()
        for one in (listen,) if isinstance(listen, str) else listen:
            with contextlib.suppress(ValueError, TypeError):
                host, port = host_and_port(one)
                if host in ("", "0.0.0.0", "::", *HERE):
                    yield port


def _services() -> list[Mapping[str, Any]]:
    services = _setting("smtp_services")
    found = services.values() if isinstance(services, Mapping) else ()
    return [one for one in found if isinstance(one, Mapping)]


def hostname() -> str | None:
    """What we call ourselves: as the services do, where the settings say it."""
    names = [keys.get("hostname") for keys in _services()]
    return next((name for name in names if isinstance(name, str) and name.isascii()), None)


def handler_timeout() -> float:
    """Seconds that a handler has, whichever service the mail comes to."""
    default = float(ServiceSettings.model_fields["handler_timeout"].default)
    given = [keys.get("handler_timeout", default) for keys in _services()]
    # Whatever is wrong there is said where services are set up.
    usable = [float(one) for one in given if isinstance(one, int | float) and one > 0]
    return min([one for one in usable if math.isfinite(one)], default=default)
