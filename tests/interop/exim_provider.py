"""A real ODMR provider for the tests: Exim 4.99 or later, in the chroot of ``install-exim``.

It listens on a free port of the loopback, holds what is submitted to it until a customer sends
ATRN, and adds nothing to a message.  It looks up no names and tries no delivery by itself, so it
needs no network.  How Exim does ODMR: its specification, chapter "The ATRN command, and ODMR".

What Exim 4.100.1 does with a reversed connection that a test has to know:

- In the clear it takes no notice of the customer's EHLO: no SIZE, PIPELINING, CHUNKING, PRDR, and
  UTF-8 mailboxes become A-labels.  Under TLS it uses them all, PRDR with two recipients or more.
- Under TLS it sends one message, then QUIT; the next ATRN brings the next message.
- It keeps to the domains of ATRN in the first message of a session only; later ones come with all
  their recipients.  So give a message no recipients of two accounts.
- A recipient that got a 4xx is not tried again within a second; an ATRN in that time is answered
  250, and the connection breaks.  A 5xx makes a bounce, which stays in the queue.
- A message without a header section gets the empty line that ends one; a lone CR becomes CRLF.
"""

from __future__ import annotations

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType

__all__ = ["ACCOUNTS", "DEFAULT_ROOT", "DOMAINS", "EximProvider", "find_exim"]

#: Where install-exim puts the chroot when REVSMTP_EXIM_ROOT says nothing else.
DEFAULT_ROOT = "/var/cache/salmon-revsmtp/exim"

#: account -> password
ACCOUNTS: Mapping[str, str] = MappingProxyType({"acme": "s3cret", "other": "0ther-s3cret"})

#: account -> the domains that it may ask for, all of them when ATRN comes without argument
DOMAINS: Mapping[str, Sequence[str]] = MappingProxyType(
    {"acme": ("example.org", "example.com"), "other": ("example.net",)}
)

START_SECONDS = 20
STOP_SECONDS = 5
SUBMIT_SECONDS = 30

CONFIGURATION = r"""
primary_hostname = odmr.example.net
spool_directory = @PLACE@/spool
log_file_path = @PLACE@/log/%slog
local_interfaces = 127.0.0.1
daemon_smtp_ports = @PORT@
@TLS@

# Nothing is looked up: neither names, nor who is behind a connection.
host_lookup =
helo_lookup_domains =
rfc1413_hosts =
rfc1413_query_timeout = 0s
disable_ipv6 = true
keep_environment =

# Submission only fills the queue.
queue_only = true
queue_run_in_order = true
smtp_accept_max = 100
smtp_accept_queue_per_connection = 0
acl_smtp_mail = check_mail
acl_smtp_rcpt = accept
acl_smtp_atrn = check_atrn

# Nothing is added to a message, nothing taken away.
received_header_text =
return_path_remove = false
envelope_to_remove = false
delivery_date_remove = false
smtputf8_advertise_hosts = *
prdr_enable = true

begin acl

# Signatures cost DNS look-ups.
check_mail:
  accept control = dkim_disable_verify

check_atrn:
  warn    set acl_m_own = ${extract{$authenticated_id}{@DOMAINS@}}
          set acl_m_asked = $acl_m_own
  # RFC 2645 5.2.1: authorised for every domain of the list, or for none.
  defer   condition = ${if def:smtp_command_argument}
          condition = ${if forany{<, $smtp_command_argument}{!inlisti{$item}{$acl_m_own}}}
          message = 450 ATRN request refused
  # What inlisti yields is the configuration's own word, and so is free of taint.
  warn    condition = ${if def:smtp_command_argument}
          set acl_m_asked = ${map{<, $smtp_command_argument}\
                                 {${if inlisti{$item}{$acl_m_own}{$value}}}}
          set acl_m_asked = ${sg{$acl_m_asked}{,}{:}}
  defer   !atrn_domains = $acl_m_asked
          message = 453 You have no mail
  accept

begin routers

to_customer:
  driver = manualroute
  route_data = <;$atrn_host
  self = send
  transport = reversed

# $atrn_host is empty outside a reversed connection: the router above declines.
hold:
  driver = redirect
  allow_defer
  data = :defer: held for ATRN

begin transports

reversed:
  driver = smtp
  multi_domain = true
  max_rcpt = 100
  connection_max_messages = 0
  hosts_try_prdr = *
  hosts_try_chunking = *
  hosts_try_dane =
  # 998 octets and their CRLF; longer lines are the tests' business, not Exim's.
  message_linelength_limit = 100000

begin retry

* * F,1h,1s

begin authenticators

cram_md5:
  driver = cram_md5
  public_name = CRAM-MD5
  server_secret = ${extract{$auth1}{@SECRETS@}{$value}fail}
  server_set_id = $auth1

plain:
  driver = plaintext
  public_name = PLAIN
  server_advertise_condition = ${if def:tls_in_cipher}
  server_prompts = :
  server_condition = ${if eq{$auth3}{${extract{$auth2}{@SECRETS@}{$value}fail}}}
  server_set_id = $auth2

login:
  driver = plaintext
  public_name = LOGIN
  server_advertise_condition = ${if def:tls_in_cipher}
  server_prompts = Username:: : Password::
  server_condition = ${if eq{$auth2}{${extract{$auth1}{@SECRETS@}{$value}fail}}}
  server_set_id = $auth1
"""

