"""How a dict of settings becomes a model, and each wrong key a sentence for a person.

No sentence, repr or exception holds a password: values of secret or unknown keys are not quoted,
nor is a text where a dict or a list belongs, nor what stands before an "@".
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from salmon_revsmtp.foreign import without_login

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["SettingsError", "kind_of", "quote", "validated", "words_of"]


class SettingsError(Exception):
    """The settings are wrong; ``problems`` has a sentence for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


# What people write who know another program, and the key that is meant where the model has it.
_OTHER_WORDS = {
    "server": ("host", "hostname", "address", "provider"),
    "hostname": ("host", "server", "name"),
    "account": ("user", "username", "login", "name"),
    "password": ("pass", "passwd", "secret"),
    "every": ("interval", "minutes", "poll", "schedule"),
    "tls": ("ssl", "starttls", "encryption", "security"),
    "tls_cert": ("cert", "certificate", "certfile", "ssl_cert"),
    "tls_key": ("key", "keyfile", "private_key", "ssl_key"),
    "ca_file": ("ca", "cafile", "ca_cert", "ca_certs"),
    "domains": ("domain", "domain_names"),
    "listen": ("bind", "address", "port", "host"),
    "allow": ("allowed", "networks"),
    "protocol": ("type", "kind"),
}

# A number with a unit, which the keys do not take: what the unit is as a factor.
_WITH_UNIT = re.compile(r"([0-9]+(?:[.][0-9]+)?) *([A-Za-z]+)")
_OCTETS = {"k": "1024", "m": "1024**2", "g": "1024**3", "t": "1024**4"}

_WORDS_FOR_TRUE = ("yes", "on", "true", "1")
_WORDS_FOR_FALSE = ("no", "off", "false", "0")

# What stands between names that should be a list.
_BETWEEN = re.compile(r"[\s,;]+")
# Keys of mail addresses, in which an "@" is no password's.
_ADDRESSES = ("mail", "sender")
# Keys that take one text, or a list of them.
_ONE_OR_MORE = ("listen", "listen_implicit")


def validated(model: type[BaseModel], keys: object, where: str, problems: list[str]) -> Any:
    """A dict of settings as a pydantic model; ``None`` if anything is wrong with it.

    ``model``     gives each field a ``description``: what is allowed.
    ``keys``      what the user wrote.
    ``where``     what that is called, such as ``agent "isp"``.
    ``problems``  gets a sentence for each wrong key; none of them quotes a secret.
    """
    if not isinstance(keys, Mapping):
        problems.append(f"{where}: found {kind_of(keys)}, allowed: a dict{_hint_for_dict(keys)}")
        return None
    given = {str(key): value for key, value in keys.items()}
    wrong = _truths_for_numbers(model, given)
    for key in wrong:
        problems.append(f"{where}: {key}: found {given[key]}, allowed: {_allowed(model, key)}")
    try:
        valid = model.model_validate(given)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=True):
            if not (detail["loc"] and detail["loc"][0] in wrong):
                problems.append(f"{where}: {_sentence(model, given, detail)}")
        return None
    return None if wrong else valid


def _truths_for_numbers(model: type[BaseModel], given: Mapping[str, Any]) -> list[str]:
    """Keys for numbers that have ``True`` or ``False``, which Python takes for 1 and 0: ``every:
    True`` would collect once a minute."""
    return [
        key
        for key, value in given.items()
        if isinstance(value, bool)
        and (field := model.model_fields.get(key)) is not None
        and {int, float} & {field.annotation, *get_args(field.annotation)}
        and bool not in get_args(field.annotation)
    ]


def _allowed(model: type[BaseModel], key: str) -> str | None:
    return model.model_fields[key].description if key in model.model_fields else None


def _sentence(model: type[BaseModel], keys: Mapping[str, Any], detail: ErrorDetails) -> str:
    """One error of pydantic's in our words: the key, what was found, what is allowed, and what may
    have been meant."""
    key = str(detail["loc"][0]) if detail["loc"] else ""
    kind = detail["type"]
    if not key:
        return _reason(detail)
    if kind == "extra_forbidden":
        near = _meant(key, model.model_fields)
        hint = f"; did you mean {near}?" if near else ""
        return f"{without_login(key)}: unknown key, allowed: {', '.join(model.model_fields)}{hint}"
    allowed = _allowed(model, key)
    if kind == "missing":
        return f"{key}: missing, allowed: {allowed}"
    value = _at(keys, detail["loc"])
    found = "that value" if _secret(key, value) else _quoted(model, key, value, detail)
    reason = f" ({_reason(detail)})" if kind == "value_error" else ""
    return f"{key}: found {found}{reason}, allowed: {allowed}{_hint(key, value, kind)}"


