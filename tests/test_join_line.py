"""The join line: what a provider prints is what its customer reads, whatever is in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salmon_revsmtp.init.environment import hidden, value_of, variable_name, with_value
from salmon_revsmtp.init.joinline import JoinLine, JoinLineError, parse

PIN = "sha256:" + "0123456789abcdef" * 4
GOOD = f"revsmtp://acme:secret@mx.example.net:366?domains=example.org&fingerprint={PIN}"

# Whatever a password or a name may have: no control characters, and UTF-8.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40)


@given(account=TEXT, password=TEXT)
def test_every_account_and_password_survive(account: str, password: str) -> None:
    line = JoinLine(account, password, "mx.example.net", 366, ("example.org",), PIN)
    assert parse(str(line)) == line
    assert str(line).isascii()


def test_the_password_is_in_no_repr() -> None:
    assert "secret" not in repr(parse(GOOD))


@given(value=TEXT, before=st.sampled_from(["", "A='1'\n", "# x\nB=2", "ACME_PASSWORD=old\nC=3\n"]))
def test_every_password_survives_in_env(value: str, before: str) -> None:
    text = with_value(before, "ACME_PASSWORD", value)
    assert value_of(text, "ACME_PASSWORD") == value
    for other in "ABC":
        assert value_of(text, other) == value_of(before, other)
    assert text.count("ACME_PASSWORD=") == 1 or "ACME_PASSWORD=" in value


def test_env_is_shown_without_its_values_and_comments() -> None:
    shown = hidden("# old: hunter1\nA='hunter2\nhunter3'\n\nexport B=hunter4\n")
    assert "hunter" not in shown
    assert "A=(hidden)" in shown and "B=(hidden)" in shown


def test_a_line_of_env_that_gives_nothing_a_value_is_not_shown() -> None:
    """It may be the rest of a password, or one without its name."""
    shown = hidden("hunter1\nA=1\nexport hunter2\nhunter3==\nhunter4=\n")
    assert "hunter" not in shown
    assert "A=(hidden)" in shown


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("acme", "ACME_PASSWORD"),
        ("a-b.c", "A_B_C_PASSWORD"),
        ("1st", "_1ST_PASSWORD"),
        ("δ", "ACCOUNT_PASSWORD"),
    ],
)
def test_the_variable_of_an_account(owner: str, name: str) -> None:
    assert variable_name(owner) == name


def test_a_host_may_be_an_ipv6_address_and_a_domain_have_letters_of_its_own() -> None:
    line = parse("revsmtp://a:b@[2001:DB8::1]:3660?domains=b%C3%BCcher.example,EXAMPLE.org")
    assert (line.host, line.port) == ("2001:db8::1", 3660)
    assert line.domains == ("xn--bcher-kva.example", "example.org")
    assert line.fingerprint is None
    assert parse(str(line)) == line


def test_white_space_around_it_and_a_missing_port_are_forgiven() -> None:
    assert parse(f"\n  {GOOD}\r\n").port == 366
    assert parse(GOOD.replace(":366", "")) == parse(GOOD)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "empty"),
        (GOOD[:40] + "\n" + GOOD[40:], "a space or a line break"),
        (GOOD.replace("revsmtp", "https"), "does not begin with revsmtp://"),
        (GOOD.partition("?")[0], "its end is missing"),
        (GOOD.replace("?", "/?"), "its end is missing or is something else"),
        (GOOD.replace(":366", ":99999"), "host or port"),
        (GOOD.replace(":366", ":x"), "host or port"),
        (GOOD.replace("mx.example.net", "mx_!"), "its host"),
        (GOOD.replace("mx.example.net", "[::"), "host or port"),
        (GOOD.replace(":secret", ""), "no account or no password"),
        (GOOD.replace("acme:secret@", ""), "no account or no password"),
        (GOOD.replace("secret", ""), "no account or no password"),
        (GOOD.replace("secret", "secret%zz"), "a '%' that is none"),
        (GOOD.replace("secret", "secret%ff"), "no UTF-8"),
        (GOOD.replace("secret", "secret%0A"), "control characters"),
        (GOOD.replace("domains=example.org&", ""), "domains are missing"),
        (GOOD.replace("example.org", "..secret"), "domains are missing, or one"),
        (GOOD[:-1], "fingerprint is not whole"),
        (GOOD + "&domains=x", "'domains' is there twice"),
        (GOOD + "&secret", "has no value"),
        (GOOD + "&tls=implicit", "a key 'tls' that this version does not know"),
        (GOOD + "&Secret!=1", "a key that this version does not know"),
        (GOOD.replace("secret", "s" * 70_000), "more than"),
        (GOOD.replace("secret", "secret\udcff"), "no UTF-8"),
        (GOOD.replace("acme", "secret\udcff"), "no UTF-8"),
        (GOOD.replace("example.org", "secret\udcff.example"), "no UTF-8"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence_without_the_password(line: str, reason: str) -> None:
    with pytest.raises(JoinLineError) as raised:
        parse(line)
    assert reason in str(raised.value)
    assert "secret" not in str(raised.value).lower()
    assert "\n" not in str(raised.value)


@given(st.text(max_size=200) | st.text("revsmtp:/@?&=%domainsfgerpt0123.[]a", max_size=120))
def test_nothing_else_is_raised_for_any_text(text: str) -> None:
    for line in (text, f"revsmtp://{text}"):
        try:
            parsed = parse(line)
        except JoinLineError:
            continue
        assert parse(str(parsed)) == parsed
