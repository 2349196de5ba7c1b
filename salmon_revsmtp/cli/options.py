"""The options that every command has, and how a command ends that cannot begin."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from salmon_revsmtp.cli.completion import folders
from salmon_revsmtp.foreign import printable, printable_lines

if TYPE_CHECKING:
    from salmon_revsmtp.customer.agent import Agent
    from salmon_revsmtp.plugins.manager import Plugins
    from salmon_revsmtp.server.configuration import Configuration
    from salmon_revsmtp.server.project import Project

__all__ = [
    "ATTENTION",
    "Options",
    "json_option",
    "named",
    "terminal",
    "with_options",
    "with_project",
]

#: Exit status when any agent ended badly; usage and settings errors.
ATTENTION = 1
USAGE = 2

#: Where our own log lines go.
terminal = logging.StreamHandler()

Command = TypeVar("Command", bound=Callable[..., Any])


class Options:
    """The options that every command has, and that may stand before or after its name."""

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
            from salmon_revsmtp.plugins.manager import Plugins

            self.plugins = Plugins.load()
        return self.plugins

    def open(self) -> tuple[Project, Configuration]:
        """The project and its valid settings; usage errors end the command with status 2."""
        from salmon_revsmtp.server.configuration import load
        from salmon_revsmtp.server.project import Project, ProjectError
        from salmon_revsmtp.settings import SettingsError

        try:
            project = Project.open(self.chdir, self.settings)
            return project, load(project.settings, self.load_plugins())
        except ProjectError as error:
            raise stop(str(error)) from None
        except SettingsError as error:
            raise stop(*error.problems) from None

    def boot_project(self, project: Project, listen: bool = False) -> None:
        """Import the boot module, whose receiver may ``listen`` or not."""
        from salmon_revsmtp.server.project import ProjectError

        try:
            project.boot(self.boot, listen)
        except ProjectError as error:
            raise stop(str(error)) from None

    def log_to_terminal(self) -> None:
        """Our own log lines go to standard error, whatever the project's logging does."""
        ours = logging.getLogger("salmon_revsmtp")
        if terminal not in ours.handlers:
            ours.addHandler(terminal)
            ours.setLevel(logging.INFO)
        terminal.setFormatter(_Line(self.verbose))
        terminal.setLevel(logging.DEBUG if self.verbose else logging.WARNING)
        # Every line of SMTP is for -v only, however verbose the project's own log is.
        level = logging.DEBUG if self.verbose else logging.INFO
        logging.getLogger("salmon_revsmtp.dialogue").setLevel(level)

    def leave_to_the_log(self, logger: str) -> None:
        """Have what a logger of ours says on the terminal with ``-v`` only."""
        terminal.addFilter(lambda record: self.verbose or record.name != logger)


class _Line(logging.Formatter):
    """A log record on the terminal: one line; the traceback is for ``-v`` and the project's log."""

    def __init__(self, verbose: bool) -> None:
        super().__init__("%(message)s")
        self._verbose = verbose

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno < logging.WARNING:
            return self._text(record)
        kind = "warning" if record.levelno < logging.ERROR else "error"
        return f"{kind}: {self._text(record)}"

    def _text(self, record: logging.LogRecord) -> str:
        if self._verbose or not record.exc_info or record.exc_info[1] is None:
            return printable_lines(super().format(record))
        error = record.exc_info[1]
        return printable(f"{record.getMessage()}: {type(error).__name__}: {error}")


class _Stop(click.ClickException):
    exit_code = USAGE


def stop(*problems: str) -> _Stop:
    """What to raise when a command cannot begin; each problem is one line."""
    return _Stop("\n".join(printable(problem) for problem in problems))


def shared(command: Command) -> Command:
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Show the SMTP dialogue."),
        click.option("--boot", metavar="MODULE", help="Boot module [default: config.boot]."),
        click.option(
            "--settings",
            metavar="MODULE",
            help="Settings module [default: SALMON_SETTINGS_MODULE or config.settings].",
        ),
        click.option(
            "--chdir",
            metavar="DIR",
            shell_complete=folders,
            help="The Salmon project's folder [default: .].",
        ),
    ):
        command = option(command)
    return command


def with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hands a command its :class:`Options`, merged with those before its name."""

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        options = click.get_current_context().ensure_object(Options)
        options.update(given)
        options.log_to_terminal()
        return function(options, **given)

    return shared(command)


def with_project(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a command of a plugin: it has the options that every command has, and is called with
    ``settings``, the project's settings module, and ``project``, its folder, beside its own
    arguments.  Wrong settings end the command before that.  A group is not called where one of its
    commands is."""

    @functools.wraps(function)
    def command(options: Options, **given: Any) -> Any:
        if click.get_current_context().invoked_subcommand is not None:
            return None
        project, _ = options.open()
        return function(settings=project.settings, project=project.folder, **given)

    return with_options(command)


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")


def named(configuration: Configuration, names: Sequence[str]) -> list[Agent]:
    chosen, unknown = [], []
    for name in dict.fromkeys(names):
        agent = configuration.agent(name)
        chosen.append(agent) if agent else unknown.append(name)
    if unknown:
        known = ", ".join(agent.name for agent in configuration.agents) or "none"
        raise stop(*(f"no agent is named {name!r}; there are: {known}" for name in unknown))
    return [agent for agent in chosen if agent]
