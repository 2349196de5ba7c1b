"""The project of a customer."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from salmon_revsmtp.init import environment
from salmon_revsmtp.init.joinline import JoinLine
from salmon_revsmtp.init.project import ProjectUser, common_files, filled, literal, unit
from salmon_revsmtp.init.writing import File, read
from salmon_revsmtp.net.address import HostAndPort

__all__ = ["Customer", "customer_files"]

HANDLERS = "salmon_revsmtp.handlers"

MAILDIR = """\
# Each address has a Maildir of its own below this folder.
maildirs = "run/mail"

# The addresses that there are; mail for any other is refused. Without this list every address of
# your domains is one, and whoever guesses addresses makes a Maildir with each guess.
$mailboxes"""

NEXT_HOST = """\
# The mail server that takes each message; what it refuses is refused, and what it defers is kept by
# the provider.
{setting} = {server}"""


@dataclass(frozen=True)
class Customer:
    """What a person has said of it.

    ``agent``     the name of the collection agent.
    ``hostname``  of this machine; ``None``: what it calls itself.
    ``lmtp``, ``smtp``  the server that takes the mail; with neither it goes into Maildirs.
    ``mailboxes``  the addresses that there are; with none every one is.
    """

    join: JoinLine
    agent: str
    hostname: str | None
    lmtp: str | None
    smtp: str | None
    mailboxes: tuple[str, ...]
    relay: HostAndPort

    @property
    def variable(self) -> str:
        return environment.variable_name(self.agent)


def customer_files(folder: Path, made: Customer, user: ProjectUser) -> list[File]:
    """All files of the project.  Raises :class:`OSError` and :class:`UnicodeDecodeError`."""
    return [
        File("config/settings.py", _settings(made)),
        _environment(folder, made),
        *common_files(),
        File("app/__init__.py", b""),
        File("app/handlers/__init__.py", b""),
        unit(folder, user, "customer"),
    ]


def _settings(made: Customer) -> bytes:
    join = made.join
    pinned = f'        "fingerprint": {literal(join.fingerprint)},\n' if join.fingerprint else ""
    hostname = f'        "hostname": {literal(made.hostname)},\n' if made.hostname else ""
    handler, settings = _handler(made)
    return filled(
        "customer-settings.py",
        agent=literal(made.agent),
        server=literal(join.host),
        port=literal(join.port),
        fingerprint_line=pinned,
        account=literal(join.account),
        variable=made.variable,
        domains=literal(join.domains, 8, len('"domains": ,')),
        hostname_line=hostname,
        handler=literal(f"{HANDLERS}.{handler}"),
        handler_settings=settings,
        relay_host=literal(made.relay.host),
        relay_port=literal(made.relay.port),
    )


def _handler(made: Customer) -> tuple[str, str]:
    """The handler, and what the settings say to it."""
    for name, server in (("lmtp", made.lmtp), ("smtp", made.smtp)):
        if server:
            text = NEXT_HOST.format(setting=f"{name}_server", server=literal(server))
            return name, text
    domain = made.join.domains[0]
    shown = made.mailboxes or (f"me@{domain}", f"postmaster@{domain}")
    boxes = f"mailboxes = {literal(shown, 0, len('# mailboxes = '))}"
    if not made.mailboxes:
        boxes = textwrap.indent(boxes, "# ")  # a long list has several lines
    return "maildir", MAILDIR.replace("$mailboxes", boxes)


def _environment(folder: Path, made: Customer) -> File:
    before = read(folder, ".env")
    text = (before or b"").decode()
    text = environment.with_value(text, made.variable, made.join.password)
    return File(".env", text.encode(), "env", made_of=before)
