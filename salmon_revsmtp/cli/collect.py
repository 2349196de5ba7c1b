"""``collect``, ``run``: do it now, let it run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from salmon_revsmtp.cli.asking import ask_server
from salmon_revsmtp.cli.completion import agent_names
from salmon_revsmtp.cli.errors import warn
from salmon_revsmtp.cli.options import ATTENTION, Options, json_option, named, with_options
from salmon_revsmtp.cli.output import in_a_thread, print_json

if TYPE_CHECKING:
    from salmon_revsmtp.customer.agent import Agent
    from salmon_revsmtp.customer.report import Report
    from salmon_revsmtp.server.configuration import Configuration
    from salmon_revsmtp.server.project import Project

__all__ = ["collect", "run"]

INTERRUPTED = "interrupted; what was not answered with 250 stays with the provider"


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=agent_names)
@click.option("--all", "every_one", is_flag=True, help="All agents.")
@json_option
@with_options
def collect(options: Options, names: Sequence[str], every_one: bool, as_json: bool) -> None:
    """Collect waiting mail now.

    Name one or more agents, or give --all. You see one report for each agent.

    If a server runs in this project (`salmon start` or `salmon-revsmtp run`), it collects, and this
    command shows its progress, with -v its dialogue. Ctrl-c then ends this command only: the server
    goes on. If no server runs, this command collects by itself. Then ctrl-c ends the
    collection: messages that have come already are finished, for 10 seconds at most, and no new one
    is taken. A second ctrl-c ends it at once.
    """
    if bool(names) == every_one:
        raise click.UsageError("name the agents to collect from, or give --all")
    project, configuration = options.open()
    for warning in configuration.warnings:
        warn(warning)
    chosen = configuration.agents if every_one else named(configuration, names)
    reports = ask_server(options, chosen, as_json)
    if reports is None:
        options.boot_project(project)
        _warn_of_sample(configuration)
        reports = _collect(options, project, configuration, chosen, as_json)
    if not all(report.outcome.good for report in reports):
        sys.exit(ATTENTION)


def _warn_of_sample(configuration: Configuration) -> None:
    from salmon_revsmtp.delivery.sample import sample_warning

    if warning := sample_warning(configuration.routed):
        warn(warning)


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
    options.leave_to_the_log("salmon_revsmtp.server.failing")  # the report says it
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
            progress.closing()
    except KeyboardInterrupt:
        raise click.ClickException(INTERRUPTED) from None
    if collector.interrupted:
        raise click.ClickException(INTERRUPTED)
    return reports


@click.command()
@with_options
def run(options: Options) -> None:
    """Run agents and listening services in the foreground.

    This is the server without Salmon's own receiver. `salmon start` runs both.

    It says where it listens, which agents it collects from and where its log is, once everything
    listens, and ends on ctrl-c (SIGINT), SIGTERM or SIGHUP.
    """
    from salmon_revsmtp.cli.foreground import Foreground
    from salmon_revsmtp.server.attach import serve_in_foreground

    project, configuration = options.open()
    options.boot_project(project)
    plugins = options.load_plugins()
    told = Foreground(project.folder)
    try:
        serve_in_foreground(
            configuration, plugins, lambda: project.settings.relay, project.folder, told
        )
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from None
