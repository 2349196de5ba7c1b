"""The SMTP dialogue in the log: only where it was asked for, and never a word of a message."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys

import pytest
from support.collecting import collect
from support.configuration import agent_keys
from support.dialogue import Dialogue, no_more_mail, scripted
from support.project import Project, isp, one_message, provider
from support.salmon import Salmon

from salmon_revsmtp.net.trace import Trace

LINE = b"MAIL FROM:<a@example.net>\r\n"
SECRET = b"Subject: our secret\r\n\r\nsecret.\r\n..\r\n.secret\r\n"


async def in_every_way(provider: Dialogue) -> None:
    """A message by DATA, one by BDAT, and content that comes where it should not."""
    await provider.reverse()
    provider.say("MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>", "DATA")
    for code in (250, 250, 354):
        await provider.replied(code)
    for start in range(0, len(SECRET), 7):
        provider.writer.write(SECRET[start : start + 7])
        await provider.writer.drain()
        await asyncio.sleep(0.001)
    provider.writer.write(b".\r\nMAIL FROM:<after@example.net>\r\n")
    await provider.replied(250)
    await provider.replied(250)
    provider.writer.write(b"RCPT TO:<b@example.org>\r\nBDAT %d LAST\r\n" % len(SECRET) + SECRET)
    provider.writer.write(b"NOOP between\r\nDATA\r\n" + SECRET)
    provider.say("QUIT")
    await asyncio.wait_for(provider.reader.read(), 60)


def test_a_word_of_a_message_is_never_in_the_dialogue(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "salmon_revsmtp.dialogue")
    salmon.handle(".*")

    async def main() -> None:
        async with scripted(in_every_way, no_more_mail) as port:
            await collect(salmon, agent_keys(port))

    asyncio.run(main())
    said = "\n".join(one.getMessage() for one in caplog.records if one.name.endswith("dialogue"))
    assert "secret" not in said.lower()
    assert "RCPT TO:<b@example.org>" in said and "354" in said
    assert "MAIL FROM:<after@example.net>" in said and "NOOP between" in said
    assert f"[{len(SECRET)} octets of a message]" in said


@pytest.mark.parametrize("seed", range(50))
def test_however_the_octets_are_split_the_same_commands_are_shown(seed: int) -> None:
    chance = random.Random(seed)
    trace, said = Trace(), []
    wire = LINE + b"BDAT %d\r\n" % len(SECRET) + SECRET + b"DATA\r\n"
    end = SECRET + b".\r\nRSET\r\n"
    for part in (wire, end):
        while part:
            size = chance.randint(1, len(part))
            said.append(trace.client(part[:size]))
            part = part[size:]
        said.append(trace.server(b"250 ok\r\n354 go on\r\n"))
    text = " ".join(said)
    assert "secret" not in text
    for command in ("MAIL FROM:<a@example.net>", f"BDAT {len(SECRET)}", "DATA", "RSET"):
        assert text.count(command) == 1


@pytest.mark.parametrize("asked", [False, True])
def test_a_log_at_debug_has_the_dialogue_only_if_it_was_asked_for(
    project: Project, asked: bool
) -> None:
    """As the logging.conf of ``salmon gen`` has it."""
    with provider(one_message, no_more_mail) as port:
        project.configure(isp(port))
        code = "from salmon_revsmtp.cli.main import main; main()"
        if not asked:  # a server in which no command has set the level
            code = (
                "import asyncio, salmon_revsmtp\n"
                "from salmon_revsmtp.plugins.manager import Plugins\n"
                "from salmon_revsmtp.server.collector import Collector\n"
                "from salmon_revsmtp.server.configuration import load\n"
                "from salmon_revsmtp.server.project import Project\n"
                "project = Project.open()\n"
                "project.boot()\n"
                "plugins = Plugins.load()\n"
                "valid = load(project.settings, plugins)\n"
                "with Collector(valid, plugins, lambda: None) as collector:\n"
                "    asyncio.run(collector.collect(valid.agents))\n"
            )
        arguments = ["collect", "-v", "isp"] if asked else []
        subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=project.folder, check=True, timeout=60
        )
    log = (project.folder / "logs/salmon.log").read_text()
    assert "from=<a@example.net>" in log
    assert ("MAIL FROM:<a@example.net>" in log) is asked


def test_a_logging_conf_may_ask_for_the_dialogue() -> None:
    code = (
        "import logging\n"
        "logging.getLogger('salmon_revsmtp.dialogue').setLevel(logging.DEBUG)\n"
        "from salmon_revsmtp.net.trace import dialogue\n"
        "assert dialogue.isEnabledFor(logging.DEBUG)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
