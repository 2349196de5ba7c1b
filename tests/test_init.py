"""``init``: a project that works, and a folder in which nothing is lost."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dns.resolver
import hypothesis
import pytest
import trustme
from click.testing import CliRunner
from hypothesis import strategies as st
from support.disk import small_disk
from support.names import name_server
from support.terminal import on_a_terminal
from support.tls import CERTIFICATE

from salmon_revsmtp import hookimpl
from salmon_revsmtp.cli.main import cli
from salmon_revsmtp.cli.options import Options, terminal
from salmon_revsmtp.console import check_settings
from salmon_revsmtp.init.customer import Customer, customer_files
from salmon_revsmtp.init.environment import value_of
from salmon_revsmtp.init.joinline import JoinLine, parse
from salmon_revsmtp.init.project import ProjectUser
from salmon_revsmtp.init.writing import Change, File, changes, write
from salmon_revsmtp.net.address import HostAndPort
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.configuration import load

NEEDED = ("--hostname", "mx.example.net", "--account", "acme", "--domain", "example.org")
PIN = "sha256:" + "0123456789abcdef" * 4
SECRET = "S3cr-t/of/the%25line"
LINE = f"revsmtp://acme:S3cr-t%2Fof%2Fthe%2525line@mx.example.net:366?domains=example.org&fingerprint={PIN}"


def run(
    *arguments: str | Path, given: str = "", status: int = 0, umask: int = 0o022, **environment: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "salmon_revsmtp", *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        umask=umask,
        env={**os.environ, **environment},
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def provider(folder: Path, *arguments: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
    return run("init", "provider", folder, *NEEDED, *arguments, **how)


def customer(folder: Path, *arguments: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
    how.setdefault("given", LINE)
    return run("init", "customer", folder, "--join", "-", *arguments, **how)


def join_line(done: subprocess.CompletedProcess[str]) -> str:
    [line] = [one for one in done.stdout.splitlines() if one.startswith("revsmtp://")]
    return line


def settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings module of a project, and what is in its ``.env``."""
    for name in ("ACME_PASSWORD", "ISP_PASSWORD"):
        monkeypatch.setenv(name, "")  # and it is gone again after the test
        monkeypatch.delenv(name)
    spec = importlib.util.spec_from_file_location("written", folder / "config/settings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tree(folder: Path) -> dict[str, bytes]:
    files = [one for one in folder.rglob("*") if one.is_file()]
    return {str(one.relative_to(folder)): one.read_bytes() for one in files}


def bits(folder: Path) -> dict[str, str]:
    return {
        str(one.relative_to(folder)): oct(one.stat().st_mode & 0o777) for one in folder.rglob("*")
    }


# -- the provider ---------------------------------------------------------------------------------


def test_a_provider_is_whole_and_its_line_has_all_that_its_customer_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new/provider"
    done = provider(folder, "--domain", "b\u00fccher.example", "--listen", "[::]:3660")
    line = parse(join_line(done))
    monkeypatch.chdir(folder)
    found = settings(folder, monkeypatch)
    [account] = found.customer_accounts
    assert account == {
        "name": "acme",
        "password": line.password,
        "domains": ["example.org", "xn--bcher-kva.example"],
    }
    assert (line.account, line.host, line.port) == ("acme", "mx.example.net", 3660)
    assert list(line.domains) == account["domains"]
    assert found.provider["listen"] == "[::]:3660"
    assert found.smtp_services["mx"]["listen"] == "0.0.0.0:25"
    assert len(line.password) >= 32
    assert line.fingerprint == openssl_fingerprint(folder / "tls/cert.pem")
    assert join_line(run("--chdir", folder, "provider", "join", "acme")) == str(line)


def openssl_fingerprint(certificate: Path) -> str:
    said = openssl("-fingerprint", "-sha256", "-in", str(certificate))
    return "sha256:" + said.partition("=")[2].strip().replace(":", "").lower()


def openssl(*arguments: str) -> str:
    command = ["openssl", "x509", "-noout", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_certificate_is_for_the_host_and_for_ten_years(tmp_path: Path) -> None:
    provider(tmp_path / "p")
    made = str(tmp_path / "p/tls/cert.pem")
    text = openssl("-text", "-in", made)
    assert "DNS:mx.example.net" in text
    assert "prime256v1" in text
    assert "will not expire" in openssl("-checkend", str(3649 * 86400), "-in", made)


@pytest.mark.parametrize("umask", [0, 0o077])
def test_only_its_owner_can_read_a_project_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    provider(tmp_path / "p", umask=umask)
    customer(tmp_path / "c", umask=umask)
    for folder in (tmp_path / "p", tmp_path / "c"):
        assert folder.stat().st_mode & 0o777 == 0o700
        for path, mode in bits(folder).items():
            kind = "0o700" if (folder / path).is_dir() else "0o600"
            assert mode == ("0o644" if path.endswith(".service") else kind), path


def test_a_password_is_in_env_and_in_the_join_line_and_nowhere_else(tmp_path: Path) -> None:
    done = provider(tmp_path / "p")
    password = parse(join_line(done)).password
    assert done.stdout.count(password) == 1 and password not in done.stderr
    assert [path for path, text in tree(tmp_path).items() if password.encode() in text] == [
        "p/.env"
    ]
    done = customer(tmp_path / "c")
    assert SECRET not in done.stdout + done.stderr
    assert "S3cr" not in done.stdout + done.stderr
    there = [path for path, text in tree(tmp_path / "c").items() if b"S3cr" in text]
    assert there == [".env"]
    assert value_of((tmp_path / "c/.env").read_text(), "ISP_PASSWORD") == SECRET
    private = (tmp_path / "p/tls/key.pem").read_text().splitlines()[1]
    assert [path for path, text in tree(tmp_path).items() if private.encode() in text] == [
        "p/tls/key.pem"
    ]


def test_a_certificate_of_ones_own_is_pinned(tmp_path: Path) -> None:
    made = trustme.CA().issue_cert("mx.example.net")
    made.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
    done = provider(tmp_path / "p", "--tls-cert", tmp_path / "both.pem")
    assert parse(join_line(done)).fingerprint == openssl_fingerprint(tmp_path / "both.pem")
    assert not (tmp_path / "p/tls").exists()
    assert f'"tls_cert": "{tmp_path}/both.pem"' in (tmp_path / "p/config/settings.py").read_text()


@pytest.mark.parametrize(("name", "pinned"), [("mx.example.net", False), ("other.example", True)])
def test_a_certificate_of_a_known_authority_is_not_pinned_if_it_is_for_the_host(
    tmp_path: Path, name: str, pinned: bool
) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    made = ca.issue_cert(name)
    made.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    made.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    files = ("--tls-cert", tmp_path / "cert.pem", "--tls-key", tmp_path / "key.pem")
    done = provider(tmp_path / "p", *files, SSL_CERT_FILE=str(tmp_path / "ca.pem"))
    assert (parse(join_line(done)).fingerprint is not None) is pinned


def test_without_openssl_it_says_what_to_install_or_to_name(tmp_path: Path) -> None:
    done = provider(tmp_path / "p", status=1, PATH=str(tmp_path))
    assert "install the package openssl" in done.stderr
    assert "--tls-cert and --tls-key" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_all_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    done = run("init", "provider", tmp_path / "p", "--mx", "x", "--tls-key", "k", status=2)
    assert re.findall(r"^error: (--[a-z-]+)", done.stderr, re.MULTILINE) == [
        "--hostname",
        "--account",
        "--domain",
        "--mx",
        "--tls-key",
    ]
    done = run("init", "customer", tmp_path / "c", "--lmtp", "x", status=2)
    assert re.findall(r"^error: (--[a-z-]+)", done.stderr, re.MULTILINE) == ["--lmtp", "--join"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--hostname", "[192.0.2.1]", "an MX record needs a name"),
        ("--hostname", "mx_1.example.net", "letters, digits and hyphens"),
        ("--account", "", "up to 200 characters"),
        ("--account", "a\tb", "control character"),
        ("--domain", "..", "no domain name"),
        ("--domain", " ", "there is none"),
        ("--listen", "366", "not a host and a port"),
        ("--listen", "0.0.0.0:0", "port 0"),
        ("--mx", "[::]:70000", "not a host and a port"),
        ("--relay", ":25", "the host is missing"),
        ("--tls-cert", "/nowhere.pem", "No such file"),
        ("--user", "no-such-user", "no user"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    tmp_path: Path, option: str, value: str, reason: str
) -> None:
    done = provider(tmp_path / "p", option, value, status=2)
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {option}") and reason in line
    assert list(tmp_path.iterdir()) == []


def test_on_a_terminal_it_asks_for_what_is_missing_and_asks_again(tmp_path: Path) -> None:
    status, seen = on_a_terminal(
        tmp_path,
        *("init", "provider", "p", "--account", "acme"),
        answers=[
            ("This host's name", "mx_1"),
            ("letters, digits and hyphens", "mx.example.net"),
            ("Domains whose mail", "example.org  example.com"),
        ],
    )
    assert status == 0, seen
    [line] = [one.strip() for one in seen.splitlines() if one.startswith("revsmtp://")]
    assert parse(line).domains == ("example.org", "example.com")
    assert parse(line).host == "mx.example.net"
    assert "A name for the customer" not in seen


def test_a_project_can_be_checked_out_without_its_secrets(tmp_path: Path) -> None:
    provider(tmp_path / "p")
    git = ["git", "-c", "init.defaultBranch=main", "-c", "safe.directory=*"]
    subprocess.run([*git, "init", "-q"], cwd=tmp_path / "p", check=True)
    command = [*git, "ls-files", "--others", "--exclude-standard"]
    listed = subprocess.run(
        command, cwd=tmp_path / "p", check=True, capture_output=True, text=True
    ).stdout.split()
    assert "config/settings.py" in listed
    assert not {".env", "tls/key.pem"} & set(listed)


@pytest.mark.parametrize("end", ["provider", "customer"])
def test_what_is_written_is_formatted_as_ruff_does_it(tmp_path: Path, end: str) -> None:
    domains = [f"domain-number-{number}.example.org" for number in range(9)]
    if end == "provider":
        more = [word for one in domains for word in ("--domain", one)]
        provider(tmp_path / "x", "--mx", "[::]:25", "--mx", "0.0.0.0:25", *more)
    else:
        customer(tmp_path / "x", given=LINE.replace("example.org", ",".join(domains)))
    for command in (["check", "--select", "E,F,W,I,UP"], ["format", "--check"]):
        subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--line-length", "100", "--isolated", "."],
            cwd=tmp_path / "x",
            check=True,
        )


@pytest.mark.parametrize("end", ["provider", "customer"])
@pytest.mark.parametrize("name", ["a % folder", "a backslash\\", "a space "])
def test_systemd_takes_the_unit(tmp_path: Path, end: str, name: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    folder = tmp_path / name
    provider(folder) if end == "provider" else customer(folder)
    unit = folder / f"revsmtp-{end}.service"
    done = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    escaped = str(folder).replace("%", "%%")  # systemd expands what begins with %
    ends = "/" if name[-1] in "\\ " else ""  # systemd would join two lines, and strip the space
    assert f"\nWorkingDirectory={escaped}{ends}\n" in unit.read_text()
    quoted = escaped.replace("\\", "\\\\")
    assert f'\nReadWritePaths="{quoted}/run" "{quoted}/logs"\n' in unit.read_text()
    assert ("CAP_NET_BIND_SERVICE" in unit.read_text()) is (end == "provider")


# -- the customer ---------------------------------------------------------------------------------


def test_a_customer_collects_what_the_line_says_and_stores_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = customer(tmp_path / "c", "--hostname", "mail.example.org")
    assert "example.org" in done.stdout and "check isp" in done.stdout
    found = settings(tmp_path / "c", monkeypatch)
    assert found.collection_agents == [
        {
            "name": "isp",
            "protocol": "odmr",
            "server": "mx.example.net",
            "port": 366,
            "fingerprint": PIN,
            "account": "acme",
            "password": SECRET,
            "domains": ["example.org"],
            "every": 10,
        }
    ]
    assert found.smtp_services == {
        "default": {"hostname": "mail.example.org", "unknown_recipients": "refuse"}
    }
    assert found.handlers == ["salmon_revsmtp.handlers.maildir"]
    assert found.maildirs == "run/mail"


LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
DOMAIN = (
    st.lists(LABEL, min_size=1, max_size=4)
    .map(lambda labels: ".".join([*labels, "example"]))
    .filter(lambda name: len(name) <= 253)
)
LONGEST_DOMAIN = ".".join(["a" * 63] * 3 + ["b" * 61])
NAME = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    account=NAME,
    host=DOMAIN,
    domains=st.lists(DOMAIN, min_size=1, max_size=30, unique=True),
    pinned=st.booleans(),
    agent=st.from_regex("[A-Za-z0-9_-]{1,30}", fullmatch=True),
    boxes=st.booleans(),
)
@hypothesis.example("a", "x" * 39 + ".example", ["y" * 39 + ".example"], True, "isp", False)
@hypothesis.example("a", LONGEST_DOMAIN, [LONGEST_DOMAIN], True, "isp", False)
@hypothesis.example(
    '"\\${x}\u2028', LONGEST_DOMAIN, [LONGEST_DOMAIN, "b.example"], False, "-", True
)
def test_the_settings_of_every_join_line_can_be_loaded(
    account: str, host: str, domains: list[str], pinned: bool, agent: str, boxes: bool
) -> None:
    line = JoinLine(account, "pw", host, 366, tuple(domains), PIN if pinned else None)
    mailboxes = tuple(f"me@{one}" for one in domains) if boxes else ()
    relay = HostAndPort("localhost", 25)
    made = Customer(parse(str(line)), agent, None, None, None, mailboxes, relay)
    user = ProjectUser("nobody", None)
    [written] = [
        one
        for one in customer_files(Path("/nowhere"), made, user)
        if one.path == "config/settings.py"
    ]
    found: dict[str, Any] = {"__file__": "/nowhere/config/settings.py"}
    with unittest.mock.patch.dict(os.environ, {made.variable: "pw"}):
        exec(compile(written.content, "settings.py", "exec"), found)
    module: Any = SimpleNamespace(**found)
    [loaded] = load(module, Plugins.load()).agents
    assert loaded.settings.account == account
    assert found["collection_agents"][0]["domains"] == domains
    assert found.get("mailboxes", ()) == (list(mailboxes) if boxes else ())


@pytest.mark.parametrize("made", [provider, customer])
def test_the_console_is_one_comment_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any]
) -> None:
    made(tmp_path / "x")
    file = tmp_path / "x/config/settings.py"
    assert not hasattr(settings(tmp_path / "x", monkeypatch), "console")
    file.write_text(file.read_text().replace("# console = ", "console = "))
    problems = check_settings(settings(tmp_path / "x", monkeypatch))
    assert settings(tmp_path / "x", monkeypatch).console and problems == []


