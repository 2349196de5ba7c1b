"""The peers: which of them are here, and how each is run.  What is not here is said, not installed.

fetchmail and smtp-source (Debian's packages ``fetchmail`` and ``postfix``) are looked for on
``PATH``, smtp-source also in the chroot of ``tests/interop/install-server postfix``; Exim 4.100 in
that of ``install-server exim``, which needs root to be entered.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.processes import ROOT, Child, wait_for_port
from benchmarks.project import ACCOUNT, DOMAIN, PASSWORD, project
from benchmarks.table import Missing

sys.path.insert(0, str(ROOT / "tests"))
from support.servers import ACCOUNTS, Exim, Postfix, Server, free_port
from support.servers import find as find_chroot

__all__ = [
    "EXIM_PASSWORD",
    "Server",
    "collect",
    "exim",
    "exim_cutthrough",
    "exim_server",
    "fetchmail",
    "free_port",
    "missing",
    "postfix_server",
    "receiver",
    "smtp_source",
    "versions",
]

COMMAND = Path(sys.executable).with_name("salmon-revsmtp")
EXIM_PASSWORD = ACCOUNTS[ACCOUNT]  # of its customers, as a provider
SALMON = Path(sys.executable).with_name("salmon")


def missing(*names: str) -> str | None:
    """Why these peers cannot take part; ``None`` if they can."""
    for name in names:
        try:
            _FINDERS[name]()
        except Missing as error:
            return str(error)
    return None


def _fetchmail() -> str:
    found = shutil.which("fetchmail")
    if found is None:
        raise Missing("not installed: Debian's package fetchmail")
    return found


def _exim() -> Path:
    found = find_chroot("exim")
    if isinstance(found, str):
        raise Missing(f"not installed: {found}")
    return found


def smtp_source() -> str:
    """The command of smtp-source.  Raises :class:`~benchmarks.table.Missing`."""
    if found := shutil.which("smtp-source"):
        return found
    root = find_chroot("postfix")
    if isinstance(root, Path) and (root / "usr/sbin/smtp-source").exists():
        return f"chroot {root} /usr/sbin/smtp-source"
    raise Missing("not installed: smtp-source of Debian's package postfix")


def _postfix() -> Path:
    found = find_chroot("postfix")
    if isinstance(found, str):
        raise Missing(f"not installed: {found}")
    return found


_FINDERS: dict[str, Callable[[], str | Path]] = {
    "fetchmail": _fetchmail,
    "exim": _exim,
    "smtp-source": smtp_source,
    "postfix": _postfix,
}


def versions() -> dict[str, str]:
    """What the peers say that they are."""
    found = {}
    for name, finder in _FINDERS.items():
        try:
            where = finder()
        except Missing as error:
            found[name] = str(error)
            continue
        command = {
            "fetchmail": [str(where), "-V"],
            "exim": ["chroot", str(where), "exim4", "-bV"],
            "postfix": ["chroot", str(where), "postconf", "mail_version"],
        }
        if name in command:
            done = subprocess.run(command[name], capture_output=True, text=True, check=False)
            lines = (done.stdout or done.stderr).splitlines()
            found[name] = next((one for one in lines if "elease" in one or "version" in one), "?")
        else:
            found[name] = "here"
    return found


def collect(folder: Path, *arguments: str) -> Child:
    """Our customer: the command, in a project's folder."""
    command = [str(COMMAND), "--chdir", str(folder), "collect", *(arguments or ("isp",)), "--json"]
    return Child(command, env={"SALMON_SETTINGS_MODULE": "config.settings"})


@contextlib.contextmanager
def receiver(kind: str) -> Iterator[int]:
    """Salmon's ``lmtp`` or ``smtp`` receiver, run by ``salmon start``; yields its port."""
    port = free_port()
    command = [str(SALMON), "start", "--no-daemon", "--boot", f"config.{kind}"]
    with project(port=port) as folder, Child(command, folder, name=f"salmon ({kind})") as salmon:
        wait_for_port(port, salmon)
        yield port


