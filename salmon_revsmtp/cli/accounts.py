"""``provider accounts``: list them; and add, change and remove those in the database."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from salmon_revsmtp.cli.completion import account_names
from salmon_revsmtp.cli.options import Options, json_option, stop, with_options
from salmon_revsmtp.cli.output import BAD, GOOD, Toned, at, print_json, table
from salmon_revsmtp.cli.passwords import (
    made_password,
    prompted_password,
    read_password,
    verifier_of,
)
from salmon_revsmtp.cli.treating import refuse_options
from salmon_revsmtp.foreign import printable

if TYPE_CHECKING:
    from salmon_revsmtp.provider.hold.postgres.accounts import PostgresAccounts
    from salmon_revsmtp.server.configuration import Configuration

__all__ = ["accounts"]

Command = TypeVar("Command", bound=Callable[..., Any])
#: An account as `customer_accounts` has it.
Keys = dict[str, Any]

# The keys of an account that options set, as `customer_accounts` has them.
KEYS = {
    "quota_messages": ("NUMBER", "Messages that are held for it at most."),
    "quota_bytes": ("OCTETS", "The same in octets."),
    "hold_days": ("DAYS", "How long a message is held."),
    "warn_hours": ("HOURS", "After so long a sender is told of a delay; none: never."),
    "push": ("true|false|always", "Whether its sessions stay open."),
    "live": ("true|false", "Whether senders hear the customer's own answers."),
    "sessions": ("NUMBER", "Reversed sessions at a time."),
    "etrn": ("HOST:PORT", "Where its mail is sent after ETRN; none: nowhere."),
}
_WORDS: Mapping[str, Any] = {"true": True, "false": False, "none": None}
_WORDS_OF: dict[str, tuple[str, ...]] = {"push": ("true", "false"), "live": ("true", "false")}
_WORDS_OF |= {"warn_hours": ("none",), "etrn": ("none",)}


@click.group(invoke_without_command=True)
@json_option
@with_options
def accounts(options: Options, as_json: bool) -> None:
    """List the accounts, and what is held for each.

    An account that cannot log in has "(Disabled)" after its name. "Set aside" are messages that are
    not tried any more until you say so; see `provider held`. When an account was last seen is known
    for the time since the server started.

    Accounts are in `customer_accounts` of the settings, and, where mail is held in PostgreSQL, also
    in that database: the commands below change those, and every host knows of it within a second.
    The settings win.
    """
    from salmon_revsmtp.cli.desk import Desk

    context = click.get_current_context()
    if context.invoked_subcommand is not None:
        refuse_options(context, "as_json")
        return
    with Desk(options) as desk:
        rows = [answer["account"] for answer in desk.ask("accounts")]
    if as_json:
        for row in rows:
            print_json(row)
        return
    columns = ["name", "domains", "messages", "bytes", "oldest", "set aside", "last seen", "push"]
    cells = [_account_cells(row) for row in rows]
    if any(row["from"] not in (None, "settings") for row in rows):
        columns.insert(1, "from")
        for row, shown in zip(rows, cells, strict=True):
            shown.insert(1, row["from"] or "-")
    table("Accounts", columns, cells)


def _account_cells(row: Mapping[str, Any]) -> list[str]:
    title = {None: " (no such account)", False: " (Disabled)", True: ""}[row["enabled"]]
    push = f"since {at(row['push'])}" if row["push"] else "-"
    aside = f"{row['aside']:,}"
    where = f"{push}, {row['peer']}" if row["peer"] else push
    return [
        f"{row['account']}{title}",
        ", ".join(row["domains"]) or "-",
        _of(row["messages"], row["quota_messages"]),
        _of(row["bytes"], row["quota_bytes"]),
        at(row["oldest"]),
        Toned(aside, BAD) if row["aside"] else aside,
        at(row["last_seen"]),
        Toned(where, GOOD) if row["push"] else where,
    ]


def _of(number: int, most: int | None) -> str:
    return f"{number:,}" if most is None else f"{number:,} of {most:,}"


# -- those in the database -------------------------------------------------------------------------


class _Here:
    """The project, and the accounts in its database."""

    def __init__(self, options: Options) -> None:
        from salmon_revsmtp.cli.joining import provider_of
        from salmon_revsmtp.plugins.builtin import postgres_accounts

        project, self.configuration = options.open()
        self.settings = provider_of(self.configuration)
        with _explained():
            found = postgres_accounts(project.settings)
        if found is None:
            raise stop(
                "the accounts of this provider are in customer_accounts of its settings; only one "
                'whose hold is a URL "postgresql://..." has some in its database, too'
            )
        self.accounts: PostgresAccounts = found

    def change(self, name: str, change: Callable[[Keys], Keys]) -> Keys:
        """Make of the keys of an account what ``change`` makes of them, if that is valid; returns
        them."""
        from salmon_revsmtp.provider.hold.postgres.accounts import DomainTakenError

        def changed(keys: Keys) -> Keys:
            return _valid(self.configuration, change(keys))

        try:
            with _explained():
                made = self.accounts.edit(name, changed)
        except DomainTakenError as error:
            raise _taken(name, error.domain, error.owner) from None
        if made is None:
            raise self.unknown(name)
        return made

    def unknown(self, name: str) -> click.ClickException:
        """There is no such account in the database."""
        if any(one.name == name for one in self.configuration.accounts):
            return stop(f"{name!r} is in customer_accounts of the settings: change it there")
        return stop(
            f"no account in the database is named {name!r}; `salmon-revsmtp provider accounts` "
            "lists them"
        )

    def join_line(self, keys: Mapping[str, Any], password: str) -> str:
        """The join line; ``""`` where there can be none."""
        from salmon_revsmtp.cli.joining import line_of, why_no_line

        if why_no_line(self.settings):
            return ""
        try:
            return line_of(self.settings, keys["name"], password, tuple(keys["domains"])) or ""
        except OSError as error:  # a certificate that cannot be read
            click.echo(f"There is no join line: {printable(str(error))}", err=True)
            return ""


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """A database that cannot be had ends the command."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(printable(str(error))) from None


