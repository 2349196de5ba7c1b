"""``provider move-hold``: from one hold store to another."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import click

from salmon_revsmtp.cli.options import ATTENTION, Options, json_option, stop, with_options
from salmon_revsmtp.cli.output import print_json
from salmon_revsmtp.customer.report import counted
from salmon_revsmtp.foreign import printable

if TYPE_CHECKING:
    from salmon_revsmtp.plugins.manager import Plugins
    from salmon_revsmtp.provider.moving import Moved
    from salmon_revsmtp.server.project import Project

__all__ = ["move_hold"]

RECORD = "run/move-hold"


@click.command("move-hold")
@click.argument("old", metavar="FROM")
@click.argument("new", metavar="[TO]", required=False)
@json_option
@with_options
def move_hold(options: Options, old: str, new: str | None, as_json: bool) -> None:
    """Copy all that is held from one hold store to another, and compare.

    FROM and TO are what `hold` in the settings may be: a folder, or a URL. Without TO, it goes
    where the settings say. Other users of the host can see a password on a command line, so leave
    it out of the URL and set PGPASSWORD, or have the URL with it in the settings.

    Stop all servers that use either of the two before. TO has to be empty. If the command is
    interrupted, run it again: it goes on where it was. Nothing is deleted from FROM. Do not start a
    server on it again, for its mail would go out twice.
    """
    from salmon_revsmtp.provider.moving import Move, MoveError
    from salmon_revsmtp.server.providing import open_store

    project, configuration = options.open()
    plugins = options.load_plugins()
    if new is None:
        if configuration.provider is None:
            raise stop("the settings have no provider, so they do not say where to: name TO")
        new = configuration.provider.hold
    names = _shown(old, plugins, project), _shown(new, plugins, project)
    if old == new or names[0] == names[1]:
        raise stop(f"FROM and TO are the same: {names[0]}")
    if "://" not in old and not (project.folder / old / "index.sqlite3").exists():
        raise stop(f"FROM: there is no hold store in the folder {names[0]}")

    def tell(what: str, messages: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r{what}: {messages:,} ", nl=False, err=True)

    try:
        with contextlib.ExitStack() as opened:
            source = open_store(old, project.folder, plugins)
            opened.callback(source.close)
            target = open_store(new, project.folder, plugins)
            opened.callback(target.close)
            moved = Move(source, target, names, project.folder / RECORD, tell).run()
    except (MoveError, OSError) as error:
        raise click.ClickException(printable(error)) from None
    _say(moved, names, as_json)


def _shown(place: str, plugins: Plugins, project: Project) -> str:
    """A place for people; one that cannot be ends the command."""
    from salmon_revsmtp.provider.hold.places import scheme_of, without_secrets

    try:
        scheme = scheme_of(place)
    except ValueError as error:
        raise stop(str(error)) from None
    if scheme is None:
        return str((project.folder / place).resolve())
    if scheme not in plugins.hold_stores:
        known = ", ".join(f"{one}://..." for one in sorted(plugins.hold_stores))
        raise stop(f"no hold store has URLs with {scheme}://; there are: a folder, {known}")
    return without_secrets(place)


def _say(moved: Moved, names: tuple[str, str], as_json: bool) -> None:
    if sys.stderr.isatty():
        click.echo("\r", nl=False, err=True)
    if as_json:
        print_json(
            {
                "from": names[0],
                "to": names[1],
                "messages": moved.messages,
                "bytes": moved.octets,
                "accounts": len(moved.accounts),
                "resumed": moved.resumed,
                "missing": moved.missing,
            }
        )
    else:
        accounts = f"{len(moved.accounts):,} account{'' if len(moved.accounts) == 1 else 's'}"
        click.echo(
            printable(
                f"copied and compared: {counted(moved.messages, moved.octets)}, held for "
                f"{accounts}. {names[0]} still has them: start no server on it."
            )
        )
    if moved.missing:
        keys = ", ".join(map(str, moved.missing))
        click.echo(f"not copied, for their content is missing: {keys}", err=True)
        sys.exit(ATTENTION)