def test_a_customer_has_the_mailboxes_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = ["ann@example.org", "postmaster@example.org"]
    customer(tmp_path / "c", *(word for one in named for word in ("--mailbox", one)))
    assert settings(tmp_path / "c", monkeypatch).mailboxes == named


@pytest.mark.parametrize(
    ("option", "server"),
    [("lmtp", "localhost:24"), ("lmtp", "unix:/run/dovecot/lmtp"), ("smtp", "[::1]:25")],
)
def test_a_customer_hands_its_mail_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, server: str
) -> None:
    line = LINE.partition("&fingerprint")[0]
    how = (f"--{option}", server, "--name", "my-isp", "--relay", "smtp.example.com:587")
    customer(tmp_path / "c", *how, given=line)
    found = settings(tmp_path / "c", monkeypatch)
    assert found.handlers == [f"salmon_revsmtp.handlers.{option}"]
    assert getattr(found, f"{option}_server") == server
    assert found.collection_agents[0]["name"] == "my-isp"
    assert "fingerprint" not in found.collection_agents[0]
    assert found.relay_config == {"host": "smtp.example.com", "port": 587}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--lmtp", "localhost:24", "--smtp", "localhost:25"),
        ("--lmtp", "unix:run/lmtp"),
        ("--name", "a b"),
        ("--mailbox", "bob"),
        ("--mailbox", "bob@example.org", "--lmtp", "localhost:24"),
        ("--hostname", "a b"),
    ],
)
def test_a_wrong_option_of_a_customer_is_named(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = customer(tmp_path / "c", *arguments, status=2)
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {arguments[0]}")


def test_a_broken_join_line_is_refused_without_being_shown(tmp_path: Path) -> None:
    for given in (LINE[:-3], LINE.replace("revsmtp", "revmtp"), "", f"{LINE}\n{LINE}"):
        done = customer(tmp_path / "c", given=given, status=2)
        [line] = done.stderr.splitlines()
        assert line.startswith("error: --join: ")
        assert "S3cr" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("customer", "z", "LINE"),
        ("customer", "LINE"),
        ("customer", "LINE", "z"),
        ("customer", "z", "--join", "LINE", "LINE"),
        ("customer", "z", "--user", "x", "--force=LINE"),
        ("customer", "z", "--LINE"),
        ("LINE",),
        ("provider", "z", "LINE"),
        ("provider", "z", "--relay", "LINE"),
        ("customer", "z", "--lmtp", "LINE"),
        ("customer", "z", "--mailbox", "LINE"),
    ],
)
@pytest.mark.parametrize("login", ["acme:sesame", "acme:se same/sesame", "ACME:x@sesame"])
def test_a_join_line_in_the_wrong_place_is_not_shown(
    tmp_path: Path, arguments: tuple[str, ...], login: str
) -> None:
    line = f"REVsmtp://{login}@mx.example.net:366?domains=example.org"
    done = run(
        "--chdir", tmp_path, "init", *(one.replace("LINE", line) for one in arguments), status=2
    )
    assert "sesame" not in done.stdout + done.stderr
    if arguments[1:] in (("z", "LINE"), ("LINE",)):
        assert "--join" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--join", LINE.replace("S3cr", "S3cr\udcff")), ("--mailbox", "\udcff@example.org")),
        *(("--lmtp", "\udcff:24"), ("--smtp", "\udcff:25"), ("--relay", "\udcff:25")),
        *(("--name", "\udcff"), ("--hostname", "\udcff"), ("--user", "\udcff")),
    ],
)
def test_octets_that_are_no_utf_8_are_a_sentence(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    given = arguments if arguments[0] == "--join" else ("--join", LINE, *arguments)
    done = run("init", "customer", tmp_path / "c", *given, status=2)
    assert done.stderr.startswith(f"error: {arguments[0]}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--tls-cert", "--account", "--domain", "--listen", "--relay"])
