"""``init``: a project that works, from nothing."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from salmon_revsmtp.cli.errors import complain, warn
from salmon_revsmtp.cli.options import Options, stop, with_options
from salmon_revsmtp.cli.output import BOLD, Toned, shown
from salmon_revsmtp.cli.records import INDENT, looked_up, show_findings, show_records
from salmon_revsmtp.foreign import printable, printable_lines, without_login

if TYPE_CHECKING:
    from salmon_revsmtp.init.customer import Customer
    from salmon_revsmtp.init.joinline import JoinLine
    from salmon_revsmtp.init.project import ProjectUser
    from salmon_revsmtp.init.provider import Provider
    from salmon_revsmtp.init.writing import Change, File
    from salmon_revsmtp.net.address import HostAndPort

__all__ = ["init"]

NOTHING = "nothing was written"

HOSTNAME = "the name of this host, such as mx.example.net"
ACCOUNT = "a name for the customer to log in with, such as acme"
LISTEN = "an address of this host and a port, such as 0.0.0.0:25 or [::]:25"
DOMAINS = "the domains whose mail it holds, such as example.org"
SERVER = "a mail server and its port, such as localhost:25"
JOIN = "the join line that `salmon-revsmtp init provider` has printed, or - for standard input"


@click.group()
@with_options
def init(options: Options) -> None:
    """Write a project that works, from nothing.

    `init provider` is for a host with a public address: it takes the world's mail and holds it. It
    prints a join line. `init customer` is for the machine that collects the mail: it takes the join
    line.
    """


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that both ends have."""
    for option in (
        click.option(
            "--force",
            is_flag=True,
            help="Write over files that are there, after showing what changes.",
        ),
        click.option(
            "--user",
            metavar="NAME",
            help="Who runs the server. By default it is you. If you are root, it is the owner of "
            "DIR, or `mail` if that is root, too.",
        ),
    ):
        command = option(command)
    return click.argument("directory", metavar="DIR")(command)


@init.command()
@click.option("--hostname", metavar="NAME", help="This host's name, such as mx.example.net.")
@click.option("--account", metavar="NAME", help="What the customer logs in as.")
@click.option(
    "--domain",
    "domains",
    metavar="DOMAIN",
    multiple=True,
    help="A domain whose mail is held for the account. May be given several times.",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    multiple=True,
    default=("0.0.0.0:366",),
    show_default=True,
    help="Where the customer calls. May be given several times; the first port is in the join "
    "line.",
)
@click.option(
    "--mx",
    metavar="HOST:PORT",
    multiple=True,
    default=("0.0.0.0:25",),
    show_default=True,
    help="Where the world sends mail. May be given several times.",
)
@click.option("--tls-cert", metavar="FILE", help="A certificate [default: one is made].")
@click.option("--tls-key", metavar="FILE", help="Its key, if it is in a file of its own.")
@click.option(
    "--relay",
    metavar="HOST:PORT",
    default="localhost:587",
    show_default=True,
    help="A mail server that sends notifications to the world for you.",
)
@click.option("--check-dns", is_flag=True, help="See which DNS records are there already.")
@click.option(
    "--new-password", is_flag=True, help="Make a new password, although there is one already."
)
@shared
@with_options
def provider(options: Options, directory: str, **given: Any) -> None:
    """Write the project of a provider to DIR.

    On a terminal it asks for what you do not say. It makes a password for the account, which is in
    DIR/.env, and a certificate, unless you name one. Then it prints the DNS records to set and the
    join line for the customer. There is a password in that line, so keep it to yourself.

    Nothing that is in DIR is overwritten, unless you say --force. A password and a certificate that
    are there already stay: run it again, and your customer still gets in.
    """
    folder = _folder(options, directory)
    if _on_a_terminal():
        _ask_provider(given)
    made = _provider(given)
    user = _user(folder, given["user"])
    _write(folder, lambda: _provider_files(folder, made, user), user, given["force"])
    _show_provider(folder, made, user, given["check_dns"])


