"""The alarm: a plugin on the hooks that everyone has, as a third party would write it.

It uses nothing but what is exported by the package, and nothing of the package knows it.  What is
imported is little until a server runs, because plugins are loaded for every command.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from salmon_revsmtp import hookimpl

if TYPE_CHECKING:
    from salmon_revsmtp import Server
    from salmon_revsmtp.alert.alarm import Alarm
    from salmon_revsmtp.alert.settings import AlertSettings

__all__ = ["check_settings", "server_started", "server_stopping"]

_alarms: dict[Server, Alarm] = {}


@hookimpl
def check_settings(settings: ModuleType) -> Sequence[str]:
    problems: list[str] = []
    _settings(settings, problems)
    return problems


@hookimpl
def server_started(server: Server) -> None:
    settings = _settings(server.settings, [])
    if settings is not None:
        from salmon_revsmtp.alert.alarm import Alarm

        alarm = Alarm(server, settings)
        alarm.start()
        _alarms[server] = alarm


@hookimpl
def server_stopping(server: Server) -> None:
    if alarm := _alarms.pop(server, None):
        alarm.stop()


def _settings(module: ModuleType, problems: list[str]) -> AlertSettings | None:
    found = getattr(module, "alert", None)
    if found is None:
        return None
    from salmon_revsmtp import validated
    from salmon_revsmtp.alert.settings import AlertSettings

    settings: AlertSettings | None = validated(AlertSettings, found, "alert", problems)
    return settings
