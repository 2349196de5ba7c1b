"""Inputs for hypothesis: the dictionary's tokens, the seeds' lines, and noise, in any order."""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import strategies as st

__all__ = ["SEEDS", "inputs", "seeds"]

HERE = Path(__file__).parent
SEEDS = HERE / "seeds"

_ENTRY = re.compile(r'(?:(\w+)=)?"(.*)"')


def seeds(target: str) -> list[Path]:
    """The files below ``seeds/``, and every crash that was kept there."""
    return sorted((SEEDS / target).iterdir())


def _tokens() -> list[bytes]:
    entries = map(_ENTRY.fullmatch, (HERE / "smtp.dict").read_text(encoding="ascii").splitlines())
    return [
        entry[2].encode("ascii").decode("unicode_escape").encode("latin-1")
        for entry in entries
        if entry and not (entry[1] or "").startswith("option_")
    ]


def inputs(target: str) -> st.SearchStrategy[bytes]:
    """Inputs of a target, as ``properties`` describes them."""
    contents = [path.read_bytes().partition(b"\n") for path in seeds(target)]
    heads = sorted({head for head, _, _ in contents})
    lines = sorted({line for _, _, body in contents for line in body.splitlines(keepends=True)})
    whole = st.sampled_from([body for _, _, body in contents])
    part = st.one_of(
        st.sampled_from(lines), st.sampled_from(_tokens()), st.binary(min_size=1, max_size=8)
    )
    parts = st.lists(part, max_size=12).map(b"".join)
    return st.builds(
        lambda head, sizes, before, body, at, after: (
            b" ".join([head, *sizes]) + b"\n" + before + body[: at % (len(body) + 1)] + after
        ),
        st.sampled_from(heads),
        st.lists(st.integers(1, 60).map(lambda size: b"%d" % size), max_size=6),
        st.one_of(st.just(b""), parts),
        whole,
        st.integers(0, 400),
        parts,
    )