def test_octets_that_are_no_utf_8_are_a_sentence_of_the_provider_too(
    tmp_path: Path, option: str
) -> None:
    (tmp_path / "x\udcff:25").write_bytes(CERTIFICATE.read_bytes())
    done = provider(tmp_path / "p", option, f"{tmp_path}/x\udcff:25", status=2)
    assert done.stderr.startswith(f"error: {option}")
    assert not (tmp_path / "p").exists()


def test_on_a_terminal_the_line_is_asked_for_and_not_shown(tmp_path: Path) -> None:
    for number, arguments in enumerate([(), ("--join", "-")]):
        status, seen = on_a_terminal(
            tmp_path,
            *("init", "customer", f"c{number}", *arguments),
            answers=[("not shown): ", LINE[:-3]), ("not shown): ", LINE)],
        )
        assert status == 0, seen
        assert "fingerprint is not whole" in seen
        assert "S3cr" not in seen and "acme" not in seen
        assert (tmp_path / f"c{number}/config/settings.py").exists()


# -- what is there already ------------------------------------------------------------------------


def test_nothing_is_overwritten_and_nothing_else_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    (folder / "config").mkdir(parents=True)
    (folder / "config/boot.py").write_text("# mine\n")
    (folder / "mine.txt").write_text("mine")
    for write_it in (provider, customer):
        done = write_it(folder, status=2)
        assert "config/boot.py" in done.stderr and "--force" in done.stderr
        assert tree(folder) == {"config/boot.py": b"# mine\n", "mine.txt": b"mine"}
        assert sorted(one.name for one in folder.iterdir()) == ["config", "mine.txt"]


