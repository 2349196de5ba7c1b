"""Real servers, in the chroots of ``install-server``, as long as a test wants them.

Each listens on a free port of the loopback and keeps its files in a folder of its own.  The mail
servers take mail for ``example.org`` and ``example.com``: Exim holds it for a customer's ATRN, and
all of them try to deliver it to ``next_hop`` (a port of the loopback) if there is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, TypeVar

from support.serving import wait_for

__all__ = [
    "ACCOUNTS",
    "DEFERRED",
    "FULL",
    "REFUSED",
    "Dovecot",
    "Exim",
    "EximOfThePage",
    "HAProxy",
    "PgBouncer",
    "Postfix",
    "Program",
    "Sendmail",
    "Server",
    "find",
    "free_port",
    "until",
]

DEFAULT_ROOT = "/var/cache/salmon-revsmtp"

#: Recipients that Exim and Postfix refuse for good, and for now.
REFUSED, DEFERRED = "refused@example.org", "deferred@example.org"

#: A recipient whose mailbox is full at Dovecot.
FULL = "full@example.org"

#: account -> password, of Exim
ACCOUNTS = {"acme": "s3cret of acme"}

Self = TypeVar("Self", bound="Program")


def find(name: str) -> Path | str:
    """The root of a server's chroot, or a sentence that says why there is none."""
    root = Path(os.environ.get("REVSMTP_SERVERS", DEFAULT_ROOT)) / name
    if os.geteuid() != 0:
        return f"{name} runs in a chroot, which needs root"
    if not root.exists():
        return f"no {name} in {root}: run tests/interop/install-server {name}"
    return root


