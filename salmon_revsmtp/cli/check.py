"""``check``: would it work?"""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import click

from salmon_revsmtp.cli.completion import agent_names
from salmon_revsmtp.cli.options import ATTENTION, Options, json_option, named, with_options
from salmon_revsmtp.cli.output import BAD, GOOD, WAITS, Toned, print_json, shown
from salmon_revsmtp.foreign import printable

if TYPE_CHECKING:
    from salmon_revsmtp.customer.agent import Agent, Check
    from salmon_revsmtp.plugins.manager import Plugins
    from salmon_revsmtp.server.checks import Finding
    from salmon_revsmtp.server.configuration import Configuration
    from salmon_revsmtp.server.project import Project
    from salmon_revsmtp.server.reaching import Place

__all__ = ["check"]

# What each result looks like on a terminal, and how wide it is.
TONES = {"ok": GOOD, "warning": WAITS, "failed": BAD}
RESULT = 9

# What a server does not start without.
NEEDED = ("boot", "hold", "listen")


@click.command()
@click.argument("name", required=False, shell_complete=agent_names)
@click.option("--offline", is_flag=True, help="Nothing that needs the network, as for CI.")
@json_option
@with_options
def check(options: Options, name: str | None, offline: bool, as_json: bool) -> None:
    """See whether it would work, without asking for mail.

    Without a NAME everything is looked at that can fail: the settings, the boot module, the
    handlers, folders, the journal, the disk, the clock, certificates, the addresses to listen on
    (the console's and the metrics', too), the relay, what handlers need, such as the server that
    they hand mail on to, and each agent that is enabled: it connects, does TLS, greets the server
    and logs in.
    `salmon start` goes into the background before it looks at any of that, so it cannot say on the
    terminal what is wrong.

    With the NAME of an agent only that agent is tried, and you see what its server offers.

    A warning is something that works, but not as you may want it; then the exit status is 0. If
    anything would fail it is 1, or 2 if it is in the settings. With --offline no address is
    listened on, and no relay, no next server, no agent and no name server is asked.
    """
    if name is None:
        _check_everything(options, offline, as_json)
    elif offline:
        raise click.UsageError("an agent's check needs the network; leave --offline or NAME out")
    else:
        _check_agent(options, name, as_json)


def _check_everything(options: Options, offline: bool, as_json: bool) -> None:
    try:
        project, configuration = options.open()
    except click.ClickException as error:
        if as_json:
            _print_settings_errors(error.message.splitlines())
        raise
    findings: list[Finding] = []

    def tell(finding: Finding) -> None:
        findings.append(finding)
        print_json(finding.as_dict()) if as_json else _show(finding)

    live = sys.stdout.isatty() and not (as_json or options.verbose)
    running = _look(options, project, configuration, offline, tell, live)
    problems = [one.text for one in findings if one.result == "failed"]
    text = _verdict(findings, running)
    results = {one.result for one in findings}
    result = next((one for one in ("failed", "warning") if one in results), "ok")
    if as_json:
        _print_summary(result, text, running, problems)
    else:
        _say(text, TONES[result])
    if problems:
        sys.exit(ATTENTION)


def _look(
    options: Options,
    project: Project,
    configuration: Configuration,
    offline: bool,
    tell: Callable[[Finding], None],
    live: bool,
) -> bool:
    """Look at everything; returns whether a server of this project runs.  ``live``: on a terminal,
    say what is waited for."""
    from salmon_revsmtp.journal.collections import Journal
    from salmon_revsmtp.server.checks import changed_since, handler_modules, local_findings
    from salmon_revsmtp.server.control import running
    from salmon_revsmtp.server.eventloop import run
    from salmon_revsmtp.server.reaching import NOT_MADE, handler_checks, reached, skipped

    runs = running()
    started = _server_started() if runs else None
    listen, booted = not (runs or offline), True
    plugins = options.load_plugins()
    for finding in local_findings(
        project, configuration, plugins, options.boot, listen=listen, offline=offline
    ):
        booted = booted and not (finding.check == "boot" and finding.result == "failed")
        tell(finding)
    for finding in changed_since(project, started) if started is not None else ():
        tell(finding)
    journal, enabled = Journal(), {}
    for agent in configuration.agents:
        kept = journal.state(agent.name).enabled
        enabled[agent.name] = bool(agent.settings.enabled if kept is None else kept)
    handlers = handler_checks(handler_modules(project))
    listening = _places(project, configuration, plugins, tell)
    if offline:
        for finding in skipped(configuration, listening, handlers, enabled):
            tell(finding)
    else:
        relay = getattr(project.settings, "relay", None if booted else NOT_MADE)
        with _waiting(sum(enabled.values()), live):
            run(reached(configuration, listening, handlers, enabled, relay, runs, tell))
    return runs


