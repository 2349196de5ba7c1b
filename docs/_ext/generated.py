"""Directives that write reference pages from the code, so that they cannot differ from it.

``.. settings:: package.module.Model`` is a table of the keys of a pydantic model: the default, the
meaning (the string below the field in the source) and what is allowed (the field's description,
which is also what a wrong value is told).  ``:beside:`` leaves out the keys of another model.

``.. commands:: package.module.group`` has a section for each command of a click group, and of the
groups in it: its usage, its help text and its options.  The options that the group has itself stand
once, at the top.

``.. states:: package.module.Machine`` is the diagram of an SMTP machine, drawn from its tables.
``.. replies::`` is the table of the replies that the sender takes.

In docstrings, lines such as ``name``  meaning, which read well in the source, become a list.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Container, Iterator, Sequence
from typing import Any

import click
from docutils import nodes
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

from salmon_revsmtp.console import register_commands
from salmon_revsmtp.smtp import commands as machines
from salmon_revsmtp.smtp import sender

__all__ = ["command_lines", "meaning", "reply_lines", "setting_lines", "setup", "state_lines"]

WORDS = {(): "[]", None: "None", True: "True", False: "False"}


def find(path: str) -> Any:
    """``package.module.name`` as the object that it names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


# -- settings -------------------------------------------------------------------------------------


def meaning(model: type[BaseModel], key: str) -> str:
    """The string below a field in the source of its model, or of the model that it is inherited
    from.  Raises :class:`KeyError` where there is none."""
    for base in model.__mro__:
        if issubclass(base, BaseModel) and base is not BaseModel:
            found = ModuleAnalyzer.for_module(base.__module__).find_attr_docs()
            if lines := found.get((base.__qualname__, key)):
                return " ".join(" ".join(lines).split())
    raise KeyError(f"{model.__qualname__}.{key} has no meaning: write a string below the field")


def default(model: type[BaseModel], key: str) -> str:
    field = model.model_fields[key]
    if field.is_required():
        return "required"
    if isinstance(field.default, str):
        return f'``"{field.default}"``'
    if isinstance(field.default, tuple) and field.default:
        return f'``["{", ".join(field.default)}"]``'
    return f"``{WORDS.get(field.default, field.default)}``"


def setting_lines(model: type[BaseModel], leave_out: Container[str] = ()) -> Iterator[str]:
    """The keys of a model as a table in reStructuredText."""
    yield from (".. list-table::", "   :header-rows: 1", "   :widths: 20 15 65", "")
    yield from ("   * - key", "     - default", "     - meaning")
    for key, field in model.model_fields.items():
        if key in leave_out:
            continue
        yield f"   * - ``{key}``"
        yield f"     - {default(model, key)}"
        yield f"     - {meaning(model, key)}"
        yield ""
        yield f"       *Allowed:* {field.description}."


class Settings(SphinxDirective):
    required_arguments = 1
    option_spec = {"beside": find}  # noqa: RUF012 (docutils' own way)

    def run(self) -> list[nodes.Node]:
        beside: type[BaseModel] = self.options.get("beside", BaseModel)
        lines = setting_lines(find(self.arguments[0]), beside.model_fields)
        return self.parse_text_to_nodes("\n".join(lines))


# -- commands -------------------------------------------------------------------------------------


def command_lines(group: click.Group, program: str) -> Iterator[str]:
    """The commands of a group as sections in reStructuredText."""
    context = click.Context(group, info_name=program)
    shared = {option.name for option in options(group)}
    yield from ("Options of every command", "------------------------", "")
    yield from option_lines(context, options(group))
    for words, command in commands_of(group):
        own = [one for one in options(command) if one.name not in shared]
        title = " ".join(words)
        yield from (title, "-" * len(title), "", "::", "")
        yield from (f"    {' '.join((program, *words, *usage(command, context, own)))}", "")
        yield from prose(command.help or "")
        yield ""
        yield from option_lines(context, own)


