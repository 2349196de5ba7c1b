"""Collections that the running server runs: their progress, their dialogue and their reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from salmon_revsmtp.cli.errors import warn
from salmon_revsmtp.cli.options import Options
from salmon_revsmtp.cli.output import print_json
from salmon_revsmtp.foreign import printable

if TYPE_CHECKING:
    from salmon_revsmtp.cli.progress import Progress
    from salmon_revsmtp.customer.agent import Agent
    from salmon_revsmtp.customer.report import Report

__all__ = ["ask_server"]

OLDER = "the running server is older than this command, and does not show its dialogue; restart it"


def ask_server(options: Options, chosen: Sequence[Agent], as_json: bool) -> list[Report] | None:
    """Have the running server collect; ``None`` if there is none."""
    from salmon_revsmtp.cli.progress import Progress
    from salmon_revsmtp.server.control import NoServer

    names = [agent.name for agent in chosen]
    request: dict[str, Any] = {"do": "collect", "agents": names}
    if options.verbose:
        request["verbose"] = True
    with Progress(live=not as_json and not options.verbose) as progress:
        asked = _Asked(names, options.verbose, as_json, progress)
        for name in names:
            progress.begin(name, "asking the running server")
        try:
            for answer in _answers(request):
                asked.hear(answer)
        except NoServer:
            return None
        except KeyboardInterrupt:
            raise click.ClickException(asked.what_goes_on()) from None
    if not asked.ended:
        raise click.ClickException("the server ended before the collection did")
    return asked.reports


def _answers(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """As ``control.ask``; what goes wrong ends the command."""
    from salmon_revsmtp.server.control import ask

    try:
        yield from ask(request)
    except OSError as error:
        raise click.ClickException(f"asking the running server: {printable(error)}") from None
    except ValueError:  # half a line: it has ended, which is said by what is missing
        return


class _Asked:
    """What the server has answered.  ``ended``: all that it had to say."""

    def __init__(
        self, names: Sequence[str], verbose: bool, as_json: bool, progress: Progress
    ) -> None:
        self.reports: list[Report] = []
        self.ended = False
        self._running = list(names)
        self._several = len(names) > 1
        self._wants_dialogue = verbose
        self._json = as_json
        self._progress = progress
        self._begun = False

    def hear(self, answer: dict[str, Any]) -> None:
        """Show an answer."""
        self._begun = True
        if self._wants_dialogue and "verbose" not in answer:
            warn(OLDER)
        self._wants_dialogue = False
        if "report" in answer:
            self._report(answer["report"])
        elif "dialogue" in answer:
            whose = f"{answer['agent']} " if self._several else ""
            click.echo(printable(f"{whose}{answer['dialogue']}"), err=True)
        elif "unheard" in answer:
            warn(f"{answer['agent']}: no dialogue is shown: {answer['unheard']}")
        elif "agent" in answer:
            counts = answer["messages"], answer["bytes"]
            self._progress.update(answer["agent"], counts, (answer["doing"], answer["seconds"]))
        elif "warning" in answer:
            warn(answer["warning"])
        elif "error" in answer:
            raise click.ClickException(answer["error"])
        self.ended = "end" in answer

    def _report(self, row: dict[str, Any]) -> None:
        from salmon_revsmtp.customer.report import Report
        from salmon_revsmtp.net.outcome import Outcome

        report = Report(**{**row, "outcome": Outcome(row["outcome"])})
        self.reports.append(report)
        if report.agent in self._running:
            self._running.remove(report.agent)
        print_json(row) if self._json else self._progress.done(report)

    def what_goes_on(self) -> str:
        """After ctrl-c: it ends this command, and nothing that the server does."""
        if not self._running:
            return "interrupted"
        name = self._running[0] if len(self._running) == 1 else ""
        see = f"`{' '.join(['salmon-revsmtp history', name]).rstrip()}` shows how it ends"
        if not self._begun:
            return f"interrupted; if the server has begun to collect, it goes on: {see}"
        which = ", ".join(self._running)
        return f"interrupted; the server goes on collecting from {which}: {see}"
