"""``collect``, ``check``, ``run``: do it now, try it, let it run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from salmon_revsmtp.cli.options import ATTENTION, Options, json_option, named, with_options
from salmon_revsmtp.cli.output import in_a_thread, print_json
from salmon_revsmtp.foreign import printable

if TYPE_CHECKING:
    from salmon_revsmtp.customer.agent import Agent, Check
    from salmon_revsmtp.customer.report import Report
    from salmon_revsmtp.server.configuration import Configuration
    from salmon_revsmtp.server.project import Project

__all__ = ["check", "collect", "run"]

INTERRUPTED = "interrupted; what was not answered with 250 stays with the provider"


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--all", "every_one", is_flag=True, help="All agents.")
@json_option
@with_options
def collect(options: Options, names: Sequence[str], every_one: bool, as_json: bool) -> None:
    """Collect waiting mail now.

    Name one or more agents, or give --all. You see one report for each agent.

    If a server runs in this project (`salmon start` or `salmon-revsmtp run`), it collects, and this
    command shows its progress. If not, this command collects by itself.
    """
    if bool(names) == every_one:
        raise click.UsageError("name the agents to collect from, or give --all")
    project, configuration = options.open()
    chosen = configuration.agents if every_one else named(configuration, names)
    reports = _ask_server(options, chosen, as_json)
    if reports is None:
        options.boot_project(project)
        reports = _collect(options, project, configuration, chosen, as_json)
    if not all(report.outcome.good for report in reports):
        sys.exit(ATTENTION)


def _ask_server(options: Options, chosen: Sequence[Agent], as_json: bool) -> list[Report] | None:
    """Have the running server collect; ``None`` if there is none."""
    from salmon_revsmtp.cli.progress import Progress
    from salmon_revsmtp.customer.report import Report
    from salmon_revsmtp.net.outcome import Outcome
    from salmon_revsmtp.server.control import NoServer, ask

    reports, ended = [], False
    try:
        with Progress(live=not as_json and not options.verbose) as progress:
            names = [agent.name for agent in chosen]
            for answer in ask({"do": "collect", "agents": names}):
                if "report" in answer:
                    row = answer["report"]
                    report = Report(**{**row, "outcome": Outcome(row["outcome"])})
                    reports.append(report)
                    print_json(row) if as_json else progress.done(report)
                elif "agent" in answer:
                    progress.update(
                        answer["agent"],
                        (answer["messages"], answer["bytes"]),
                        (answer["doing"], answer["seconds"]),
                    )
                elif "error" in answer:
                    raise click.ClickException(printable(answer["error"]))
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
    import signal

    from salmon_revsmtp.cli.progress import Progress
    from salmon_revsmtp.server.collector import Collector
    from salmon_revsmtp.server.eventloop import run

    def show(report: Report) -> None:
        if as_json:
            print_json(report.as_dict())
        else:
            progress.done(report)

    plugins = options.load_plugins()
    try:
        with (
            Progress(live=not as_json and not options.verbose) as progress,
            # Outside of the collector, whose handlers end properly whatever becomes of the output.
            in_a_thread(show) as show_in_a_thread,
            Collector(
                configuration, plugins, lambda: project.settings.relay, project.folder
            ) as collector,
        ):
            signals = (signal.SIGINT, signal.SIGTERM)
            collecting = collector.collect(chosen, progress.watch, show_in_a_thread, signals)
            reports = run(collecting)
    except KeyboardInterrupt:
        raise click.ClickException(INTERRUPTED) from None
    if collector.interrupted:
        raise click.ClickException(INTERRUPTED)
    return reports


@click.command()
@click.argument("name", required=False)
@json_option
@with_options
def check(options: Options, name: str | None, as_json: bool) -> None:
    """See whether it would work, without asking for mail.

    With the NAME of an agent, that agent connects, does TLS, greets the server and logs in. Then it
    says what the server offers and what would fail.

    Without a NAME you see whether the server can start: the settings, the boot module and the
    addresses to listen on. `salmon start` goes into the background before it looks at them, so it
    cannot say on the terminal what is wrong with them.
    """
    if name is None:
        _check_start(options, as_json)
    else:
        _check_agent(options, name, as_json)


def _check_start(options: Options, as_json: bool) -> None:
    import asyncio

    from salmon_revsmtp.server.control import running
    from salmon_revsmtp.service.listening import address_problems

    project, configuration = options.open()
    runs = running()
    options.boot_project(project, listen=not runs)
    problems = [] if runs else asyncio.run(address_problems(configuration.services))
    if as_json:
        print_json({"ready": not problems, "running": runs, "problems": problems})
    else:
        for problem in problems:
            click.echo(f"failed: {printable(problem)}")
        if not problems:
            click.echo("the server is running" if runs else "the server can start")
    if problems:
        sys.exit(ATTENTION)


def _check_agent(options: Options, name: str, as_json: bool) -> None:
    from salmon_revsmtp.customer.agent import Check
    from salmon_revsmtp.net.outcome import CollectionError, NotTrusted
    from salmon_revsmtp.server.eventloop import run
    from salmon_revsmtp.service.policy import Service

    _, configuration = options.open()
    [agent] = named(configuration, [name])
    settings = configuration.services[agent.settings.service]
    service = Service(agent.settings.service, settings)
    outcome, result = None, Check()
    try:
        result = run(agent.check(service))
    except CollectionError as error:
        outcome = error.outcome.value
        result.problems.append(str(error))
        if isinstance(error, NotTrusted):
            result.fingerprint = error.fingerprint
    if as_json:
        print_json(
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
        click.echo("it offers: " + printable(", ".join(sorted(result.offers))))
        if result.fingerprint:
            click.echo(f"its certificate has the fingerprint {result.fingerprint}")
    for problem in result.problems:
        click.echo(f"{outcome or 'warning'}: {printable(problem)}")
    if not result.problems:
        click.echo("nothing found that would fail")


@click.command()
@with_options
def run(options: Options) -> None:
    """Run agents and listening services in the foreground.

    This is the server without Salmon's own receiver. `salmon start` runs both.
    """
    from salmon_revsmtp.server.attach import serve_in_foreground

    project, configuration = options.open()
    options.boot_project(project)
    plugins = options.load_plugins()
    try:
        serve_in_foreground(configuration, plugins, lambda: project.settings.relay, project.folder)
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from None