def _valid(configuration: Configuration, keys: Keys) -> Keys:
    """The keys of an account as the settings would take them; what they would not take ends the
    command."""
    from salmon_revsmtp.provider.settings import AccountSettings
    from salmon_revsmtp.server.configuration import account_named, domain_taken
    from salmon_revsmtp.settings import validated

    problems: list[str] = []
    where = account_named(keys["name"])
    account: AccountSettings | None = validated(AccountSettings, keys, where, problems)
    if account is not None:
        if any(one.name == account.name for one in configuration.accounts):
            problems.append(
                f"{where}: name: found in customer_accounts, too, allowed: a name of its own for "
                "each"
            )
        owners = {one: each.name for each in configuration.accounts for one in each.domains}
        problems += [
            domain_taken(where, domain, owners[domain])
            for domain in account.domains
            if domain in owners
        ]
    if account is None or problems:
        raise stop(*problems)
    made = account.model_dump(exclude_unset=True)
    return {
        **made,
        "password": account.password.get_secret_value(),
        "domains": list(account.domains),
    }


def _taken(name: str, domain: str, owner: str) -> click.ClickException:
    from salmon_revsmtp.server.configuration import account_named, domain_taken

    return stop(domain_taken(account_named(name), domain, owner))


def _with_keys(command: Command) -> Command:
    """Options for the keys of an account."""
    for key, (metavar, text) in reversed(KEYS.items()):
        option = click.option(f"--{key.replace('_', '-')}", key, metavar=metavar, help=text)
        command = option(command)
    return command


def _given(values: Mapping[str, str | None]) -> Keys:
    """What options say, as the settings would have it; what is wrong is said by their rules."""
    return {
        key: _WORDS[value.lower()] if value.lower() in _WORDS_OF.get(key, ()) else value
        for key, value in values.items()
        if value is not None
    }


