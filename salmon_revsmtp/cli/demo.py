"""``demo``: the whole thing on one machine."""

from __future__ import annotations

import logging
import sys

import click

from salmon_revsmtp.cli.options import Options, terminal, with_options

__all__ = ["demo"]


@click.command()
@with_options
def demo(options: Options) -> None:
    """Show it all on this machine, without an account.

    It starts a provider that holds sample mail, and an example project that collects it, and to
    which more is passed on while its senders wait.
    """
    from salmon_revsmtp.demo import show

    if not options.verbose:
        terminal.setLevel(logging.CRITICAL)  # the table shows what the log would
    sys.exit(show.run(options.load_plugins()))
