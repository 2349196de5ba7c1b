"""``status``: what needs a person, and what there is."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from salmon_revsmtp.cli.errors import warn
from salmon_revsmtp.cli.options import ATTENTION, Options, json_option, with_options
from salmon_revsmtp.cli.output import BAD, BOLD, Toned, at, folded, print_json, shown
from salmon_revsmtp.customer.report import counted
from salmon_revsmtp.foreign import printable

if TYPE_CHECKING:
    from salmon_revsmtp.server.configuration import Configuration
    from salmon_revsmtp.server.project import Project

__all__ = ["status"]

INDENT = "  "
# Columns of a line that is read easily.
WIDEST = 100

Row = Mapping[str, Any]


@click.command()
@json_option
@with_options
def status(options: Options, as_json: bool) -> None:
    """See whether anything needs you: the server, the agents, the provider, the queues.

    What needs a person comes first, with what to try, and the exit status is 1 then. A server that
    runs is asked, and has to answer within two seconds. Without one you see what the disk and the
    journal say.
    """
    project, configuration = options.open()
    there, rows = _ask_server()
    if not rows:
        rows = _look(configuration, project, silent=there)
    if as_json:
        for row in rows:
            print_json(dict(row))
    elif sys.stdout.isatty():
        _show(rows)
    else:
        for row in rows:
            click.echo("\t".join(printable(cell) for cell in _cells(row)))
    if any(row["status"] == "trouble" for row in rows):
        sys.exit(ATTENTION)


def _ask_server() -> tuple[bool, Sequence[Row]]:
    """Whether a server runs, and all that it says; nothing if it does not answer in time, or does
    not know what it is asked."""
    from salmon_revsmtp.server.control import GLANCE, NoServer, ask

    rows: list[Row] = []
    try:
        for answer in ask({"do": "status"}, patience=GLANCE):
            if "error" in answer:
                text = answer["error"] + OLDER * (answer["error"] == "no such request")
                warn(f"the running server: {text}")
                break
            if "row" in answer:
                rows.append(answer["row"])
            if "end" in answer:
                return True, rows
    except NoServer:
        return False, ()
    except (OSError, ValueError) as error:
        warn(f"asking the running server: {error}")
    return True, ()


def _look(configuration: Configuration, project: Project, silent: bool) -> Sequence[Row]:
    from salmon_revsmtp.server.health import Health

    return Health(configuration, project.folder).look(None, silent).rows


# -- for a person ---------------------------------------------------------------------------------

OLDER = "; it is older than this command: restart it"

HEADINGS = {
    "trouble": "Needs you",
    "server": "Server",
    "agent": "Agents",
    "provider": "Provider",
    "queue": "Queues",
}


def _show(rows: Sequence[Row]) -> None:
    """On a terminal: trouble first, and nothing wider than it."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    if not any(row["status"] == "trouble" for row in rows):
        _heading("Nothing needs you.")
    for kind, heading in HEADINGS.items():
        these = [_cells(row) for row in rows if row["status"] == kind]
        if not these:
            continue
        _heading(heading, BAD if kind == "trouble" else BOLD)
        label = 0 if kind == "trouble" else max(len(name) for _, name, *_ in these)
        for _, name, *texts in these:
            indent = INDENT + (" " * (label + 2) if label else "")
            lines = folded(printable("; ".join(filter(None, texts))), width - len(indent), indent)
            if label:
                lines[0] = f"{INDENT}{printable(name):<{label}}  {lines[0].lstrip()}"
            click.echo("\n".join(lines))


def _heading(text: str, tone: str = BOLD) -> None:
    click.echo(shown(Toned(text, tone)))


def _cells(row: Row) -> tuple[str, ...]:
    """What it is about, its name, and what is said of it."""
    kind = row["status"]
    if kind == "trouble":
        since = f"since {at(row['since'])}" if row["since"] else ""
        return kind, row["trouble"], row["text"], *([since] if not sys.stdout.isatty() else [])
    if kind == "agent":
        title = row["agent"] + ("" if row["enabled"] else " (Disabled)")
        return kind, title, "; ".join(_of_agent(row))
    if kind == "provider":
        return kind, "", "; ".join(_of_provider(row))
    if kind == "queue":
        oldest = f", the oldest since {at(row['oldest'])}" if row["oldest"] else ""
        return kind, row["queue"], f"{_number(row['messages'])}{oldest} ({row['folder']})"
    return kind, "", _of_server(row)


def _of_server(row: Row) -> str:
    if not row["up"]:
        return "not running"
    if not row["answers"]:
        return "running, and not answering"
    return f"up since {at(row['since'])}, version {row['version']}, process {row['pid']}"


def _of_agent(row: Row) -> Iterator[str]:
    if row["push"]:
        yield f"push session since {at(row['push'])}"
    elif row["running"]:
        yield "collecting now"
    if row["failing_since"]:
        yield f"fails since {at(row['failing_since'])}"
    if row["outcome"] and not row["push"]:
        yield f"last {row['outcome']}, {at(row['ended'])}"
    if row["next"]:
        yield f"next {at(row['next'])}"
    if not any(row[key] for key in ("push", "running", "failing_since", "outcome", "next")):
        yield "has not collected yet"


def _of_provider(row: Row) -> Iterator[str]:
    if row["accounts"] is None:
        yield f"{row['online']:,} account{'' if row['online'] == 1 else 's'} online"
    else:
        yield f"{row['online']:,} of {row['accounts']:,} accounts online"
    oldest = f", the oldest since {at(row['oldest'])}" if row["oldest"] else ""
    yield f"{counted(row['messages'], row['bytes'])} held{oldest}"
    if row["aside"]:
        yield f"{row['aside']:,} set aside"


def _number(messages: int) -> str:
    return f"{messages:,} message{'' if messages == 1 else 's'}"
