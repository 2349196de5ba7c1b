"""``undelivered`` and ``unsent``: list, show, retry and drop mail that waits for a person."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from salmon_revsmtp.cli.desk import Asking
from salmon_revsmtp.cli.errors import warn
from salmon_revsmtp.cli.options import ATTENTION, Options, json_option, stop, with_options
from salmon_revsmtp.cli.output import at, print_json, table
from salmon_revsmtp.cli.treating import (
    confirm,
    named_and_more,
    refuse_options,
    requests,
    say_what_became,
    show_message,
    yes_option,
)
from salmon_revsmtp.customer.report import counted, iso

if TYPE_CHECKING:
    from salmon_revsmtp.delivery.waiting import Message, WaitingMail
    from salmon_revsmtp.server.collector import Collector
    from salmon_revsmtp.server.control import Answers

__all__ = ["undelivered", "unsent"]

COLUMNS = ("key", "since", "from", "to", "bytes", "subject", "reason")

limit_option = click.option(
    "--limit", type=click.IntRange(1), default=50, show_default=True, help="How many at most."
)
after_option = click.option("--after", metavar="KEY", help="Begin after this key.")
keys_argument = click.argument("keys", metavar="[KEY]...", nargs=-1)
all_option = click.option("--all", "every_one", is_flag=True, help="All messages.")
content_option = click.option(
    "--content", is_flag=True, help="The whole message, and nothing else."
)


class _Place(Asking):
    """Where mail waits for a person, and who tries it again."""

    title: str
    what: str

    def _answers(self, collector: Collector, request: dict[str, Any]) -> Answers:
        from salmon_revsmtp.server.waiting_requests import WaitingRequests

        return WaitingRequests(collector).answer(request)

    def waiting(self) -> WaitingMail:
        """The mail."""
        raise NotImplementedError

    def reason(self, message: Message) -> str:
        """Why it waits."""
        return message.reason

    def row(self, message: Message) -> dict[str, Any]:
        """A message as JSON has it."""
        from salmon_revsmtp.server.waiting_rows import waiting_row

        return waiting_row(message, self.reason(message))


class _Undelivered(_Place):
    about = "undelivered"
    title = "Undelivered mail"
    what = "undelivered"

    def waiting(self) -> WaitingMail:
        """Where ``Router.UNDELIVERABLE_QUEUE`` of the boot module points, or ``run/undeliverable``
        if that cannot be known."""
        from salmon_revsmtp.delivery.waiting import WaitingMail

        try:
            self.prepare_to_act()
        except click.ClickException as error:
            warn(f"{error.message}; this is what is in run/undeliverable")
            return WaitingMail(Path("run/undeliverable").absolute())
        [answer] = self.ask("folder")
        if answer["folder"] is None:
            raise stop(
                "Router.UNDELIVERABLE_QUEUE of the boot module is in no folder, so what is in it "
                "cannot be listed; a salmon.queue.Queue can"
            )
        return WaitingMail(Path(answer["folder"]))


class _Unsent(_Place):
    about = "unsent"
    title = "Unsent notifications"
    what = "unsent"
    _reasons: Mapping[str, str] | None = None

    def waiting(self) -> WaitingMail:
        from salmon_revsmtp.delivery.outbox import UNSENT
        from salmon_revsmtp.delivery.waiting import WaitingMail

        return WaitingMail(self._project.folder / UNSENT, shared=False)

    def reason(self, message: Message) -> str:
        from salmon_revsmtp.delivery.outbox import UNSENT, Outbox

        if self._reasons is None:
            self._reasons = Outbox(lambda: None, self._project.folder / UNSENT).reasons()
        return self._reasons.get(message.key, "")


# -- undelivered ----------------------------------------------------------------------------------


@click.group(invoke_without_command=True)
@limit_option
@after_option
@json_option
@with_options
def undelivered(options: Options, limit: int, after: str | None, as_json: bool) -> None:
    """List the mail that no handler has taken, the oldest first.

    It was answered with 250, and it is safe: no route took it, a handler raised an exception or
    took too long, or a sender could not be told that it was refused. You see why, and have it
    tried again when the reason is gone. Each message has a key, the same as long as it is there.

    Mail that Salmon's own receiver took is here, too. Salmon does not keep its envelope, so sender
    and recipient are those of its header, and it is tried again only for whom you say.
    """
    context = click.get_current_context()
    if context.invoked_subcommand is not None:
        refuse_options(context, "limit", "after", "as_json")
        return
    with _Undelivered(options) as place:
        _list(place, limit, after, as_json)


@undelivered.command("show")
@click.argument("key")
@content_option
@json_option
@with_options
def show_undelivered(options: Options, key: str, content: bool, as_json: bool) -> None:
    """Show a message: its envelope, why it is here, and its header.

    With --content, the whole message as the handlers would get it: its octets go to a file or a
    pipe as they are, and what a terminal would obey is not shown on one. In JSON they are base64.
    """
    with _Undelivered(options) as place:
        _show(place, key, content, as_json)


@undelivered.command("retry")
@keys_argument
@all_option
@click.option("--to", metavar="ADDRESS", help="For whom it is, if its envelope was not kept.")
@json_option
@with_options
def retry_undelivered(
    options: Options, keys: Sequence[str], every_one: bool, to: str | None, as_json: bool
) -> None:
    """Take messages through the handlers again.

    If a server runs in this project, its handlers take them; restart it first if you have changed
    a handler. If not, this command does it. A message is deleted when its handlers have returned.
    What fails again stays, with the new reason; no one is told.
    """
    with _Undelivered(options) as place:
        _act(place, "retry", "delivered", keys, every_one, as_json, to=to)


@undelivered.command("drop")
@keys_argument
@all_option
@yes_option
@json_option
@with_options
def drop_undelivered(
    options: Options, keys: Sequence[str], every_one: bool, yes: bool, as_json: bool
) -> None:
    """Delete messages. No one is told.

    You are asked before. Without a terminal, say --yes.
    """
    with _Undelivered(options) as place:
        _drop(place, keys, every_one, yes, as_json)


# -- unsent ---------------------------------------------------------------------------------------


@click.group(invoke_without_command=True)
@limit_option
@after_option
@json_option
@with_options
def unsent(options: Options, limit: int, after: str | None, as_json: bool) -> None:
    """List the notifications that the relay has not taken yet, the oldest first.

    They are tried again every five minutes while a server runs. After five days, or when the relay
    refuses one for good, it is undelivered.
    """
    context = click.get_current_context()
    if context.invoked_subcommand is not None:
        refuse_options(context, "limit", "after", "as_json")
        return
    with _Unsent(options) as place:
        _list(place, limit, after, as_json)


@unsent.command("show")
@click.argument("key")
@content_option
@json_option
@with_options
def show_unsent(options: Options, key: str, content: bool, as_json: bool) -> None:
    """Show a notification: whom it is for, what the relay said the last time, and its header.

    With --content, the whole notification.
    """
    with _Unsent(options) as place:
        _show(place, key, content, as_json)


@unsent.command("retry")
@keys_argument
@all_option
@json_option
@with_options
def retry_unsent(options: Options, keys: Sequence[str], every_one: bool, as_json: bool) -> None:
    """Give notifications to the relay now."""
    with _Unsent(options) as place:
        _act(place, "retry", "sent", keys, every_one, as_json)


@unsent.command("drop")
@keys_argument
@all_option
@yes_option
@json_option
@with_options
def drop_unsent(
    options: Options, keys: Sequence[str], every_one: bool, yes: bool, as_json: bool
) -> None:
    """Delete notifications. Those whom they are for are not told.

    You are asked before. Without a terminal, say --yes.
    """
    with _Unsent(options) as place:
        _drop(place, keys, every_one, yes, as_json)


def _one_of(keys: Sequence[str], every_one: bool) -> None:
    if bool(keys) == every_one:
        raise click.UsageError("name the KEYs of messages, or give --all")


# -- both -----------------------------------------------------------------------------------------


def _list(place: _Place, limit: int, after: str | None, as_json: bool) -> None:
    from salmon_revsmtp.server import waiting_rows

    waiting = place.waiting()
    try:
        keys = waiting_rows.after(waiting, after)
    except LookupError:
        raise stop(f"no message is {place.what} with the key {after}") from None
    found = (waiting.find(key) for key in keys[:limit])
    messages = [one for one in found if one is not None]
    if as_json:
        for one in messages:
            print_json(place.row(one))
        return
    if messages or not sys.stdout.isatty():
        rows = [_cells(one, place.reason(one)) for one in messages]
        table(place.title, COLUMNS, rows, remarks=True)
    else:
        click.echo(f"nothing is {place.what}")
    if len(keys) > limit:
        click.echo(f"There are more; see them with --after {keys[limit - 1]}.", err=True)


def _cells(message: Message, reason: str) -> tuple[str, ...]:
    return (
        message.key,
        at(iso(message.since)),
        message.sender or "<>",
        named_and_more(message.recipients) or "-",
        f"{message.size:,}",
        message.subject,
        reason,
    )


def _show(place: _Place, key: str, content: bool, as_json: bool) -> None:
    from salmon_revsmtp.delivery.trace import header_end

    waiting = place.waiting()
    message, stored = waiting.find(key), waiting.read(key)
    if message is None or stored is None:
        raise stop(f"no message is {place.what} with the key {key}")
    _, _, octets = waiting.unpack(key, stored)
    show_message(
        place.row(message),
        _lines(message, place.reason(message)),
        octets if content else octets[: header_end(octets)],
        content=content,
        cut=False,
        as_json=as_json,
    )


def _lines(message: Message, reason: str) -> Iterable[str]:
    yield f"key      {message.key}"
    yield f"since    {at(iso(message.since))}"
    yield f"from     <{message.sender}>"
    yield from (f"to       <{one}>" for one in message.recipients)
    yield f"bytes    {message.size:,}"
    yield f"reason   {reason or '-'}"
    if not message.envelope:
        yield "envelope not kept; sender and recipients are those of the header"


def _chosen(
    place: _Place, waiting: WaitingMail, keys: Sequence[str], every_one: bool
) -> dict[str, int]:
    """The messages that are meant, and their sizes.  If any is not there, nothing is done."""
    wanted = waiting.keys() if every_one else list(dict.fromkeys(keys))
    sizes = {key: waiting.size(key) for key in wanted}
    missing = [key for key, size in sizes.items() if size is None]
    if missing and not every_one:
        which = "keys" if len(missing) > 1 else "key"
        named = ", ".join(missing)
        raise stop(f"no message is {place.what} with the {which} {named}; nothing is done")
    return {key: size for key, size in sizes.items() if size is not None}


def _drop(place: _Place, keys: Sequence[str], every_one: bool, yes: bool, as_json: bool) -> None:
    from salmon_revsmtp.server.waiting_rows import dropped

    _one_of(keys, every_one)
    waiting = place.waiting()
    chosen = _chosen(place, waiting, keys, every_one)
    if not chosen:
        _say_nothing(place, as_json)
        return
    if not yes:
        what = _described(chosen)
        confirm(f"Delete {what}, {place.what}? No one is told, and it cannot be undone.", "drop")
    answers = (dropped(waiting, key) for key in chosen)
    _tell(answers, "drop", "deleted", chosen, as_json)


def _act(
    place: _Place,
    action: str,
    done: str,
    keys: Sequence[str],
    every_one: bool,
    as_json: bool,
    **more: Any,
) -> None:
    _one_of(keys, every_one)
    waiting = place.waiting()
    chosen = _chosen(place, waiting, keys, every_one)
    if not chosen:
        _say_nothing(place, as_json)
        return
    place.prepare_to_act()
    asked = (place.ask(action, keys=list(some), **more) for some in requests(list(chosen)))
    answers = (answer for some in asked for answer in some if "key" in answer)
    _tell(answers, action, done, chosen, as_json)


def _tell(
    answers: Iterable[Mapping[str, Any]],
    action: str,
    done: str,
    chosen: Mapping[str, int],
    as_json: bool,
) -> None:
    treated = say_what_became(answers, action, done, as_json)
    if treated and not as_json:
        click.echo(f"{done}: {_described({key: chosen[key] for key in treated})}")
    if len(treated) < len(chosen):
        sys.exit(ATTENTION)


def _described(chosen: Mapping[str, int]) -> str:
    return counted(len(chosen), sum(chosen.values()))


def _say_nothing(place: _Place, as_json: bool) -> None:
    if not as_json:
        click.echo(f"nothing is {place.what}")
