"""The documentation: what it says of the program is what the program has."""

from __future__ import annotations

import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from docutils import nodes
from docutils.core import publish_doctree
from pydantic import BaseModel
from sphinx import addnodes

import salmon_revsmtp
from salmon_revsmtp.alert.settings import AlertSettings
from salmon_revsmtp.cli.main import cli
from salmon_revsmtp.console import register_commands
from salmon_revsmtp.console.settings import ConsoleSettings
from salmon_revsmtp.customer.etrn import EtrnSettings
from salmon_revsmtp.customer.odmr import OdmrSettings
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.metrics.settings import MetricsSettings
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.provider.settings import AccountSettings, ProviderSettings
from salmon_revsmtp.service.settings import ServiceSettings
from salmon_revsmtp.smtp.commands import Commands
from salmon_revsmtp.smtp.receiver import Receiver
from salmon_revsmtp.smtp.turn import Turn

# A command of a plugin of ours.
register_commands(cli)

ROOT = Path(__file__).parent.parent
MODELS: dict[str, type[BaseModel]] = {
    "ODMR agents": OdmrSettings,
    "ETRN agents": EtrnSettings,
    "Services": ServiceSettings,
    "Accounts": AccountSettings,
    "The provider": ProviderSettings,
    "The alarm": AlertSettings,
    "The console": ConsoleSettings,
    "The metrics": MetricsSettings,
}

Pages = Callable[[str], nodes.document]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """A function that gives a page of the documentation, which builds without a warning."""
    built = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "dummy", "-d", str(built)]
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(built)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    def page(name: str) -> nodes.document:
        document: nodes.document = pickle.loads((built / f"{name}.doctree").read_bytes())
        return document

    return page


def section(document: nodes.document, title: str) -> nodes.section:
    """The section with a title."""
    [found] = [one for one in document.findall(nodes.section) if one[0].astext() == title]
    return found


def words(text: str) -> str:
    return " ".join(text.replace("`", "").split())


@pytest.mark.parametrize("title", MODELS)
def test_every_key_has_its_default_its_meaning_and_what_is_allowed(page: Pages, title: str) -> None:
    model = MODELS[title]
    rows = section(page("settings"), title).findall(nodes.row)
    table: dict[str, Any] = {cells[0]: cells[1:] for cells in map(_cells, rows)}
    assert list(table) == ["key", *model.model_fields]
    for key, field in model.model_fields.items():
        default, text = table[key]
        assert (default == "required") is field.is_required()
        meaning, _, allowed = text.partition("\n\nAllowed: ")
        assert meaning.endswith("."), f"{key} has no meaning"
        assert allowed == f"{field.description}."


def _cells(row: nodes.row) -> list[str]:
    return [cell.astext() for cell in row.findall(nodes.entry)]


def commands_of(group: click.Group, above: str = "") -> Iterator[tuple[str, click.Command]]:
    """Those of a group and of the groups in it, by all of their words."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{above}{name}", command
        if isinstance(command, click.Group):
            yield from commands_of(command, f"{above}{name} ")


def test_every_command_has_a_section_with_its_help_and_options(page: Pages) -> None:
    commands = page("commands")
    everywhere = {option.name for option in cli.params}
    for name, command in commands_of(cli):
        text = words(section(commands, name).astext())
        assert f"salmon-revsmtp {name}" in text
        assert words(inspect.cleandoc(command.help or "no help")) in text
        for option in command.params:
            if isinstance(option, click.Option) and option.name not in everywhere:
                assert f"{option.opts[0]}" in text
                assert words(option.help or "no help") in text
    text = section(commands, "Options of every command").astext()
    assert all(option.opts[0] in text for option in cli.params)


def test_every_outcome_and_every_key_of_a_report_is_explained(page: Pages) -> None:
    outcomes = page("outcomes")
    explained = _terms(section(outcomes, "Outcomes"))
    assert explained == {outcome.value for outcome in Outcome}
    explained = _terms(section(outcomes, "A report as JSON"))
    assert explained == set(Report("isp", "odmr", answers=["ok"]).as_dict())


def _terms(section: nodes.section) -> set[str]:
    terms = section.findall(nodes.term)
    return {word.strip() for term in terms for word in term.astext().split(",")}


def test_the_parts_of_the_program_are_those_of_the_contracts(page: Pages) -> None:
    contracts = (ROOT / "pyproject.toml").read_text()
    [layers] = re.findall(r"^layers = \[(.*?)^\]", contracts, re.MULTILINE | re.DOTALL)
    rows = section(page("internals"), "What each folder may know").findall(nodes.row)
    listed = [_cells(row)[0].split(", ") for row in rows]
    assert listed == [layer.split(" | ") for layer in re.findall(r'"([^"]+)"', layers)]


@pytest.mark.parametrize("machine", [Receiver, Turn])
def test_the_diagram_of_a_machine_has_every_step_of_its_tables(
    page: Pages, machine: type[Commands]
) -> None:
    drawn = [words(block.astext()) for block in page("internals").findall(nodes.literal_block)]
    [diagram] = [one for one in drawn if all(verb in one for verb in machine.VERBS)]
    for what, leads in machine.ENDS.items():
        assert f"({what})" in diagram
        assert all(state.name in diagram for state in (*leads, *leads.values()))
    for name, verb in machine.VERBS.items():
        for state, then in verb.leads.items():
            steps = re.split(rf"\b{state.name} (?=-->|stays)", diagram, maxsplit=1)[1]
            assert then is state or re.search(rf"--> {then.name} [^>]*\b{name}\b", steps)


def test_every_public_name_is_in_the_reference(page: Pages) -> None:
    signatures = page("reference").findall(addnodes.desc_signature)
    documented = {name for one in signatures for name in one["ids"]}
    public = {f"salmon_revsmtp.{name}" for name in salmon_revsmtp.__all__}
    assert public - documented == set()


@pytest.mark.parametrize("source", [*ROOT.glob("*.rst")], ids=lambda source: source.name)
def test_a_page_beside_the_package_has_no_mistake_in_its_markup(source: Path) -> None:
    strict = {"report_level": 2, "halt_level": 2}
    publish_doctree(source.read_text(), source_path=str(source), settings_overrides=strict)


SOURCES = [*ROOT.glob("*.rst"), *ROOT.glob("docs/**/*.rst")]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_files_targets_and_commands_that_a_page_names_exist(source: Path) -> None:
    text = source.read_text()
    files = re.findall(r"``((?:tests|benchmarks|config|docs)/[\w./-]+)``", text)
    made = {"docs/_build"}  # by `make docs`
    assert [one for one in files if not (ROOT / one).exists() and one not in made] == []
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:``|^    )make ([a-z]+)", text, re.MULTILINE)
    assert [one for one in named if one not in targets] == []
    commands = re.findall(
        r"(?:``|^    |[/=])salmon-revsmtp ([a-z]+(?: [a-z]+(?:-[a-z]+)*)*)", text, re.MULTILINE
    )
    assert [one for one in commands if not _is_a_command(one)] == []


def _is_a_command(words: str) -> bool:
    """Whether the program has a command that a text begins with.  A group may stand alone."""
    group: click.Command | None = cli
    for word in words.split():
        if not isinstance(group, click.Group):
            break
        group = group.get_command(click.Context(group), word)
    return group is not None
