"""How a command says what went wrong: ``error: ...``, a line each, on standard error.

So does every command of a plugin, whatever it raises that a person can do something about.  Only a
bug has a traceback.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from salmon_revsmtp.cli.options import ATTENTION, Options
from salmon_revsmtp.foreign import printable

__all__ = ["Program", "complain", "warn"]

# Of click from 8.2 on: a command without arguments shows its help, which is no error.
_HELP: type[Exception] | tuple[()] = getattr(click.exceptions, "NoArgsIsHelpError", ())


# To the end, for a password may have anything in it.
_JOIN_LINE = re.compile(r"(revsmtp://).*", re.IGNORECASE | re.DOTALL)


def complain(text: str) -> None:
    """Say what went wrong; each line of ``text`` is one thing."""
    for line in text.splitlines():
        click.echo(f"error: {printable(line)}", err=True)


def warn(text: str) -> None:
    """Say what is not as it should be; the command goes on."""
    click.echo(f"warning: {printable(text)}", err=True)


class Program(click.Group):
    """The command with its subcommands; says in one form how any of them failed."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's."""
        run: Callable[..., Any]
        run = functools.partial(super().main, args, prog_name, complete_var, **extra)
        if not standalone_mode:
            return run(standalone_mode=False)
        options = extra.get("obj")
        with _in_words(options if isinstance(options, Options) else Options()):
            status: object = run(standalone_mode=False)
        sys.exit(status)

    def invoke(self, ctx: click.Context) -> None:
        """What a command returns is not its status, which click cannot tell from it."""
        super().invoke(ctx)


@contextlib.contextmanager
def _in_words(options: Options) -> Iterator[None]:
    """End the process with a sentence if that is what helps."""
    try:
        yield
    except click.UsageError as error:
        _show_usage_error(error)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        complain(error.format_message())
        sys.exit(error.exit_code)
    except click.Abort:
        complain("aborted")
        sys.exit(ATTENTION)
    except OSError as error:
        # Such as a file that may not be written, or a disk that is full.
        if options.verbose:
            traceback.print_exc()
        complain(_in_a_sentence(error))
        sys.exit(ATTENTION)


def _show_usage_error(error: click.UsageError) -> None:
    if _HELP and isinstance(error, _HELP):
        error.show()
        return
    text = error.format_message()
    if text[1:2].islower():  # click's own begin with a capital
        text = text[0].lower() + text[1:]
    complain(_without_join_line(text.rstrip(".")))
    if error.ctx is not None:
        click.echo(f"see: {error.ctx.command_path} --help", err=True)


def _without_join_line(text: str) -> str:
    """click quotes what is too much or does not fit, and a password may be in that."""
    found = _JOIN_LINE.search(text)
    if found is None:
        return text
    end = ")" if text.endswith(")") else ""
    return f"{text[: found.start()]}{found[1]}***{end}; a join line goes after --join"


def _in_a_sentence(error: OSError) -> str:
    """``Permission denied: run/x``."""
    reason = error.strerror or str(error) or type(error).__name__
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if _is_path(name)]
    return ": ".join([reason, *names])


def _is_path(name: object) -> bool:
    return isinstance(name, (str, bytes, os.PathLike))
