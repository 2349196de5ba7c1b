"""nginx stands before the console as the documentation has it, with someone who has logged in there
and someone who has not."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shutil
import socket
import subprocess
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.console import Browser
from support.project import Project, isp
from support.servers import free_port
from support.serving import RUN, server, wait_for

pytestmark = pytest.mark.interop

PAGE = Path(__file__).parent.parent.parent / "docs/console.rst"
HOST = "home.example.org"

NGINX = """
daemon off;
user {user};
pid {folder}/pid;
error_log {folder}/error.log;
worker_processes 1;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        server_name {host};
{block}
    }}
}}
"""


class Gate(http.server.BaseHTTPRequestHandler):
    """As much of oauth2-proxy as nginx asks for."""

    open_to = ""

    def do_GET(self) -> None:
        asked = self.path == "/oauth2/auth"
        self.send_response((202 if self.open_to else 401) if asked else 200)
        if asked and self.open_to:
            self.send_header("X-Auth-Request-Email", self.open_to)
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"sign in")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def blocks() -> list[str]:
    """The blocks of code of the page's section."""
    _, _, section = PAGE.read_text().partition("Behind a reverse proxy")
    found = re.findall(r"::\n\n((?:    .*\n|\n)+)", section.partition("\nPrograms\n")[0])
    return [textwrap.dedent(one) for one in found]


@contextlib.contextmanager
def gate() -> Iterator[int]:
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield served.server_address[1]
    served.shutdown()
    served.server_close()


@contextlib.contextmanager
def nginx(folder: Path, console: int, oauth: int) -> Iterator[int]:
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        reason = "nginx is missing; tests/interop/install-server nginx"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    folder.mkdir()
    port, block = free_port(), next(one for one in blocks() if "proxy_pass" in one)
    block = block.replace(":8366", f":{console}").replace(":4180", f":{oauth}")
    user = subprocess.check_output(["id", "-un"], text=True).strip()
    text = NGINX.format(folder=folder, port=port, host=HOST, block=block, user=user)
    (folder / "nginx.conf").write_text(text)
    command = [program, "-c", str(folder / "nginx.conf"), "-p", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def listens() -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return True
        return False

    try:
        wait_for(listens)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def test_who_has_logged_in_at_nginx_is_in_and_no_one_else(tmp_path: Path) -> None:
    settings = next(one for one in blocks() if "base_path" in one)
    project, port = Project(tmp_path / "project"), free_port()
    project.configure(isp(1, every="None"))
    with (project.folder / "config/settings.py").open("a") as file:
        file.write("\n" + settings.replace(":8366", f":{port}"))
    with (
        server(project, RUN),
        gate() as oauth,
        nginx(tmp_path / "nginx", port, oauth) as front,
    ):
        wait_for((project.folder / "run/console.json").exists)
        ann = Browser(front)
        ann.host = HOST
        assert ann.get("/mail/", x_remote_user="eve").text == "sign in"
        Gate.open_to = "ann@example.org"
        page = ann.get("/mail/", x_remote_user="eve")
        assert page.status == 200 and "<h1>Health</h1>" in page.text
        assert all("Path=/mail;" in one for one in page.cookies) and page.cookies
        style = page.text.partition('rel="stylesheet" href="')[2].partition('"')[0]
        assert style.startswith("/mail/static/") and ann.get(style).status == 200
        form = {"csrf": page.csrf, "enabled": "no"}
        done = ann.post("/mail/agents/isp/enable", form)
        assert done.headers["location"].startswith("/mail/agents/isp?")
        assert "isp (Disabled)" in ann.get("/mail/agents").text
        Gate.open_to = "bob@example.org"
        assert ann.post("/mail/agents/isp/enable", form).status == 403, "that was ann's"
        Gate.open_to = ""
        assert ann.get("/mail/agents").text == "sign in"
