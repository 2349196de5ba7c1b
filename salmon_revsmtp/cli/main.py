"""The command ``salmon-revsmtp`` (click, as Salmon's own command is).

Exit status: 0 when there is nothing for a person to do, 1 when any agent ended otherwise, 2 for
usage and settings errors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from salmon_revsmtp.cli.agents import agents, disable, enable, history
from salmon_revsmtp.cli.collect import check, collect, run
from salmon_revsmtp.cli.demo import demo
from salmon_revsmtp.cli.init import init
from salmon_revsmtp.cli.options import Options, with_options
from salmon_revsmtp.cli.plugins import plugins
from salmon_revsmtp.cli.provider import provider
from salmon_revsmtp.cli.status import status
from salmon_revsmtp.cli.undelivered import undelivered, unsent
from salmon_revsmtp.foreign import escape_what_cannot_be_shown

__all__ = ["cli", "main"]


@click.group()
@click.version_option(package_name="salmon-revsmtp", message="%(version)s")
@with_options
def cli(options: Options) -> None:
    """Collect waiting mail into a Salmon project by reverse SMTP."""


for _command in (
    init,
    agents,
    collect,
    check,
    enable,
    disable,
    history,
    run,
    provider,
    plugins,
    demo,
):
    cli.add_command(_command)
for _command in (status, undelivered, unsent):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: plugins may add commands, then click takes over."""
    for stream in (sys.stdout, sys.stderr):
        escape_what_cannot_be_shown(stream)
    options = Options()
    options.log_to_terminal()
    loaded = options.load_plugins()
    loaded.call("register_commands", cli=cli)
    cli.main(args=arguments, prog_name="salmon-revsmtp", obj=options)
