"""Wrong settings: one clear sentence each, all at once, and never a secret."""

from __future__ import annotations

import ipaddress
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from support.configuration import PASSWORD, agent_keys, configuration
from support.tls import CERTIFICATE

from salmon_revsmtp.hostname import machine_name
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.configuration import load
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.service.settings import ServiceSettings
from salmon_revsmtp.settings import SettingsError


def problems(*agents: Any, **services: Any) -> list[str]:
    with pytest.raises(SettingsError) as raised:
        configuration(*agents, **services)
    assert PASSWORD not in str(raised.value) + repr(raised.value)
    return raised.value.problems


def one(**keys: Any) -> str:
    """The one problem of an agent with these keys."""
    [problem] = problems(agent_keys(366, **keys))
    return problem


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in agent_keys(366).items() if key not in keys}


def test_defaults_are_those_of_the_documentation() -> None:
    [agent] = configuration(without("port", "tls")).agents
    settings = agent.settings
    assert (settings.enabled, settings.port, settings.tls) == (True, 366, "starttls")
    assert (settings.ca_file, settings.service, settings.every) == (None, "default", 10)
    assert (settings.timeout, settings.parameters, settings.auth) == (60, None, None)
    service = configuration().services["default"]
    assert (service.max_message_size, service.max_recipients) == (50 * 2**20, 1000)
    assert (service.delivery, service.queue, service.listen) == ("router", "run/inbound", ())


def test_no_settings_at_all_are_no_agents() -> None:
    module: Any = SimpleNamespace()
    valid = load(module, Plugins.load())
    assert valid.agents == ()
    assert list(valid.services) == ["default"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("name", "i s p", ["name: found 'i s p'", "letters, digits"]),
        ("protocol", "pop3", ["protocol: found 'pop3'", "'odmr'"]),
        ("enabled", "perhaps", ["enabled: found 'perhaps'", "True or False"]),
        ("server", "", ["server: found ''", "host name"]),
        ("server", "acme@odmr.example.net", ["server: found", "host name"]),
        ("server", "odmr.example.net:3660", ["server: found", "a key of its own: port"]),
        ("server", "[::1]:3660", ["server: found", "a key of its own: port"]),
        ("server", "a..b", ["server: found 'a..b'", "host name"]),
        ("server", "[odmr", ["server: found '[odmr'", "host name"]),
        ("password", "a\udcff", ["password: found that value", "UTF-8"]),
        ("port", 70000, ["port: found 70000", "1 to 65535"]),
        ("port", "smtp", ["port: found 'smtp'", "1 to 65535"]),
        ("tls", "yes", ["tls: found 'yes'", "'implicit', 'starttls'"]),
        ("account", None, ["account: found None", "log in"]),
        ("account", "a\nb", ["account: found 'a\\nb'", "control characters"]),
        ("password", "", ["password: found that value", ".env"]),
        ("password", 12345678, ["password: found that value", "text"]),
        ("password", f"{PASSWORD}\n", ["password: found that value", "control characters"]),
        ("auth", "PLAIN", ["auth: found 'PLAIN'", "a list", "'CRAM-MD5'"]),
        ("auth", [], ["auth: found a list", "'CRAM-MD5'"]),
        ("auth", ["XOAUTH2"], ["auth: found 'XOAUTH2'", "'SCRAM-SHA-256'", "'LOGIN'"]),
        ("auth", ["CRAM-MD5", "cram-md5"], ["auth: found a list", "twice"]),
        ("auth", ["CRAM-MD5", "PLAIN"], ["auth: found a list", "tls 'none' verifies no"]),
        ("domains", "example.org", ["domains: found 'example.org'", "a list"]),
        ("domains", ["exa mple.org"], ["domains", "'exa mple.org'", "list of domain"]),
        ("domains", ["straße.example"], ["domains", "xn--"]),
        ("domains", [17], ["domains: found 17", "list of domain"]),
        ("parameters", "x\r\nQUIT", ["parameters", "control characters"]),
        ("parameters", ["a", "b"], ["parameters: found a list", "a text"]),
        ("service", "other", ["service: found 'other'", "'default'"]),
        ("every", 0, ["every: found 0", "minutes above 0"]),
        ("every", float("nan"), ["every: found nan", "minutes above 0"]),
        ("timeout", -1, ["timeout: found -1", "seconds"]),
        ("passwort", PASSWORD, ["passwort: unknown key", "did you mean password?"]),
    ],
)
def test_a_wrong_value_names_agent_key_finding_and_what_is_allowed(
    key: str, value: object, words: list[str]
) -> None:
    problem = one(**{key: value})
    assert problem.startswith(f'agent "{"i s p" if key == "name" else "isp"}": ')
    for word in words:
        assert word in problem


