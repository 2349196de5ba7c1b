"""Collections by ETRN, as dialogues with a server that follows a script (RFC 1985)."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from support.collecting import collect
from support.configuration import DEFAULT, agent_keys, configuration
from support.dialogue import Dialogue, scripted
from support.project import Project, isp, provider
from support.salmon import Salmon
from support.serving import RUN, server

from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.settings import SettingsError


def etrn(port: int, **keys: Any) -> dict[str, Any]:
    plain = agent_keys(port, protocol="etrn", name="mx", **keys)
    return {key: value for key, value in plain.items() if value is not None}


def run(
    salmon: Salmon, answers: dict[str, str], service: dict[str, Any] | None = None, **keys: Any
) -> Report:
    """Collect from a server that gives these answers to these ETRNs, in order."""

    async def script(mx: Dialogue) -> None:
        mx.say("220 mx")
        await mx.asks("EHLO mail.example.org", "250-mx", "250 ETRN")
        for name, answer in answers.items():
            assert await mx.hear() == f"ETRN {name}"
            mx.say(answer)
        await mx.asks("QUIT", "221 bye")
        await mx.silence()

    async def main() -> Report:
        async with scripted(script) as port:
            keys.setdefault("domains", list(answers))
            agent = etrn(port, account=None, password=None, **keys)
            [report] = await collect(salmon, agent, default=service or DEFAULT)
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
    async def script(mx: Dialogue) -> None:
        mx.say("220 mx")
        await mx.asks("EHLO", "250-mx", "250 ETRN")
        await mx.asks("ETRN example.org", answer)

    async def main() -> Report:
        async with scripted(script) as port:
            [report] = await collect(salmon, etrn(port, account=None, password=None))
        return report

    report = asyncio.run(main())
    assert report.outcome is outcome
    assert report.answers == [f"example.org: {answer}"]
    # No server of this project listens, so what is requested comes to no one.
    assert (report.error is None) == (outcome is Outcome.NO_MAIL)
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
    assert report.outcome is Outcome.REQUESTED


def test_parameters_go_out_as_they_are(salmon: Salmon) -> None:
    report = run(salmon, {"x y": "250 ok", "z": "250 ok"}, parameters=["x y", "z"], domains=["a.b"])
    assert report.outcome is Outcome.REQUESTED
    report = run(salmon, {"one": "250 ok"}, parameters="one", domains=["a.b"])
    assert report.outcome is Outcome.REQUESTED


def test_names_go_out_in_idna(salmon: Salmon) -> None:
    answers = {"@xn--mller-kva.example": "250 ok"}
    assert run(salmon, answers, domains=["@Müller.example"]).outcome is Outcome.REQUESTED


def test_it_logs_in_first_if_it_has_an_account(salmon: Salmon) -> None:
    async def script(mx: Dialogue) -> None:
        mx.say("220 mx")
        await mx.asks("EHLO", "250-mx", "250-ETRN", "250 AUTH CRAM-MD5")
        await mx.asks("AUTH CRAM-MD5", "334 PDFAeD4=")
        await mx.asks("", "235 welcome")
        await mx.asks("EHLO", "250-mx", "250 ETRN")
        await mx.asks("ETRN example.org", "250 started")
        await mx.asks("QUIT", "221 bye")

    async def main() -> Report:
        async with scripted(script) as port:
            [report] = await collect(salmon, etrn(port))
        return report

    report = asyncio.run(main())
    assert (report.outcome, report.auth) == (Outcome.REQUESTED, "CRAM-MD5")


def test_a_server_without_etrn(salmon: Salmon) -> None:
    async def script(mx: Dialogue) -> None:
        mx.say("220 mx")
        await mx.asks("EHLO", "250-mx", "250 SIZE")
        await mx.asks("QUIT", "221 bye")

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


# -- where the mail comes to -----------------------------------------------------------------------

SOCKET_OF_ITS_OWN = "sends the mail over a connection of its own"


@pytest.mark.parametrize(
    ("listen", "words"),
    [
        (None, 'service "default" does not listen, so it will not come here; set listen'),
        (
            "127.0.0.1:0",
            'no server of this project listens (service "default", listen 127.0.0.1:0), so it will '
            "not come here; start it with `salmon start` or `salmon-revsmtp run`",
        ),
    ],
)
def test_a_request_that_no_server_here_waits_for_says_so(
    salmon: Salmon, listen: str | None, words: str
) -> None:
    service = {"hostname": "mail.example.org", "listen": listen}
    report = run(salmon, {"example.org": "250 started"}, service=service)
    assert report.outcome is Outcome.REQUESTED and report.outcome.good
    assert report.error is not None and SOCKET_OF_ITS_OWN in report.error
    assert words in report.error
    assert "\n  example.org: 250 started\n" in report.summary()
    assert report.summary().endswith(report.error)


@pytest.mark.parametrize("listening", [True, False])
def test_check_says_whether_a_server_here_waits(listening: bool) -> None:
    async def script(mx: Dialogue) -> None:
        mx.say("220 mx")
        await mx.asks("EHLO", "250-mx", "250 ETRN")
        await mx.asks("QUIT", "221 bye")

    async def main() -> list[str]:
        async with scripted(script) as port:
            keys = etrn(port, account=None, password=None)
            valid = configuration(keys, default={"listen": "127.0.0.1:0"})
            service = Service("default", valid.services["default"])
            service.listens = listening
            return (await valid.agents[0].check(service)).problems

    problems = asyncio.run(main())
    assert [SOCKET_OF_ITS_OWN in one for one in problems] == ([] if listening else [True])


def test_a_server_that_listens_gets_what_it_asks_for(project: Project) -> None:
    """The running server, asked to collect: there is nothing to say."""

    async def script(mx: Dialogue) -> None:
        mx.say("220 mx")
        await mx.asks("EHLO", "250-mx", "250 ETRN")
        await mx.asks("ETRN example.org", "250 started")
        await mx.asks("QUIT", "221 bye")

    with provider(script, script) as port:
        keys = isp(port, protocol="'etrn'", every="None")
        del keys["account"], keys["password"]
        project.configure(keys, services="{'default': {'listen': '127.0.0.1:0'}}")
        with server(project, RUN):
            row = json.loads(project.run("collect", "isp", "--json").stdout)
        assert (row["outcome"], row["error"]) == ("requested", None)
        done = project.run("collect", "isp", "--json")
        row = json.loads(done.stdout)
    assert (row["outcome"], done.returncode) == ("requested", 0)
    assert "no server of this project listens" in row["error"]
