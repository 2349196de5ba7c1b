"""Whom commands ask: the server that runs, or this process where none does.  Those about a provider
then open the hold store themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import click

from salmon_revsmtp.cli.options import Options, stop
from salmon_revsmtp.foreign import printable

if TYPE_CHECKING:
    from typing_extensions import Self

    from salmon_revsmtp.server.collector import Collector
    from salmon_revsmtp.server.control import Answers

__all__ = ["Asking", "Desk"]

NO_PROVIDER = (
    "no mail is held in this project: its settings have neither a provider nor a service with "
    '"delivery": "hold"; customer_accounts and provider make one'
)


# A server keeps the settings and the version that it was started with.
OLDER = "; when it was started it had other settings, or was older: restart it"


class Asking:
    """Has a request answered by the running server, or by this process.  A context manager: what is
    opened for that is let go at the end.

    ``about``  the word that each request begins with.
    """

    about: ClassVar[str]

    def __init__(self, options: Options) -> None:
        self._options = options
        self._project, self._configuration = options.open()
        self._beside: Collector | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._beside is not None:
            self._beside.__exit__(kind, error, traceback)
            self._beside = None

    def ask(self, do: str, **request: Any) -> Iterator[dict[str, Any]]:
        """The answers to a request; what goes wrong ends the command with status 1."""
        from salmon_revsmtp.server.control import SOCKET, NoServer, ask

        request = {"do": f"{self.about} {do}", **request}
        try:
            yield from _whole(ask(request))
            return
        except NoServer:
            pass
        except OSError as error:
            text = f"asking the running server: {printable(error)}"
            raise click.ClickException(text) from None
        try:
            yield from _whole(self._alone(request))
        except OSError as error:
            text = f"no server answers on {SOCKET}, and without one: {printable(error)}"
            raise click.ClickException(text) from None

    def _alone(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        from salmon_revsmtp.server.collector import Collector
        from salmon_revsmtp.server.eventloop import run

        if self._beside is None:
            plugins, project = self._options.load_plugins(), self._project
            self._beside = Collector(
                self._configuration, plugins, lambda: project.settings.relay, project.folder
            )
        made = self._answers(self._beside, request)

        async def answers() -> list[dict[str, Any]]:
            return [one async for one in made]

        yield from run(answers())

    def _answers(self, collector: Collector, request: dict[str, Any]) -> Answers:
        """Those of this process."""
        raise NotImplementedError

    def prepare_to_act(self) -> None:
        """Whatever is done is in the project's log, and its relay takes notifications: import the
        boot module, unless the running server has done so."""
        from salmon_revsmtp.server.control import running

        if not running():
            self._options.boot_project(self._project)


class Desk(Asking):
    """Answers requests about held mail.  The hold store belongs to one process, so it is let go
    while a person thinks.

    A project that holds no mail ends the command with status 2.
    """

    about = "provider"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if not self._configuration.holds:
            raise stop(NO_PROVIDER)

    def _answers(self, collector: Collector, request: dict[str, Any]) -> Answers:
        from salmon_revsmtp.server.provider_requests import ProviderRequests

        return ProviderRequests(collector.providing).answer(request)

    @property
    def known_accounts(self) -> str:
        """Which there are, where a sentence ends."""
        if self._configuration.elsewhere:
            return "`salmon-revsmtp provider accounts` lists those that there are"
        names = ", ".join(one.name for one in self._configuration.accounts) or "none"
        return f"there are: {names}"


def _whole(answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All but the end, which must come."""
    with contextlib.suppress(ValueError):  # half a line
        for answer in answers:
            if "error" in answer:
                text = f"the running server: {printable(answer['error'])}"
                raise click.ClickException(text + OLDER * (answer["error"] == "no such request"))
            if "end" in answer:
                return
            yield answer
    raise click.ClickException("the server ended before it had answered")
