"""Collections by ETRN, as dialogues with a server that follows a script (RFC 1985)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.collecting import collect
from support.configuration import agent_keys, configuration
from support.dialogue import Dialogue, scripted
from support.salmon import Salmon

from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.settings import SettingsError


def etrn(port: int, **keys: Any) -> dict[str, Any]:
    plain = agent_keys(port, protocol="etrn", name="mx", **keys)
    return {key: value for key, value in plain.items() if value is not None}


def run(salmon: Salmon, answers: dict[str, str], **keys: Any) -> Report:
    """Collect from a server that gives these answers to these ETRNs, in order."""

    async def script(server: Dialogue) -> None:
        server.say("220 mx")
        await server.asks("EHLO mail.example.org", "250-mx", "250 ETRN")
        for name, answer in answers.items():
            assert await server.hear() == f"ETRN {name}"
            server.say(answer)
        await server.asks("QUIT", "221 bye")
        await server.silence()

    async def main() -> Report:
        async with scripted(script) as port:
            keys.setdefault("domains", list(answers))
            [report] = await collect(salmon, etrn(port, account=None, password=None, **keys))
        return report

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("250 OK, queuing for node example.org started", Outcome.REQUESTED),
        ("251 OK, no messages waiting", Outcome.NO_MAIL),
        ("252 OK, pending messages started", Outcome.REQUESTED),
        ("253 OK, 17 pending messages started", Outcome.REQUESTED),
        ("458 unable to queue", Outcome.DEFERRED),
        ("459 node not allowed: not yours", Outcome.REFUSED),
        ("421 closing", Outcome.DEFERRED),
        ("500 syntax", Outcome.REFUSED),
        ("501 syntax", Outcome.REFUSED),
    ],
)
def test_each_answer_has_its_outcome(salmon: Salmon, answer: str, outcome: Outcome) -> None:
    async def script(server: Dialogue) -> None:
        server.say("220 mx")
        await server.asks("EHLO", "250-mx", "250 ETRN")
        await server.asks("ETRN example.org", answer)

    async def main() -> Report:
        async with scripted(script) as port:
            [report] = await collect(salmon, etrn(port, account=None, password=None))
        return report

    report = asyncio.run(main())
    assert report.outcome is outcome
    assert report.answers == [f"example.org: {answer}"]
    assert (report.error is None) == outcome.good
    assert report.as_dict()["answers"] == report.answers


def test_the_worst_of_several_answers_is_the_outcome(salmon: Salmon) -> None:
    answers = {
        "example.org": "253 OK, 2 pending messages started",
        "@example.com": "459 not allowed",
        "#slow": "458 unable",
        "example.net": "251 nothing",
    }
    report = run(salmon, answers)
    assert report.outcome is Outcome.REFUSED
    assert report.answers == [f"{name}: {answer}" for name, answer in answers.items()]
    assert report.error is not None
    assert "@example.com: 459 not allowed; #slow: 458 unable" in report.error


def test_a_request_beside_an_empty_queue_is_requested(salmon: Salmon) -> None:
    report = run(salmon, {"example.org": "251 nothing", "example.com": "250 started"})
    assert (report.outcome, report.error) == (Outcome.REQUESTED, None)


def test_parameters_go_out_as_they_are(salmon: Salmon) -> None:
    report = run(salmon, {"x y": "250 ok", "z": "250 ok"}, parameters=["x y", "z"], domains=["a.b"])
    assert report.outcome is Outcome.REQUESTED
    report = run(salmon, {"one": "250 ok"}, parameters="one", domains=["a.b"])
    assert report.outcome is Outcome.REQUESTED


def test_names_go_out_in_idna(salmon: Salmon) -> None:
    answers = {"@xn--mller-kva.example": "250 ok"}
    assert run(salmon, answers, domains=["@Müller.example"]).outcome is Outcome.REQUESTED


def test_it_logs_in_first_if_it_has_an_account(salmon: Salmon) -> None:
    async def script(server: Dialogue) -> None:
        server.say("220 mx")
        await server.asks("EHLO", "250-mx", "250-ETRN", "250 AUTH CRAM-MD5")
        await server.asks("AUTH CRAM-MD5", "334 PDFAeD4=")
        await server.asks("", "235 welcome")
        await server.asks("EHLO", "250-mx", "250 ETRN")
        await server.asks("ETRN example.org", "250 started")
        await server.asks("QUIT", "221 bye")

    async def main() -> Report:
        async with scripted(script) as port:
            [report] = await collect(salmon, etrn(port))
        return report

    report = asyncio.run(main())
    assert (report.outcome, report.auth) == (Outcome.REQUESTED, "CRAM-MD5")


def test_a_server_without_etrn(salmon: Salmon) -> None:
    async def script(server: Dialogue) -> None:
        server.say("220 mx")
        await server.asks("EHLO", "250-mx", "250 SIZE")
        await server.asks("QUIT", "221 bye")

    async def main() -> Report:
        async with scripted(script) as port:
            [report] = await collect(salmon, etrn(port, account=None, password=None))
        return report

    report = asyncio.run(main())
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "does not offer ETRN" in report.error


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"domains": []}, "nothing would be asked for"),
        ({"domains": ["#a b"]}, "one word"),
        ({"domains": ["@"]}, "no domain name"),
        ({"password": None}, "give both, or neither"),
        ({"account": None, "password": None, "auth": ["CRAM-MD5"]}, "auth: .*no login"),
        ({"parameters": ["a\r\nQUIT"]}, "control characters"),
        ({"domains": ["#queue"]}, "names no domain"),
    ],
)
def test_wrong_settings(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        configuration(etrn(25, **keys))


def test_defaults() -> None:
    keys = etrn(25, account=None, password=None)
    del keys["port"], keys["tls"]
    [agent] = configuration(keys).agents
    assert (agent.settings.port, agent.settings.tls) == (25, "opportunistic")