def _quoted(model: type[BaseModel], key: str, value: object, detail: ErrorDetails) -> str:
    if len(detail["loc"]) == 1 and key not in _ONE_OR_MORE:
        field = model.model_fields.get(key)
        if field is not None and _takes_many(field.annotation):
            return kind_of(value)
    return quote(value, address=key in _ADDRESSES)


def _takes_many(annotation: object) -> bool:
    """Whether a key is for a list or a dict; or ``None``, or something else."""
    kinds = (annotation, *get_args(annotation))
    return any(
        isinstance(kind, type) and issubclass(kind, list | tuple | set | frozenset | Mapping)
        for kind in (get_origin(one) or one for one in kinds)
    )


def _meant(key: str, known: Collection[str]) -> str | None:
    """Which of the known keys an unknown one may stand for."""
    word = key.lower().replace("-", "_")
    if near := difflib.get_close_matches(word, known, 1, 0.75):
        return near[0]
    others = [name for name, words in _OTHER_WORDS.items() if name in known and word in words]
    return next(iter(others or difflib.get_close_matches(word, known, 1)), None)


def _hint(key: str, value: object, kind: str) -> str:
    """What may have been meant by a wrong value; empty if no one can tell."""
    if value is None and key == "password":
        return "; None is what os.environ.get() says of a variable that is not set"
    if not isinstance(value, str) or _secret(key, value):
        return ""
    meant = ""
    if kind.startswith("bool"):
        meant = _truth(value)
    elif kind.startswith(("int", "float")):
        meant = _number(value)
    elif key == "domains":
        meant = _names(value)
    elif key in ("allow", "deny", "keep_places_for", "forwarded_from", "proxy_from"):
        meant = _networks(value)
    return f"; did you mean {meant}?" if meant else ""


def _truth(value: str) -> str:
    word = value.strip().lower()
    if word in _WORDS_FOR_TRUE:
        return "True, without quotes"
    return "False, without quotes" if word in _WORDS_FOR_FALSE else ""


def _number(value: str) -> str:
    """``50 * 1024**2`` for ``50 MiB``, and ``10`` for ``10 minutes``."""
    found = _WITH_UNIT.fullmatch(value.strip())
    if found is None:
        return ""
    factor = _OCTETS.get(found[2][0].lower()) if found[2][-1] in "bB" else None
    return f"{found[1]} * {factor}" if factor else found[1]


def _names(value: str) -> str:
    """``['a.example', 'b.example']`` for ``a.example, b.example``; for an address its domain."""
    if "@" in value and ":" in value:  # of a login, and between spaces there may be some of it
        return ""
    names = [one.rpartition("@")[2].strip("[]'\"") for one in _BETWEEN.split(value.strip())]
    fit = all(re.fullmatch(r"[*]|[\w-]+([.][\w-]+)+", one) for one in names)
    return repr(names) if fit else ""


def _networks(value: str) -> str:
    """``['192.168.1.0/24']`` for ``192.168.1.1/24``."""
    try:
        found = [ipaddress.ip_interface(one) for one in _BETWEEN.split(value.strip())]
    except ValueError:
        return ""
    return repr([str(one.network if "/" in value else one.ip) for one in found])


def _hint_for_dict(found: object) -> str:
    """For a dict in a list, and a list without one."""
    if isinstance(found, list | tuple) and len(found) == 1 and isinstance(found[0], Mapping):
        return "; take the brackets around it away"
    return ""


def _reason(detail: ErrorDetails) -> str:
    return detail["msg"].removeprefix("Value error, ")


def _secret(key: str, value: object) -> bool:
    if key == "command":  # a command line, in which tokens are
        return True
    if key == "parameters" and isinstance(value, str):  # there may be a password among them
        return True
    if key == "hold" and isinstance(value, str) and "://" in value:  # and in a URL, however written
        return True
    if value is None or key in ("tls_cert", "tls_key"):  # a path
        return False
    return re.search("pass|secret|token|key", key, re.IGNORECASE) is not None


def _at(keys: Any, location: Sequence[int | str]) -> Any:
    for step in location:
        try:
            keys = keys[step]
        except (KeyError, IndexError, TypeError):
            break
    return keys


def quote(value: object, *, address: bool = False) -> str:
    """A value for a person; a container only by its kind, for it may hold a secret.

    ``address``  it should be a mail address: before its ``@`` may be anything but a ``:``.
    """
    if not isinstance(value, str):
        return kind_of(value)
    if not address or ":" in value:
        value = without_login(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def kind_of(value: object) -> str:
    """What was found where a dict or a list belongs: a text there may be a password."""
    if isinstance(value, int | float | None):
        return repr(value) if len(repr(value)) <= 60 else "a number"
    return f"a {'text' if isinstance(value, str) else type(value).__name__}"


def words_of(words: Collection[str]) -> str:
    return ", ".join(repr(word) for word in sorted(words)) or "none is installed"
