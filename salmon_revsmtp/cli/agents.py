"""``agents``, ``enable``, ``disable``, ``history``: what there is, and what has been."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from salmon_revsmtp.cli.completion import agent_names
from salmon_revsmtp.cli.errors import warn
from salmon_revsmtp.cli.options import Options, json_option, named, with_options
from salmon_revsmtp.cli.output import (
    GOOD,
    Toned,
    lasted,
    lasted_column,
    outcome,
    print_json,
    table,
    when,
)
from salmon_revsmtp.cli.since import Since

if TYPE_CHECKING:
    from salmon_revsmtp.customer.agent import Agent
    from salmon_revsmtp.server.agent_rows import Now

__all__ = ["agents", "disable", "enable", "history"]


@click.command()
@json_option
@with_options
def agents(options: Options, as_json: bool) -> None:
    """List the mail collection agents.

    For each agent you see how its last collection ended and, while a server runs, when the next
    one begins. An agent that does not collect has "(Disabled)" after its name.
    """
    from salmon_revsmtp.journal.collections import Journal
    from salmon_revsmtp.server.agent_rows import agent_rows

    _, configuration = options.open()
    journal = Journal()
    now = _running_state()
    rows = agent_rows(configuration.agents, journal, now)
    if as_json:
        for row in rows:
            print_json(row)
        return
    if not configuration.agents:
        click.echo("No agents: collection_agents in the settings is empty.")
        return
    table(
        "Mail Collection Agents",
        ("name", "protocol", "server", "schedule", "last outcome", "next run"),
        [
            (
                str(row["title"]),
                agent.protocol,
                agent.address,
                _schedule(agent),
                outcome(str(row["outcome"] or "-")),
                _next_run(agent.name, bool(row["enabled"]), now),
            )
            for agent, row in zip(configuration.agents, rows, strict=True)
        ],
    )


def _next_run(name: str, enabled: bool, now: Now) -> str:
    if name in now.push:
        return Toned(f"push since {when(now.push[name])}", GOOD)
    return when(now.next[name]) if enabled and name in now.next else "-"


def _running_state() -> Now:
    """What the running server says of its agents; nothing if none runs, or if it does not say."""
    from salmon_revsmtp.server.agent_rows import Now
    from salmon_revsmtp.server.control import GLANCE, NoServer, ask

    try:
        [answer] = ask({"do": "state"}, patience=GLANCE)
    except NoServer:
        return Now()
    except (OSError, ValueError) as error:
        warn(f"asking the running server: {error}")
        return Now()
    return Now.of(answer)


def _schedule(agent: Agent) -> str:
    every = agent.settings.every
    if every is None:
        return "on demand"
    return "every minute" if every == 1 else f"every {every:g} minutes"


@click.command()
@click.argument("name", shell_complete=agent_names)
@with_options
def enable(options: Options, name: str) -> None:
    """Enable an agent.

    This is kept in the journal and wins over the settings file. A running server follows it.
    """
    _set_enabled(options, name, True)


@click.command()
@click.argument("name", shell_complete=agent_names)
@with_options
def disable(options: Options, name: str) -> None:
    """Disable an agent: it does not collect until you enable it.

    This is kept in the journal and wins over the settings file. A running server follows it.
    """
    _set_enabled(options, name, False)


def _set_enabled(options: Options, name: str, enabled: bool) -> None:
    from salmon_revsmtp.journal.collections import Journal
    from salmon_revsmtp.journal.file import DEFAULT_JOURNAL

    _, configuration = options.open()
    [agent] = named(configuration, [name])
    if not Journal().set_enabled(agent.name, enabled):
        raise click.ClickException(f"{DEFAULT_JOURNAL} could not be written")
    _tell_server()
    click.echo(f"{agent.name} is {'enabled' if enabled else 'disabled'}")


def _tell_server() -> None:
    """Have a running server look at once; it does so every 15 seconds in any case."""
    from salmon_revsmtp.server.control import GLANCE, NoServer, ask

    with contextlib.suppress(NoServer, OSError, ValueError):
        list(ask({"do": "look"}, patience=GLANCE))


@click.command()
@click.argument("name", required=False, shell_complete=agent_names)
@click.option(
    "--since",
    type=Since(),
    metavar="TIME",
    help="Only what ended since then: 2d, 3h or 30m ago, or '2026-11-25 14:30' in local time.",
)
@click.option("--failed", is_flag=True, help="Only what did not end well.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="How many at most."
)
@json_option
@with_options
def history(
    options: Options,
    name: str | None,
    since: float | None,
    failed: bool,
    limit: int,
    as_json: bool,
) -> None:
    """List past collections, newest first.

    Times are local. A collection that was interrupted is there too, with what it had brought; one
    whose process was killed is not. The journal keeps them for 90 days.
    """
    from salmon_revsmtp.journal.collections import Journal
    from salmon_revsmtp.net.outcome import Outcome
    from salmon_revsmtp.server.agent_rows import collection_row

    _, configuration = options.open()
    if name is not None:
        named(configuration, [name])
    good = [one.value for one in Outcome if one.good]
    entries = Journal().history(name, limit, since, good if failed else ())
    if as_json:
        for entry in entries:
            print_json(collection_row(entry))
        return
    table(
        "Collections",
        ("started", "agent", "outcome", "messages", "refused", lasted_column(), "error"),
        [
            (
                when(entry.started),
                entry.agent,
                outcome(entry.outcome),
                str(entry.messages),
                str(entry.refused),
                lasted(entry.ended - entry.started),
                entry.error or "",
            )
            for entry in entries
        ],
        remarks=True,
    )
