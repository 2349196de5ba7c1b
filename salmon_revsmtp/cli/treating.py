"""What the commands that show, retry and delete single messages have in common, whatever the
messages wait for."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import click

from salmon_revsmtp.cli.options import ATTENTION, stop
from salmon_revsmtp.cli.output import print_json
from salmon_revsmtp.foreign import printable, printable_lines

__all__ = [
    "confirm",
    "named_and_more",
    "refuse_options",
    "requests",
    "say_what_became",
    "show_message",
    "yes_option",
]

# Recipients that a row of a list names.
NAMED = 3

yes_option = click.option("--yes", is_flag=True, help="Do not ask.")

Key = TypeVar("Key")


def refuse_options(context: click.Context, *names: str) -> None:
    """A list's own options say nothing to the commands below it."""
    given = click.core.ParameterSource.COMMANDLINE
    for name in names:
        if context.get_parameter_source(name) is given:
            option = "--json" if name == "as_json" else f"--{name}"
            raise click.UsageError(f"{option} goes after {context.invoked_subcommand!r}")


def named_and_more(recipients: Sequence[str]) -> str:
    """The recipients of a row."""
    named = recipients[:NAMED]
    others = len(recipients) - len(named)
    return ", ".join(named) + (f" and {others} more" if others else "")


def show_message(
    row: dict[str, Any],
    lines: Iterable[str],
    octets: bytes,
    *,
    content: bool,
    cut: bool,
    as_json: bool,
) -> None:
    """Show what is known of a message (``row`` in JSON, else ``lines``) with its header, or with
    ``content`` the whole of it: as it is into a file or a pipe, harmless on a terminal."""
    if as_json:
        shown = {"content": base64.b64encode(octets).decode("ascii")}
        print_json({**row, **(shown if content else {"header": _text(octets)})})
    elif not content:
        for line in lines:
            click.echo(printable(line))
        click.echo("\n" + printable_lines(_text(octets).expandtabs()), nl=False)
        if cut:
            click.echo("(there is more of this header)")
    elif sys.stdout.isatty():
        click.echo(printable_lines(_text(octets.replace(b"\r\n", b"\n")).expandtabs()))
    else:
        sys.stdout.buffer.write(octets)
        sys.stdout.buffer.flush()


def _text(octets: bytes) -> str:
    return octets.decode("utf-8", "replace")


def requests(keys: Sequence[Key]) -> Iterator[Sequence[Key]]:
    """As many keys at a time as may be in a request."""
    from salmon_revsmtp.server.control import MOST_KEYS

    for start in range(0, len(keys), MOST_KEYS):
        yield keys[start : start + MOST_KEYS]


def confirm(question: str, action: str) -> None:
    """Ask before messages go; without a terminal, or with another answer than yes, nothing is
    done, and this ends the command."""
    if not sys.stdin.isatty():
        raise stop(f"{question} There is no terminal to ask: say {action} --yes. Nothing is done.")
    if not click.confirm(printable(question), err=True):
        click.echo("nothing is done", err=True)
        sys.exit(ATTENTION)


def say_what_became(
    answers: Iterable[Mapping[str, Any]],
    action: str,
    done: str,
    as_json: bool,
    more: Callable[[Any], Mapping[str, Any]] = lambda key: {},
) -> list[Any]:
    """Say of each message what is not simply done, as it comes; returns the keys of those that
    are.  ``more``: what JSON has of a message by its key."""
    treated = []
    for answer in answers:
        if answer["done"]:
            treated.append(answer["key"])
        if as_json:
            print_json({**more(answer["key"]), "action": action, **answer})
        elif answer["remark"]:
            what = f"{done}; " if answer["done"] else f"not {done}: "
            click.echo(printable(f"{answer['key']}: {what}{answer['remark']}"), err=True)
    return treated