def test_the_same_again_changes_nothing_and_shows_the_line_again(tmp_path: Path) -> None:
    first = join_line(provider(tmp_path / "p"))
    before = tree(tmp_path)
    assert join_line(provider(tmp_path / "p")) == first
    assert join_line(provider(tmp_path / "p", "--force")) == first
    customer(tmp_path / "c", given=first)
    customer(tmp_path / "c", given=first)
    assert {path: text for path, text in tree(tmp_path).items() if path[0] == "p"} == before


def test_with_force_it_shows_what_changes_and_a_customer_still_gets_in(tmp_path: Path) -> None:
    first = parse(join_line(provider(tmp_path / "p")))
    with (tmp_path / "p/.env").open("a") as env:
        env.write("# old: hunter1\nOTHER_PASSWORD='hunter2'\n")
    with (tmp_path / "p/config/settings.py").open("a") as module:
        module.write("relay_config = {'password': 'hunter3', 'x': 'y'}\n")
        module.write('API_TOKEN = r"hunter4"  # revsmtp://a:hunter5@h\n')
    (tmp_path / "p/config/consumer.py").unlink()
    done = provider(tmp_path / "p", "--domain", "example.com", "--force")
    second = parse(join_line(done))
    assert '+        "domains": ["example.org", "example.com"],' in done.stdout
    assert "config/consumer.py: new" in done.stdout
    assert (second.password, second.fingerprint) == (first.password, first.fingerprint)
    assert "hunter" not in done.stdout and '-API_TOKEN = r"(hidden)"' in done.stdout
    assert value_of((tmp_path / "p/.env").read_text(), "OTHER_PASSWORD") == "hunter2"
    assert not list((tmp_path / "p").glob(".init-*"))