def test_a_ca_file_that_does_not_exist() -> None:
    problem = one(tls="starttls", ca_file="/nowhere.pem")
    for words in ("ca_file: found '/nowhere.pem'", "No such file", "PEM"):
        assert words in problem


@pytest.mark.parametrize("protocol", ["odmr", "etrn"])
@pytest.mark.parametrize("tls", ["opportunistic", "none"])
def test_a_ca_file_that_nothing_would_be_verified_with_is_an_error(protocol: str, tls: str) -> None:
    problem = one(protocol=protocol, tls=tls, ca_file=str(CERTIFICATE))
    assert problem.startswith('agent "isp": ca_file: found ')
    assert f"tls {tls!r} verifies no certificate" in problem


def test_a_ca_file_with_the_default_tls_of_etrn_is_an_error() -> None:
    keys = {**without("tls"), "protocol": "etrn", "ca_file": str(CERTIFICATE)}
    assert any("tls 'opportunistic' verifies no certificate" in one for one in problems(keys))


@pytest.mark.parametrize(
    "value",
    [
        *("my box", "", "a..b", "[192.0.2]", "[2001:db8::1]", "192.0.2.1", "a_b.example", "mail/x"),
        *("-a.example", "mail.example.org\r\nQUIT", "x" * 64 + ".example", "[mail.example.org]"),
    ],
)
def test_a_hostname_that_no_one_takes(value: str) -> None:
    [problem] = problems(agent_keys(366), default={"hostname": value})
    assert problem.startswith('service "default": hostname: found ')
    assert "'mail.example.org'" in problem


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("mail.example.org", "mail.example.org"),
        ("Mail.Example.org.", "mail.example.org"),
        ("büro.example", "xn--bro-hoa.example"),
        ("[192.0.2.1]", "[192.0.2.1]"),
        ("[ipv6:2001:db8::1]", "[IPv6:2001:db8::1]"),
    ],
)
def test_a_hostname_goes_out_in_one_form(value: str, name: str) -> None:
    service = configuration(agent_keys(366), default={"hostname": value}).services["default"]
    assert service.hostname == name


@pytest.mark.parametrize(
    "found",
    [
        *("raspberrypi", "büro", "my box", "", "localhost", "localhost.localdomain", "192.0.2.7"),
        *("1.0.0.127.in-addr.arpa", "my_box.example.org", "-x.example.org", "a..b", "x" * 300),
    ],
)
def test_a_machine_without_a_full_name_is_called_by_its_address(
    monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: found)
    name = machine_name()
    assert name[0] + name[-1] == "[]"
    assert ipaddress.ip_address(name[1:-1].removeprefix("IPv6:"))
    assert Service("default", ServiceSettings(hostname=name)).hostname == name


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ("mail.example.org", "mail.example.org"),
        ("host7.example.org.", "host7.example.org"),
        ("büro.example.org", "xn--bro-hoa.example.org"),
    ],
)
def test_a_machine_with_a_full_name_is_called_by_it(
    monkeypatch: pytest.MonkeyPatch, found: str, name: str
) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: found)
    assert machine_name() == name


