"""Replies: what is read of a peer, and written again."""

from __future__ import annotations

import pytest

from salmon_revsmtp.smtp.replies import MAX_LINE, Reply, ReplyError, ReplyParser, is_about_mail


def test_an_enhanced_code_is_written_in_ascii_digits_only() -> None:
    assert Reply(250, "2.\u0663.0 ok").encode() == b"250 2.0.0 2.?.0 ok\r\n"


def test_an_enhanced_code_on_every_line_is_not_written_twice() -> None:
    text = "2.1.5 first\n2.1.5 second"
    assert Reply(250, text).encode() == b"250-2.1.5 first\r\n250 2.1.5 second\r\n"
    assert Reply(250, "2.0.0\n2.0.0 b").encode() == b"250-2.0.0 \r\n250 2.0.0 b\r\n"


@pytest.mark.parametrize("size", [1, 1000, 10000])
def test_the_longest_line_is_as_long_in_one_piece_as_in_many(size: int) -> None:
    def parse(line: bytes) -> Reply | None:
        parser, reply = ReplyParser(), None
        for start in range(0, len(line), size):
            parser.receive_bytes(line[start : start + size])
            reply = parser.next_reply()
        return reply

    assert parse(b"250 " + b"x" * (MAX_LINE - 4) + b"\n")
    for end in (b"\n", b"\r\n", b"\r\r\n"):
        with pytest.raises(ReplyError):
            parse(b"250 " + b"x" * (MAX_LINE - 3) + end)
    with pytest.raises(ReplyError):
        parse(b"250 " + b"x" * (MAX_LINE - 4) + b"\r\n")


def test_a_reply_that_says_far_too_much_is_cut_wherever_it_is_kept_or_shown() -> None:
    no = Reply(550, "\n".join(["x" * 100] * 600) + "\nthe end")
    assert len(no.text) <= 2000 and no.text.endswith("the end")
    assert len(str(no)) <= 500 and str(no).startswith("550 xxx") and str(no).endswith("the end")
    wordy = Reply(250, "line\n" * 5000)
    assert wordy.encode().count(b"\r\n") <= 100
    assert wordy.encode().splitlines()[-1].startswith(b"250 ")


def test_of_an_answer_to_ehlo_nothing_is_cut() -> None:
    keywords = "\n".join(f"X-KEYWORD-{number}" for number in range(500))
    assert Reply(250, keywords).text == keywords


@pytest.mark.parametrize(
    ("reply", "about_mail"),
    [
        ("550 5.7.1 no", True),
        ("554", True),
        ("501 5.5.4 what?", True),
        ("530 5.7.0 log in first", False),
        ("530 5.7.1 client was not authenticated", False),
        ("530 5.1.1 no such user", True),
        ("502 5.5.2 no such command", False),
        ("503 5.5.1 MAIL first", False),
        ("504 not implemented", False),
        ("504 5.5.4 not implemented", False),
        ("504 5.5.2 <root@nas>: Sender address rejected: need fully-qualified address", True),
        ("504 5.7.1 <root@nas>: no", True),
        ("504 5.1.8 no such domain", True),
    ],
)
def test_whether_a_refusal_is_about_the_mail(reply: str, about_mail: bool) -> None:
    code, _, text = reply.partition(" ")
    assert is_about_mail(Reply(int(code), text)) is about_mail


def test_codes_that_are_doubted_as_well() -> None:
    assert not is_about_mail(Reply(501, "5.5.4 what?"), {501})
    assert is_about_mail(Reply(501, "5.1.7 no address"), {501})
    assert is_about_mail(Reply(501, "", "5.1.3"), {501})
    assert not is_about_mail(Reply(501, "no address", ""), {501})