_password_options = (
    click.option("--generate", is_flag=True, help="Make a strong password."),
    click.option(
        "--password-stdin", is_flag=True, help="Read the password from standard input, one line."
    ),
)


def _with_password(command: Command) -> Command:
    for option in _password_options:
        command = option(command)
    return command


def _password(name: str, generate: bool, from_stdin: bool) -> str:
    if generate and from_stdin:
        raise click.UsageError("--generate and --password-stdin do not go together")
    if generate:
        return made_password()
    if from_stdin:
        return read_password()
    if not sys.stdin.isatty():
        raise click.UsageError("there is no terminal: say --generate, or --password-stdin")
    return prompted_password(name)


def _show_login(
    here: _Here, keys: Mapping[str, Any], done: str, password: str, made: bool, as_json: bool
) -> None:
    """What the customer needs, while the password is known."""
    line = here.join_line(keys, password)
    if as_json:
        known = {"password": password} if made else {}
        print_json({"account": keys["name"], **known, "join": line or None})
        return
    click.echo(f"{printable(keys['name'])}: {done}")
    if made:
        click.echo(f"password, for the customer: {password}")
    if line:
        click.echo(f"join line, for the customer: {line}")


@accounts.command()
@click.argument("name")
@click.option("--domain", "domains", metavar="DOMAIN", multiple=True, help="One of its domains.")
@_with_password
@_with_keys
@click.option("--disabled", is_flag=True, help="It cannot log in until you enable it.")
@json_option
@with_options
def add(
    options: Options,
    name: str,
    domains: tuple[str, ...],
    generate: bool,
    password_stdin: bool,
    disabled: bool,
    as_json: bool,
    **values: str | None,
) -> None:
    """Add an account to the database.

    It asks for the password, which is not shown. Only a verifier is kept, from which no one can log
    in. The join line has the password, and is printed now and not again; `provider join` makes it
    again for who knows the password.
    """
    if not domains:
        raise click.UsageError("say whose mail it gets, such as --domain example.org")
    here = _Here(options)
    # Not before it is known that psycopg is there.
    from salmon_revsmtp.provider.hold.postgres.accounts import DomainTakenError, NameTakenError

    keys = {"name": name, "domains": list(domains), **_given(values), "enabled": not disabled}
    # Before a password is asked for.
    _valid(here.configuration, {**keys, "password": "x"})
    password = _password(name, generate, password_stdin)
    keys = _valid(here.configuration, {**keys, "password": verifier_of(password)})
    try:
        with _explained():
            here.accounts.add(keys)
    except NameTakenError:
        raise stop(
            f"there is an account {name!r} in the database already; `salmon-revsmtp provider "
            "accounts` lists all, and `set`, `domains` and `password` change one"
        ) from None
    except DomainTakenError as error:
        raise _taken(name, error.domain, error.owner) from None
    _show_login(here, keys, f"added, for {', '.join(keys['domains'])}", password, generate, as_json)


@accounts.command("password")
@click.argument("name", shell_complete=account_names)
@_with_password
@json_option
@with_options
def password_(
    options: Options, name: str, generate: bool, password_stdin: bool, as_json: bool
) -> None:
    """Give an account in the database another password.

    A session that is open ends within seconds: whoever has it has to log in again.
    """
    here = _Here(options)
    with _explained():
        if here.accounts.find(name) is None:
            raise here.unknown(name)
    password = _password(name, generate, password_stdin)
    verifier = verifier_of(password)
    keys = here.change(name, lambda keys: {**keys, "password": verifier})
    _show_login(here, keys, "has another password", password, generate, as_json)


def _set_enabled(options: Options, name: str, enabled: bool) -> None:
    _Here(options).change(name, lambda keys: {**keys, "enabled": enabled})
    click.echo(f"{printable(name)}: {'enabled' if enabled else 'disabled'}")


@accounts.command()
@click.argument("name", shell_complete=account_names)
@with_options
def disable(options: Options, name: str) -> None:
    """Let an account in the database log in no more.

    A session that is open ends within seconds. Its mail is still held.
    """
    _set_enabled(options, name, False)


