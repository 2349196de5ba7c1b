"""The command ``salmon-revsmtp`` (click, as Salmon's own command is).

Exit status: 0 when there is nothing for a person to do, 1 when any agent ended otherwise, 2 for
usage and settings errors.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from salmon_revsmtp.agents.base import Agent, Check
    from salmon_revsmtp.journal import Journal
    from salmon_revsmtp.plugins import Plugins
    from salmon_revsmtp.project import Project
    from salmon_revsmtp.report import Report
    from salmon_revsmtp.settings import Configuration

__all__ = ["cli", "main"]

ATTENTION = 1
USAGE = 2

# Seconds that what is being written has after ctrl-c.
LAST_WORDS = 1.0

_terminal = logging.StreamHandler()

Command = TypeVar("Command", bound=Callable[..., Any])


class Options:
    """The options that every command has, and that may stand before or behind its name."""

    def __init__(self) -> None:
        self.chdir: str = "."
        self.settings: str | None = None
        self.boot: str | None = None
        self.verbose = False
        self.plugins: Plugins | None = None

    def update(self, given: dict[str, Any]) -> None:
        for name in ("chdir", "settings", "boot", "verbose"):
            if value := given.pop(name):
                setattr(self, name, value)

    def load_plugins(self) -> Plugins:
        if self.plugins is None:
            from salmon_revsmtp.plugins import Plugins

            self.plugins = Plugins.load()
        return self.plugins

    def open(self) -> tuple[Project, Configuration]:
        """The project and its valid settings; usage errors end the command with status 2."""
        from salmon_revsmtp.project import Project, ProjectError
        from salmon_revsmtp.settings import SettingsError, load

        try:
            project = Project.open(self.chdir, self.settings)
            return project, load(project.settings, self.load_plugins())
        except ProjectError as error:
            raise _stop(str(error)) from None
        except SettingsError as error:
            raise _stop(*error.problems) from None

    def boot_project(self, project: Project) -> None:
        """Import the boot module."""
        from salmon_revsmtp.project import ProjectError

        try:
            project.boot(self.boot)
        except ProjectError as error:
            raise _stop(str(error)) from None

    def log_to_terminal(self) -> None:
        """Our own log lines go to standard error, whatever the project's logging does."""
        ours = logging.getLogger("salmon_revsmtp")
        if _terminal not in ours.handlers:
            ours.addHandler(_terminal)
            ours.setLevel(logging.INFO)
        _terminal.setFormatter(_Line(self.verbose))
        _terminal.setLevel(logging.DEBUG if self.verbose else logging.WARNING)
        # Every line of SMTP is for -v only, however verbose the project's own log is.
        level = logging.DEBUG if self.verbose else logging.INFO
        logging.getLogger("salmon_revsmtp.dialogue").setLevel(level)


class _Line(logging.Formatter):
    """A log record on the terminal: one line; the traceback is for ``-v`` and the project's log."""

    def __init__(self, verbose: bool) -> None:
        super().__init__("%(message)s")
        self._verbose = verbose

    def format(self, record: logging.LogRecord) -> str:
        if self._verbose or not record.exc_info or record.exc_info[1] is None:
            return super().format(record)
        error = record.exc_info[1]
        return f"{record.getMessage()}: {type(error).__name__}: {error}"


class _Stop(click.ClickException):
    exit_code = USAGE

    def show(self, file: Any = None) -> None:
        for line in self.message.splitlines():
            click.echo(f"error: {line}", err=True, file=file)


def _stop(*problems: str) -> _Stop:
    return _Stop("\n".join(problems))


