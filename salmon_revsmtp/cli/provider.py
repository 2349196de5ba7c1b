"""``provider``: its accounts and sessions, and what makes a password into a setting."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from salmon_revsmtp.cli.completion import account_names
from salmon_revsmtp.cli.held import held
from salmon_revsmtp.cli.moving import move_hold
from salmon_revsmtp.cli.options import ATTENTION, Options, json_option, stop, with_options
from salmon_revsmtp.cli.output import BAD, GOOD, Toned, at, print_json, table
from salmon_revsmtp.cli.records import looked_up, show_findings

if TYPE_CHECKING:
    from salmon_revsmtp.provider.settings import ProviderSettings
    from salmon_revsmtp.server.configuration import Configuration

__all__ = ["provider"]

# Random octets of a password that is made: nobody guesses 192 bits.
STRONG = 24
# Octets of a password that is read: AUTH takes lines of 12,288 (RFC 4954 4), in base64.
LONGEST = 8192


@click.group()
@with_options
def provider(options: Options) -> None:
    """Look after a provider: its accounts, their sessions and the mail that it holds.

    These commands ask the server that runs in this project (`salmon start` or `salmon-revsmtp
    run`). If none runs, they open the hold store themselves.
    """


@provider.command()
@json_option
@with_options
def accounts(options: Options, as_json: bool) -> None:
    """List the accounts, and what is held for each.

    An account that cannot log in has "(Disabled)" after its name. "Set aside" are messages that are
    not tried any more until you say so; see `provider held`. When an account was last seen is known
    for the time since the server started.
    """
    from salmon_revsmtp.cli.desk import Desk

    with Desk(options) as desk:
        rows = [answer["account"] for answer in desk.ask("accounts")]
    if as_json:
        for row in rows:
            print_json(row)
        return
    columns = ("name", "domains", "messages", "bytes", "oldest", "set aside", "last seen", "push")
    table("Accounts", columns, [_account_cells(row) for row in rows])


def _account_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    title = {None: " (not in the settings)", False: " (Disabled)", True: ""}[row["enabled"]]
    push = f"since {at(row['push'])}" if row["push"] else "-"
    aside = f"{row['aside']:,}"
    where = f"{push}, {row['peer']}" if row["peer"] else push
    return (
        f"{row['account']}{title}",
        ", ".join(row["domains"]) or "-",
        _of(row["messages"], row["quota_messages"]),
        _of(row["bytes"], row["quota_bytes"]),
        at(row["oldest"]),
        Toned(aside, BAD) if row["aside"] else aside,
        at(row["last_seen"]),
        Toned(where, GOOD) if row["push"] else where,
    )


def _of(number: int, most: int | None) -> str:
    return f"{number:,}" if most is None else f"{number:,} of {most:,}"


@provider.command()
@json_option
@with_options
def sessions(options: Options, as_json: bool) -> None:
    """List the sessions that are open: who collects mail now, or waits for it.

    A push session stays open, and mail goes down it as it arrives: live, so that its sender hears
    the customer's own answer, or, where there is none in time, it falls back on being held.
    """
    from salmon_revsmtp.cli.desk import Desk

    with Desk(options) as desk:
        rows = [answer["session"] for answer in desk.ask("sessions")]
    if as_json:
        for row in rows:
            print_json(row)
        return
    table(
        "Sessions",
        ("account", "peer", "since", "push", "messages", "tls", "live", "fell back"),
        [
            (
                row["account"],
                row["peer"],
                at(row["since"]),
                "yes" if row["push"] else "no",
                f"{row['messages']:,}",
                row["tls"] or "-",
                f"{row['live']:,}",
                f"{row['fell_back']:,}",
            )
            for row in rows
        ],
    )


@provider.command()
@click.argument("name", required=False, shell_complete=account_names)
@click.option("--generate", is_flag=True, help="Make a strong password.")
@json_option
@with_options
def password(options: Options, name: str | None, generate: bool, as_json: bool) -> None:
    """Make of a password what `customer_accounts` may have instead of it.

    It asks for the password, which is not shown, or reads one line from standard input if that is
    not a terminal. NAME is the account's, for the question. It prints a verifier: who reads that in
    your settings cannot log in with it. With --generate it makes the password, too, and prints
    both: the password is for the customer.

    With a verifier alone the customer logs in by SCRAM-SHA-256, or under TLS by PLAIN or LOGIN, but
    not by CRAM-MD5, which needs the password itself.
    """
    import secrets

    text = secrets.token_urlsafe(STRONG) if generate else _read_password(name)
    verifier = _verifier(text)
    if as_json:
        made = {"password": text} if generate else {}
        print_json({"account": name, **made, "verifier": verifier})
    elif generate:
        click.echo(f"password, for the customer: {text}")
        click.echo(f"verifier, for customer_accounts: {verifier}")
    else:
        click.echo(verifier)


def _read_password(name: str | None) -> str:
    if sys.stdin.isatty():
        whose = f"Password of {name}" if name else "Password"
        # What is asked goes elsewhere than what is printed, which may go into a file.
        return str(click.prompt(whose, hide_input=True, confirmation_prompt=True, err=True))
    stream = sys.stdin.buffer
    line = stream.readline(LONGEST + 1)
    if len(line) > LONGEST:
        raise click.UsageError(f"the password has more than {LONGEST} octets")
    if stream.read(LONGEST).strip():
        raise click.UsageError("standard input has more than one line; the password is one")
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        raise click.UsageError("the password is no UTF-8") from None


def _verifier(text: str) -> str:
    from scramp import ScramException

    from salmon_revsmtp.smtp.sasl import Secret
    from salmon_revsmtp.smtp.verifier import SHA_256

    if not text:
        raise click.UsageError("the password is empty")
    if any(ord(letter) < 0x20 or letter == "\x7f" for letter in text):
        raise click.UsageError("the password has control characters, which are refused")
    if text.startswith(f"{SHA_256}$"):
        raise click.UsageError("this is a verifier already")
    try:
        return str(Secret("", text).verifier(SHA_256))
    except (ScramException, UnicodeError):
        # RFC 4013: such as a letter that Unicode does not know yet.
        raise click.UsageError("the password has letters that SCRAM forbids") from None


@provider.command()
@click.argument("account")
@with_options
def join(options: Options, account: str) -> None:
    """Print the join line of an account.

    On the customer's machine, `salmon-revsmtp init customer` takes it. There is the account's
    password in it, so show it to no one else. It is made of the settings as they are now: after a
    change of the certificate it is another line.
    """
    from salmon_revsmtp.init.provider import join_line_of

    _, configuration = options.open()
    settings = _provider_of(configuration)
    chosen = next((one for one in configuration.accounts if one.name == account), None)
    if chosen is None:
        known = ", ".join(one.name for one in configuration.accounts) or "none"
        raise stop(f"no account is named {account!r}; there are: {known}")
    if settings.tls_cert is None:
        raise stop("provider has no tls_cert, and a customer with a join line uses STARTTLS")
    ports = [address.port for address, implicit in settings.addresses if not implicit]
    if not ports:
        raise stop("provider has no listen, and a customer with a join line uses STARTTLS")
    line = join_line_of(
        chosen.name,
        chosen.password.get_secret_value(),
        _hostname(settings),
        ports[0],
        chosen.domains,
        (settings.tls_cert, settings.tls_key),
    )
    if line is None:
        raise stop(
            f"the settings have no password of {account!r}, but a verifier, of which no password "
            "can be made; `salmon-revsmtp provider password --generate` makes both"
        )
    click.echo(str(line))


@provider.command()
@json_option
@with_options
def dns(options: Options, as_json: bool) -> None:
    """See whether the DNS records that the provider needs are there.

    These are the host's address, its name for that address (PTR), the MX record of each domain, and
    an SPF record, because senders are told of what does not arrive.
    """
    from salmon_revsmtp.init.records import PLACE, own_addresses, records

    _, configuration = options.open()
    hostname = _hostname(_provider_of(configuration))
    domains = [domain for one in configuration.accounts for domain in one.domains]
    holding = [one for one in configuration.services.values() if one.delivery == "hold"]
    listen = [address for one in holding for address in one.listen]
    findings = looked_up(hostname, list(records(hostname, domains, listen, own_addresses())))
    if as_json:
        for one in findings:
            record = one.record
            known = None if PLACE in record.name else record.name
            value = None if PLACE in record.value else record.value
            row = {"name": known, "type": record.kind, "value": value}
            print_json({**row, "there": one.right, "instead": one.instead or None})
    else:
        show_findings(findings)
    if not all(one.right for one in findings):
        sys.exit(ATTENTION)


def _provider_of(configuration: Configuration) -> ProviderSettings:
    if configuration.provider is None:
        raise stop("this project is no provider: provider in the settings is missing")
    return configuration.provider


def _hostname(settings: ProviderSettings) -> str:
    from salmon_revsmtp.hostname import machine_name

    return settings.hostname or machine_name()


provider.add_command(held)
provider.add_command(move_hold)
