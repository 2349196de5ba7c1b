"""``plugins``: what is installed."""

from __future__ import annotations

from dataclasses import asdict

import click

from salmon_revsmtp.cli.options import Options, json_option, with_options
from salmon_revsmtp.cli.output import print_json, table

__all__ = ["plugins"]


@click.command()
@json_option
@with_options
def plugins(options: Options, as_json: bool) -> None:
    """List the plugins, with their agent types and hooks.

    A plugin that could not be loaded is listed with the reason.
    """
    loaded = options.load_plugins().loaded
    if as_json:
        for plugin in loaded:
            print_json(asdict(plugin))
        return
    table(
        "Plugins",
        ("plugin", "distribution", "version", "agent types", "hooks"),
        [
            (
                plugin.plugin,
                plugin.distribution,
                plugin.version,
                ", ".join(plugin.agent_types) or "-",
                plugin.error or ", ".join(plugin.hooks) or "-",
            )
            for plugin in loaded
        ],
    )