def _shared(command: Command) -> Command:
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Show the SMTP dialogue."),
        click.option("--boot", metavar="MODULE", help="Boot module [default: config.boot]."),
        click.option(
            "--settings",
            metavar="MODULE",
            help="Settings module [default: SALMON_SETTINGS_MODULE or config.settings].",
        ),
        click.option("--chdir", metavar="DIR", help="The Salmon project's folder [default: .]."),
    ):
        command = option(command)
    return command


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hands a command its :class:`Options`, merged with those before its name."""

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        options = click.get_current_context().ensure_object(Options)
        options.update(given)
        options.log_to_terminal()
        return function(options, **given)

    return _shared(command)


@click.group()
@click.version_option(package_name="salmon-revsmtp", message="%(version)s")
@_with_options
def cli(options: Options) -> None:
    """Collect waiting mail into a Salmon project by reverse SMTP."""


_json = click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")


# -- agents ------------------------------------------------------------------------------------


@cli.command()
@_json
@_with_options
def agents(options: Options, as_json: bool) -> None:
    """List the mail collection agents."""
    from salmon_revsmtp.journal import Journal

    _, configuration = options.open()
    journal = Journal()
    rows = [_agent_row(agent, journal) for agent in configuration.agents]
    for name, at in _next_runs().items():
        for row in rows:
            if row["agent"] == name and row["enabled"]:
                row["next"] = _iso(at)
    if as_json:
        for row in rows:
            _print_json(row)
        return
    if not configuration.agents:
        click.echo("No agents: collection_agents in the settings is empty.")
        return
    _table(
        "Mail Collection Agents",
        ("name", "protocol", "server", "schedule", "last outcome", "next run"),
        [
            (
                str(row["title"]),
                agent.protocol,
                agent.address,
                _schedule(agent),
                str(row["outcome"] or "-"),
                str(row["next"] or "-"),
            )
            for agent, row in zip(configuration.agents, rows, strict=True)
        ],
    )


def _next_runs() -> dict[str, float]:
    """When the running server runs each agent next; empty if none runs."""
    from salmon_revsmtp.control import NoServer, ask

    try:
        [answer] = ask({"do": "state"})
    except (NoServer, OSError, ValueError):
        return {}
    return dict(answer.get("next", {}))


def _agent_row(agent: Agent, journal: Journal) -> dict[str, object]:
    kept = journal.state(agent.name).enabled
    enabled = agent.settings.enabled if kept is None else kept
    last = journal.history(agent.name, 1)
    return {
        "agent": agent.name,
        "title": agent.name if enabled else f"{agent.name} (Disabled)",
        "protocol": agent.protocol,
        "enabled": enabled,
        "server": getattr(agent.settings, "server", None),
        "port": getattr(agent.settings, "port", None),
        "every": agent.settings.every,
        "outcome": last[0].outcome if last else None,
        "ended": _iso(last[0].ended) if last else None,
        "next": None,
    }


def _schedule(agent: Agent) -> str:
    every = agent.settings.every
    if every is None:
        return "on demand"
    return "every minute" if every == 1 else f"every {every:g} minutes"


# -- collect -----------------------------------------------------------------------------------


@cli.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--all", "every_one", is_flag=True, help="All agents.")
@_json
@_with_options
def collect(options: Options, names: Sequence[str], every_one: bool, as_json: bool) -> None:
    """Collect waiting mail now."""
    if bool(names) == every_one:
        raise click.UsageError("name the agents to collect from, or give --all")
    project, configuration = options.open()
    chosen = configuration.agents if every_one else _named(configuration, names)
    reports = _ask_server(options, chosen, as_json)
    if reports is None:
        options.boot_project(project)
        reports = _collect(options, project, configuration, chosen, as_json)
    if not all(report.outcome.good for report in reports):
        sys.exit(ATTENTION)


def _named(configuration: Configuration, names: Sequence[str]) -> list[Agent]:
    chosen, unknown = [], []
    for name in dict.fromkeys(names):
        agent = configuration.agent(name)
        chosen.append(agent) if agent else unknown.append(name)
    if unknown:
        known = ", ".join(agent.name for agent in configuration.agents) or "none"
        raise _stop(*(f"no agent is named {name!r}; there are: {known}" for name in unknown))
    return [agent for agent in chosen if agent]


def _ask_server(options: Options, chosen: Sequence[Agent], as_json: bool) -> list[Report] | None:
    """Have the running server collect; ``None`` if there is none."""
    from salmon_revsmtp.control import NoServer, ask
    from salmon_revsmtp.progress import Progress
    from salmon_revsmtp.report import Outcome, Report

    reports, ended = [], False
    try:
        with Progress(live=not as_json and not options.verbose) as progress:
            names = [agent.name for agent in chosen]
            for answer in ask({"do": "collect", "agents": names}):
                if "report" in answer:
                    row = answer["report"]
                    report = Report(**{**row, "outcome": Outcome(row["outcome"])})
                    reports.append(report)
                    _print_json(row) if as_json else progress.done(report)
                elif "agent" in answer:
                    progress.update(answer["agent"], answer["messages"], answer["bytes"])
                elif "error" in answer:
                    raise click.ClickException(answer["error"])
                ended = "end" in answer
    except NoServer:
        return None
    except OSError as error:
        raise click.ClickException(f"asking the running server: {error}") from None
    if not ended:
        raise click.ClickException("the server ended before the collection did")
    return reports


def _collect(
    options: Options,
    project: Project,
    configuration: Configuration,
    chosen: Sequence[Agent],
    as_json: bool,
) -> list[Report]:
    import asyncio

    from salmon_revsmtp.progress import Progress
    from salmon_revsmtp.runtime import Runtime

    def show(report: Report) -> None:
        if as_json:
            _print_json(report.as_dict())
        else:
            progress.done(report)

    plugins = options.load_plugins()
    try:
        with (
            Progress(live=not as_json and not options.verbose) as progress,
            # Outside of the runtime, whose handlers end properly whatever becomes of the output.
            _in_a_thread(show) as show_in_a_thread,
            Runtime(configuration, plugins, lambda: project.settings.relay) as runtime,
        ):
            return asyncio.run(runtime.collect(chosen, progress.watch, show_in_a_thread))
    except KeyboardInterrupt:
        raise click.ClickException(
            "interrupted; what was not answered with 250 stays with the provider"
        ) from None


@contextlib.contextmanager
def _in_a_thread(show: Callable[[Report], None]) -> Iterator[Callable[[Report], None]]:
    """``show``, but in a thread: a pipe that nobody reads would hold up every session of every
    agent.  All are shown when this ends.  What ``show`` raises, as when the reader is gone, is
    raised with the next report or at the end."""
    import signal
    import threading
    import traceback
    from queue import SimpleQueue

    reports: SimpleQueue[Report | None] = SimpleQueue()
    errors: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            while report := reports.get():
                show(report)
        except BaseException as error:  # rich exits when the reader is gone
            errors.append(error)
        ended.set()

    def show_in_a_thread(report: Report) -> None:
        if errors:
            raise errors[0]
        reports.put(report)

    threading.Thread(target=work, name="output", daemon=True).start()
    try:
        try:
            yield show_in_a_thread
        finally:
            reports.put(None)
        ended.wait()
    except BaseException as error:
        # A second ctrl-c is no reason to wait any longer.
        with contextlib.suppress(KeyboardInterrupt):
            ended.wait(LAST_WORDS)
        if not ended.is_set():
            # A write into a full pipe ends with the process, and Python's own end waits for it.
            if isinstance(error, KeyboardInterrupt):
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.raise_signal(signal.SIGINT)
            traceback.print_exc()
            os._exit(ATTENTION)
        raise
    if errors:
        raise errors[0]


@cli.command()
@_with_options
def run(options: Options) -> None:
    """Run listeners and schedule in the foreground, without `salmon start`."""
    from salmon_revsmtp.attached import serve_in_foreground

    project, configuration = options.open()
    options.boot_project(project)
    plugins = options.load_plugins()
    try:
        serve_in_foreground(configuration, plugins, lambda: project.settings.relay)
    except OSError as error:
        raise click.ClickException(f"listening: {error}") from None


# -- enable, disable, history ------------------------------------------------------------------


@cli.command()
@click.argument("name")
@_with_options
def enable(options: Options, name: str) -> None:
    """Enable an agent, whatever the settings file says."""
    _set_enabled(options, name, True)


@cli.command()
@click.argument("name")
@_with_options
def disable(options: Options, name: str) -> None:
    """Disable an agent, whatever the settings file says."""
    _set_enabled(options, name, False)


def _set_enabled(options: Options, name: str, enabled: bool) -> None:
    from salmon_revsmtp.journal import DEFAULT_JOURNAL, Journal

    _, configuration = options.open()
    [agent] = _named(configuration, [name])
    if not Journal().set_enabled(agent.name, enabled):
        raise click.ClickException(f"{DEFAULT_JOURNAL} could not be written")
    click.echo(f"{agent.name} is {'enabled' if enabled else 'disabled'}")


@cli.command()
@click.argument("name", required=False)
@click.option("--limit", default=50, show_default=True, help="How many at most.")
@_json
@_with_options
def history(options: Options, name: str | None, limit: int, as_json: bool) -> None:
    """List past collections, newest first."""
    from salmon_revsmtp.journal import Journal

    _, configuration = options.open()
    if name is not None:
        _named(configuration, [name])
    entries = Journal().history(name, limit)
    if as_json:
        for entry in entries:
            _print_json(
                {
                    **asdict(entry),
                    "started": _iso(entry.started),
                    "ended": _iso(entry.ended),
                    "seconds": round(entry.ended - entry.started, 3),
                }
            )
        return
    _table(
        "Collections",
        ("started", "agent", "outcome", "messages", "refused", "seconds", "error"),
        [
            (
                _iso(entry.started),
                entry.agent,
                entry.outcome,
                str(entry.messages),
                str(entry.refused),
                f"{entry.ended - entry.started:.1f}",
                entry.error or "",
            )
            for entry in entries
        ],
    )


def _iso(seconds: float) -> str:
    """A time since the epoch, in the local zone, as ISO 8601 has it."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


