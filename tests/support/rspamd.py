"""A real rspamd, in the chroot of ``install-server``, as long as a test wants it."""

from __future__ import annotations

import os
import socket
import subprocess

from support.servers import Program

__all__ = ["SPF", "Rspamd"]

#: domain -> what the DNS says of it; it knows nothing else.
SPF = {
    "example.net": "v=spf1 ip4:192.0.2.25 ip4:127.0.0.2 ip6:2001:db8::25 -all",
    "xn--bcher-kva.example": "v=spf1 ip4:192.0.2.25 -all",
}

# Those that would ask the network.
OFF = (
    *("arc", "asn", "dkim", "dkim_signing", "dmarc", "fuzzy_check", "mx_check", "neural"),
    *("phishing", "rbl", "rspamd_update", "surbl", "url_redirector"),
)

WORKERS = ("controller", "proxy")

OPTIONS = """
url_tld = "{place}/tld";
control_socket = "{place}/control mode=0600";
disable_hyperscan = true;
enable_test_patterns = true;
dns {{
  # No one answers there.
  nameserver = ["127.0.0.1:{dns}:1"];
  timeout = 0.1s;
  retransmits = 1;
  fake_records = [{records}];
}}
"""


class Rspamd(Program):
    """rspamd with the configuration of its Debian package, which asks no one else.

    ``url``  where its normal worker listens.
    """

    program = "rspamd"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def configure(self) -> None:
        self._dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._dns.bind(("127.0.0.1", 0))
        records = ", ".join(
            f'{{ name = "{name}", type = txt, replies = ["{text}"] }}' for name, text in SPF.items()
        )
        values = {"place": self.place, "dns": self._dns.getsockname()[1], "records": records}
        # It looks up where the workers would listen that do not run.
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost\n")
        files = {
            "tld": "example\nnet\norg\n",
            "local.d/hfilter.conf": "hostname_enabled = false;\n",  # as we advise
            "override.d/options.inc": OPTIONS.format(**values),
            "override.d/logging.inc": 'type = "console";\n',
            "override.d/spf.conf": "check_local = true;\n",  # clients are on the loopback
            "override.d/worker-normal.inc": f'bind_socket = "127.0.0.1:{self.port}";\ncount = 1;\n',
            **{f"override.d/worker-{one}.inc": "enabled = false;\n" for one in WORKERS},
            **{f"override.d/{one}.conf": "enabled = false;\n" for one in OFF},
        }
        for name, text in files.items():
            file = self.folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        owner = (self.root / "var/lib/rspamd").stat()
        self._user = f"{owner.st_uid}:{owner.st_gid}"
        os.chown(self.folder, owner.st_uid, owner.st_gid)

    def chroot_options(self) -> list[str]:
        return [f"--userspec={self._user}"]

    def command(self) -> list[str]:
        places = ("LOCAL_CONFDIR", "DBDIR", "RUNDIR", "LOGDIR")
        variables = [f"--var={name}={self.place}" for name in places]
        return ["rspamd", "--no-fork", "--config=/etc/rspamd/rspamd.conf", *variables]

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        self._dns.close()
        super().stop(process)
