"""The join line of an account, for the commands that print it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salmon_revsmtp.cli.options import stop

if TYPE_CHECKING:
    from salmon_revsmtp.provider.settings import ProviderSettings
    from salmon_revsmtp.server.configuration import Configuration

__all__ = ["hostname_of", "line_of", "provider_of", "why_no_line"]


def provider_of(configuration: Configuration) -> ProviderSettings:
    """Its settings; a project that is no provider ends the command."""
    if configuration.provider is None:
        raise stop("this project is no provider: provider in the settings is missing")
    return configuration.provider


def hostname_of(settings: ProviderSettings) -> str:
    """What the provider calls itself.  May ask DNS."""
    from salmon_revsmtp.hostname import machine_name

    return settings.hostname or machine_name()


def why_no_line(settings: ProviderSettings) -> str:
    """Why there can be no join line; ``""`` if there can."""
    if settings.tls_cert is None:
        return "provider has no tls_cert, and a customer with a join line uses STARTTLS"
    if all(implicit for _, implicit in settings.addresses):
        return "provider has no listen, and a customer with a join line uses STARTTLS"
    return ""


def line_of(
    settings: ProviderSettings, account: str, password: str, domains: tuple[str, ...]
) -> str | None:
    """The line; ``None`` where ``password`` is a verifier.  Not where :func:`why_no_line` says why.
    Raises :class:`OSError`."""
    from salmon_revsmtp.init.provider import join_line_of

    assert settings.tls_cert is not None
    port = next(address.port for address, implicit in settings.addresses if not implicit)
    certificate = settings.tls_cert, settings.tls_key
    line = join_line_of(account, password, hostname_of(settings), port, domains, certificate)
    return None if line is None else str(line)
