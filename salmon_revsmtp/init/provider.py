"""The project of a provider."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from salmon_revsmtp.init import environment
from salmon_revsmtp.init.joinline import JoinLine
from salmon_revsmtp.init.project import ProjectUser, common_files, filled, literal, unit
from salmon_revsmtp.init.selfsigned import make_certificate
from salmon_revsmtp.init.writing import File, read
from salmon_revsmtp.net.address import HostAndPort, bare_address, host_and_port
from salmon_revsmtp.net.certificate import certificate_problem, fingerprint, is_for, own_certificate
from salmon_revsmtp.smtp.verifier import Verifier

__all__ = ["CERTIFICATE", "KEY", "Provider", "join_line", "join_line_of", "provider_files"]

# Random octets of a password: no one guesses 192 bits.
STRONG = 24

CERTIFICATE, KEY = "tls/cert.pem", "tls/key.pem"


@dataclass(frozen=True)
class Provider:
    """What a person has said of it.  ``certificate``: that and its key; ``None``: make one.

    ``new_password``  make one, although there is one already.
    """

    hostname: str
    account: str
    domains: tuple[str, ...]
    listen: tuple[str, ...]
    mx: tuple[str, ...]
    relay: HostAndPort
    certificate: tuple[Path, Path | None] | None = None
    new_password: bool = False

    @property
    def variable(self) -> str:
        return environment.variable_name(self.account)


def provider_files(folder: Path, made: Provider, user: ProjectUser) -> list[File]:
    """All files of the project.  A password and a certificate that are in the folder already stay,
    or its customers could not log in any more.

    Raises :class:`OSError`, :class:`UnicodeDecodeError` and
    :class:`~salmon_revsmtp.init.selfsigned.CertificateError`.
    """
    certificate: tuple[str, str | None] = (CERTIFICATE, KEY)
    files = []
    if made.certificate is None:
        blobs = _kept_certificate(folder, made.hostname) or make_certificate(made.hostname)
        files += [File(CERTIFICATE, blobs[0]), File(KEY, blobs[1], "secret")]
    else:
        pem, key = made.certificate
        certificate = (str(pem), str(key) if key else None)
    return [
        File("config/settings.py", _settings(made, certificate)),
        _environment(folder, made),
        *common_files(),
        *files,
        unit(folder, user, "provider", "LimitNOFILE=65536", "CAP_NET_BIND_SERVICE"),
    ]


def _settings(made: Provider, certificate: tuple[str, str | None]) -> bytes:
    pem, key = certificate
    return filled(
        "provider-settings.py",
        account=literal(made.account),
        variable=made.variable,
        domains=literal(made.domains, 8, len('"domains": ,')),
        hostname=literal(made.hostname),
        listen=_one_or_more(made.listen, 4),
        mx=_one_or_more(made.mx, 8),
        certificate=literal(pem),
        key="None" if key is None else literal(key),
        relay_host=literal(made.relay.host),
        relay_port=literal(made.relay.port),
    )


def _one_or_more(values: Sequence[str], indent: int) -> str:
    return literal(values[0] if len(values) == 1 else values, indent, len('"listen": ,'))


def _environment(folder: Path, made: Provider) -> File:
    before = read(folder, ".env")
    text = (before or b"").decode()
    password = environment.value_of(text, made.variable)
    if password is None or made.new_password:
        text = environment.with_value(text, made.variable, secrets.token_urlsafe(STRONG))
    return File(".env", text.encode(), "env", made_of=before)


def _kept_certificate(folder: Path, hostname: str) -> tuple[bytes, bytes] | None:
    """The certificate that is there and its key, if they belong together and are for the name."""
    certificate, key = folder / CERTIFICATE, folder / KEY
    kept = read(folder, CERTIFICATE), read(folder, KEY)  # which follows no link
    if kept[0] is None or kept[1] is None or certificate_problem(certificate, key):
        return None
    if not is_for(certificate, key, hostname):
        return None
    return kept[0], kept[1]


def join_line(folder: Path, made: Provider) -> JoinLine | None:
    """The line for the customer of a project that is written; ``None`` where ``.env`` has no more
    than a verifier of the password.  Raises :class:`OSError`."""
    text = (read(folder, ".env") or b"").decode()
    password = environment.value_of(text, made.variable) or ""
    certificate = made.certificate or (folder / CERTIFICATE, folder / KEY)
    port = host_and_port(made.listen[0]).port
    return join_line_of(made.account, password, made.hostname, port, made.domains, certificate)


def join_line_of(
    account: str,
    password: str,
    hostname: str,
    port: int,
    domains: tuple[str, ...],
    certificate: tuple[Path, Path | None],
) -> JoinLine | None:
    """The line for a customer; ``None`` where ``password`` is a verifier.

    It pins the certificate, unless this machine's certificate authorities vouch for it: such a one
    is renewed, and has another fingerprint then.  Raises :class:`OSError`.
    """
    if Verifier.parse(password) is not None:
        return None
    host = bare_address(hostname)
    shown, trusted = own_certificate(*certificate, host)
    pinned = None if trusted else fingerprint(shown)
    return JoinLine(account, password, host, port, domains, pinned)
