"""A project that is both ends, with a console: a provider, and agents that collect from it."""

from __future__ import annotations

import smtplib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support.configuration import PASSWORD
from support.project import Project, isp
from support.servers import free_port
from support.serving import RUN, server, wait_for

__all__ = ["SECRET", "Site", "running_site"]

#: The console's password.
SECRET = "open sesame"

SETTINGS = """
customer_accounts = [
    {{"name": "acme", "password": os.environ["ISP_PASSWORD"], "domains": ["example.org"]}},
    {{"name": "office", "password": os.environ["ISP_PASSWORD"], "domains": ["example.com"]}},
    {{"name": "away/<i>", "password": "x", "domains": ["away.example"], "live": False}},
]
provider = {{"hostname": "odmr.example.net", "listen": "127.0.0.1:{odmr}", "require_tls": False}}
smtp_services["mx"] = {{
    "hostname": "mx.example.net", "listen": "127.0.0.1:{mx}", "delivery": "hold",
}}
console = {{"listen": "127.0.0.1:{console}", "password": "{secret}"}}
"""


class Site(NamedTuple):
    """``url`` is the console's; ``mx`` is a port."""

    project: Project
    url: str
    mx: int

    def send(self, to: str, subject: str, sender: str = "a@example.net") -> None:
        """Send a message as any mail server does."""
        with smtplib.SMTP("127.0.0.1", self.mx, timeout=30) as client:
            client.sendmail(sender, [to], f"Subject: {subject}\n\nhello\n")


def running_site(folder: Path) -> Iterator[Site]:
    """A server that runs: the agent ``vps`` has a push session, ``office`` collects when it is
    asked to, ``isp`` fails."""
    project = Project(folder)
    odmr, mx, console = (free_port() for _ in range(3))
    login = {"password": "os.environ['ISP_PASSWORD']"}
    project.configure(
        isp(odmr, name="'vps'", every="0.01", **login),
        isp(odmr, name="'office'", account="'office'", domains="['example.com']", every="None"),
        isp(1, every="None"),
    )
    settings = project.folder / "config/settings.py"
    more = SETTINGS.format(odmr=odmr, mx=mx, console=console, secret=SECRET)
    settings.write_text(settings.read_text() + more)
    with server(project, RUN) as process:
        wait_for((project.folder / "run/console.json").exists, process)
        yield Site(project, f"http://127.0.0.1:{console}", mx)
    assert PASSWORD not in (project.folder / "server.log").read_text()
