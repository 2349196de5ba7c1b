"""The command ``salmon-revsmtp`` (click, as Salmon's own command is).

Exit status: 0 when there is nothing for a person to do, 1 when any agent ended otherwise, 2 for
usage and settings errors.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence

import click

from salmon_revsmtp.cli.completion import completing, prepare, quiet, scripting
from salmon_revsmtp.cli.errors import Program
from salmon_revsmtp.cli.options import Options, with_options
from salmon_revsmtp.foreign import escape_what_cannot_be_shown

__all__ = ["cli", "main"]


# The module of each command below this package; it is imported when the command is needed.
MODULES = {
    **dict.fromkeys(("agents", "disable", "enable", "history"), "agents"),
    **dict.fromkeys(("collect", "run"), "collect"),
    **dict.fromkeys(("undelivered", "unsent"), "undelivered"),
    **{name: name for name in ("check", "demo", "init", "plugins", "provider", "status")},
}


class Ours(Program):
    """The commands of this package, and what plugins add."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*MODULES, *self.commands})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.commands or cmd_name not in MODULES:
            return super().get_command(ctx, cmd_name)
        module = importlib.import_module(f"salmon_revsmtp.cli.{MODULES[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
        self.add_command(command, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            for name in MODULES:  # one of them may have been meant
                self.get_command(ctx, name)
            return super().resolve_command(ctx, args)


@click.group(cls=Ours, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="salmon-revsmtp", message="%(version)s")
@with_options
def cli(options: Options) -> None:
    """Collect waiting mail into a Salmon project by reverse SMTP."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: plugins may add commands, then click takes over."""
    for stream in (sys.stdout, sys.stderr):
        escape_what_cannot_be_shown(stream)
    if completing():
        prepare()
    options = Options()
    options.log_to_terminal()
    if not scripting():
        with quiet() if completing() else contextlib.nullcontext():
            options.load_plugins().call("register_commands", cli=cli)
    cli.main(args=arguments, prog_name="salmon-revsmtp", obj=options)