# -- check ---------------------------------------------------------------------------------------


@cli.command()
@click.argument("name")
@_json
@_with_options
def check(options: Options, name: str, as_json: bool) -> None:
    """Try everything but collecting: dial, TLS, EHLO, AUTH."""
    import asyncio

    from salmon_revsmtp.agents.base import Check
    from salmon_revsmtp.report import CollectionError
    from salmon_revsmtp.service import Service

    _, configuration = options.open()
    [agent] = _named(configuration, [name])
    settings = configuration.services[agent.settings.service]
    service = Service(agent.settings.service, settings)
    outcome, result = None, Check()
    try:
        result = asyncio.run(agent.check(service))
    except CollectionError as error:
        outcome = error.outcome.value
        result.problems.append(str(error))
    if as_json:
        _print_json(
            {
                "agent": agent.name,
                "protocol": agent.protocol,
                "outcome": outcome,
                "error": result.problems[0] if outcome else None,
                **asdict(result),
            }
        )
    else:
        _show_check(agent, result, outcome)
    if outcome:
        sys.exit(ATTENTION)


def _show_check(agent: Agent, result: Check, outcome: str | None) -> None:
    if outcome is None:
        secured = f"by {result.tls}" if result.tls else "in the clear"
        login = f"logged in with {result.auth}" if result.auth else "not logged in"
        click.echo(f"{agent.title}: {agent.address} reached {secured}, {login}")
        click.echo("it offers: " + ", ".join(sorted(result.offers)))
    for problem in result.problems:
        click.echo(f"{outcome or 'warning'}: {problem}")
    if not result.problems:
        click.echo("nothing found that would fail")


# -- plugins ---------------------------------------------------------------------------------------


@cli.command()
@_json
@_with_options
def plugins(options: Options, as_json: bool) -> None:
    """List the plugins and their agent types."""
    loaded = options.load_plugins().loaded
    if as_json:
        for plugin in loaded:
            _print_json(asdict(plugin))
        return
    _table(
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


# -- demo ------------------------------------------------------------------------------------------


@cli.command()
@_with_options
def demo(options: Options) -> None:
    """Show it all on this machine: a provider with sample mail, and a project that collects it."""
    from salmon_revsmtp.demo import show

    if not options.verbose:
        _terminal.setLevel(logging.CRITICAL)  # the table shows what the log would
    sys.exit(show.run(options.load_plugins()))


# -- output ----------------------------------------------------------------------------------------


def _print_json(row: dict[str, object]) -> None:
    click.echo(json.dumps(row))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; into a pipe, lines with tabs between the columns."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            click.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: plugins may add commands, then click takes over."""
    options = Options()
    options.log_to_terminal()
    loaded = options.load_plugins()
    loaded.call("register_commands", cli=cli)
    cli.main(args=arguments, prog_name="salmon-revsmtp", obj=options)