def test_a_new_password_is_made_when_it_is_asked_for(tmp_path: Path) -> None:
    first = parse(join_line(provider(tmp_path / "p")))
    assert ".env" in provider(tmp_path / "p", "--new-password", status=2).stderr
    done = provider(tmp_path / "p", "--new-password", "--force")
    second = parse(join_line(done))
    assert second.password != first.password
    assert ".env: a value changes" in done.stdout
    assert first.password not in done.stdout and done.stdout.count(second.password) == 1
    assert second.fingerprint == first.fingerprint


def test_another_host_name_has_another_certificate_and_no_key_is_shown(tmp_path: Path) -> None:
    first = parse(join_line(provider(tmp_path / "p")))
    key = (tmp_path / "p/tls/key.pem").read_text().splitlines()[1]
    done = provider(tmp_path / "p", "--hostname", "mx2.example.net", "--force")
    assert "tls/key.pem: replaced (its content is secret)" in done.stdout
    new_key = (tmp_path / "p/tls/key.pem").read_text().splitlines()[1]
    assert key not in done.stdout and new_key not in done.stdout and key != new_key
    assert parse(join_line(done)).fingerprint != first.fingerprint


def test_a_new_join_line_changes_the_customers_password(tmp_path: Path) -> None:
    customer(tmp_path / "c")
    new = LINE.replace("S3cr", "N3w")
    assert ".env" in customer(tmp_path / "c", given=new, status=2).stderr
    done = customer(tmp_path / "c", "--force", given=new)
    assert "N3w" not in done.stdout and "S3cr" not in done.stdout
    assert "N3w" in (tmp_path / "c/.env").read_text()


