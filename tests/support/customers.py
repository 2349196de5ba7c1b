"""Customers of other makes, in the chroots of ``install-server``: fetchmail, and Exim by ``-atrn``.

Each collects once, for ``example.org`` and ``example.com``, by CRAM-MD5 in the clear, which is the
way of both.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import ClassVar, TypeVar

from support.configuration import PASSWORD

__all__ = ["DOMAINS", "Customer", "EtrnFetchmail", "EximCustomer", "Fetchmail"]

DOMAINS = ("example.org", "example.com")

Self = TypeVar("Self", bound="Customer")


class Customer(ABC):
    """A customer of the provider that listens on ``port`` of 127.0.0.1.

    ``behind``  the port of the server that gets what it collects.
    """

    program: ClassVar[str]

    def __init__(self, root: Path, port: int, behind: int) -> None:
        self.root, self.port, self.behind = root, port, behind
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self: Self) -> Self:
        (self.root / "srv").mkdir(exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="revsmtp-", dir=self.root / "srv"))
        self.folder.chmod(0o755)
        self.configure()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)
        shutil.rmtree(self.folder)

    @property
    def place(self) -> str:
        """The folder as it is called inside the chroot."""
        return f"/{self.folder.relative_to(self.root)}"

    @abstractmethod
    def configure(self) -> None:
        """Write its configuration into the folder."""

    @abstractmethod
    def command(self) -> list[str]:
        """What collects, inside the chroot."""

    def begin(self) -> None:
        """Collect, in the background."""
        self._process = subprocess.Popen(
            ["chroot", str(self.root), *self.command()],
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / "output").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def collecting(self) -> bool:
        """It still does."""
        return self._process is not None and self._process.poll() is None

    def collect(self) -> int:
        """Collect once, to the end; returns the exit status."""
        self.begin()
        assert self._process is not None
        return self._process.wait(60)

    @abstractmethod
    def deliver(self) -> None:
        """Give what it has collected to the server behind it, if it has not."""

    def log(self) -> str:
        """What it said, for a test that fails."""
        files = [self.folder / "mainlog", self.folder / "output"]
        return "\n".join(file.read_text(errors="replace") for file in files if file.exists())


FETCHMAILRC = """
set no bouncemail
poll 127.0.0.1 service {port} protocol odmr timeout 60
    user "acme" password "{password}" fetchdomains {domains} smtphost 127.0.0.1/{behind}
    sslproto ""
"""


FETCHMAILRC_ETRN = """
set no bouncemail
poll 127.0.0.1 service {port} protocol etrn timeout 60
    user "acme" password "{password}" fetchdomains {domains}
    sslproto ""
"""


class Fetchmail(Customer):
    """fetchmail passes on what the provider says to the server behind it, and back."""

    program = "fetchmail"
    settings: ClassVar[str] = FETCHMAILRC

    def configure(self) -> None:
        # It does not run where the machine's name has no address.
        name = socket.gethostname()
        hosts = f"127.0.0.1 localhost\n127.0.0.1 customer.example.org {name}\n"
        (self.root / "etc/hosts").write_text(hosts)
        file = self.folder / "fetchmailrc"
        values = {"port": self.port, "behind": self.behind, "domains": " ".join(DOMAINS)}
        file.write_text(self.settings.format(password=PASSWORD, **values))
        file.chmod(0o600)

    def command(self) -> list[str]:
        return [
            *("env", f"HOME={self.place}", f"FETCHMAILHOME={self.place}", "fetchmail"),
            *("-f", f"{self.place}/fetchmailrc", "--nosyslog", "--pidfile", f"{self.place}/pid"),
        ]

    def deliver(self) -> None:
        """It has."""


class EtrnFetchmail(Fetchmail):
    """fetchmail asks for the mail by ETRN, which then goes to the server that the provider calls.

    ``port``  where the provider takes mail.
    """

    settings = FETCHMAILRC_ETRN


EXIM = """
spool_directory = {place}/spool
log_file_path = {place}/%slog
primary_hostname = customer.example.org
local_interfaces = 127.0.0.1
host_lookup =
rfc1413_hosts = :
tls_advertise_hosts =
smtputf8_advertise_hosts = *
received_header_text =
queue_only = true
message_size_limit = 50M
smtp_accept_queue_per_connection = 0
smtp_accept_max_per_connection = 0
smtp_accept_max_nonmail = 1000
acl_smtp_rcpt = accept_everything
acl_smtp_data = accept_everything

begin acl

accept_everything:
  accept

begin routers

to_provider:
  driver = manualroute
  condition = ${{if eq {{$atrn_mode}}{{C}}}}
  route_data = <;$domain
  self = send
  transport = call_provider

to_host:
  driver = manualroute
  route_data = 127.0.0.1
  self = send
  transport = call_host

begin transports

call_provider:
  driver = smtp
  port = {port}
  hosts_try_auth = *
  hosts_avoid_tls = *
  command_timeout = 10m

call_host:
  driver = smtp
  port = {behind}
  hosts_avoid_tls = *
  message_linelength_limit = 10000

begin retry

begin authenticators

cram:
  driver = cram_md5
  public_name = CRAM-MD5
  client_name = acme
  client_secret = {password}
"""


class EximCustomer(Customer):
    """Exim takes mail into its queue, and changes nothing in it."""

    program = "exim"

    def configure(self) -> None:
        values = {"place": self.place, "port": self.port, "behind": self.behind}
        (self.folder / "exim.conf").write_text(EXIM.format(password=PASSWORD, **values))
        owner = (self.root / "var/spool/exim4").stat()
        (self.folder / "spool").mkdir()
        for path in (self.folder, self.folder / "spool"):
            os.chown(path, owner.st_uid, owner.st_gid)

    def command(self) -> list[str]:
        exim = ["exim4", "-C", f"{self.place}/exim.conf"]
        return [*exim, "-atrn", "127.0.0.1", ",".join(DOMAINS)]

    def waiting(self) -> int:
        """How many messages it has."""
        return len(list((self.folder / "spool/input").glob("**/*-H")))

    def deliver(self) -> None:
        command = ["chroot", str(self.root), "exim4", "-C", f"{self.place}/exim.conf", "-qff"]
        subprocess.run(command, check=True, timeout=60)
