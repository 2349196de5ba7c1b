"""Metrics for Prometheus: a plugin on the hooks that everyone has, as a third party would write it.

It is at work where the settings have ``metrics`` or ``console``; prometheus-client comes with the
extra ``console``, and nothing of it is imported before a server runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from salmon_revsmtp import hookimpl

if TYPE_CHECKING:
    from salmon_revsmtp import Server
    from salmon_revsmtp.metrics.serving import Serving
    from salmon_revsmtp.metrics.settings import MetricsSettings

__all__ = ["check_settings", "exposition", "list_addresses", "server_started", "server_stopping"]

MISSING = (
    "metrics: prometheus-client is not installed: pip install 'salmon-revsmtp[console]', or remove "
    "metrics from the settings"
)

_serving: dict[Server, Serving] = {}


def exposition() -> tuple[bytes, str]:
    """What Prometheus reads, and its content type.  Blocks.  Raises :class:`RuntimeError` when no
    server runs here that has metrics."""
    if not _serving:
        raise RuntimeError("no server runs in this process that has metrics")
    return next(reversed(_serving.values())).exposition()


@hookimpl
def check_settings(settings: ModuleType) -> Sequence[str]:
    problems: list[str] = []
    if _settings(settings, problems) is not None and not _installed():
        problems.append(MISSING)
    return problems


@hookimpl
def list_addresses(settings: ModuleType) -> Sequence[tuple[str, int]]:
    found = _settings(settings, [])
    return [] if found is None or found.address is None else [found.address]


@hookimpl
def server_started(server: Server) -> None:
    settings = _settings(server.settings, [])
    if settings is None and getattr(server.settings, "console", None) is not None and _installed():
        from salmon_revsmtp.metrics.settings import MetricsSettings

        settings = MetricsSettings()
    if settings is not None:
        from salmon_revsmtp.metrics.serving import Serving

        serving = _serving[server] = Serving(server, settings)
        serving.start()


@hookimpl
def server_stopping(server: Server) -> None:
    if serving := _serving.pop(server, None):
        serving.stop()


def _settings(module: ModuleType, problems: list[str]) -> MetricsSettings | None:
    found = getattr(module, "metrics", None)
    if found is None:
        return None
    from salmon_revsmtp import validated
    from salmon_revsmtp.metrics.settings import MetricsSettings

    settings: MetricsSettings | None = validated(MetricsSettings, found, "metrics", problems)
    return settings


def _installed() -> bool:
    from importlib.util import find_spec

    return find_spec("prometheus_client") is not None
