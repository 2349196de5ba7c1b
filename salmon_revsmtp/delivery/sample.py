"""Salmon's sample handler, which ``salmon gen`` puts into every project.

It takes mail for every address, moves its sender from one state to the next, and keeps nothing:
what is collected into a project that has nothing else is gone after the 250.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from importlib import resources
from types import CodeType
from typing import Any

from salmon.routing import Router

__all__ = ["sample_warning"]

_SOURCE = "data/prototype/app/handlers/sample.py"

# The local part of an address that no project has a route of its own for.
_ANYONE = "no-one-of-this-name-6f1d"


def sample_warning(domains: Iterable[str]) -> str | None:
    """A sentence if mail for any address in one of these domains goes to Salmon's sample and to no
    other handler; ``None`` if it does not.  ``"*"`` stands for any domain.  The handlers have been
    loaded.

    The sample is known by what its functions do, whatever module they stand in.
    """
    swallowing: dict[str, None] = {}
    with Router.lock:
        samples = _samples()
        for domain in domains if samples else ():
            named = "example.org" if domain == "*" else domain.removeprefix("@").lower()
            address = f"{_ANYONE}@{named}"
            taking = {one.__module__ for functions, _ in Router.match(address) for one in functions}
            if taking and taking <= samples:
                swallowing.update(dict.fromkeys(sorted(taking)))
    if not swallowing:
        return None
    return (
        f"{', '.join(swallowing)} is the sample handler of `salmon gen`: it takes mail for every "
        "address and keeps none of it, so what is collected is lost; put a handler that stores "
        'mail in its place: handlers = ["salmon_revsmtp.handlers.maildir"] in the settings'
    )


def _samples() -> set[str]:
    """The modules whose routes are those of Salmon's sample, and no others."""
    routed: dict[str, dict[str, Any]] = {}
    for _, functions in Router.REGISTERED.values():
        for one in functions:
            inner = inspect.unwrap(one)  # what Salmon's decorator has put it into
            deeds = _deeds(getattr(inner, "__code__", None))
            routed.setdefault(one.__module__, {})[one.__name__] = deeds
    return {module for module, functions in routed.items() if functions == _sample()}


@functools.cache
def _sample() -> dict[str, Any]:
    """What the functions of Salmon's sample do; empty if this Salmon has none."""
    try:
        source = resources.files("salmon").joinpath(_SOURCE).read_text()
        made = compile(source, "sample.py", "exec", dont_inherit=True).co_consts
    except (OSError, SyntaxError, ValueError):
        return {}
    return {one.co_name: _deeds(one) for one in made if isinstance(one, CodeType)}


def _deeds(code: CodeType | None) -> Any:
    """What a function does, whatever stands in its comments and in its docstring."""
    return None if code is None else (code.co_code, code.co_names, code.co_varnames)