_FETCHMAILRC = """
set no bouncemail
poll 127.0.0.1 service {port} protocol odmr timeout 60
    user "{account}" password "{password}" fetchdomains {domain} smtphost 127.0.0.1/{smtp}
    sslproto ""
"""


@contextlib.contextmanager
def fetchmail(port: int) -> Iterator[Child]:
    """fetchmail as ODMR customer of a port, in front of Salmon's SMTPReceiver."""
    with receiver("smtp") as smtp, tempfile.TemporaryDirectory(prefix="revsmtp-bench-") as home:
        file = Path(home, "fetchmailrc")
        file.write_text(
            _FETCHMAILRC.format(
                port=port, account=ACCOUNT, password=PASSWORD, domain=DOMAIN, smtp=smtp
            )
        )
        file.chmod(0o600)
        command = [_fetchmail(), "-f", str(file), "--nosyslog", "--pidfile", f"{home}/pid"]
        with Child(command, env={"HOME": home, "FETCHMAILHOME": home}, name="fetchmail") as child:
            yield child


_EXIM = """
spool_directory = {place}/spool
log_file_path = {place}/%slog
primary_hostname = customer.example.org
local_interfaces = 127.0.0.1
host_lookup =
rfc1413_hosts = :
tls_advertise_hosts =
queue_only = true
message_size_limit = 50M
smtp_accept_queue_per_connection = 0
smtp_accept_max_per_connection = 0
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

begin transports

call_provider:
  driver = smtp
  port = {port}
  hosts_try_auth = *
  hosts_avoid_tls = *
  command_timeout = 10m

begin retry

begin authenticators

cram:
  driver = cram_md5
  public_name = CRAM-MD5
  client_name = {account}
  client_secret = {password}
"""


@contextlib.contextmanager
def exim(port: int) -> Iterator[Child]:
    """Exim as ODMR customer of a port, into its own queue."""
    root = _exim()
    (root / "srv").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="revsmtp-bench-", dir=root / "srv") as name:
        folder = Path(name)
        place = f"/{folder.relative_to(root)}"
        (folder / "exim.conf").write_text(
            _EXIM.format(place=place, port=port, account=ACCOUNT, password=PASSWORD)
        )
        owner = (root / "var/spool/exim4").stat()
        (folder / "spool").mkdir()
        for path in (folder, folder / "spool"):
            path.chmod(0o755)
            os.chown(path, owner.st_uid, owner.st_gid)
        config = ["-C", f"{place}/exim.conf"]
        command = ["chroot", str(root), "exim4", *config, "-atrn", "127.0.0.1", DOMAIN]
        with Child(command, name="exim") as child:
            yield child


def exim_server() -> Server:
    """Exim as provider: it queues what comes, synced, and hands it over by ATRN."""
    return _EximServer(_exim())


def exim_cutthrough(next_hop: int) -> Server:
    """Exim, which passes a message on to a port while it comes, and its answer back."""
    return _EximCutthrough(_exim(), next_hop=next_hop)


def postfix_server() -> Server:
    """Postfix, which takes everything into its hold queue, synced, and does no more with it."""
    return _PostfixServer(_postfix())


class _EximServer(Exim):
    def configure(self) -> None:
        super().configure()
        file = self.folder / "exim.conf"
        # A place for each of 100 sessions, and for whoever looks whether it is there; and as many
        # messages in each as come.
        more = "smtp_accept_max = 200\nsmtp_accept_max_per_connection = 0"
        file.write_text(file.read_text().replace("smtp_accept_max = 100", more))


class _EximCutthrough(_EximServer):
    def configure(self) -> None:
        super().configure()
        file = self.folder / "exim.conf"
        accepts = "  accept\n\n# From the chapter on ODMR"
        passes = accepts.replace("accept", "accept control = cutthrough_delivery")
        file.write_text(file.read_text().replace(accepts, passes))


class _PostfixServer(Postfix):
    def configure(self) -> None:
        super().configure()
        with (self.folder / "conf/main.cf").open("a") as file:
            file.write("smtpd_recipient_restrictions = check_client_access static:HOLD\n")
            file.write("default_process_limit = 200\nsmtpd_client_connection_count_limit = 0\n")
