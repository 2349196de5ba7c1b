"""A real provider: Exim, which does ODMR since 4.99, in the chroot of ``install-exim``.

It listens on a free port of the loopback, holds what it is given over SMTP until a customer says
ATRN, and changes nothing in a message: no Received, no header made up.
"""

from __future__ import annotations

import os
import shutil
import smtplib
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

__all__ = ["ACCOUNTS", "Exim", "find_exim"]

DEFAULT_ROOT = "/var/cache/salmon-revsmtp/exim"

#: account -> password
ACCOUNTS = {"acme": "s3cret of acme"}

CONFIGURATION = """
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
queue_only = true
queue_run_in_order = true
acl_smtp_rcpt = accept_everything
acl_smtp_data = accept_everything
acl_smtp_atrn = check_atrn
{tls}

begin acl

accept_everything:
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

begin routers

to_customer:
  driver = manualroute
  route_data = <;$atrn_host
  self = send
  transport = call_customer

begin transports

call_customer:
  driver = smtp
  hosts_try_prdr = *
  message_linelength_limit = 10000

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

TLS = """
tls_advertise_hosts = *
tls_certificate = {place}/certificate.pem
tls_privatekey = {place}/key.pem
"""


def find_exim() -> Path | str:
    """The root of the chroot, or a sentence that says why there is none."""
    root = Path(os.environ.get("REVSMTP_EXIM_ROOT", DEFAULT_ROOT))
    if os.geteuid() != 0:
        return "Exim runs in a chroot, which needs root"
    if not (root / "usr/sbin/exim4").exists():
        return f"no Exim in {root}: run tests/interop/install-exim"
    return root


class Exim:
    """A provider that runs while the context lasts.

    ``certificate``, ``key``  PEM files: STARTTLS is offered with them.
    ``port``                  where it listens, on 127.0.0.1.
    """

    def __init__(
        self, root: Path, certificate: Path | None = None, key: Path | None = None
    ) -> None:
        self._root = root
        self._tls = (certificate, key)
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Exim:
        (self._root / "srv").mkdir(exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="revsmtp-", dir=self._root / "srv"))
        self._folder.chmod(0o755)
        self.port = _free_port()
        self._configure()
        self._process = subprocess.Popen(
            [*self._exim, "-bdf"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self._folder / "stderr").open("wb"),
            start_new_session=True,
        )
        try:
            self._wait_until_it_listens()
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
            self._process.terminate()
            self._process.wait(10)
        shutil.rmtree(self._folder)

    @property
    def _exim(self) -> list[str]:
        place = self._folder.relative_to(self._root)
        return ["chroot", str(self._root), "exim4", "-C", f"/{place}/exim.conf"]

    def _configure(self) -> None:
        place = f"/{self._folder.relative_to(self._root)}"
        certificate, key = self._tls
        tls = "tls_advertise_hosts ="
        if certificate is not None and key is not None:
            shutil.copy(certificate, self._folder / "certificate.pem")
            shutil.copy(key, self._folder / "key.pem")
            (self._folder / "key.pem").chmod(0o644)
            tls = TLS.format(place=place)
        values = {"place": place, "port": self.port, "tls": tls, "password": ACCOUNTS["acme"]}
        (self._folder / "exim.conf").write_text(CONFIGURATION.format(**values))
        owner = (self._root / "var/spool/exim4").stat()
        (self._folder / "spool").mkdir()
        for path in (self._folder, self._folder / "spool"):
            os.chown(path, owner.st_uid, owner.st_gid)

    def _wait_until_it_listens(self) -> None:
        assert self._process is not None
        give_up = time.monotonic() + 20
        while time.monotonic() < give_up and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.02)
        raise RuntimeError(f"Exim does not listen: {(self._folder / 'stderr').read_text()}")

    def submit(
        self, sender: str, recipients: Sequence[str], message: bytes, options: Sequence[str] = ()
    ) -> None:
        """Have a message (CRLF line ends) held for the customer, as it is."""
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

    def waiting(self) -> int:
        """How many messages it holds."""
        done = subprocess.run([*self._exim, "-bpc"], capture_output=True, text=True, check=True)
        return int(done.stdout)

    def log(self) -> str:
        """Its main log, for a test that fails."""
        path = self._folder / "mainlog"
        return path.read_text() if path.exists() else ""


def _expect(client: smtplib.SMTP, code: int, command: str) -> None:
    client.send(f"{command}\r\n".encode())
    got, text = client.getreply()
    assert got == code, f"{command}: {got} {text!r}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