@init.command()
@click.option(
    "--join",
    metavar="LINE",
    help="The join line of the provider; `-` reads it from standard input, so that it is not in "
    "your shell's history. On a terminal you are asked for it.",
)
@click.option(
    "--lmtp",
    metavar="HOST:PORT",
    help="Hand the mail to this server by LMTP, such as Dovecot; or `unix:/PATH`.",
)
@click.option("--smtp", metavar="HOST:PORT", help="Hand the mail to this server by SMTP.")
@click.option(
    "--mailbox",
    "mailboxes",
    metavar="ADDRESS",
    multiple=True,
    help="An address that there is. May be given several times; all others are refused. Without it "
    "every address of your domains is one.",
)
@click.option(
    "--name",
    metavar="NAME",
    default="isp",
    show_default=True,
    help="The collection agent's name, for commands and the log.",
)
@click.option("--hostname", metavar="NAME", help="This machine's name [default: as it has it].")
@click.option(
    "--relay",
    metavar="HOST:PORT",
    default="localhost:25",
    show_default=True,
    help="A mail server that sends notifications to the world for you.",
)
@shared
@with_options
def customer(options: Options, directory: str, **given: Any) -> None:
    """Write the project of a customer to DIR.

    It collects mail from the provider of the join line. Each address gets a Maildir below
    DIR/run/mail, unless you name a mail server of yours that takes it.

    Nothing that is in DIR is overwritten, unless you say --force.
    """
    folder = _folder(options, directory)
    made = _customer(given)
    user = _user(folder, given["user"])
    _write(folder, lambda: _customer_files(folder, made, user), user, given["force"])
    _show_customer(folder, made, user)


# -- what is said, and what is missing ------------------------------------------------------------


def _on_a_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _folder(options: Options, directory: str) -> Path:
    if directory.lower().startswith("revsmtp:"):
        raise stop("DIR: that is a join line, which goes after --join; name a folder")
    folder = Path(options.chdir, directory).resolve()
    if not str(folder).isprintable():
        raise stop("DIR: control characters in the name of a folder are refused")
    return folder


def _user(folder: Path, asked: str | None) -> ProjectUser:
    from salmon_revsmtp.init.project import project_user

    try:
        return project_user(folder, asked)
    except ValueError as error:
        raise stop(f"--user: {error}") from None


def _ask_provider(given: dict[str, Any]) -> None:
    if given["hostname"] is None:
        given["hostname"] = _asked("This host's name, as the world knows it", _host, _machine())
    if given["account"] is None:
        given["account"] = _asked("A name for the customer to log in with", _account, "home")
    if not given["domains"]:
        text = "Domains whose mail it holds, with spaces between them"
        given["domains"] = tuple(_asked(text, _domains).split())


def _asked(question: str, valid: Callable[[str], object], default: str | None = None) -> str:
    def value(text: str) -> str:
        try:
            valid(text)
        except ValueError as error:
            raise click.UsageError(printable(error)) from None
        return text

    return str(click.prompt(question, default=default, value_proc=value))


def _machine() -> str | None:
    from salmon_revsmtp.hostname import machine_name

    name = machine_name()
    return None if name.startswith("[") else name


def _host(text: str) -> str:
    from salmon_revsmtp.net.address import host_name

    if text.startswith("["):
        raise ValueError("an MX record needs a name, and not an address")
    return host_name(text)


def _account(text: str) -> str:
    if not 0 < len(text) <= 200 or not text.isprintable():
        raise ValueError("a text of up to 200 characters, none of them a control character")
    return text


def _domains(text: str) -> tuple[str, ...]:
    from salmon_revsmtp.smtp.addresses import to_ascii

    found = tuple(dict.fromkeys(to_ascii(one) for one in text.split()))
    if not found:
        raise ValueError("there is none in it")
    return found


def _address(text: str) -> HostAndPort:
    """Where to listen."""
    from salmon_revsmtp.net.address import host_and_port

    found = host_and_port(text)
    if found.port == 0:
        raise ValueError("port 0 is none that others could call")
    return found


def _server(text: str) -> HostAndPort:
    """Whom to call."""
    found = _address(text)
    if not found.host:
        raise ValueError("the host is missing")
    return found


