"""What TLS 1.3 costs: the same intake, encrypted and not."""

from __future__ import annotations

from benchmarks import intake
from benchmarks.intake import Load
from benchmarks.table import Case, Section

__all__ = ["sections"]

COUNTS = {4_000: 5000, 10_000_000: 10}
QUICK = {4_000: 60}

CLEAR = "ours, router, in the clear"


def sections(quick: bool) -> list[Section]:
    """Small messages, and large ones."""
    return [_section(Load(messages, octets)) for octets, messages in _counts(quick).items()]


def _counts(quick: bool) -> dict[int, int]:
    return QUICK if quick else COUNTS


def _section(load: Load) -> Section:
    cases = [
        Case(CLEAR, lambda: intake.by_us(load)),
        Case("ours, router, TLS 1.3", lambda: intake.by_us(load, tls=True)),
        Case("ours, queue, in the clear", lambda: intake.by_us(load, delivery="queue")),
        Case("ours, queue, TLS 1.3", lambda: intake.by_us(load, tls=True, delivery="queue")),
        Case("the feeding side, into a sink, TLS 1.3", lambda: intake.ceiling(load, "--tls")),
    ]
    title = f"TLS, {load.octets // 1000:,} KB messages, one connection"
    return Section(title, "messages/s", cases, ours=CLEAR)