@accounts.command()
@click.argument("name", shell_complete=account_names)
@with_options
def enable(options: Options, name: str) -> None:
    """Let an account in the database log in again."""
    _set_enabled(options, name, True)


@accounts.command()
@click.argument("name", shell_complete=account_names)
@click.option("--add", "added", metavar="DOMAIN", multiple=True, help="It has this one, too.")
@click.option(
    "--remove", "removed", metavar="DOMAIN", multiple=True, help="It has this one no more."
)
@with_options
def domains(options: Options, name: str, added: tuple[str, ...], removed: tuple[str, ...]) -> None:
    """List the domains of an account in the database, or change them.

    Mail that is held for a domain that is removed stays with the account.
    """
    here = _Here(options)

    def change(keys: Keys) -> Keys:
        from salmon_revsmtp.net.address import domain_name

        gone: set[str] = set()
        for one in removed:
            domain = ""
            with contextlib.suppress(ValueError):
                domain = domain_name(one)
            if domain not in keys["domains"]:
                raise stop(f"{name!r} has no domain {one!r}; it has {', '.join(keys['domains'])}")
            gone.add(domain)
        if not added and gone.issuperset(keys["domains"]):
            raise stop(
                f"{name!r} would have no domain left; add another one first, or see "
                "`salmon-revsmtp provider accounts remove`"
            )
        return {**keys, "domains": [one for one in [*keys["domains"], *added] if one not in gone]}

    if added or removed:
        found = here.change(name, change)
    else:
        with _explained():
            there = here.accounts.find(name)
        if there is None:
            raise here.unknown(name)
        found = there
    for one in found["domains"]:
        click.echo(one)


@accounts.command("set")
@click.argument("name", shell_complete=account_names)
@_with_keys
@click.option(
    "--default",
    "defaults",
    type=click.Choice([key.replace("_", "-") for key in KEYS]),
    multiple=True,
    help="This one as it is without being set.",
)
@with_options
def set_(options: Options, name: str, defaults: tuple[str, ...], **values: str | None) -> None:
    """Change other keys of an account in the database."""
    new, old = _given(values), {one.replace("-", "_") for one in defaults}
    if not new and not old:
        raise click.UsageError("say what to change, such as --quota-messages 1000")
    if both := sorted(set(new) & old):
        raise click.UsageError(f"--default {both[0]} and a value do not go together")
    _Here(options).change(
        name, lambda keys: {**{key: value for key, value in keys.items() if key not in old}, **new}
    )
    click.echo(f"{printable(name)}: {', '.join([*new, *sorted(old)])} changed")


@accounts.command()
@click.argument("name", shell_complete=account_names)
@click.option(
    "--leave-mail", is_flag=True, help="Also while mail is held for it, which stays held."
)
@with_options
def remove(options: Options, name: str, leave_mail: bool) -> None:
    """Remove an account from the database.

    Refused while mail is held for it: `provider held bounce --account NAME` returns that to its
    senders. A session that is open ends within seconds.
    """
    here = _Here(options)
    with _explained():
        if here.accounts.find(name) is None:
            raise here.unknown(name)
        waiting = _waiting(options, name)
        if waiting and not leave_mail:
            raise click.ClickException(
                f"{printable(name)}: {waiting} held for it; return the mail to its senders by "
                f"`salmon-revsmtp provider held bounce --account {printable(name)}`, wait until "
                "the customer has it, or say --leave-mail"
            )
        here.accounts.remove(name)
        click.echo(f"{printable(name)}: removed")
        if not leave_mail and (waiting := _waiting(options, name)):
            click.echo(f"{waiting} held for it: that came meanwhile", err=True)


def _waiting(options: Options, name: str) -> str:
    """How many messages are held for an account; ``""`` for none."""
    from salmon_revsmtp.cli.desk import Desk

    with Desk(options) as desk:
        for answer in desk.ask("accounts", account=name):
            if number := answer["account"]["messages"]:
                return f"{number:,} message{' is' if number == 1 else 's are'}"
    return ""