def commands_of(
    group: click.Group, above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """The commands of a group and of the groups in it, each with the words that it is called by."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*above, name), command
        if isinstance(command, click.Group):
            yield from commands_of(command, (*above, name))


def usage(
    command: click.Command, context: click.Context, own: Sequence[click.Option]
) -> Iterator[str]:
    """What follows the name of a command."""
    if own:
        yield "[OPTIONS]"
    pieces = command.collect_usage_pieces(context)
    if isinstance(command, click.Group):
        pieces = ["[COMMAND]" if command.invoke_without_command else "COMMAND"]
    yield from (piece for piece in pieces if piece != "[OPTIONS]")


def options(command: click.Command) -> list[click.Option]:
    return [one for one in command.params if isinstance(one, click.Option)]


def option_lines(context: click.Context, options: list[click.Option]) -> Iterator[str]:
    for option in options:
        if record := option.get_help_record(context):
            yield f"``{record[0]}``"
            yield f"    {record[1]}"
            yield ""


def prose(text: str) -> Iterator[str]:
    """A help text, in which a command stands between single backticks."""
    text = inspect.cleandoc(text).replace("\b", "")
    yield from re.sub(r"`([^`]+)`", r"``\1``", text).splitlines()


class Commands(SphinxDirective):
    required_arguments = 1
    option_spec = {"program": str}  # noqa: RUF012 (docutils' own way)

    def run(self) -> list[nodes.Node]:
        group = find(self.arguments[0])
        register_commands(group)  # of a plugin of ours
        lines = command_lines(group, self.options["program"])
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


# -- the SMTP machines ----------------------------------------------------------------------------


def state_lines(machine: type[machines.Commands]) -> Iterator[str]:
    """The states of a machine, and what leads from each to which, as a diagram of text."""
    steps = [(name, verb.leads) for name, verb in machine.VERBS.items()]
    steps += [(f"({what})", leads) for what, leads in machine.ENDS.items()]
    for state in machines.State:
        ways: dict[machines.State, list[str]] = {}
        for name, leads in steps:
            if state in leads:
                ways.setdefault(leads[state], []).append(name)
        if ways:
            yield state.name
            stays = ways.pop(state, [])
            arrows = [*((f"--> {to.name}", names) for to, names in ways.items()), ("stays", stays)]
            for arrow, names in arrows:
                lines = textwrap.wrap(", ".join(names), 56)
                heads = (arrow, *[""] * len(lines))
                yield from (
                    f"    {head:<16}{line}" for head, line in zip(heads, lines, strict=False)
                )


class States(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        text = "\n".join(state_lines(find(self.arguments[0])))
        return [nodes.literal_block(text, text, language="none")]


def reply_lines() -> Iterator[str]:
    """What may come to each command of the sender, in reStructuredText."""
    yield from (".. list-table::", "   :header-rows: 1", "   :widths: 25 35 40", "")
    yield from ("   * - to", "     - may come", "     - the next command")
    for name, row in sender.REPLIES.items():
        classes = {code // 100 for code in row.codes}
        whole = [
            one for one in sorted(classes) if row.codes >= set(range(100 * one, 100 * one + 100))
        ]
        single = [str(code) for code in sorted(row.codes) if code // 100 not in whole]
        yield f"   * - {name}"
        yield f"     - {', '.join([*single, *(f'{one}yz' for one in whole)])}"
        yield f"     - {'waits for the reply' if row.wait else 'may go before the reply is here'}"


class Replies(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n".join(reply_lines()))


# -- docstrings -----------------------------------------------------------------------------------

ITEM = re.compile(r"((?:``\w+``(?:, )?)+)( +)(\S.*)")


def list_items(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Make a definition of each line ``name``  meaning; those that go on below it are indented."""
    made: list[str] = []
    among = False
    for line in lines:
        found = ITEM.fullmatch(line)
        if found and (among or len(found[2]) > 1):
            made += ["", found[1], f"    {found[3]}"]
            among = True
        else:
            made.append(f"    {line.strip()}" if among and line.strip() else line)
            among = among and bool(line.strip())
    lines[:] = made


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("settings", Settings)
    app.add_directive("commands", Commands)
    app.add_directive("states", States)
    app.add_directive("replies", Replies)
    app.connect("autodoc-process-docstring", list_items)
    return {"parallel_read_safe": True}
