"""``.env``: passwords beside the settings, quoted so that every password is true."""

from __future__ import annotations

import io
import re

import dotenv
from dotenv.parser import parse_stream

__all__ = ["HIDDEN", "hidden", "value_of", "variable_name", "with_value"]

HIDDEN = "(hidden)"


def variable_name(owner: str) -> str:
    """``ACME_PASSWORD`` for ``acme``."""
    name = re.sub(r"[^A-Z0-9]+", "_", owner.upper()).strip("_") or "ACCOUNT"
    return f"{'_' if name[0].isdigit() else ''}{name}_PASSWORD"


def value_of(text: str, name: str) -> str | None:
    """The value of a variable in the text of a ``.env``; ``None`` if it has none, or an empty
    one."""
    return dotenv.dotenv_values(stream=io.StringIO(text), interpolate=False).get(name) or None


def with_value(text: str, name: str, value: str) -> str:
    """The text of a ``.env`` in which a variable has a value; the rest of it stays."""
    if value_of(text, name) == value:
        return text
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    wanted = f"{name}='{escaped}'\n"
    pieces: list[str] = []
    for piece in _bindings(text):
        if _name_of(piece) == name:
            piece, wanted = wanted, ""  # in its place, and once
        pieces.append(piece)
    text = "".join(pieces)
    if wanted and text and not text.endswith("\n"):
        text += "\n"
    return text + wanted


def hidden(text: str) -> str:
    """The text of a ``.env`` for a person: the names of its variables, no value and no comment,
    which may be a password of before.  What has no value is no name: it may be half of one."""
    names = map(_name_with_a_value, _bindings(text))
    return "".join(f"{name}={HIDDEN}\n" if name else f"# {HIDDEN}\n" for name in names)


def _bindings(text: str) -> list[str]:
    """The pieces of a ``.env``, as dotenv reads it: a value may go on for lines."""
    return [one.original.string for one in parse_stream(io.StringIO(text))]


def _name_with_a_value(piece: str) -> str | None:
    found = dotenv.dotenv_values(stream=io.StringIO(piece), interpolate=False)
    # A password in Base64 has "=" at its end, and nothing but that after it.
    return next((name for name, value in found.items() if (value or "").strip("=")), None)


def _name_of(piece: str) -> str | None:
    found = list(dotenv.dotenv_values(stream=io.StringIO(piece), interpolate=False))
    return found[0] if found else None
