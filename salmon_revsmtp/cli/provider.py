"""``provider``: its accounts and sessions, and what makes a password into a setting."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from salmon_revsmtp.cli.accounts import accounts
from salmon_revsmtp.cli.completion import account_names
from salmon_revsmtp.cli.held import held
from salmon_revsmtp.cli.joining import hostname_of, provider_of
from salmon_revsmtp.cli.moving import move_hold
from salmon_revsmtp.cli.options import ATTENTION, Options, json_option, stop, with_options
from salmon_revsmtp.cli.output import at, print_json, table
from salmon_revsmtp.cli.passwords import (
    made_password,
    prompted_password,
    read_password,
    verifier_of,
)
from salmon_revsmtp.cli.records import looked_up, show_findings

if TYPE_CHECKING:
    from salmon_revsmtp.provider.settings import AccountSettings
    from salmon_revsmtp.server.configuration import Configuration
    from salmon_revsmtp.server.project import Project

__all__ = ["provider"]


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
def sessions(options: Options, as_json: bool) -> None:
    """List the sessions that are open: who collects mail now, or waits for it.

    A push session stays open, and mail goes down it as it arrives: live, so that its sender hears
    the customer's own answer, or, where there is none in time, it falls back on being held. Where
    several hosts are one provider, those of the others have the host's name in the last column.
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
        ("account", "peer", "since", "push", "messages", "tls", "live", "fell back", "host"),
        [
            (
                row["account"],
                row["peer"],
                at(row["since"]),
                "yes" if row["push"] else "no",
                _count(row["messages"]),
                row["tls"] or "-",
                _count(row["live"]),
                _count(row["fell_back"]),
                row["host"] or "-",
            )
            for row in rows
        ],
    )


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


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
    if generate:
        text = made_password()
    else:
        text = prompted_password(name) if sys.stdin.isatty() else read_password()
    verifier = verifier_of(text)
    if as_json:
        made = {"password": text} if generate else {}
        print_json({"account": name, **made, "verifier": verifier})
    elif generate:
        click.echo(f"password, for the customer: {text}")
        click.echo(f"verifier, for customer_accounts: {verifier}")
    else:
        click.echo(verifier)


@provider.command()
@click.argument("account", shell_complete=account_names)
@click.option(
    "--password-stdin",
    is_flag=True,
    help="Read the password from standard input, for an account of which only a verifier is kept.",
)
@with_options
def join(options: Options, account: str, password_stdin: bool) -> None:
    """Print the join line of an account.

    On the customer's machine, `salmon-revsmtp init customer` takes it. There is the account's
    password in it, so show it to no one else. It is made of the settings as they are now: after a
    change of the certificate it is another line.

    Where only a verifier of the password is kept, as for every account in the database, say
    --password-stdin; the password is compared with it.
    """
    from salmon_revsmtp.cli.joining import line_of, why_no_line

    project, configuration = options.open()
    settings = provider_of(configuration)
    chosen = next((one for one in configuration.accounts if one.name == account), None)
    if chosen is None:
        chosen = _elsewhere(project, configuration, account)
    if chosen is None:
        known = ", ".join(one.name for one in configuration.accounts)
        if configuration.elsewhere:
            known = "those that `salmon-revsmtp provider accounts` lists"
        raise stop(f"no account is named {account!r}; there are: {known or 'none'}")
    if why := why_no_line(settings):
        raise stop(why)
    password = chosen.password.get_secret_value()
    if password_stdin:
        from salmon_revsmtp.provider.accounts import Account

        password = read_password()
        if not Account(chosen).secret.is_password(password.encode()):
            raise click.ClickException(f"this is not the password of {account!r}")
    line = line_of(settings, account, password, chosen.domains)
    if line is None:
        raise stop(
            f"there is no password of {account!r}, but a verifier, of which no password can be "
            "made; if you know it, say --password-stdin; `salmon-revsmtp provider password "
            "--generate`, or for an account in the database `salmon-revsmtp provider accounts "
            "password --generate`, makes both"
        )
    click.echo(line)


def _elsewhere(project: Project, configuration: Configuration, name: str) -> AccountSettings | None:
    """The account of that name in the database, if there is one."""
    from salmon_revsmtp.plugins.builtin import postgres_accounts
    from salmon_revsmtp.provider.settings import AccountSettings

    try:
        found = postgres_accounts(project.settings)
        keys = found.find(name) if found is not None else None
    except OSError as error:
        raise click.ClickException(str(error)) from None
    return None if keys is None else AccountSettings.model_validate(keys)


@provider.command()
@click.argument("domains", metavar="[DOMAIN]...", nargs=-1)
@json_option
@with_options
def dns(options: Options, domains: Sequence[str], as_json: bool) -> None:
    """See whether the DNS records that the provider needs are there.

    These are the host's address, its name for that address (PTR), the MX record of each domain, and
    an SPF record, because senders are told of what does not arrive. The domains are those of all
    accounts, wherever these are; with DOMAINs only those, such as the ones of an account to be.
    """
    from salmon_revsmtp.init.records import PLACE, own_addresses, records

    project, configuration = options.open()
    hostname = hostname_of(provider_of(configuration))
    if domains:
        domains = [_domain(one) for one in domains]
    else:
        domains = _domains_of_accounts(options, project, configuration)
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


def _domain(given: str) -> str:
    from salmon_revsmtp.net.address import domain_name

    try:
        return domain_name(given)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _domains_of_accounts(
    options: Options, project: Project, configuration: Configuration
) -> list[str]:
    from salmon_revsmtp.provider.lookups import AccountsUnavailableError, Lookups

    found = [domain for one in configuration.accounts for domain in one.domains]
    if configuration.elsewhere:
        with contextlib.closing(Lookups(options.load_plugins(), project.settings)) as lookups:
            try:
                found += [domain for _, one in lookups.listing() for domain in one.domains]
            except AccountsUnavailableError as error:
                raise click.ClickException(str(error)) from None
    return list(dict.fromkeys(found))


provider.add_command(accounts)
provider.add_command(held)
provider.add_command(move_hold)
