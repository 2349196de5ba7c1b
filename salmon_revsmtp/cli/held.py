"""``provider held``: list, show, retry, bounce and drop what a provider holds."""

from __future__ import annotations

import base64
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from salmon_revsmtp.cli.completion import account_names
from salmon_revsmtp.cli.options import ATTENTION, Options, json_option, stop, with_options
from salmon_revsmtp.cli.output import BAD, Toned, at, print_json, table
from salmon_revsmtp.cli.treating import (
    confirm,
    named_and_more,
    refuse_options,
    requests,
    say_what_became,
    show_message,
    yes_option,
)
from salmon_revsmtp.customer.report import counted
from salmon_revsmtp.foreign import printable

if TYPE_CHECKING:
    from salmon_revsmtp.cli.desk import Desk

__all__ = ["held"]

# The largest number that a store has for a message.
LARGEST_KEY = 2**63 - 1
STATES = {"waiting": "waiting", "aside": Toned("set aside", BAD)}


class _Key(click.IntRange):
    name = "key"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and not value.lstrip("-").isdecimal():
            shown = "`salmon-revsmtp provider held` shows them, and they are numbers"
            self.fail(printable(f"{value!r} is no key; {shown}"), param, ctx)
        return super().convert(value, param, ctx)


Key = _Key(1, LARGEST_KEY)


class Message(NamedTuple):
    """What has to be known of a message to ask before it goes."""

    key: int
    account: str
    size: int


# -- list and show --------------------------------------------------------------------------------


@click.group(invoke_without_command=True)
@click.option(
    "--account",
    metavar="NAME",
    shell_complete=account_names,
    help="Only what is held for this account.",
)
@click.option(
    "--limit", type=click.IntRange(1), default=50, show_default=True, help="How many at most."
)
@click.option(
    "--after", type=click.IntRange(0, LARGEST_KEY), default=0, help="Begin after this key."
)
@json_option
@with_options
def held(options: Options, account: str | None, limit: int, after: int, as_json: bool) -> None:
    """List the mail that is held, the oldest first.

    A message waits for its customer, or it is set aside: it was tried several times and the session
    broke each time. Then it goes out only when you say `provider held retry`. Each message has a
    key, the same as long as it is held.
    """
    from salmon_revsmtp.cli.desk import Desk

    context = click.get_current_context()
    if context.invoked_subcommand is not None:
        refuse_options(context, "account", "limit", "after", "as_json")
        return
    with Desk(options) as desk:
        if account is not None:
            _check_account(desk, account)
        asked = desk.ask("held", account=account, limit=limit + 1, after=after)
        rows = [answer["held"] for answer in asked]
    more = rows[limit:]
    del rows[limit:]
    if as_json:
        for row in rows:
            print_json(row)
        return
    columns = ("key", "account", "from", "to", "bytes", "arrived", "state", "strikes", "reason")
    table("Held mail", columns, [_cells(row) for row in rows], remarks=True)
    if more:
        click.echo(f"There are more; see them with --after {rows[-1]['key']}.", err=True)


def _check_account(desk: Desk, name: str) -> None:
    """Whether there is such an account, in the settings or with mail."""
    if not list(desk.ask("accounts", account=name)):
        raise stop(f"no account is named {name!r}; {desk.known_accounts}")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(row["key"]),
        row["account"],
        row["from"] or "<>",
        named_and_more(row["to"]),
        f"{row['size']:,}",
        at(row["arrived"]),
        STATES[row["state"]],
        str(row["strikes"]),
        row["reason"],
    )


@held.command()
@click.argument("key", type=Key)
@click.option("--content", is_flag=True, help="The whole message, and nothing else.")
@json_option
@with_options
def show(options: Options, key: int, content: bool, as_json: bool) -> None:
    """Show a message: its envelope, what becomes of it and why, and its header.

    With --content, the whole message as it will be sent: its octets go to a file or a pipe as they
    are, and what a terminal would obey is not shown on one. In JSON they are base64.
    """
    from salmon_revsmtp.cli.desk import Desk

    with Desk(options) as desk:
        answers = list(desk.ask("show", key=key, whole=content))
    if not answers:
        raise stop(f"no message with the key {key} is held")
    row, cut = answers[0]["held"], answers[0]["cut"]
    octets = b"".join(base64.b64decode(answer["octets"]) for answer in answers[1:])
    show_message(row, _lines(row), octets, content=content, cut=cut, as_json=as_json)


def _lines(row: Mapping[str, Any]) -> Iterable[str]:
    yield f"key      {row['key']}"
    yield f"account  {row['account']}"
    yield f"from     <{row['from']}>"
    yield from (f"to       <{one}>" for one in row["to"])
    yield f"bytes    {row['size']:,}"
    yield f"arrived  {at(row['arrived'])}"
    yield f"state    {STATES[row['state']]}"
    yield f"strikes  {row['strikes']}"
    yield f"reason   {row['reason'] or '-'}"


# -- retry, bounce, drop --------------------------------------------------------------------------

