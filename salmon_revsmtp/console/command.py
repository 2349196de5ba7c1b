"""``salmon-revsmtp console``: where it is, and a link that lets you in."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from types import ModuleType

import click

from salmon_revsmtp import with_project

__all__ = ["console"]

# Seconds to wait for a console that listens on this machine.
PATIENCE = 2.0
# Exit statuses: there is something for a person to do; it cannot be done.
ATTENTION, USAGE = 1, 2

HOW = """\
This project has no console. Add to config/settings.py

    console = {"listen": "127.0.0.1:8366", "password": os.environ["CONSOLE_PASSWORD"]}

with the password in .env, and restart the server. Without a password, this command lets you in."""


@click.group(invoke_without_command=True)
@click.option("--open", "opens", is_flag=True, help="Open it in your browser.")
@with_project
def console(settings: ModuleType, project: Path, opens: bool) -> None:
    """Say where the console of the running server is, and print a link to it.

    The link lets you in without the password, once, and is good for five minutes. Show it to no one
    else.
    """
    from salmon_revsmtp.console import settings_of
    from salmon_revsmtp.console.links import Running

    if settings_of(settings, []) is None:
        click.echo(HOW, err=True)
        sys.exit(USAGE)
    running = Running.read(project)
    if running is None or not _listens(*running.listen):
        click.echo(
            "No server with a console runs in this project. Start it with `salmon start` or "
            "`salmon-revsmtp run`; if it runs, see its log, or `salmon-revsmtp status`.",
            err=True,
        )
        sys.exit(ATTENTION)
    link = running.link()
    click.echo(f"The console is at {running.url}/")
    click.echo("This link lets you in once, in the next five minutes:")
    click.echo(link)
    if opens and click.launch(link) != 0:
        click.echo("There is no browser to open here; open the link yourself.", err=True)


@console.command()
def password() -> None:
    """Make of a password what `console` in the settings may have instead of it.

    It asks for the password, which is not shown, or reads one line from standard input if that is
    not a terminal. Who reads what it prints in your settings cannot log in with it.
    """
    from salmon_revsmtp.console.passwords import hashed

    if sys.stdin.isatty():
        # What is asked goes elsewhere than what is printed, which may go into a file.
        text = str(click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    else:
        text = sys.stdin.readline(2000).removesuffix("\n").removesuffix("\r")
    if not text:
        raise click.UsageError("the password is empty")
    if text.startswith("scrypt$"):
        raise click.UsageError("this is a hash already")
    if len(text) > 1024 or not text.isprintable():
        raise click.UsageError("the password is too long, or has control characters")
    click.echo(hashed(text))


def _listens(host: str, port: int) -> bool:
    """Whether the console is there.  A server that was killed leaves its file."""
    there = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        with socket.create_connection((there, port), PATIENCE):
            return True
    except OSError:
        return False