@pytest.mark.parametrize(
    ("value", "server", "address"),
    [
        ("localhost.", "localhost", "localhost:366"),
        ("odmr.example.net.", "odmr.example.net", "odmr.example.net:366"),
        ("[::1]", "::1", "[::1]:366"),
        ("2001:db8::1", "2001:db8::1", "[2001:db8::1]:366"),
        ("[192.0.2.1]", "192.0.2.1", "192.0.2.1:366"),
        ("büro.example", "xn--bro-hoa.example", "xn--bro-hoa.example:366"),
    ],
)
def test_a_server_may_be_written_in_these_ways(value: str, server: str, address: str) -> None:
    [agent] = configuration(agent_keys(366, server=value)).agents
    assert (agent.settings.server, agent.address) == (server, address)


@pytest.mark.parametrize("protocol", ["odmr", "etrn"])
def test_parameters_stand_in_no_repr_and_no_error(protocol: str) -> None:
    keys = agent_keys(366, protocol=protocol, parameters="acme;hunter2")
    [agent] = configuration(keys).agents
    assert "hunter2" not in repr(agent.settings) + str(agent.settings) + repr(agent)
    for wrong in ("acme;hunter2\n", "acme;hunter2ü"):
        assert "hunter2" not in one(protocol=protocol, parameters=wrong)
    assert "hunter2" not in one(protocol=protocol, parameters=["a", "acme;hunter2\r"])


def test_missing_keys() -> None:
    keys = without("server", "account", "password")
    found = problems(keys)
    assert [problem.split(":")[1].strip() for problem in found] == [
        "server",
        "account",
        "password",
    ]
    assert all("missing" in problem for problem in found)


def test_all_wrong_settings_at_once() -> None:
    found = problems(
        agent_keys(0, every="often", service="nowhere"),
        agent_keys(366),
        agent_keys(366, name="other", tls="always"),
        "not a dict",
        default={"deny": ["300.0.0.0/8"], "hostnam": "x"},
        slow={"delivery": "pigeon", "max_recipients": 0},
    )
    text = "\n".join(found)
    for words in (
        'agent "isp": port: found 0',
        "agent \"isp\": every: found 'often'",
        "agent \"isp\": service: found 'nowhere'",
        'agent "isp": name: found twice',
        "agent \"other\": tls: found 'always'",
        "agent number 4: found 'not a dict'",
        'service "default": deny: found',
        'service "default": hostnam: unknown key',
        "did you mean hostname?",
        "service \"slow\": delivery: found 'pigeon'",
        'service "slow": max_recipients: found 0',
    ):
        assert words in text, text


def test_an_agent_without_domains_needs_a_service_with_domains() -> None:
    assert "every recipient would be refused" in one(domains=[])
    assert configuration(agent_keys(366, domains=[]), default={"domains": ["example.org"]})
    assert configuration(agent_keys(366, domains=[], parameters="example.org,example.com"))
    assert configuration(agent_keys(366, domains=[]), default={"domains": ["*"]})


@pytest.mark.parametrize("value", [{"isp": {}}, "isp", 5])
def test_collection_agents_that_are_no_list(value: object) -> None:
    module: Any = SimpleNamespace(collection_agents=value)
    with pytest.raises(SettingsError, match=r"collection_agents: found .* a list of dicts"):
        load(module, Plugins.load())


def test_smtp_services_that_are_no_dict() -> None:
    module: Any = SimpleNamespace(smtp_services=["default"])
    with pytest.raises(SettingsError, match="smtp_services: found a list, allowed: a dict"):
        load(module, Plugins.load())


def test_a_password_stands_in_no_repr() -> None:
    valid = configuration(agent_keys(366, tls="starttls", ca_file=str(CERTIFICATE)))
    [agent] = valid.agents
    for text in (repr(valid), repr(agent), str(agent.settings), repr(agent.settings)):
        assert PASSWORD not in text
