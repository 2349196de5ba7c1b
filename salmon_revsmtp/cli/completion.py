"""What a shell completes: commands and options, which click knows, and the names of a project.

While a shell asks, a person is typing: nothing is written to the terminal, whatever is wrong, and
nothing waits.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from types import FrameType, ModuleType

    from click.shell_completion import CompletionItem

__all__ = ["account_names", "agent_names", "completing", "folders", "prepare", "quiet", "scripting"]

# The variable with which the shell asks: bash_source for the script, bash_complete for the words.
VARIABLE = "_SALMON_REVSMTP_COMPLETE"

# Seconds for the import of the settings: longer, and who types sees no names.
PATIENCE = 2.0


def completing() -> bool:
    """Whether this process is asked for words."""
    return os.environ.get(VARIABLE, "").endswith("_complete")


def scripting() -> bool:
    """Whether it is asked for the script, in which no word stands."""
    return os.environ.get(VARIABLE, "").endswith("_source")


def prepare() -> None:
    """Make this process one that completes: it says nothing but the words, and leaves nothing."""
    from click import shell_completion

    class Bash(shell_completion.BashComplete):
        """bash makes three words of ``--chdir=DIR``."""

        def get_completion_args(self) -> tuple[list[str], str]:
            words, incomplete = super().get_completion_args()
            return _joined(words), incomplete

    shell_completion.add_completion_class(Bash)
    sys.dont_write_bytecode = True
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 2)
    os.close(null)


def _joined(words: list[str]) -> list[str]:
    joined: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "=" and joined and joined[-1].startswith("--"):
            value = next(rest, None)
            if value is not None:  # otherwise it is the one that is being typed
                joined[-1] += f"={value}"
        else:
            joined.append(word)
    return joined


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What foreign code prints meanwhile, or its children, is not taken for words."""
    sys.stdout.flush()
    kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def agent_names(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The agents of the project that begin so, but those that are there already."""
    return _names("collection_agents", context, parameter, incomplete)


def account_names(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The same of a provider's accounts."""
    return _names("customer_accounts", context, parameter, incomplete)


def folders(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Have the shell complete a folder."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


def _names(
    setting: str, context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    given = context.params.get(parameter.name or "")
    taken = given if isinstance(given, (list, tuple)) else ()
    rows = _rows(setting, _option(context, "chdir") or ".", _option(context, "settings"))
    names = dict.fromkeys(row.get("name") for row in rows if isinstance(row, dict))
    return [
        CompletionItem(name)
        for name in names
        if isinstance(name, str) and name.isprintable() and name.startswith(incomplete)
        if name not in taken
    ]


def _option(context: click.Context | None, name: str) -> str | None:
    """An option that stands before or after the command's name."""
    while context is not None:
        if value := context.params.get(name):
            return str(value)
        context = context.parent
    return None


def _rows(setting: str, folder: str, module: str | None) -> list[object]:
    """What the settings have, unchecked; nothing if they cannot be imported in time."""
    rows: list[object] = []
    with quiet(), contextlib.suppress(BaseException), _in_time():
        rows = list(getattr(_settings(folder, module), setting, []))
    return rows


def _settings(folder: str, module: str | None) -> ModuleType:
    from salmon_revsmtp.server.project import Project

    return Project.open(Path(folder).expanduser(), module).settings


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """Raise :class:`TimeoutError` when it takes too long."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before: Callable[..., object] | int | None = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