def _places(
    project: Project,
    configuration: Configuration,
    plugins: Plugins,
    tell: Callable[[Finding], None],
) -> list[Place]:
    """Where the server and its plugins are to listen."""
    from salmon_revsmtp.hooks import HookFailedError
    from salmon_revsmtp.server.checks import WARNING, Finding
    from salmon_revsmtp.server.reaching import places, places_of_plugins

    found = places(configuration)
    try:
        found += places_of_plugins(plugins, project.settings)
    except (HookFailedError, ValueError) as error:
        text = f"{error}; where plugins are to listen was not tried"
        tell(Finding("listen", "plugins", WARNING, text))
    return found


def _server_started() -> float | None:
    """Since when the server runs (seconds since the epoch), if it says so."""
    from salmon_revsmtp.server.control import GLANCE, NoServer, ask

    with contextlib.suppress(NoServer, OSError, ValueError):
        for answer in ask({"do": "status"}, patience=GLANCE):
            since = answer.get("since")
            return float(since) if since is not None else None
    return None


@contextlib.contextmanager
def _waiting(agents: int, live: bool) -> Iterator[None]:
    """Say below what is printed meanwhile whom we wait for."""
    if not live:
        yield
        return
    from rich.console import Console

    console = Console()
    spinner = "dots" if console.encoding.startswith("utf") else "line"
    whom = f" and the servers of {agents} agent{'' if agents == 1 else 's'}" if agents else ""
    with console.status(f"asking the relay{whom}", spinner=spinner):
        yield


def _verdict(findings: Sequence[Finding], running: bool) -> str:
    """Whether it would work, in one line."""
    failed = [one for one in findings if one.result == "failed"]
    warnings = sum(1 for one in findings if one.result == "warning")
    state = "the server is running" if running else "the server can start"
    if not running and any(one.check in NEEDED for one in failed):
        state = "the server cannot start"
    if failed:
        state += f"; {len(failed)} thing{'' if len(failed) == 1 else 's'} would fail"
    if warnings:
        state += f"; {warnings} warning{'' if warnings == 1 else 's'}"
    return state


def _print_settings_errors(problems: list[str]) -> None:
    for problem in problems:
        print_json({"check": "settings", "subject": "", "result": "failed", "text": problem})
    _print_summary("failed", "the settings are wrong", None, problems)


def _print_summary(result: str, text: str, running: bool | None, problems: list[str]) -> None:
    row = {"check": "summary", "subject": "", "result": result, "text": text}
    print_json({**row, "ready": not problems, "running": running, "problems": problems})


def _show(finding: Finding) -> None:
    """``failed   relay localhost:8825: Connection refused; ...``, folded on a terminal."""
    line = printable(f"{finding.check} {finding.subject}: {finding.text}")
    lines = [line]
    if sys.stdout.isatty():
        width = max(shutil.get_terminal_size().columns - RESULT, 20)
        lines = textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
    _say(finding.result.ljust(RESULT), TONES.get(finding.result), nl=False)
    click.echo(f"\n{' ' * RESULT}".join(lines))


def _say(text: str, tone: str | None, nl: bool = True) -> None:
    click.echo(shown(Toned(text, tone) if tone else text), nl=nl)


# -- one agent -------------------------------------------------------------------------------------


def _check_agent(options: Options, name: str, as_json: bool) -> None:
    from salmon_revsmtp.server.agent_check import checked
    from salmon_revsmtp.server.control import running
    from salmon_revsmtp.server.eventloop import run
    from salmon_revsmtp.service.policy import Service

    _, configuration = options.open()
    [agent] = named(configuration, [name])
    settings = configuration.services[agent.settings.service]
    service = Service(agent.settings.service, settings)
    service.listens = bool(settings.listen) and running()
    found = run(checked(agent, service))
    print_json(found.row()) if as_json else _show_check(agent, found.result, found.outcome)
    if found.outcome:
        sys.exit(ATTENTION)


def _show_check(agent: Agent, result: Check, outcome: str | None) -> None:
    from salmon_revsmtp.server.reaching import has_check, reached_by

    if not has_check(agent):
        click.echo(f"{agent.title}: the agent type {printable(agent.protocol)} has no check")
        return
    if outcome is None:
        click.echo(f"{agent.title}: {reached_by(agent, result)}")
        click.echo("it offers: " + printable(", ".join(sorted(result.offers))))
        if result.fingerprint:
            click.echo(f"its certificate has the fingerprint {result.fingerprint}")
    for problem in result.problems:
        _say(f"{outcome or 'warning'}: ", TONES["failed" if outcome else "warning"], nl=False)
        click.echo(printable(problem))
    if not result.problems:
        click.echo("nothing found that would fail")
