"""Wrong settings: one clear sentence each, all at once, and never a secret."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.configuration import PASSWORD, agent_keys, configuration
from support.tls import CERTIFICATE

from salmon_revsmtp.customer.etrn import EtrnSettings
from salmon_revsmtp.customer.odmr import OdmrSettings
from salmon_revsmtp.hostname import machine_name
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.settings import AccountSettings, ProviderSettings
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
        ("auth", "PLAIN", ["auth: found a text", "a list", "'CRAM-MD5'"]),
        ("auth", [], ["auth: found a list", "'CRAM-MD5'"]),
        ("auth", ["XOAUTH2"], ["auth: found 'XOAUTH2'", "'SCRAM-SHA-256'", "'LOGIN'"]),
        ("auth", ["CRAM-MD5", "cram-md5"], ["auth: found a list", "twice"]),
        ("auth", ["CRAM-MD5", "PLAIN"], ["auth: found a list", "tls 'none' verifies no"]),
        ("domains", "example.org", ["domains: found a text", "did you mean ['example.org']?"]),
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
        ("username", "acme", ["username: unknown key", "did you mean account?"]),
        ("host", "x", ["host: unknown key", "did you mean server?"]),
        ("interval", 10, ["interval: unknown key", "did you mean every?"]),
        ("Timeout", 10, ["Timeout: unknown key", "did you mean timeout?"]),
        ("enabled", "no", ["enabled: found 'no'", "did you mean False, without quotes?"]),
        ("enabled", "True", ["enabled: found 'True'", "did you mean True, without quotes?"]),
        ("enabled", 1, ["enabled: found 1", "True or False"]),
        ("push", "off", ["push: found 'off'", "did you mean False, without quotes?"]),
        ("every", True, ["every: found True", "minutes above 0"]),
        ("every", "10 minutes", ["every: found '10 minutes'", "did you mean 10?"]),
        ("port", False, ["port: found False", "1 to 65535"]),
        ("timeout", "60s", ["timeout: found '60s'", "did you mean 60?"]),
        ("server", "smtp://mx.example.net", ["that is a URL; write 'mx.example.net' here"]),
        ("server", "a.example:25", ["write 'a.example' here, and port: 25", "host name"]),
        (
            "server",
            f"revsmtp://acme:{PASSWORD.replace(' ', '+')}@mx.example.net:366?domains=a.example",
            ["found 'revsmtp://***@mx", "write 'mx.example.net' here, and port: 366"],
        ),
        ("password", None, ["password: found None", "a variable that is not set", ".env"]),
        ("domains", "a.example, b.example", ["did you mean ['a.example', 'b.example']?"]),
        ("domains", ["ann@a.example"], ["'***@a.example'", "did you mean 'a.example'?"]),
        ("domains", ["@a.example"], ["'@a.example'", "did you mean 'a.example'?"]),
        ("domains", ["a.example b.example"], ["write each name by itself"]),
        ("domains", ["https://a.example/"], ["did you mean 'a.example'?"]),
        ("domains", None, ["domains: found None", "a list of domain"]),
        ("service", "defualt", ["service: found 'defualt'", "did you mean 'default'?"]),
        ("service", ["default"], ["service: found a list", "smtp_services"]),
        ("protocol", "ODMR", ["protocol: found 'ODMR'", "did you mean 'odmr'?"]),
        ("protocol", ["odmr"], ["protocol: found a list", "'odmr'"]),
    ],
)
def test_a_wrong_value_names_agent_key_finding_and_what_is_allowed(
    key: str, value: object, words: list[str]
) -> None:
    problem = one(**{key: value})
    assert problem.startswith(f'agent "{"i s p" if key == "name" else "isp"}": ')
    for word in words:
        assert word in problem


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("allow", "192.168.1.1/24", ["found a text", "mean ['192.168.1.0/24']?"]),
        ("allow", "192.168.1.1", ["found a text", "did you mean ['192.168.1.1']?"]),
        (
            "allow",
            ["192.168.1.1/24"],
            [
                "a host and its network",
                "'192.168.1.0/24' for the network",
                "'192.168.1.1' for that",
            ],
        ),
        ("deny", ["2001:db8::1/64"], ["'2001:db8::/64' for the network", "'2001:db8::1' for"]),
        ("deny", ["example.org"], ["'example.org' is no network", "'192.0.2.0/24'"]),
        ("listen", 366, ["found 366", "the host is missing; did you mean '0.0.0.0:366'?"]),
        ("listen", "366", ["did you mean '0.0.0.0:366'?"]),
        ("listen", "0.0.0.0", ["the port is missing: 0.0.0.0:PORT"]),
        ("listen", "::", ["the port is missing: [::]:PORT"]),
        ("listen", "::1:25", ["did you mean '[::1]:25'?"]),
        ("listen", ("0.0.0.0", "25"), ["the port is missing"]),
        ("listen", "smtp://0.0.0.0:25", ["write no URL"]),
        ("max_message_size", "50 MiB", ["did you mean 50 * 1024**2?"]),
        ("max_message_size", True, ["max_message_size: found True", "octets"]),
        ("notifications", "no", ["did you mean False, without quotes?"]),
        ("domain", ["example.org"], ["domain: unknown key", "did you mean domains?"]),
        ("certfile", "x.pem", ["certfile: unknown key", "did you mean tls_cert?"]),
        ("delivery", "Router", ["delivery: found 'Router'", "'router', 'queue' or 'hold'"]),
    ],
)
def test_a_wrong_value_of_a_service_says_what_may_be_meant(
    key: str, value: object, words: list[str]
) -> None:
    [problem] = problems(agent_keys(366), default={key: value})
    assert problem.startswith(f'service "default": {key}: ')
    for word in words:
        assert word in problem


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("port", "366"), ("every", "10"), ("every", "2.5"), ("timeout", 10)),
        *(("enabled", False), ("push", True), ("server", "[::1]"), ("domains", ("a.example",))),
    ],
)
def test_what_can_mean_one_thing_only_is_taken(key: str, value: object) -> None:
    assert configuration(agent_keys(366, **{key: value}))


@pytest.mark.parametrize("value", [":25", "0.0.0.0:25", "[::]:25", ["127.0.0.1:25", "[::1]:25"]])
def test_addresses_to_listen_on_may_be_written_in_these_ways(value: object) -> None:
    keys = {"listen": value, "domains": ["example.org"]}
    assert configuration(default=keys).services["default"].addresses


def provider_problem(**keys: Any) -> str:
    accounts = [{"name": "acme", "password": PASSWORD, "domains": ["example.org"]}]
    with pytest.raises(SettingsError) as raised:
        configuration(provider=keys, accounts=accounts)
    [problem] = raised.value.problems
    return problem.removeprefix("provider: ")


def pem(tmp_path: Path, name: str, *parts: str) -> Path:
    file = tmp_path / name
    file.write_text("".join(parts))
    return file


def made(tmp_path: Path, name: str, *how: str) -> tuple[str, str]:
    """A certificate and its key, made by OpenSSL."""
    key, certificate = str(tmp_path / f"{name}.key"), str(tmp_path / f"{name}.crt")
    names = ("-keyout", key, "-out", certificate, "-subj", "/CN=mx.example.net", "-days", "1")
    subprocess.run(["openssl", "req", "-x509", *how, *names], check=True, capture_output=True)
    return Path(certificate).read_text(), Path(key).read_text()


def test_a_certificate_that_is_no_good_is_said_in_words(tmp_path: Path) -> None:
    """Each file that a person may name by mistake; OpenSSL's codes stand in no sentence."""
    elliptic = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    certificate, key = made(tmp_path, "one", *elliptic, "-nodes")
    other, _ = made(tmp_path, "other", *elliptic, "-nodes")
    _, encrypted = made(tmp_path, "locked", *elliptic, "-passout", "pass:secret")
    weak, its_key = made(tmp_path, "weak", "-newkey", "rsa:1024", "-nodes")
    both = pem(tmp_path, "both.pem", certificate, key)
    alone, apart = pem(tmp_path, "cert.pem", certificate), pem(tmp_path, "key.pem", key)
    assert configuration(
        provider={"tls_cert": str(both)},
        accounts=[{"name": "a", "password": "p", "domains": ["example.org"]}],
    )
    unreadable = pem(tmp_path, "unreadable.pem", key)
    unreadable.chmod(0)
    nowhere = tmp_path / "nowhere.pem"
    for tls_cert, tls_key, words in (
        (alone, None, f"tls_key: missing, and {alone} holds no private key; name the file"),
        (nowhere, None, f"tls_cert: {nowhere} cannot be read: No such file or directory"),
        (alone, nowhere, f"tls_key: {nowhere} cannot be read: No such file or directory"),
        (tmp_path, apart, f"tls_cert: {tmp_path} cannot be read: Is a directory"),
        (apart, alone, f"tls_cert: {apart} holds no certificate in PEM form"),
        (alone, alone, f"tls_key: {alone} holds no private key in PEM form"),
        (pem(tmp_path, "locked.pem", encrypted), None, "holds no certificate"),
        (alone, pem(tmp_path, "locked.pem", encrypted), "needs a passphrase"),
        (pem(tmp_path, "other.pem", other), apart, "is not that of the first certificate in"),
        (pem(tmp_path, "ca-first.pem", other, certificate), apart, "the server's own comes first"),
        (pem(tmp_path, "weak.pem", weak), pem(tmp_path, "weak.key", its_key), "too weak for"),
        (pem(tmp_path, "cut.pem", certificate[:200]), apart, "are the files whole?"),
        (None, apart, "tls_key: it needs a tls_cert"),
        *([(alone, unreadable, "Permission denied; the user that")] if os.geteuid() else ()),
    ):
        given = {"tls_cert": tls_cert, "tls_key": tls_key}
        problem = provider_problem(**{key: str(path) for key, path in given.items() if path})
        assert words in problem, problem
        assert "_ssl.c" not in problem and "[SSL" not in problem


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