def test_on_a_terminal_force_asks_and_takes_no_for_an_answer(tmp_path: Path) -> None:
    provider(tmp_path / "p")
    before = tree(tmp_path)
    again = ("init", "provider", "p", *NEEDED, "--mx", "0.0.0.0:2525", "--force")
    status, seen = on_a_terminal(tmp_path, *again, answers=[("Write this to", "n")])
    assert (status, "nothing was written" in seen) == (1, True)
    assert tree(tmp_path) == before
    status, seen = on_a_terminal(tmp_path, *again, answers=[("Write this to", "y")])
    assert status == 0
    assert '"listen": "0.0.0.0:2525"' in (tmp_path / "p/config/settings.py").read_text()


def test_a_verifier_in_env_stays_and_has_no_join_line(tmp_path: Path) -> None:
    provider(tmp_path / "p")
    verifier = run("provider", "password", given="secret\n").stdout.strip()
    (tmp_path / "p/.env").write_text(f"ACME_PASSWORD='{verifier}'\n")
    done = provider(tmp_path / "p")
    assert "revsmtp://" not in done.stdout and "--new-password" in done.stdout
    done = run("--chdir", tmp_path / "p", "provider", "join", "acme", status=2)
    assert "a verifier" in done.stderr and verifier not in done.stderr


# -- a folder that cannot be written --------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below", Path("/proc/1/nothing")):
        done = customer(folder, status=1)
        assert str(folder) in done.stderr and "nothing was written" in done.stderr
    assert tree(tmp_path) == {"file": b""}


def test_on_a_full_disk_nothing_is_written(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    with small_disk(place) as disk:
        disk.fill(8192)
        before = sorted(place.iterdir())
        done = customer(place / "new", status=1)
        assert "No space left on device" in done.stderr
        assert sorted(place.iterdir()) == before
        disk.empty()
        customer(place / "new")


def test_what_was_named_is_taken_back_when_the_rest_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"before")
    files = [File("a", b"after"), File("new/b", b"new"), File("c", b"new")]
    wanted = changes(tmp_path, files)
    rename = os.rename

    def fails(source: str, target: str, **where: int) -> None:
        if target == "c":
            raise OSError(28, "No space left on device")
        rename(source, target, **where)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path, wanted, ["run"])
    assert tree(tmp_path) == {"a": b"before"}
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
    write(tmp_path, wanted, ["run"])
    assert tree(tmp_path) == {"a": b"after", "new/b": b"new", "c": b"new"}


def test_a_file_that_was_made_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    change = Change(File("a", b"ours"), None)
    (tmp_path / "a").write_bytes(b"theirs")
    with pytest.raises(FileExistsError):
        write(tmp_path, [change])
    assert tree(tmp_path) == {"a": b"theirs"}


def test_what_another_has_written_meanwhile_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"before")
    wanted = changes(tmp_path, [File(name, b"after") for name in ("a", "b", "c")])
    (tmp_path / "c").write_bytes(b"theirs")
    with pytest.raises(OSError, match="it was changed meanwhile"):
        write(tmp_path, wanted)
    assert tree(tmp_path) == {"a": b"before", "b": b"before", "c": b"theirs"}
    (tmp_path / "c").write_bytes(b"before")
    rename = os.rename

    def others_write(source: str, target: str, **where: int) -> None:
        rename(source, target, **where)
        (tmp_path / "c").write_bytes(b"theirs")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", others_write)
        with pytest.raises(OSError, match="it was changed meanwhile"):
            write(tmp_path, wanted)
    assert tree(tmp_path) == {"a": b"before", "b": b"before", "c": b"theirs"}
    (tmp_path / "c").unlink()
    with pytest.raises(OSError, match="it was changed meanwhile"):
        write(tmp_path, wanted)


