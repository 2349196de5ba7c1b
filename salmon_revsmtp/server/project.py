"""The Salmon project that we are a plugin of: its folder, ``.env``, settings and boot module."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from salmon_revsmtp.files import give_to_owner
from salmon_revsmtp.foreign import escape_what_cannot_be_shown

__all__ = ["Project", "ProjectError", "enable_logging", "explained"]

DEFAULT_SETTINGS = "config.settings"
DEFAULT_BOOT = "config.boot"

ELSEWHERE = "run this in a Salmon project's folder, or with --chdir"


class ProjectError(Exception):
    """The project cannot be loaded; the text says which file and why, without quoting values."""


class Project:
    """A Salmon project, with its settings imported.

    ``folder``    its folder, which is the current one from now on, as for ``salmon start``.
    ``settings``  its settings module, after ``.env`` was read into the environment.
    """

    def __init__(self, folder: Path, settings: ModuleType) -> None:
        self.folder = folder
        self.settings = settings

    @classmethod
    def open(cls, folder: str | Path = ".", settings: str | None = None) -> Project:
        """Read ``.env`` and import the settings, as Salmon does, but without importing Salmon.

        ``settings`` is a module name; else ``SALMON_SETTINGS_MODULE``, else ``config.settings``.
        What is in the environment already wins over ``.env``.  Raises :class:`ProjectError`.
        """
        try:
            os.chdir(folder)
        except OSError as error:
            raise ProjectError(f"changing to the folder {folder}: {error.strerror}") from None
        here = Path.cwd()
        if str(here) not in sys.path:
            sys.path.insert(0, str(here))
        if (here / ".env").exists():
            import dotenv

            with explained(".env"):
                # A password may have "${" in it.
                dotenv.load_dotenv(here / ".env", interpolate=False)
        if settings:
            os.environ["SALMON_SETTINGS_MODULE"] = settings
        name = os.environ.get("SALMON_SETTINGS_MODULE", DEFAULT_SETTINGS)
        with explained(name):
            module = importlib.import_module(name)
        return cls(here, module)

    def boot(self, module: str | None = None, listen: bool = False) -> None:
        """Import the boot module, with the settings in Salmon's hands: logging, relay, routes and
        handlers.

        Unless it is to ``listen``, no receiver of the boot module does: this process is not the
        server, which may be running already on the same port.  Raises :class:`ProjectError`.
        """
        from salmon import utils
        from salmon.routing import Router

        from salmon_revsmtp.delivery.maildir import make_whole

        utils.import_settings(False)
        name = module or DEFAULT_BOOT
        with explained(name), contextlib.nullcontext() if listen else _nothing_listens():
            importlib.import_module(name)
        enable_logging()
        _give_logs_to_owner()
        with contextlib.suppress(OSError):  # whoever needs it says so
            make_whole(Router.UNDELIVERABLE_QUEUE)  # root's command may have made it


def enable_logging() -> None:
    """Salmon's ``logging.config.fileConfig`` disables every logger that it does not name; ours are
    to be heard all the same, also where a log's encoding lacks a character.  And `salmon start` has
    an umask that would let everyone write to what is made, also to a log that is rotated."""
    before = os.umask(0o077)
    if before:
        os.umask(before)
    for handler in logging.root.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.errors = "backslashreplace"  # for a file that is opened again
            with contextlib.suppress(OSError):
                _close_to_others(Path(handler.baseFilename))
        escape_what_cannot_be_shown(getattr(handler, "stream", None))
    for name, logger in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == "salmon_revsmtp" and isinstance(logger, logging.Logger):
            logger.disabled = False


def _close_to_others(path: Path) -> None:
    """If everyone may write to it."""
    if path.stat().st_mode & 0o002:
        path.chmod(0o600)


def _give_logs_to_owner() -> None:
    """A log that root's command has made must not keep the server from starting."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.FileHandler):
                with contextlib.suppress(OSError):
                    give_to_owner(Path(handler.baseFilename))


@contextlib.contextmanager
def explained(what: str, if_missing: str = ELSEWHERE) -> Iterator[None]:
    """Turn what a project's own file raises into one sentence with the line that raised it.
    ``if_missing``: what to try if there is no such module at all."""
    try:
        yield
    except ProjectError:
        raise
    except ModuleNotFoundError as error:
        hint = ""
        if error.name and (what == error.name or what.startswith(error.name + ".")):
            hint = f"; {if_missing}"
        raise ProjectError(f"{what}: {error}{_where(error)}{hint}") from None
    except KeyError as error:
        raise ProjectError(
            f"{what}: the variable or key {error} is not set{_where(error)}; is it in .env?"
        ) from None
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL) and not error.filename:
            # Salmon's receivers listen when they are made.
            raise ProjectError(f"{what}: {_receivers(error)}{_where(error)}") from None
        raise ProjectError(f"{what}: {type(error).__name__}: {error}{_where(error)}") from None
    except Exception as error:
        raise ProjectError(f"{what}: {type(error).__name__}: {error}{_where(error)}") from None


def _receivers(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"{error.strerror}: another program has the port of Salmon's receiver "
            "(receiver_config), maybe a mail server, or this one a second time; `ss -ltnp` says "
            "which"
        )
    return (
        f"{error.strerror}: the host of Salmon's receiver (receiver_config) is not this machine's"
    )


def _where(error: BaseException) -> str:
    """The last line below the current folder that an error passed through."""
    here = str(Path.cwd())
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(here) and "site-packages" not in frame.filename:
            return f" ({Path(frame.filename).relative_to(here)}, line {frame.lineno})"
    return ""


@contextlib.contextmanager
def _nothing_listens() -> Iterator[None]:
    """Salmon's receivers bind and listen when they are made; while this lasts, they do not."""
    from salmon._vendor import asyncore

    dispatcher = asyncore.dispatcher
    bind, listen = dispatcher.bind, dispatcher.listen
    dispatcher.bind = lambda self, address: None
    dispatcher.listen = lambda self, backlog: None
    try:
        yield
    finally:
        dispatcher.bind, dispatcher.listen = bind, listen