NO_TLS = "tls_advertise_hosts ="

TLS = """tls_advertise_hosts = *
tls_certificate = @PLACE@/certificate.pem
tls_privatekey = @PLACE@/key.pem"""

# An entry of `exim4 -bp` opens with age, size and message id; recipients are indented below it.
ENTRY = re.compile(r"^ *\d+[a-z] +\S+ +(\S+) <")


def find_exim() -> Path | str:
    """The root of the chroot, or a sentence that says why it cannot be used."""
    root = Path(os.environ.get("REVSMTP_EXIM_ROOT") or DEFAULT_ROOT)
    if os.geteuid() != 0:
        return "Exim runs in a chroot, which needs root"
    if not (root / "usr/sbin/exim4").exists():
        return f"Exim is not installed in {root}: run tests/interop/install-exim as root"
    return root


class EximProvider:
    """A provider that runs from ``start()`` to ``stop()``, or while the context lasts.

    ``port``         where it listens, on 127.0.0.1
    ``certificate``  with ``tls``, the PEM file to trust, for localhost and 127.0.0.1; else None
    ``accounts``     account -> password
    ``domains``      account -> domains
    """

    accounts: Mapping[str, str] = ACCOUNTS
    domains: Mapping[str, Sequence[str]] = DOMAINS

    def __init__(self, root: Path, tls: bool = False) -> None:
        self.port = 0
        self.certificate: Path | None = None
        self._root = root
        self._tls = tls
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> EximProvider:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Run until the port answers; RuntimeError, with what Exim said, if it never does."""
        try:
            self._make_folder()
            if self._tls:
                self._make_certificate()
            self.port = _free_port()
            self._write_configuration()
            self._launch()
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End Exim with all its children and remove its spool.  A second call does nothing."""
        if self._process is not None:
            _end_group(self._process)
            self._process = None
        if self._folder is not None:
            _remove(self._folder)
            self._folder = None

    def submit(self, sender: str, recipients: Sequence[str], message: bytes) -> None:
        """Put a message in the queue; ``sender`` "" is the null reverse-path.

        Lines may end in CRLF or LF; they arrive with CRLF, as does a last line without an end.
        RuntimeError if Exim refuses anything.
        """
        with smtplib.SMTP("127.0.0.1", self.port, timeout=SUBMIT_SECONDS) as client:
            client.ehlo("sender.example.net")
            options = " BODY=8BITMIME"
            if not "".join([sender, *recipients]).isascii():
                options += " SMTPUTF8"
            _command(client, 250, f"MAIL FROM:<{sender}>{options}")
            for recipient in recipients:
                _command(client, 250, f"RCPT TO:<{recipient}>")
            _command(client, 354, "DATA")
            client.send(_wire_form(message))
            _answer(client, 250, "the message")

    def waiting(self) -> list[tuple[str, list[str]]]:
        """Each message in the queue: its id, and the recipients that still wait."""
        done = self._exim("-bpu")
        found: list[tuple[str, list[str]]] = []
        for line in done.decode("utf-8").splitlines():
            if entry := ENTRY.match(line):
                found.append((entry[1], []))
            elif line.strip():
                found[-1][1].append(line.strip())
        return found

    def log(self) -> str:
        """Exim's main log and, if there is one, its panic log: what a failed test needs."""
        logs = [self._place / "log" / name for name in ("mainlog", "paniclog")]
        return "".join(log.read_text("utf-8", "replace") for log in logs if log.exists())

    @property
    def _place(self) -> Path:
        if self._folder is None:
            raise RuntimeError("this provider does not run")
        return self._folder

    @property
    def _inside(self) -> str:
        """The folder, as Exim sees it."""
        return f"/{self._place.relative_to(self._root)}"

    def _argv(self, *arguments: str) -> list[str]:
        configuration = f"{self._inside}/exim.conf"
        return ["chroot", str(self._root), "exim4", "-C", configuration, *arguments]

    def _exim(self, *arguments: str) -> bytes:
        done = subprocess.run(self._argv(*arguments), capture_output=True)
        if done.returncode:
            raise RuntimeError(f"exim4 {' '.join(arguments)}: {done.stderr.decode()}")
        return done.stdout

    def _make_folder(self) -> None:
        above = self._root / "srv"
        above.mkdir(exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="revsmtp-", dir=above))
        # Exim gives up root for the user that owns its packaged spool.
        owner = (self._root / "var/spool/exim4").stat()
        for name in ("spool", "log"):
            (self._folder / name).mkdir()
            os.chown(self._folder / name, owner.st_uid, owner.st_gid)
        self._folder.chmod(0o755)

    def _make_certificate(self) -> None:
        self.certificate = self._place / "certificate.pem"
        key = self._place / "key.pem"
        command = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        # Python from 3.13 on checks strictly, and then wants to see the use of the key.
        for extension in (
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "keyUsage=critical,digitalSignature,keyCertSign",
        ):
            command += ["-addext", extension]
        command += ["-keyout", str(key), "-out", str(self.certificate)]
        done = subprocess.run(command, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"openssl made no certificate: {done.stderr.decode()}")
        owner = (self._place / "spool").stat()
        os.chown(key, owner.st_uid, owner.st_gid)

    def _write_configuration(self) -> None:
        domains = " ".join(f"{name}={':'.join(own)}" for name, own in self.domains.items())
        secrets = " ".join(f"{name}={password}" for name, password in self.accounts.items())
        text = CONFIGURATION.replace("@TLS@", TLS if self._tls else NO_TLS)
        for name, value in {
            "PLACE": self._inside,
            "PORT": str(self.port),
            "DOMAINS": domains,
            "SECRETS": secrets,
        }.items():
            text = text.replace(f"@{name}@", value)
        (self._place / "exim.conf").write_text(text)

    def _launch(self) -> None:
        with (self._place / "stderr").open("wb") as stderr:
            self._process = subprocess.Popen(
                self._argv("-bdf"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        give_up = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)
        said = (self._place / "stderr").read_text()
        raise RuntimeError(f"Exim does not answer on port {self.port}: {said}{self.log()}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its group, which it leads."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)


def _remove(folder: Path) -> None:
    """Remove a folder, even if a process that was just killed still wrote to it."""
    give_up = time.monotonic() + STOP_SECONDS
    while True:
        try:
            return shutil.rmtree(folder)
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def _wire_form(message: bytes) -> bytes:
    """The message as DATA carries it: CRLF line ends, dots doubled (RFC 5321 4.5.2), the end."""
    lines = message.replace(b"\r\n", b"\n").removesuffix(b"\n").split(b"\n")
    stuffed = [b"." + line if line.startswith(b".") else line for line in lines]
    return b"\r\n".join([*stuffed, b".", b""])


def _command(client: smtplib.SMTP, code: int, command: str) -> None:
    client.send(f"{command}\r\n".encode())
    _answer(client, code, command)


def _answer(client: smtplib.SMTP, code: int, what: str) -> None:
    got, text = client.getreply()
    if got != code:
        raise RuntimeError(f"Exim answered {what}: {got} {text.decode(errors='replace')}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