LEAK = "hunter2"
LOGINS = (
    f"a:{LEAK}@h",
    f"{LEAK}@h.example",
    f"a:{LEAK}/x@h.example",
    f"a:{LEAK}?x#y@h.example",
    f"revsmtp://a:{LEAK}/{LEAK}@mx.example.net:366?x=y",
    f"http://a:{LEAK}?@!",
    f"https://h.example/?token={LEAK}",
    f"a:{LEAK} .{LEAK}@h.example, b.example",
)


@pytest.mark.parametrize("text", LOGINS)
def test_a_login_where_a_host_or_a_domain_belongs_is_shown_nowhere(text: str) -> None:
    for key in ("server", "domains", "service", "protocol", "name", "auth", "tls", "every"):
        for value in (text, [text], {"x": text}, (f"@{text}",), f"#{text}", [f"# {text}"]):
            for protocol in ("odmr", "etrn"):
                keys = agent_keys(366, **{"protocol": protocol, key: value})
                with contextlib.suppress(SettingsError):
                    configuration(keys)
                    continue
                assert LEAK not in "".join(problems(keys))
    for model, name in ((ServiceSettings, "smtp_services"), (ProviderSettings, "provider")):
        for key in set(model.model_fields) - {"tls_cert", "tls_key"}:  # whose paths are said
            for value in (text, [text]):
                keys = {key: value}
                module = {name: {"default": keys} if name == "smtp_services" else keys}
                assert LEAK not in said_of(**module, customer_accounts=[ACCOUNT])
    for key in set(AccountSettings.model_fields) - {"name"}:
        for value in (text, [text]):
            assert LEAK not in said_of(customer_accounts=[{**ACCOUNT, key: value}], provider={})