class Program(ABC):
    """A server of any kind that runs while the context lasts.

    ``port``  where it listens, on 127.0.0.1.
    """

    program: ClassVar[str]

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self: Self) -> Self:
        (self.root / "srv").mkdir(exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="revsmtp-", dir=self.root / "srv"))
        self.folder.chmod(0o755)
        self.port = free_port()
        try:
            self.configure()
            self._process = subprocess.Popen(
                ["chroot", *self.chroot_options(), str(self.root), *self.command()],
                stdin=subprocess.DEVNULL,
                stdout=(self.folder / "output").open("wb"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._wait_until_it_listens(self._process)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self.stop(self._process)
            self._process.wait(60)
            # What it forked and did not wait for.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
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
        """What runs it in the foreground, inside the chroot."""

    def chroot_options(self) -> list[str]:
        """Of the command that runs it."""
        return []

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()

    def inside(self, *command: str) -> str:
        """The output of a command inside the chroot."""
        done = subprocess.run(
            ["chroot", str(self.root), *command], capture_output=True, text=True, check=False
        )
        return done.stdout

    def log(self) -> str:
        """What it logged, for a test that fails."""
        files = [self.folder / "mainlog", self.folder / "mail.log", self.folder / "output"]
        return "\n".join(file.read_text() for file in files if file.exists())

    def _wait_until_it_listens(self, process: subprocess.Popen[bytes]) -> None:
        give_up = time.monotonic() + 30
        while time.monotonic() < give_up and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.02)
        raise RuntimeError(f"{self.program} does not listen: {self.log()}")


class Server(Program):
    """A mail server.

    ``next_hop``  the port to which it delivers; 0: nowhere.
    """

    def __init__(self, root: Path, next_hop: int = 0) -> None:
        super().__init__(root)
        self.next_hop = next_hop

    @abstractmethod
    def waiting(self) -> int:
        """How many messages it holds."""

    def submit(
        self, sender: str, recipients: Sequence[str], message: bytes, options: Sequence[str] = ()
    ) -> None:
        """Give it a message (CRLF line ends), as it is."""
        with smtplib.SMTP("127.0.0.1", self.port) as client:
            client.ehlo("sender.example.net")
            _expect(client, 250, f"MAIL FROM:<{sender}>{''.join(f' {one}' for one in options)}")
            for recipient in recipients:
                _expect(client, 250, f"RCPT TO:<{recipient}>")
            _expect(client, 354, "DATA")
            stuffed = message.replace(b"\r\n.", b"\r\n..")
            client.send((b"." if message[:1] == b"." else b"") + stuffed + b".\r\n")
            code, text = client.getreply()
            assert code == 250, (code, text)


def _expect(client: smtplib.SMTP, code: int, command: str) -> None:
    client.send(f"{command}\r\n".encode())
    got, text = client.getreply()
    assert got == code, f"{command}: {got} {text!r}"


def _running() -> Iterator[list[bytes]]:
    """The command of each process of this machine, in words."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            yield (process / "cmdline").read_bytes().split(b"\0")


_reserved: list[socket.socket] = []


def free_port() -> int:
    """A loopback port for a server that sets SO_REUSEADDR, as they all do.

    It stays bound, not listening, until this process ends, so that the system gives it to no other
    socket meanwhile: not to a test that runs beside this one, and not to an outgoing connection.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    _reserved.append(reserved)
    return int(reserved.getsockname()[1])


EXIM = """
spool_directory = {place}/spool
log_file_path = {place}/%slog
primary_hostname = odmr.example.net
local_interfaces = 127.0.0.1
daemon_smtp_ports = {port}
host_lookup =
rfc1413_hosts = :
smtp_accept_max = 100
smtp_accept_queue_per_connection = 0
smtputf8_advertise_hosts = *
received_header_text =
queue_only = {hold}
queue_run_in_order = true
smtp_etrn_command = /usr/sbin/exim4 -C {place}/exim.conf -Rf \
  "${{if inlist{{$domain}}{{example.org:example.com}}{{$value}}fail}}"
acl_smtp_rcpt = check_rcpt
acl_smtp_data = accept_everything
acl_smtp_atrn = check_atrn
acl_smtp_etrn = check_etrn
{tls}

begin acl

accept_everything:
  accept

check_rcpt:
  deny  condition = ${{if eq{{$local_part@$domain}}{{{refused}}}}}
        message = 550 5.1.1 no such user
  defer condition = ${{if eq{{$local_part@$domain}}{{{deferred}}}}}
        message = 451 4.2.1 not now
  accept

# From the chapter on ODMR in Exim's specification.
check_atrn:
  warn  set acl_m0 = example.org,example.com
  deny  condition = ${{if def:smtp_command_argument}}
        set acl_m0 = ${{map {{<, $smtp_command_argument}} \\
          {{${{if inlist{{$item}}{{example.org:example.com}} {{$value}}}}}} }}
        condition = ${{if !def:acl_m0}}
  defer !atrn_domains = <, $acl_m0
        message = 453 You have no mail
  accept

check_etrn:
  accept condition = ${{if inlist{{$smtp_command_argument}}{{example.org:example.com}}}}
  deny  message = 459 node $smtp_command_argument not allowed

begin routers

to_customer:
  driver = manualroute
  condition = ${{if def:atrn_host}}
  route_data = <;$atrn_host
  self = send
  transport = call_customer

to_host:
  driver = manualroute
  domains = example.org : example.com
  condition = ${{if >{{{next_hop}}}{{0}}}}
  route_data = 127.0.0.1
  self = send
  transport = call_host

begin transports

call_customer:
  driver = smtp
  hosts_try_prdr = *
  message_linelength_limit = 10000
  connection_max_messages = {most}

call_host:
  driver = smtp
  port = {next_hop}
  hosts_avoid_tls = *

begin retry

* * F,1h,1s

begin authenticators

cram:
  driver = cram_md5
  public_name = CRAM-MD5
  server_advertise_condition = ${{if !def:tls_in_cipher}}
  server_secret = ${{if eq{{$auth1}}{{acme}} {{{password}}}fail}}
  server_set_id = $auth1

plain:
  driver = plaintext
  public_name = PLAIN
  server_advertise_condition = ${{if def:tls_in_cipher}}
  server_prompts = :
  server_condition = ${{if and{{ {{eq{{$auth2}}{{acme}}}} {{eq{{$auth3}}{{{password}}}}} }}}}
  server_set_id = $auth2
"""

EXIM_TLS = """
tls_advertise_hosts = *
tls_certificate = {place}/certificate.pem
tls_privatekey = {place}/key.pem
"""


class _Exim(Server):
    """Exim, whatever its configuration."""

    program = "exim"

    def command(self) -> list[str]:
        return ["exim4", "-C", f"{self.place}/exim.conf", "-bdf"]

    def waiting(self) -> int:
        return int(self.inside("exim4", "-C", f"{self.place}/exim.conf", "-bpc"))

    def wait_until_idle(self) -> None:
        """Until only its daemon runs.  Each other process of it may have a message locked, which
        no queue run and no session gets then."""
        ours = f"{self.place}/exim.conf".encode()
        wait_for(lambda: sum(ours in words for words in _running()) == 1)


class Exim(_Exim):
    """Exim 4.100: ODMR and ETRN.  It changes nothing in a message: no Received, no header made up.

    ``certificate``, ``key``  PEM files: STARTTLS is offered with them.
    ``as_we_advise``          with what the page on Exim advises for TLS.
    """

    def __init__(
        self,
        root: Path,
        certificate: Path | None = None,
        key: Path | None = None,
        next_hop: int = 0,
        as_we_advise: bool = False,
    ) -> None:
        super().__init__(root, next_hop)
        self._tls = (certificate, key)
        self._as_we_advise = as_we_advise

    def configure(self) -> None:
        certificate, key = self._tls
        tls = "tls_advertise_hosts ="
        if certificate is not None and key is not None:
            shutil.copy(certificate, self.folder / "certificate.pem")
            shutil.copy(key, self.folder / "key.pem")
            (self.folder / "key.pem").chmod(0o644)
            tls = EXIM_TLS.format(place=self.place)
        values = {"place": self.place, "port": self.port, "tls": tls, "next_hop": self.next_hop}
        values |= {"password": ACCOUNTS["acme"], "hold": "false" if self.next_hop else "true"}
        values |= {"most": 1 if self._as_we_advise else 500}  # 500 is Exim's default
        values |= {"refused": REFUSED, "deferred": DEFERRED}
        (self.folder / "exim.conf").write_text(EXIM.format(**values))
        owner = (self.root / "var/spool/exim4").stat()
        (self.folder / "spool").mkdir()
        for path in (self.folder, self.folder / "spool"):
            os.chown(path, owner.st_uid, owner.st_gid)


class EximOfThePage(_Exim):
    """Exim with the configuration of the documentation's page, and what a test needs beside it.

    ``port``  where the world sends mail.
    ``odmr``  where customers call.
    """

    configuration: ClassVar[Path] = Path(__file__).parents[2] / "docs/exim/exim4.conf"

    def __init__(self, root: Path, certificate: Path, key: Path) -> None:
        super().__init__(root)
        self.odmr = free_port()
        self._tls = (certificate, key)

    def configure(self) -> None:
        for file, name in zip(self._tls, ("certificate.pem", "key.pem"), strict=True):
            shutil.copy(file, self.folder / name)
        lines = [
            f'{account}: password="{password}" domains=example.org,example.com'
            for account, password in ACCOUNTS.items()
        ]
        (self.folder / "customers").write_text("\n".join([*lines, "idle: domains=example.org", ""]))
        text = self.configuration.read_text()
        for name, value in (
            ("HOSTNAME", "localhost"),
            ("FOLDER", self.place),
            ("MX_PORT", self.port),
            ("ODMR_PORT", self.odmr),
        ):
            text, found = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", text)
            assert found == 1, name
        ours = [
            f"spool_directory = {self.place}/spool",
            f"log_file_path = {self.place}/%slog",
            "local_interfaces = 127.0.0.1",
            "rfc1413_hosts = :",
            "host_lookup =",
            "smtputf8_advertise_hosts = *",
            "received_header_text =",
        ]
        (self.folder / "exim.conf").write_text("\n".join([*ours, text]))
        (self.folder / "spool").mkdir()
        owner = (self.root / "var/spool/exim4").stat()
        # But the configuration has to be root's.
        readable = [self.folder / name for name in ("spool", "key.pem", "customers")]
        for path in (self.folder, *readable):
            os.chown(path, owner.st_uid, owner.st_gid)

    def submit(
        self, sender: str, recipients: Sequence[str], message: bytes, options: Sequence[str] = ()
    ) -> None:
        """Give it a message, and have it see that this waits for its customer."""
        super().submit(sender, recipients, message, options)
        self.wait_until_idle()

    def run_queue(self) -> None:
        """Try whatever may be tried."""
        self.inside("exim4", "-C", f"{self.place}/exim.conf", "-q")


POSTFIX = """
compatibility_level = 3.6
queue_directory = {place}/spool
data_directory = {place}/data
maillog_file = {place}/mail.log
maillog_file_prefixes = /srv
myhostname = mx.example.net
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mydestination =
mynetworks = 127.0.0.0/8
relay_domains = example.org, example.com
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_recipient_restrictions = check_recipient_access inline:{{
    {{{refused} = 550 5.1.1 no such user}}, {{{deferred} = 451 4.2.1 not now}} }}
smtp_dns_support_level = disabled
smtputf8_enable = yes
message_size_limit = 0
local_header_rewrite_clients =
mailbox_size_limit = 0
transport_maps = inline:{{ {{example.org = smtp:[127.0.0.1]:{next_hop}}},
    {{example.com = smtp:[127.0.0.1]:{next_hop}}} }}
alias_maps =
"""


class Postfix(Server):
    """Postfix: ETRN for its relay domains whose mail has been deferred."""

    program = "postfix"

    def configure(self) -> None:
        conf = self.folder / "conf"
        conf.mkdir()
        values = {"refused": REFUSED, "deferred": DEFERRED}
        text = POSTFIX.format(place=self.place, next_hop=self.next_hop, **values)
        (conf / "main.cf").write_text(text)
        proto = (self.root / "usr/share/postfix/master.cf.dist").read_text()
        # No service in a chroot of its own, and the listener on our port.
        unchrooted = re.sub(r"^(\S+ +\S+ +\S+ +\S+ +)y", r"\1n", proto, flags=re.MULTILINE)
        listening = re.sub(
            r"^smtp( +inet)", rf"127.0.0.1:{self.port}\1", unchrooted, flags=re.MULTILINE
        )
        (conf / "master.cf").write_text(listening)
        (self.folder / "spool").mkdir()
        (self.folder / "data").mkdir()
        owner = (self.root / "var/lib/postfix").stat()
        os.chown(self.folder / "data", owner.st_uid, owner.st_gid)

    def command(self) -> list[str]:
        return ["postfix", "-c", f"{self.place}/conf", "start-fg"]

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        self.inside("postfix", "-c", f"{self.place}/conf", "stop")
        process.terminate()

    def waiting(self) -> int:
        listing = self.inside("postqueue", "-c", f"{self.place}/conf", "-j")
        return len(listing.splitlines())

    def deferred(self) -> int:
        """How many of them it has tried in vain."""
        listing = self.inside("postqueue", "-c", f"{self.place}/conf", "-j")
        return listing.count('"queue_name": "deferred"')


SENDMAIL_NEXT_HOP = """define(`SMART_HOST', `esmtp:[127.0.0.1]')
define(`ESMTP_MAILER_ARGS', `TCP $h {next_hop}')"""

SENDMAIL = """
include(`/usr/share/sendmail/cf/m4/cf.m4')
OSTYPE(`linux')
define(`confDOMAIN_NAME', `mx.example.net')
define(`QUEUE_DIR', `{place}/queue')
define(`STATUS_FILE', `{place}/statistics')
define(`confPID_FILE', `{place}/pid')
define(`confDELIVERY_MODE', `{mode}')
define(`confDONT_PROBE_INTERFACES', `True')
define(`confTO_IDENT', `0')
{next_hop}
FEATURE(`no_default_msa')
FEATURE(`nocanonify')
FEATURE(`accept_unresolvable_domains')
DAEMON_OPTIONS(`Port={port}, Addr=127.0.0.1, Name=MTA')
MAILER(`smtp')
"""


class Sendmail(Server):
    """sendmail: ETRN for whatever it holds."""

    program = "sendmail"

    def configure(self) -> None:
        source = self.folder / "sendmail.mc"
        values = {"place": self.place, "port": self.port, "mode": "queueonly", "next_hop": "dnl"}
        if self.next_hop:
            next_hop = SENDMAIL_NEXT_HOP.format(next_hop=self.next_hop)
            values |= {"mode": "background", "next_hop": next_hop}
        source.write_text(SENDMAIL.format(**values))
        # It breaks lines of more than 990 octets unless it is told that there is no limit.
        made = self.inside("m4", f"{self.place}/sendmail.mc").replace("L=990", "L=0")
        (self.folder / "sendmail.cf").write_text(made)
        (self.folder / "queue").mkdir()
        (self.folder / "queue").chmod(0o700)

    def command(self) -> list[str]:
        return ["/usr/libexec/sendmail/sendmail", f"-C{self.place}/sendmail.cf", "-bD"]

    def waiting(self) -> int:
        return len(list((self.folder / "queue").glob("qf*")))


DOVECOT = """
base_dir = {place}/run
state_dir = {place}/state
log_path = {place}/mail.log
protocols = imap lmtp
listen = 127.0.0.1
ssl = no
disable_plaintext_auth = no
postmaster_address = postmaster@example.org
hostname = mail.example.org
auth_username_chars =
mail_location = maildir:{place}/mail/%u
mail_plugins = quota
passdb {{
  driver = passwd-file
  args = scheme=PLAIN username_format=%u {place}/users
}}
userdb {{
  driver = passwd-file
  args = username_format=%u {place}/users
}}
plugin {{
  quota = maildir
}}
quota_full_tempfail = yes
service lmtp {{
  inet_listener lmtp {{
    port = {port}
  }}
  unix_listener {place}/lmtp {{
    mode = 0666
  }}
}}
service imap-login {{
  inet_listener imap {{
    port = {imap}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
"""


class Dovecot(Program):
    """Dovecot: LMTP on ``port`` and on the Unix socket ``socket``, IMAP on ``imap``.

    ``users``  whose Maildirs are below ``mail``, each called as the user; all have the password
               ``"secret"``.  The mailbox of :data:`FULL` has room for nothing.
    """

    program = "dovecot"

    #: Whom the mail belongs to.
    OWNER = 5000

    def __init__(self, root: Path, *users: str) -> None:
        super().__init__(root)
        self.users = users

    def configure(self) -> None:
        self.imap = free_port()
        values = {"place": self.place, "port": self.port, "imap": self.imap}
        (self.folder / "dovecot.conf").write_text(DOVECOT.format(**values))
        home = f"{self.place}/home"
        lines = [
            f"{user}:{{PLAIN}}secret:{self.OWNER}:{self.OWNER}::{home}::" for user in self.users
        ]
        full = [line + "userdb_quota_rule=*:bytes=1" for line in lines if line.startswith(FULL)]
        lines = [line for line in lines if not line.startswith(FULL)] + full
        (self.folder / "users").write_text("".join(f"{line}\n" for line in lines))
        for name in ("home", "mail"):
            (self.folder / name).mkdir()
            os.chown(self.folder / name, self.OWNER, self.OWNER)

    def command(self) -> list[str]:
        return ["dovecot", "-F", "-c", f"{self.place}/dovecot.conf"]

    @property
    def socket(self) -> Path:
        return self.folder / "lmtp"

    @property
    def mail(self) -> Path:
        return self.folder / "mail"

    def doveadm(self, *arguments: str) -> str:
        """What doveadm says."""
        return self.inside("doveadm", "-c", f"{self.place}/dovecot.conf", *arguments)


PGBOUNCER = """
[databases]
postgres = host=127.0.0.1 port={target} dbname=postgres user={user} password='{password}' \
    connect_query='SET search_path = {schema}'
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = plain
auth_file = {place}/users
pool_mode = transaction
default_pool_size = 3
"""


class PgBouncer(Program):
    """pgbouncer, which gives each transaction of its clients one of a few connections to a
    PostgreSQL on the port ``target``."""

    program = "pgbouncer"

    def __init__(self, root: Path, target: int, user: str, password: str, schema: str) -> None:
        super().__init__(root)
        self._values = {"target": target, "user": user, "password": password, "schema": schema}

    def configure(self) -> None:
        values = {"place": self.place, "port": self.port, **self._values}
        (self.folder / "pgbouncer.ini").write_text(PGBOUNCER.format(**values))
        users = '"{user}" "{password}"\n'.format(**self._values)
        (self.folder / "users").write_text(users)

    def command(self) -> list[str]:
        # It refuses to run as root.
        return ["pgbouncer", "-u", "postgres", f"{self.place}/pgbouncer.ini"]


class HAProxy(Program):
    """HAProxy with the configuration of the documentation's page, before two hosts.

    ``port``       where the world sends mail.
    ``customers``  where customers call.

    ``mx``, ``odmr``  the ports of the two hosts.
    ``header``        ``"send-proxy-v2"`` as on the page, or ``"send-proxy"``, which is version 1.

    It connects to them from :attr:`ADDRESS`, and so is no one else on this machine.
    """

    program = "haproxy"
    configuration: ClassVar[Path] = Path(__file__).parents[2] / "docs/haproxy/haproxy.cfg"
    ADDRESS = "127.0.0.2"

    def __init__(
        self,
        root: Path,
        mx: tuple[int, int],
        odmr: tuple[int, int],
        header: str = "send-proxy-v2",
    ) -> None:
        super().__init__(root)
        self.customers = free_port()
        self._mx, self._odmr, self._header = mx, odmr, header

    def configure(self) -> None:
        text = self.configuration.read_text()
        changes = [
            ("bind :25\n", f"bind 127.0.0.1:{self.port}\n"),
            ("bind :366\n", f"bind 127.0.0.1:{self.customers}\n"),
            ("mode tcp\n", f"mode tcp\n    source {self.ADDRESS}\n"),
            ("maxconn 50000\n", "maxconn 200\n"),
            ("inter 2s ", "inter 200ms "),
            ("send-proxy-v2\n", f"{self._header}\n"),
        ]
        for number, ports in enumerate(zip(self._mx, self._odmr, strict=True), 1):
            for port, theirs in zip((25, 366), ports, strict=True):
                name = f"server mx{number}"
                changes.append(
                    (f"{name} 192.0.2.1{number}:{port}\n", f"{name} 127.0.0.1:{theirs}\n")
                )
        for of_the_page, ours in changes:
            assert text.count(of_the_page) == 1, of_the_page
            text = text.replace(of_the_page, ours)
        (self.folder / "haproxy.cfg").write_text(text)

    def command(self) -> list[str]:
        return ["haproxy", "-db", "-f", f"{self.place}/haproxy.cfg"]


async def until(what: Callable[[], bool], server: Server) -> None:
    """Wait for what another process does."""
    give_up = time.monotonic() + 30
    while not what():
        assert time.monotonic() < give_up, server.log()
        await asyncio.sleep(0.05)
