"""How a dict of settings becomes a model, and each wrong key a sentence for a person.

No sentence, repr or exception holds a password: values of secret or unknown keys are not quoted.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["SettingsError", "quote", "validated", "words_of"]


class SettingsError(Exception):
    """The settings are wrong; ``problems`` has a sentence for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def validated(model: type[BaseModel], keys: object, where: str, problems: list[str]) -> Any:
    if not isinstance(keys, Mapping):
        problems.append(f"{where}: found {quote(keys)}, allowed: a dict")
        return None
    try:
        return model.model_validate(dict(keys))
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=True):
            problems.append(f"{where}: {_sentence(model, keys, detail)}")
        return None


def _sentence(model: type[BaseModel], keys: Mapping[str, Any], detail: ErrorDetails) -> str:
    """One error of pydantic's in our words: the key, what was found, what is allowed."""
    key = str(detail["loc"][0]) if detail["loc"] else ""
    kind = detail["type"]
    if not key:
        return _reason(detail)
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, model.model_fields, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key}: unknown key, allowed: {', '.join(model.model_fields)}{hint}"
    allowed = model.model_fields[key].description if key in model.model_fields else None
    if kind == "missing":
        return f"{key}: missing, allowed: {allowed}"
    value = _at(keys, detail["loc"])
    found = "that value" if _secret(key, value) else quote(value)
    reason = f" ({_reason(detail)})" if kind == "value_error" else ""
    return f"{key}: found {found}{reason}, allowed: {allowed}"


def _reason(detail: ErrorDetails) -> str:
    return detail["msg"].removeprefix("Value error, ")


def _secret(key: str, value: object) -> bool:
    if key == "parameters" and isinstance(value, str):  # there may be a password among them
        return True
    if isinstance(value, str) and "://" in value:  # and in a URL
        return True
    return re.search("pass|secret|token|key", key, re.IGNORECASE) is not None


def _at(keys: Any, location: Sequence[int | str]) -> Any:
    for step in location:
        try:
            keys = keys[step]
        except (KeyError, IndexError, TypeError):
            break
    return keys


def quote(value: object) -> str:
    """A value for a person; a container only by its kind, for it may hold a secret."""
    if isinstance(value, str | int | float | bool | None):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    return f"a {type(value).__name__}"


def words_of(words: Collection[str]) -> str:
    return ", ".join(repr(word) for word in sorted(words)) or "none is installed"