@pytest.mark.parametrize("text", [*LOGINS, LEAK, f"curl -u me:{LEAK} http://x"])
def test_a_text_where_a_dict_or_a_list_belongs_is_not_shown(text: str) -> None:
    for name in ("collection_agents", "smtp_services", "customer_accounts", "provider", "alert"):
        for value in (text, [text]):
            said = said_of(**{name: value})
            assert said and LEAK not in said, name
    assert "found a text, allowed: a dict" in said_of(alert=text)
    values: list[Any] = [text, [text], [text, 17], {"x": text}]
    for value in values:
        said = said_of(alert={"command": value})
        assert "command: found that value" in said and LEAK not in said


def test_a_key_that_is_written_into_the_settings_is_not_shown() -> None:
    pem = f"-----BEGIN PRIVATE KEY-----\n{LEAK}\n-----END PRIVATE KEY-----\n"
    for keys in ({"tls_cert": pem}, {"tls_cert": str(CERTIFICATE), "tls_key": pem}):
        said = said_of(provider=keys, customer_accounts=[ACCOUNT])
        assert "allowed: the name of the file" in said and LEAK not in said


ACCOUNT = {"name": "acme", "password": PASSWORD, "domains": ["example.org"]}


def said_of(**names: Any) -> str:
    module: Any = SimpleNamespace(**names)
    try:
        load(module, Plugins.load())
    except SettingsError as error:
        return "\n".join(error.problems)
    return ""


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
        "agent number 4: found a text, allowed: a dict",
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


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("collection_agents", "isp", "found a text, allowed: a list of dicts"),
        ("collection_agents", 5, "found 5, allowed: a list of dicts"),
        ("collection_agents", {"isp": {}}, "each with its name among its keys: collection_agents"),
        ("collection_agents", agent_keys(366), "brackets around it: collection_agents = [{...}]"),
        ("customer_accounts", {"name": "a"}, "brackets around it: customer_accounts = [{...}]"),
        ("customer_accounts", {"acme": {}}, "each with its name among its keys"),
        ("smtp_services", [{"hostname": "mx.example.org"}], "found a list, allowed: a dict of"),
        ("smtp_services", ["default"], 'each with its name: {"default": {...}}'),
        ("smtp_services", {"hostname": "mx.example.org"}, "found the keys of one service"),
        ("smtp_services", "default", "found a text, allowed: a dict of services"),
        ("provider", [{"hold": "x"}], "found a list, allowed: a dict; take the brackets"),
        ("provider", "0.0.0.0:366", "found a text, allowed: a dict"),
    ],
)
def test_a_list_where_a_dict_belongs_and_the_other_way_round(
    name: str, value: object, words: str
) -> None:
    module: Any = SimpleNamespace(**{name: value})
    with pytest.raises(SettingsError) as raised:
        load(module, Plugins.load())
    assert raised.value.problems[0].startswith(f"{name}: found ")
    assert words in raised.value.problems[0]
    assert PASSWORD not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("collection_agent", "collection_agents"), ("COLLECTION_AGENTS", "collection_agents")),
        *(("agents", "collection_agents"), ("smtp_service", "smtp_services")),
        *(("customer_account", "customer_accounts"), ("providers", "provider")),
        *(("relay_config", ""), ("handlers", ""), ("people", ""), ("_collection_agents", "")),
    ],
)
def test_a_name_that_is_nearly_ours_is_a_warning(name: str, meant: str) -> None:
    module: Any = SimpleNamespace(**{name: [{"name": "isp"}]})
    warnings = load(module, Plugins.load()).warnings
    said = f"{name}: there is no such setting, so it is ignored; did you mean {meant}?"
    assert warnings == ((said,) if meant else ())