def test_a_line_of_env_that_is_written_while_it_asks_is_not_lost(tmp_path: Path) -> None:
    provider(tmp_path / "p")
    env = tmp_path / "p/.env"
    user = ProjectUser("nobody", None)
    relay = HostAndPort("localhost", 25)
    made = Customer(parse(LINE), "isp", None, None, None, (), relay)
    files = customer_files(tmp_path / "p", made, user)
    with env.open("a") as stream:
        stream.write("OTHER='1'\n")
    with pytest.raises(OSError, match="it was changed meanwhile"):
        changes(tmp_path / "p", files)
    wanted = changes(tmp_path / "p", customer_files(tmp_path / "p", made, user))
    with env.open("a") as stream:
        stream.write("THIRD='1'\n")
    before = tree(tmp_path)
    with pytest.raises(OSError, match="it was changed meanwhile"):
        write(tmp_path / "p", wanted)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        *("config", "run", "logs", ".env", "config/settings.py", "app", "app/handlers"),
        *("tls", "tls/key.pem", "revsmtp-provider.service", "revsmtp-customer.service"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_folder_leads_nowhere(tmp_path: Path, name: str, there: bool) -> None:
    make = customer if name.startswith("app") or "customer" in name else provider
    outside = tmp_path / "outside"
    if there and "." in name:
        outside.write_bytes(b"SECRET='hunter2'\n")
    elif there:
        outside.mkdir()
        (outside / "settings.py").write_bytes(b"hunter2")
    link = tmp_path / "d" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    before = (tree(tmp_path), bits(tmp_path)) if there else ()
    for force in ((), ("--force",)):
        done = make(tmp_path / "d", *force, status=1)
        assert f"{link}: it is a symbolic link" in done.stderr
        assert "nothing was written" in done.stderr and "hunter2" not in done.stdout + done.stderr
    assert outside.exists() is there
    if there:
        assert (tree(tmp_path), bits(tmp_path)) == before


def test_a_pipe_in_the_folder_is_no_file_and_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d/.env")
    assert ".env: it is no file" in customer(tmp_path / "d", status=1).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_makes_belongs_to_the_user_who_runs_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    done = provider(tmp_path / "p", "--user", "nobody")
    for path in [tmp_path / "p", *(tmp_path / "p").rglob("*")]:
        assert path.owner() == "nobody"
    assert "User=nobody\n" in (tmp_path / "p/revsmtp-provider.service").read_text()
    os.chown(tmp_path, *((tmp_path / "p").stat().st_uid, -1))
    customer(tmp_path / "c")
    assert (tmp_path / "c/.env").owner() == "nobody"
    private = tmp_path / "private"
    private.mkdir(0o700)
    (private / "both.pem").write_bytes(
        b"".join((tmp_path / "p/tls" / one).read_bytes() for one in ("key.pem", "cert.pem"))
    )
    os.chown(private, 0, 0)
    done = provider(tmp_path / "q", "--tls-cert", private / "both.pem")
    assert f"nobody, who is to run the server, cannot use {private}/both.pem" in done.stderr


# -- DNS ------------------------------------------------------------------------------------------

ZONE = {
    ("mx.example.net.", "A"): ["192.0.2.1"],
    ("1.2.0.192.in-addr.arpa.", "PTR"): ["MX.example.net."],
    ("example.org.", "MX"): ["10 mx.example.net.", "20 backup.example.net."],
    ("mx.example.net.", "TXT"): ['"google=1"', '"v=spf1 a mx -all"'],
}


@contextlib.contextmanager
def asked(
    monkeypatch: pytest.MonkeyPatch, zone: dict[tuple[str, str], list[str]]
) -> Iterator[None]:
    with name_server(zone) as resolver, monkeypatch.context() as patch:
        patch.setattr(dns.resolver, "get_default_resolver", lambda: resolver)
        yield


def in_process(*arguments: str | Path, plugins: Plugins | None = None) -> tuple[int, str]:
    here = Path.cwd()
    options = Options()
    options.plugins = plugins
    before = {name for name in sys.modules if name.partition(".")[0] == "config"}
    assert not before
    path = list(sys.path)
    ours = logging.getLogger("salmon_revsmtp")
    level = ours.level
    try:
        result = CliRunner().invoke(cli, [str(one) for one in arguments], obj=options)
    finally:
        ours.setLevel(level)
        ours.removeHandler(terminal)
        os.chdir(here)
        sys.path[:] = path
        for name in [one for one in sys.modules if one.partition(".")[0] == "config"]:
            del sys.modules[name]
    return result.exit_code, result.output


def test_dns_records_are_printed_and_each_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_PASSWORD", "x")
    done = provider(tmp_path / "p", "--domain", "example.com")
    for record in (
        r"mx\.example\.net\. +A ",
        r"example\.org\. +MX +10 mx\.example\.net\.",
        r"example\.com\. +MX +10 mx\.example\.net\.",
        r"PTR +mx\.example\.net\.",
        r'mx\.example\.net\. +TXT +"v=spf1 a -all"',
    ):
        assert re.search(record, done.stdout), record
    assert "AAAA" not in done.stdout
    with asked(monkeypatch, ZONE):
        status, said = in_process("--chdir", tmp_path / "p", "provider", "dns")
        assert status == 1
        assert re.findall(r"(ok|not yet) +\S.*? (A|MX|PTR|TXT) ", said) == [
            ("ok", "A"),
            ("ok", "MX"),
            ("not yet", "MX"),
            ("ok", "PTR"),
            ("ok", "TXT"),
        ]
        status, said = in_process("init", "provider", tmp_path / "q", *NEEDED, "--check-dns")
        assert (status, "not yet" in said) == (0, False)
    wrong = {
        ("mx.example.net.", "A"): ["192.0.2.1"],
        ("1.2.0.192.in-addr.arpa.", "PTR"): ["host1.example.com."],
        ("example.org.", "MX"): ["10 mail.example.org."],
    }
    with asked(monkeypatch, wrong):
        status, said = in_process("init", "provider", tmp_path / "q", *NEEDED, "--check-dns")
    assert status == 0, "the project is there, whatever DNS says"
    assert "found: 10 mail.example.org." in said
    assert "found: 192.0.2.1 is host1.example.com." in said
    assert "found: no SPF record" in said


def test_dns_records_of_accounts_elsewhere_and_of_those_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere:
        @hookimpl
        def find_account(self, name: str) -> None:
            return None

        @hookimpl
        def list_accounts(self) -> Iterator[dict[str, Any]]:
            yield {"name": "one", "password": "x", "domains": ["one.example", "example.org"]}
            yield {"name": "two", "password": "x", "domains": ["two.example"]}

    plugins = Plugins.load()
    plugins.register(Elsewhere(), "elsewhere")
    monkeypatch.setenv("ACME_PASSWORD", "x")
    provider(tmp_path / "p")

    def domains(*more: str) -> list[tuple[str, str]]:
        _, said = in_process("--chdir", tmp_path / "p", "provider", "dns", *more, plugins=plugins)
        return re.findall(r"(ok|not yet) +(\S+)\. +MX ", said)

    there = {**ZONE, ("two.example.", "MX"): ["5 mx.example.net."]}
    with asked(monkeypatch, there):
        assert domains() == [
            ("ok", "example.org"),
            ("not yet", "one.example"),
            ("ok", "two.example"),
        ]
        assert domains("Two.Example.", "three.example") == [
            ("ok", "two.example"),
            ("not yet", "three.example"),
        ]
        status, said = in_process("--chdir", tmp_path / "p", "provider", "dns", "a@two.example")
        assert status == 2 and "did you mean 'two.example'?" in said


def test_a_name_server_that_does_not_answer_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers = ["127.0.0.1"]
    resolver.port = 1
    monkeypatch.setattr("salmon_revsmtp.init.records.PATIENCE", 0.2)
    monkeypatch.setattr(dns.resolver, "get_default_resolver", lambda: resolver)
    status, said = in_process("init", "provider", tmp_path / "p", *NEEDED, "--check-dns")
    assert status == 0
    assert said.count("not yet") == 4 and "no answer" in said


# -- provider join --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hostname", "written", "host"),
    [
        ("[192.0.2.1]", "192.0.2.1", "192.0.2.1"),
        ("[IPv6:2001:db8::1]", "[2001:db8::1]", "2001:db8::1"),
    ],
)
def test_a_provider_that_is_an_address_has_a_join_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostname: str, written: str, host: str
) -> None:
    provider(tmp_path / "p")
    path = tmp_path / "p/config/settings.py"
    text = path.read_text()
    path.write_text(text.replace('"mx.example.net"', f'"{hostname}"'))
    line = join_line(run("--chdir", tmp_path / "p", "provider", "join", "acme"))
    assert f"@{written}:366?" in line
    assert parse(line).host == host
    customer(tmp_path / "c", given=line)
    found = settings(tmp_path / "c", monkeypatch)
    assert found.collection_agents[0]["server"] == host
    assert load(found, Plugins.load()).agents


def test_the_join_line_of_another_account_comes_from_the_settings(tmp_path: Path) -> None:
    provider(tmp_path / "p")
    path = tmp_path / "p/config/settings.py"
    path.write_text(
        path.read_text().replace(
            "customer_accounts = [",
            "customer_accounts = [\n"
            '    {"name": "ot her", "password": "p:/@", "domains": ["example.com"]},',
        )
    )
    line = parse(join_line(run("--chdir", tmp_path / "p", "provider", "join", "ot her")))
    assert (line.account, line.password, line.domains) == ("ot her", "p:/@", ("example.com",))
    done = run("--chdir", tmp_path / "p", "provider", "join", "x", status=2)
    assert "no account is named 'x'; there are: ot her, acme" in done.stderr
    path.write_text(path.read_text().replace('"tls_cert": "tls/cert.pem"', '"tls_cert": None'))
    path.write_text(path.read_text().replace('"tls_key": "tls/key.pem"', '"tls_key": None'))
    done = run("--chdir", tmp_path / "p", "provider", "join", "acme", status=2)
    assert "no tls_cert" in done.stderr
    customer(tmp_path / "c")
    done = run("--chdir", tmp_path / "c", "provider", "join", "acme", status=2)
    assert "no provider" in done.stderr
