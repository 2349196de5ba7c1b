"""What strangers wrote reaches a terminal or a log only harmless, and forges nothing."""

from __future__ import annotations

import logging
import logging.handlers
import re
from pathlib import Path

import pytest
from support.collecting import exchange
from support.dialogue import Dialogue
from support.project import Project, isp, provider
from support.salmon import Salmon, fails

from salmon_revsmtp.cli.options import _Line
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.foreign import angle, printable, printable_lines
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.server.project import enable_logging

# ESC, OSC with BEL, a C1 control, what turns the direction of writing, line ends of all kinds.
EVIL = "\x1b[2J\x1b]0;x\x07\x9b1m\u202e\u2066\u200f\u2028\u2029\x85\r\n\x00[/nosuch][link=http://a]x[/link]"
HARMFUL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]")


def test_no_character_that_a_terminal_obeys_is_left() -> None:
    assert not HARMFUL.search(printable(EVIL)) and "\n" not in printable(EVIL)
    assert printable_lines(EVIL).count("\n") == 1
    assert printable("Grüße, 日本語 [ok]") == "Grüße, 日本語 [ok]"


@pytest.mark.parametrize(
    "address",
    [
        "\"> to=<victim@example.org> reply='250 ok'\"@example.net",
        '"a\u2028agent=isp"@example.net',
        '"a\\\\" b"@example.net',
        None,
    ],
)
def test_an_address_is_one_field(address: str | None) -> None:
    shown = angle(address)
    assert re.fullmatch(r"<[^<> ]*>", shown) and shown.isprintable()
    assert angle("o'brien+tag=x@example.net") == "<o'brien+tag=x@example.net>"


def test_log_lines_and_tracebacks_are_harmless(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("salmon_revsmtp.test")
    try:
        raise ValueError(EVIL)
    except ValueError as error:
        log_safely(log, logging.ERROR, "error=%s", error, error=True)
    text = caplog.text
    assert not HARMFUL.search(text) and "ValueError" in text
    assert caplog.records[0].filename == "test_foreign.py"


def test_a_delivery_that_is_logged_has_the_fields_that_we_wrote(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    salmon.handle(".*", fails(550, "no' to=<\x1b\u2028x> reply='250"))
    sender = '"> to=<v@example.org> bytes=1 reply=\'250"@example.net'
    exchange(salmon, "b@example.org", sender=sender)
    [line] = [line for line in caplog.messages if "bytes=" in line and " to=" in line]
    assert not HARMFUL.search(line)
    assert re.fullmatch(
        r"""agent=\S+ from=<[^<> ]+> to=<b@example\.org> bytes=\d+ reply=("[^"]*"|'[^']*')""", line
    )


def test_a_report_is_a_line_and_its_details() -> None:
    report = Report("isp", "odmr", error=EVIL, answers=[EVIL])
    assert report.summary().count("\n") == 2
    assert not HARMFUL.search(report.summary())


def test_what_the_encoding_lacks_is_escaped_and_no_traceback(project: Project) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say("554 Zertifikat für 日本.example ungültig".encode())

    locale = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    with provider(script, script, script) as port:
        project.configure(isp(port, domains="['bücher.example']"))
        for command in (
            ["collect", "isp"],
            ["collect", "-v", "isp"],
            ["check", "isp"],
            ["history"],
        ):
            done = project.run(*command, **locale)
            told = done.stdout + done.stderr
            assert "UnicodeEncodeError" not in told and "Logging error" not in told
            assert ".example" in told, told
    project.configure(isp(1, domains="['日本 .example']"))
    done = project.run("agents", **locale)
    assert done.returncode == 2 and "UnicodeEncodeError" not in done.stderr


def test_a_log_file_whose_encoding_lacks_a_character_has_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = logging.handlers.WatchedFileHandler(tmp_path / "ascii.log", encoding="ascii")
    monkeypatch.setattr(logging.root, "handlers", [handler])
    enable_logging()
    log = logging.getLogger("salmon_revsmtp.test")
    log_safely(log, logging.ERROR, "error=%s", "日本")
    (tmp_path / "ascii.log").rename(tmp_path / "ascii.log.1")
    log_safely(log, logging.ERROR, "error=%s", "日本")
    handler.close()
    for name in ("ascii.log", "ascii.log.1"):
        assert (tmp_path / name).read_text() == "error=\\u65e5\\u672c\n"
    assert capsys.readouterr().err == ""


def test_the_terminal_shows_no_log_line_raw() -> None:
    record = logging.LogRecord("x", logging.ERROR, __file__, 1, EVIL, (), None)
    assert not HARMFUL.search(_Line(False).format(record))


def test_what_a_server_says_is_harmless_in_every_command(project: Project) -> None:
    async def script(provider: Dialogue) -> None:
        provider.say(f"554 {EVIL.replace(chr(13) + chr(10), '')}".encode())

    with provider(script, script) as port:
        project.configure(isp(port))
        for command in (["collect", "isp"], ["check", "isp"], ["history"]):
            done = project.run(*command)
            told = done.stdout + done.stderr
            assert "554" in told and "[/nosuch]" in told
            assert not HARMFUL.search(told.replace("\t", " ")), ascii(told)