def test_a_name_beside_ours_is_somebodys_own() -> None:
    agents = [agent_keys(366)]
    module: Any = SimpleNamespace(agents=agents, collection_agents=agents, services={"a": {}})
    [warning] = load(module, Plugins.load()).warnings
    assert warning.startswith("services: there is no such setting")


def test_whatever_stands_in_the_settings_no_value_is_a_traceback() -> None:
    values: list[Any] = [
        None,
        True,
        -1,
        1.5,
        float("inf"),
        "",
        "x",
        b"x",
        [],
        [[]],
        [{}],
        {},
        {1: 2},
        {1},
    ]
    accounts = [{"name": "a", "password": "p", "domains": ["example.org"]}]
    places: list[tuple[Any, Any]] = [
        (OdmrSettings, lambda key: {"collection_agents": [agent_keys(366) | key]}),
        (EtrnSettings, lambda key: {"collection_agents": [agent_keys(366, protocol="etrn") | key]}),
        (ServiceSettings, lambda key: {"smtp_services": {"default": key}}),
        (AccountSettings, lambda key: {"customer_accounts": [accounts[0] | key]}),
        (ProviderSettings, lambda key: {"provider": key, "customer_accounts": accounts}),
    ]
    tried = [
        whole({key: one}) for model, whole in places for key in model.model_fields for one in values
    ]
    tried += [
        {name: one} for name in ("collection_agents", "smtp_services", "provider") for one in values
    ]
    refused = 0
    for settings in tried:
        try:
            load(SimpleNamespace(**settings), Plugins.load())  # type: ignore[arg-type]
        except SettingsError as error:
            refused += 1
            assert all(error.problems)
    assert refused > len(tried) / 2


def test_a_password_stands_in_no_repr() -> None:
    valid = configuration(agent_keys(366, tls="starttls", ca_file=str(CERTIFICATE)))
    [agent] = valid.agents
    for text in (repr(valid), repr(agent), str(agent.settings), repr(agent.settings)):
        assert PASSWORD not in text
