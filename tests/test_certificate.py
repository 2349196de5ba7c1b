"""A certificate that is replaced while the service runs."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import aiosmtplib
import pytest
import trustme
from support.holding import Holding

from salmon_revsmtp.net.certificate import Certificate, certificate_ends, fingerprint
from salmon_revsmtp.service.settings import ServiceSettings


def write(folder: Path, ca: trustme.CA, name: str) -> None:
    made = ca.issue_cert(name)
    for path, blob in (
        (folder / "cert.pem", b"".join(one.bytes() for one in made.cert_chain_pems)),
        (folder / "key.pem", made.private_key_pem.bytes()),
    ):
        new = path.with_suffix(".new")
        new.write_bytes(blob)
        new.rename(path)


def served(certificate: Certificate, ca: trustme.CA) -> str:
    """The name in the certificate of a handshake."""
    theirs = ssl.create_default_context()
    theirs.check_hostname = False
    ca.configure_trust(theirs)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = certificate.context()
    assert ours is not None
    server = ours.wrap_bio(to_server, to_client, server_side=True)
    client = theirs.wrap_bio(to_client, to_server)
    for one in (client, server, client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            one.do_handshake()
    found: Any = client.getpeercert()
    [(_, name)] = found["subjectAltName"]
    return str(name)


def test_a_new_certificate_is_served_from_the_next_handshake_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ca = trustme.CA()
    write(tmp_path, ca, "old.example.org")
    settings = ServiceSettings(
        listen=("127.0.0.1:0",), tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem"
    )
    certificate = Certificate("service=mx", settings.tls_cert, settings.tls_key)
    assert served(certificate, ca) == "old.example.org"
    unchanged = certificate.context()
    assert certificate.context() is unchanged

    (tmp_path / "cert.pem").write_text("no certificate")
    assert served(certificate, ca) == "old.example.org"
    assert served(certificate, ca) == "old.example.org"
    assert caplog.text.count("the certificate of before is used") == 1

    (tmp_path / "cert.pem").unlink()
    assert served(certificate, ca) == "old.example.org"

    write(tmp_path, ca, "new.example.org")
    assert served(certificate, ca) == "new.example.org"


def test_a_link_that_is_turned_is_a_new_certificate(tmp_path: Path) -> None:
    """As certbot does it."""
    ca = trustme.CA()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, ca, f"{name}.example.org")
    (tmp_path / "live").symlink_to(tmp_path / "one")
    live = tmp_path / "live"
    settings = ServiceSettings(tls_cert=live / "cert.pem", tls_key=live / "key.pem")
    certificate = Certificate("service=mx", settings.tls_cert, settings.tls_key)
    assert served(certificate, ca) == "one.example.org"
    live.unlink()
    live.symlink_to(tmp_path / "two")
    assert served(certificate, ca) == "two.example.org"
    shutil.rmtree(tmp_path / "two")
    assert served(certificate, ca) == "two.example.org"


@pytest.mark.parametrize("tls", ["implicit", "starttls"])
def test_a_provider_serves_a_renewed_certificate_without_a_restart(
    tmp_path: Path, tls: str
) -> None:
    ca = trustme.CA()
    theirs = ssl.create_default_context()
    theirs.check_hostname = False
    ca.configure_trust(theirs)

    async def name_at(port: int) -> str:
        async with aiosmtplib.SMTP(
            hostname="127.0.0.1",
            port=port,
            use_tls=tls == "implicit",
            start_tls=tls == "starttls",
            tls_context=theirs,
        ) as client:
            transport: Any = client.transport
            [(_, name)] = transport.get_extra_info("peercert")["subjectAltName"]
        return str(name)

    async def main() -> list[str]:
        write(tmp_path, ca, "old.example.org")
        certificate = Certificate("provider", tmp_path / "cert.pem", tmp_path / "key.pem")
        async with Holding(tmp_path / "hold").provider(tls=tls, certificate=certificate) as one:
            before = await name_at(one.port)
            write(tmp_path, ca, "new.example.org")
            return [before, await name_at(one.port)]

    assert asyncio.run(main()) == ["old.example.org", "new.example.org"]


@pytest.mark.parametrize("year", [2001, 2049])
def test_the_end_of_a_certificate_is_known_also_when_it_is_over(tmp_path: Path, year: int) -> None:
    end = datetime.datetime(year, 5, 17, 4, 30, tzinfo=datetime.timezone.utc)
    made = trustme.CA().issue_cert("mx.example.net", not_after=end)
    made.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    assert certificate_ends(tmp_path / "both.pem", None) == end.timestamp()


def test_a_fingerprint_is_that_which_openssl_shows(tmp_path: Path) -> None:
    write(tmp_path, trustme.CA(), "mx.example.net")
    pem = tmp_path / "cert.pem"
    shown = subprocess.run(
        ["openssl", "x509", "-in", pem, "-noout", "-fingerprint", "-sha256"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    first, end = pem.read_text().partition("-----END CERTIFICATE-----")[:2]
    ours = fingerprint(ssl.PEM_cert_to_DER_cert(first + end))
    assert ours == "sha256:" + shown.strip().partition("=")[2].replace(":", "").lower()