class _Problems:
    """Collects all that is wrong with what was said, to tell it at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def valid(
        self, option: str, text: str | None, check: Callable[[str], Any], allowed: str
    ) -> Any:
        """What ``check`` makes of a text; a problem where there is none, or where it is wrong."""
        if text is None:
            self.found.append(f"{option}: missing; {allowed}")
            return None
        try:
            text.encode()
        except UnicodeEncodeError:
            self.found.append(f"{option}: it is no UTF-8; allowed: {allowed}")
            return None
        try:
            return check(text)
        except ValueError as error:
            shown = text if option == "--mailbox" and ":" not in text else without_login(text)
            self.found.append(f"{option}: found {shown!r}: {error}; allowed: {allowed}")
            return None

    def end(self) -> None:
        if self.found:
            raise stop(*(one.replace("\n", " ") for one in self.found))


def _provider(given: dict[str, Any]) -> Provider:
    from salmon_revsmtp.init.provider import Provider

    problems = _Problems()
    hostname = problems.valid("--hostname", given["hostname"], _host, HOSTNAME)
    account = problems.valid("--account", given["account"], _account, ACCOUNT)
    listed = given["domains"] or (None,)
    domains = [problems.valid("--domain", one, _domains, DOMAINS) for one in listed]
    for option in ("listen", "mx"):
        for one in given[option]:
            problems.valid(f"--{option}", one, _address, LISTEN)
    relay = problems.valid("--relay", given["relay"], _server, SERVER)
    certificate = _certificate(given["tls_cert"], given["tls_key"], problems)
    problems.end()
    return Provider(
        hostname,
        account,
        tuple(dict.fromkeys(one for listed in domains for one in listed)),
        given["listen"],
        given["mx"],
        relay,
        certificate,
        given["new_password"],
    )


def _certificate(
    cert: str | None, key: str | None, problems: _Problems
) -> tuple[Path, Path | None] | None:
    from salmon_revsmtp.net.certificate import certificate_problem

    for option, one in (("--tls-cert", cert), ("--tls-key", key)):
        if one is not None and not one.isprintable():
            problems.found.append(f"{option}: control characters and no UTF-8 are refused")
            return None
    paths = [None if one is None else Path(one).absolute() for one in (cert, key)]
    if problem := certificate_problem(*paths):
        dashed = problem.replace("tls_cert", "--tls-cert").replace("tls_key", "--tls-key")
        problems.found.append(dashed)
    return None if paths[0] is None else (paths[0], paths[1])


def _customer(given: dict[str, Any]) -> Customer:
    from salmon_revsmtp.init.customer import Customer

    problems = _Problems()
    if given["lmtp"] is not None and given["smtp"] is not None:
        problems.found.append("--lmtp and --smtp: the mail goes to one of them; leave one out")
    for option, check, allowed in (
        ("lmtp", _lmtp, f"{SERVER}, or unix:/PATH"),
        ("smtp", _server, SERVER),
        ("hostname", _host_or_address, HOSTNAME),
    ):
        if given[option] is not None:
            problems.valid(f"--{option}", given[option], check, allowed)
    for one in given["mailboxes"]:
        problems.valid("--mailbox", one, _mailbox, "an address such as bob@example.org")
    if given["mailboxes"] and (given["lmtp"] or given["smtp"]):
        problems.found.append("--mailbox: the server that takes the mail knows its addresses")
    name = problems.valid("--name", given["name"], _agent, "letters, digits, - and _")
    relay = problems.valid("--relay", given["relay"], _server, SERVER)
    join = _join_line(given["join"], problems)
    problems.end()
    assert join is not None
    boxes = tuple(dict.fromkeys(given["mailboxes"]))
    return Customer(join, name, given["hostname"], given["lmtp"], given["smtp"], boxes, relay)


def _lmtp(text: str) -> object:
    if text.startswith("unix:"):
        if not (text[5:].startswith("/") and text.isprintable()):
            raise ValueError("after unix: comes the whole path of a socket")
        return text
    return _server(text)


def _host_or_address(text: str) -> str:
    from salmon_revsmtp.net.address import host_name

    return host_name(text)


def _mailbox(text: str) -> None:
    from salmon_revsmtp.handlers.names import Mailbox

    Mailbox.of_setting(text)


def _agent(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", text):
        raise ValueError("that is no name for an agent")
    return text


def _join_line(given: str | None, problems: _Problems) -> JoinLine | None:
    from salmon_revsmtp.init.joinline import LONGEST, JoinLineError, parse

    asks = sys.stdin.isatty() and (given == "-" or (given is None and sys.stdout.isatty()))
    if given is None and not asks:
        problems.found.append(f"--join: missing; {JOIN}")
        return None
    problems.end()  # before a person is asked, or a pipe is read
    while asks:
        try:
            return parse(click.prompt("Join line (is not shown)", hide_input=True, err=True))
        except JoinLineError as error:
            complain(str(error))
    try:
        if given == "-":
            given = sys.stdin.buffer.read(LONGEST + 1).decode()
        return parse(given or "")
    except UnicodeDecodeError:
        problems.found.append("--join: it is no UTF-8")
    except JoinLineError as error:
        problems.found.append(f"--join: {error}")
    return None


# -- writing --------------------------------------------------------------------------------------


def _provider_files(folder: Path, made: Provider, user: ProjectUser) -> list[File]:
    from salmon_revsmtp.init.provider import provider_files

    return provider_files(folder, made, user)


def _customer_files(folder: Path, made: Customer, user: ProjectUser) -> list[File]:
    from salmon_revsmtp.init.customer import customer_files

    return customer_files(folder, made, user)


def _write(
    folder: Path, files: Callable[[], Sequence[File]], user: ProjectUser, force: bool
) -> None:
    from salmon_revsmtp.init.project import FOLDERS
    from salmon_revsmtp.init.selfsigned import CertificateError
    from salmon_revsmtp.init.writing import changes, write

    try:
        wanted = changes(folder, files())
        _permit(folder, wanted, force)
        write(folder, wanted, FOLDERS, user.owner)
    except CertificateError as error:
        raise click.ClickException(f"{printable(error)}; {NOTHING}") from None
    except UnicodeDecodeError:
        raise click.ClickException(f"{folder / '.env'} is no UTF-8; {NOTHING}") from None
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        text = f"writing to {folder}: {what}{error.strerror or error}; {NOTHING}"
        raise click.ClickException(printable(text)) from None


def _permit(folder: Path, wanted: Sequence[Change], force: bool) -> None:
    """End the command, unless what is there stays, or a person wants it to change."""
    from salmon_revsmtp.init.writing import difference

    over = [one for one in wanted if one.before is not None]
    if not over:
        return
    if not force:
        names = ", ".join(one.file.path for one in over)
        raise stop(
            f"{folder} has files that would change, so {NOTHING}: {names}",
            "choose another folder, or say --force, which shows first what would change",
        )
    for one in over:
        click.echo(printable_lines(difference(one)))
    for one in wanted:
        if one.before is None:
            click.echo(f"{one.file.path}: new")
    if _on_a_terminal() and not click.confirm(f"\nWrite this to {folder}?"):
        raise click.ClickException(NOTHING)
    click.echo()


# -- what is shown --------------------------------------------------------------------------------


def _show_provider(folder: Path, made: Provider, user: ProjectUser, check_dns: bool) -> None:
    from salmon_revsmtp.init.provider import CERTIFICATE, KEY, join_line
    from salmon_revsmtp.init.records import own_addresses, records

    click.echo(f"The provider is in {folder}. What it does is in config/settings.py.")
    _heading("Set these DNS records")
    needed = list(records(made.hostname, made.domains, made.mx, own_addresses()))
    if check_dns:
        show_findings(looked_up(made.hostname, needed))
    else:
        show_records(needed)
        click.echo(f"\nTo see which of them are there: {_here(folder, 'provider dns')}")
    ports = sorted({int(one.rpartition(":")[2]) for one in (*made.mx, *made.listen)})
    click.echo(f"Your firewall has to let in TCP {' and '.join(map(str, ports))}.")
    relay = f"{made.relay.host}:{made.relay.port}"
    click.echo(f"A mail server on {relay} has to send what senders are told of mail that does")
    click.echo("not arrive; --relay names another one.")
    _show_start(folder, "provider")
    _heading("Your join line: it has a password in it, so show it to no one")
    line = join_line(folder, made)
    if line is None:
        click.echo(
            "(There is none: .env has no password, but a verifier. --new-password makes one.)"
        )
    else:
        click.echo(str(line))
        click.echo("\nOn the machine that is to have the mail, this asks for the line:")
        click.echo(f"{INDENT}salmon-revsmtp init customer DIR")
    _warn(user, *(made.certificate or (folder / CERTIFICATE, folder / KEY)))


def _show_customer(folder: Path, made: Customer, user: ProjectUser) -> None:
    domains = ", ".join(made.join.domains)
    kept = "keeps it in run/mail, a Maildir for each address"
    if server := made.lmtp or made.smtp:
        kept = f"hands it to {server}"
    click.echo(f"The project is in {folder}. It collects the mail for {domains}")
    click.echo(f"from {made.join.host}, and {kept}.")
    click.echo("What it does is in config/settings.py.")
    _heading("See whether it works")
    click.echo(f"{INDENT}{_here(folder, f'check {made.agent}')}")
    _show_start(folder, "customer")
    _warn(user, folder)


def _show_start(folder: Path, end: str) -> None:
    name = f"revsmtp-{end}"
    root = "" if os.geteuid() == 0 else "sudo "
    _heading("Start it, now and with the machine")
    click.echo(f"{INDENT}{root}cp {_quoted(folder / f'{name}.service')} /etc/systemd/system/")
    click.echo(f"{INDENT}{root}systemctl enable --now {name}")
    click.echo("\nOr without systemd, in the background:")
    click.echo(f"{INDENT}cd {_quoted(folder)} && {_program('salmon')} start")


def _warn(user: ProjectUser, *paths: Path | None) -> None:
    """Say what the server's user could not use."""
    from salmon_revsmtp.init.project import cannot_use

    for path in cannot_use(user, *(one for one in paths if one)):
        warn(
            f"the user {user.name}, who is to run the server, cannot use {path}; have it where "
            "that user can, or name another one with --user"
        )


def _heading(text: str) -> None:
    click.echo()
    click.echo(shown(Toned(text, BOLD)))
    click.echo()


def _here(folder: Path, words: str) -> str:
    return f"{_program('salmon-revsmtp')} --chdir {_quoted(folder)} {words}"


def _program(name: str) -> str:
    """How to call a program: by its name where the shell finds it."""
    beside = Path(sys.executable).with_name(name)
    return name if shutil.which(name) or not beside.exists() else _quoted(beside)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
