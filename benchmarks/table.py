"""Sections, cases and targets; and the tables that are made of their figures.

A *case* is one thing that is measured, once a round; the cases of a *section* have one unit, and
are compared with one of them (``ours``) and, where there is one, with the ``limit``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Case", "Missing", "Section", "Target", "as_json", "as_markdown"]


class Missing(Exception):
    """A peer is not here; the text says which, and how it would be."""


@dataclass
class Case:
    """``measure`` makes one figure.  ``missing`` says why it cannot be made, ``failed`` why it was
    not; ``figures`` has one per round, in the section's unit."""

    name: str
    measure: Callable[[], float]
    missing: str | None = None
    failed: str | None = None
    figures: list[float] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        """Of all rounds; ``None`` without a figure."""
        return statistics.median(self.figures) if self.figures else None


@dataclass
class Section:
    """Cases that are compared.

    ``ours``   the name of the case that the others are set in relation to.
    ``limit``  the name of the case that nothing can be better than.
    ``higher`` a larger figure is the better one.
    """

    title: str
    unit: str
    cases: list[Case]
    ours: str = ""
    limit: str = ""
    higher: bool = True

    def median(self, name: str) -> float | None:
        """The median of a case, by its name."""
        return next((case.median for case in self.cases if case.name == name), None)


@dataclass(frozen=True)
class Target:
    """What is to be reached: ``figure`` of all sections by their titles, at least or at most
    ``bound``; ``None`` when what it needs was not measured."""

    text: str
    figure: Callable[[dict[str, Section]], float | None]
    bound: Callable[[dict[str, Section]], float | None]
    at_least: bool = True

    def verdict(self, sections: dict[str, Section]) -> tuple[float | None, float | None, str]:
        """Figure, bound, and ``yes``, ``no`` or ``not measured``."""
        figure, bound = self.figure(sections), self.bound(sections)
        if figure is None or bound is None:
            return figure, bound, "not measured"
        reached = figure >= bound if self.at_least else figure <= bound
        return figure, bound, "yes" if reached else "no"


def shown(figure: float | None) -> str:
    """A figure with three significant digits or so."""
    if not figure:
        return "-" if figure is None else "0"
    for digits, least in ((0, 100), (1, 10), (2, 1)):
        if abs(figure) >= least:
            return f"{figure:,.{digits}f}"
    return f"{figure:.3f}"


def as_markdown(
    sections: Sequence[Section], targets: Iterable[Target], machine: dict[str, str], rounds: int
) -> str:
    """The tables for people."""
    lines = ["# salmon-revsmtp beside its peers", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items()]
    lines += [f"- medians of {rounds} rounds, all peers in turn", ""]
    for section in sections:
        lines += [f"## {section.title}", "", *_rows(section), ""]
    by_title = {section.title: section for section in sections}
    lines += [
        "## Targets",
        "",
        "| target | bound | measured | reached |",
        "| --- | ---: | ---: | --- |",
    ]
    for target in targets:
        figure, bound, verdict = target.verdict(by_title)
        lines.append(f"| {target.text} | {shown(bound)} | {shown(figure)} | {verdict} |")
    return "\n".join(lines) + "\n"


def _rows(section: Section) -> list[str]:
    ours, limit = section.median(section.ours), section.median(section.limit)
    columns = ["what", f"{section.unit}, median", "min to max"]
    columns += ["ours is"] if section.ours else []
    columns += ["of the limit"] if section.limit else []
    rows = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for case in section.cases:
        if case.median is None:
            reason = case.failed or case.missing or "not measured"
            cells = [case.name, reason] + [""] * (len(columns) - 2)
        else:
            cells = [case.name, shown(case.median)]
            cells.append(f"{shown(min(case.figures))} to {shown(max(case.figures))}")
            cells += [_times(section, ours, case)] if section.ours else []
            cells += [_percent(case.median, limit)] if section.limit else []
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _times(section: Section, ours: float | None, case: Case) -> str:
    if case.name == section.ours or not ours or not case.median:
        return ""
    times = ours / case.median if section.higher else case.median / ours
    return f"{times:.2f} times as good"


def _percent(figure: float, limit: float | None) -> str:
    return f"{100 * figure / limit:.0f} %" if limit else ""


def as_json(
    sections: Sequence[Section], targets: Iterable[Target], machine: dict[str, str], rounds: int
) -> str:
    """The same for programs, with every round's figure."""
    by_title = {section.title: section for section in sections}
    return json.dumps(
        {
            "machine": machine,
            "rounds": rounds,
            "sections": [
                {
                    "title": section.title,
                    "unit": section.unit,
                    "ours": section.ours or None,
                    "limit": section.limit or None,
                    "higher_is_better": section.higher,
                    "cases": [
                        {
                            "name": case.name,
                            "median": case.median,
                            "figures": case.figures,
                            "missing": case.missing,
                            "failed": case.failed,
                        }
                        for case in section.cases
                    ],
                }
                for section in sections
            ],
            "targets": [
                dict(
                    zip(
                        ("text", "measured", "bound", "reached"),
                        (one.text, *one.verdict(by_title)),
                        strict=True,
                    )
                )
                for one in targets
            ],
        },
        indent=1,
    )