keys_argument = click.argument("keys", metavar="[KEY]...", nargs=-1, type=Key)
account_option = click.option(
    "--account",
    metavar="NAME",
    shell_complete=account_names,
    help="All that is held for this account.",
)


@held.command()
@keys_argument
@click.option(
    "--account",
    metavar="NAME",
    shell_complete=account_names,
    help="All that is set aside for this account.",
)
@json_option
@with_options
def retry(options: Options, keys: Sequence[int], account: str | None, as_json: bool) -> None:
    """Have messages tried again that were set aside.

    They go out the next time that their customer calls, or at once if a session is open.
    """
    from salmon_revsmtp.cli.desk import Desk

    _one_of(keys, account)
    with Desk(options) as desk:
        chosen = _choose(desk, keys, account, state="aside")
        if not chosen:
            _say_nothing_is_held(account, "set aside", as_json)
            return
        _act(desk, "retry", chosen, "to be tried again", as_json)


@held.command()
@keys_argument
@account_option
@yes_option
@json_option
@with_options
def bounce(
    options: Options, keys: Sequence[int], account: str | None, yes: bool, as_json: bool
) -> None:
    """Return messages to their senders.

    Each sender is told that its message was not delivered (RFC 3464), and the message is gone. If
    there is no sender, or it does not want to be told, or the message looks automatic, no one is
    told; you see of which messages. Notifications are limited: a message whose sender cannot be
    told in this hour stays.

    You are asked before. Without a terminal, say --yes.
    """
    question = "Return {what} to the sender? What is returned is not held any more."
    _end(options, "bounce", keys, account, yes, as_json, question, "returned")


@held.command()
@keys_argument
@account_option
@yes_option
@json_option
@with_options
def drop(
    options: Options, keys: Sequence[int], account: str | None, yes: bool, as_json: bool
) -> None:
    """Delete messages. No one is told.

    You are asked before. Without a terminal, say --yes.
    """
    question = "Delete {what}? No one is told, and it cannot be undone."
    _end(options, "drop", keys, account, yes, as_json, question, "deleted")


def _end(
    options: Options,
    action: str,
    keys: Sequence[int],
    account: str | None,
    yes: bool,
    as_json: bool,
    question: str,
    done: str,
) -> None:
    """Have messages go, if that is what is wanted."""
    from salmon_revsmtp.cli.desk import Desk

    _one_of(keys, account)
    desk = Desk(options)
    with desk:
        chosen = _choose(desk, keys, account)
    if not chosen:
        _say_nothing_is_held(account, "held", as_json)
        return
    # Whoever thinks about it does not keep the store, and what comes meanwhile is not meant.
    if not yes:
        confirm(question.format(what=_described(chosen)), action)
    with desk:
        _act(desk, action, chosen, done, as_json)


def _one_of(keys: Sequence[int], account: str | None) -> None:
    if bool(keys) == (account is not None):
        raise click.UsageError("name the KEYs of messages, or give --account")


def _choose(
    desk: Desk, keys: Sequence[int], account: str | None, state: str | None = None
) -> list[Message]:
    """The messages that are meant.  If any is not held, nothing is done."""
    if account is not None:
        _check_account(desk, account)
        rows = [answer["held"] for answer in desk.ask("held", account=account, state=state)]
    else:
        wanted = list(dict.fromkeys(keys))
        asked = (desk.ask("held", keys=part) for part in requests(wanted))
        rows = [answer["held"] for answers in asked for answer in answers]
        found = {row["key"] for row in rows}
        if missing := [str(key) for key in wanted if key not in found]:
            which = "keys" if len(missing) > 1 else "key"
            raise stop(f"no message is held with the {which} {', '.join(missing)}; nothing is done")
    return [Message(row["key"], row["account"], row["size"]) for row in rows]


def _described(chosen: Sequence[Message]) -> str:
    """How many messages, how large, and whose."""
    octets = sum(one.size for one in chosen)
    names = Counter(one.account for one in chosen)
    whose = ", ".join(
        name if len(names) == 1 else f"{name} ({number:,})" for name, number in names.most_common()
    )
    return f"{counted(len(chosen), octets)}, held for {whose}"


def _say_nothing_is_held(account: str | None, what: str, as_json: bool) -> None:
    if not as_json:
        click.echo(printable(f"nothing is {what} for {account}"))


def _act(desk: Desk, action: str, chosen: Sequence[Message], done: str, as_json: bool) -> None:
    """Do it, and say what became of each that is not simply done."""
    desk.prepare_to_act()
    messages = {one.key: one for one in chosen}
    asked = (desk.ask(action, keys=some) for some in requests(list(messages)))
    answers = (answer for some in asked for answer in some)
    treated = say_what_became(
        answers, action, done, as_json, lambda key: {"account": messages[key].account}
    )
    if treated and not as_json:
        click.echo(printable(f"{done}: {_described([messages[key] for key in treated])}"))
    if len(treated) < len(chosen):
        sys.exit(ATTENTION)
