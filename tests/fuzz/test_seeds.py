"""The fuzz targets without a fuzzer: every seed, every kept crash, and a little noise."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import properties
import pytest
from grammar import inputs, seeds
from hypothesis import given, settings

from salmon_revsmtp.delivery import bounds
from salmon_revsmtp.net import proxyheader
from salmon_revsmtp.smtp import commands, content, receiver, sasl, sender
from salmon_revsmtp.smtp.replies import Reply

EVERYTHING = [(target, path) for target in properties.TARGETS for path in seeds(target)]


@pytest.fixture(autouse=True, scope="module")
def cheap_passwords() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sasl, "ITERATIONS", 1)
        yield


@pytest.mark.parametrize(
    ("target", "path"), EVERYTHING, ids=[f"{target}-{path.name}" for target, path in EVERYTHING]
)
def test_the_properties_hold_for_every_seed_wherever_it_is_split(target: str, path: Path) -> None:
    data = path.read_bytes()
    properties.TARGETS[target](data)
    singly = properties.PIECES - 1
    for start in range(1, min(len(data), 1000), singly):
        properties.TARGETS[target](b"%d " % start + b"1 " * singly + data)


@pytest.mark.parametrize("target", properties.TARGETS)
def test_the_properties_hold_for_noise(target: str) -> None:
    # Those of the parser are larger by far.
    examples = 30 if target == "parser" else 200

    @given(inputs(target))
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    def run(data: bytes) -> None:
        properties.TARGETS[target](data)

    run()


def _answered_at_once(machine: receiver.Receiver, reply: Reply) -> None:
    """Before the messages that the client sent before ETRN."""
    if machine._state is commands.State.STARTING:
        machine._over("the answer to ETRN")
        machine._ready += reply.encode()


def _forgotten(machine: receiver.Receiver) -> None:
    """Without a word to the sink."""
    machine._sink = None


def _proves_anything(name: bytes, password: bytes) -> sasl.Exchange:
    """Whoever it is, he is another."""
    yield sasl.WhoIs(name.decode("utf-8", "replace"))
    return "other"


@pytest.mark.parametrize(
    ("target", "module", "name", "wrong"),
    [
        ("receiver", receiver, "_END_OF_DATA", b"\n.\r\n"),
        ("receiver", receiver, "_has_long_line", lambda content, limit: False),
        ("receiver", receiver.Receiver, "_end_if_shutting_down", lambda self: None),
        ("receiver", receiver.Receiver, "_too_big", lambda self: commands.OK),
        ("receiver", receiver.Receiver, "answer_etrn", _answered_at_once),
        ("receiver", receiver.Receiver, "_stuffed_content", receiver.Receiver._whole_content),
        ("receiver", receiver.Receiver, "_count_line", lambda self, block: None),
        ("receiver", receiver.Receiver, "_drop_sink", _forgotten),
        ("receiver", receiver.Receiver, "_let_go", lambda self: None),
        ("sender", sender, "_stuffed", lambda content: content),
        ("sender", content, "_with_crlf", lambda data: data),
        ("sender", content, "_hides_an_end", lambda data: False),
        ("sender", sender.Sender, "_can_be_said", lambda self, envelope: True),
        ("session", sasl, "_proved", _proves_anything),
        ("parser", bounds, "LIMITS", bounds.ParserLimits(depth=10_000)),
        ("parser", bounds, "_HEADER_LINE", re.compile(rb"[!-~]+ *:|[ \t]")),
        ("parser", bounds, "_BLANKS", b""),
        ("proxy", proxyheader, "LINE", 10_000),
        ("proxy", proxyheader, "_plain", str),
        ("proxy", proxyheader, "_FAMILIES", dict.fromkeys(range(4), 0)),
    ],
)
def test_the_properties_notice(
    target: str, module: object, name: str, wrong: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is checked is worth checking: a wrong machine does not get by."""
    monkeypatch.setattr(module, name, wrong)
    found = 0
    for path in seeds(target):
        try:
            properties.TARGETS[target](path.read_bytes())
        except (AssertionError, ValueError, RecursionError, struct.error):
            found += 1
    assert found
