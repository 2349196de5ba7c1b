"""The recipe "Django or Flask beside it": its files, with mail that is delivered to them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.dialogue import Dialogue, no_more_mail
from support.messages import MESSAGE
from support.project import Project, isp, provider

pytestmark = pytest.mark.interop

RECIPES = Path(__file__).parents[2] / "docs/recipes"
HELP = "help@example.org"


class Desk:
    """The project of one of the recipes."""

    def __init__(self, project: Project, packages: Path, recipe: str) -> None:
        self.project = project
        self.environment = {"PYTHONPATH": str(packages)}
        (project.folder / "app/handlers/sample.py").unlink()
        self._recipe = RECIPES / recipe

    def configure(self, port: int) -> None:
        self.project.configure(isp(port))
        self._append("config/settings.py", 'handlers = ["app.handlers.tickets"]\n')

    def _append(self, name: str, text: str) -> None:
        with (self.project.folder / name).open("a") as file:
            file.write(text)

    def files(self, *names: str) -> None:
        for name in names:
            shutil.copy(self._recipe / name, self.project.folder / name)

    def end_of(self, name: str, file: str) -> None:
        self._append(name, (self._recipe / file).read_text())

    def python(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.project.folder,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def receive(self, *recipients: str, taken: bool = True) -> list[str]:
        """Collect a message for each of these; what the provider hears.  It is called again only
        if we have ``taken`` something."""
        heard: list[str] = []

        async def script(there: Dialogue) -> None:
            await there.reverse()
            for number, recipient in enumerate(recipients):
                text = MESSAGE.replace(b"hello", b"hello %d" % number)
                heard.append(await there.send(text, recipient))
            await there.quit()

        with provider(script, *([no_more_mail] if taken else [])) as port:
            self.configure(port)
            done = self.project.run("collect", "isp", **self.environment)
        assert len(heard) == len(recipients), done.stderr
        return heard

    def undeliverable(self) -> int:
        return len(list((self.project.folder / "run/undeliverable/new").glob("*")))


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another process writes, and takes its time."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


@pytest.fixture(scope="session")
def packages(chroot: Callable[[str], Path]) -> Path:
    return chroot("web")


@pytest.fixture
def django(project: Project, packages: Path) -> Desk:
    desk = Desk(project, packages, "django")
    desk.python("-m", "django", "startproject", "web", ".")
    desk.python("manage.py", "startapp", "tickets")
    desk.files("tickets/models.py", "tickets/views.py", "web/urls.py", "config/boot.py")
    desk.files("app/database.py", "app/handlers/tickets.py")
    desk.end_of("web/settings.py", "web/settings_end.txt")
    desk.python("manage.py", "makemigrations", "tickets")
    desk.python("manage.py", "migrate")
    return desk
    return desk


@pytest.fixture
def flask(project: Project, packages: Path) -> Desk:
    desk = Desk(project, packages, "flask")
    desk.files("web.py", "app/handlers/tickets.py")
    boot = project.folder / "config/boot.py"
    boot.write_text(boot.read_text().replace("Router.RELOAD = True", "Router.RELOAD = False"))
    desk.python("-c", "import web; web.app.app_context().push(); web.db.create_all()")
    return desk


def test_django_shows_what_its_handlers_have_stored(django: Desk) -> None:
    heard = django.receive(HELP, "help-1@example.org", "help-7@example.org")
    assert [reply[:9] for reply in heard] == ["250 2.0.0", "250 2.0.0", "550 5.1.1"]
    assert shown_by_django(django) == [
        {
            "number": 1,
            "from": "a@example.net",
            "subject": "hi",
            "letters": [".hello 0", ".hello 1"],
        }
    ]
    assert django.undeliverable() == 0


def test_while_the_database_of_django_is_locked_mail_stays_with_the_provider(django: Desk) -> None:
    settings = django.project.folder / "web/settings.py"
    settings.write_text(settings.read_text().replace('"timeout": 20', '"timeout": 0.1'))
    with locked(django.project.folder / "db.sqlite3"):
        [reply] = django.receive(HELP, taken=False)
    assert reply == "451 4.3.0 the database is not there, try again later"
    assert (shown_by_django(django), django.undeliverable()) == ([], 0)
    [reply] = django.receive(HELP)
    assert reply.startswith("250")
    assert len(shown_by_django(django)) == 1


def test_models_without_django_setup_are_named_in_the_error(django: Desk) -> None:
    boot = django.project.folder / "config/boot.py"
    boot.write_text(boot.read_text().replace("django.setup()", ""))
    django.configure(1)
    done = django.project.run("collect", "isp", **django.environment)
    assert done.returncode == 2
    assert "config.boot: AppRegistryNotReady: Apps aren't loaded yet." in done.stderr


def test_flask_shows_what_its_handlers_have_stored(flask: Desk) -> None:
    assert [reply[:9] for reply in flask.receive(HELP, HELP)] == ["250 2.0.0"] * 2
    assert shown_by_flask(flask) == [
        {"number": number, "from": "a@example.net", "subject": "hi"} for number in (1, 2)
    ]
    assert flask.undeliverable() == 0


def test_while_the_database_of_flask_is_locked_mail_stays_with_the_provider(flask: Desk) -> None:
    web = flask.project.folder / "web.py"
    web.write_text(web.read_text().replace('"timeout": 20', '"timeout": 0.1'))
    with locked(flask.project.folder / "instance/tickets.sqlite3"):
        [reply] = flask.receive(HELP, taken=False)
    assert reply == "451 4.3.0 the database is not there, try again later"
    assert (shown_by_flask(flask), flask.undeliverable()) == ([], 0)


def test_a_handler_without_flasks_context_keeps_the_message(flask: Desk) -> None:
    handler = flask.project.folder / "app/handlers/tickets.py"
    text = handler.read_text()
    handler.write_text(text.replace("with web.app.app_context():", "if True:"))
    [reply] = flask.receive(HELP)
    assert reply == "250 2.0.0 kept, no handler took it"
    assert flask.undeliverable() == 1


def shown_by_django(desk: Desk) -> list[dict[str, Any]]:
    get = "from django.test import Client; print(Client().get('/tickets/').content.decode())"
    setup = "from django.test.utils import setup_test_environment; setup_test_environment(); "
    return tickets(desk.python("manage.py", "shell", "-v", "0", "-c", setup + get))


def shown_by_flask(desk: Desk) -> list[dict[str, Any]]:
    get = "import web; print(web.app.test_client().get('/tickets/').text)"
    return tickets(desk.python("-c", get))


def tickets(page: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(page)["tickets"]
    return found
