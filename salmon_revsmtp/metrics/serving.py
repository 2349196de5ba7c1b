"""Who reads the metrics: Prometheus over HTTP, and node_exporter from a file."""

from __future__ import annotations

import contextlib
import http.server
import logging
import os
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from salmon_revsmtp import Trouble
from salmon_revsmtp.metrics.meters import Meters

if TYPE_CHECKING:
    from salmon_revsmtp import Server
    from salmon_revsmtp.metrics.settings import MetricsSettings

__all__ = ["Serving", "unready", "write"]

# Seconds in which the event loop has to answer.
ALIVE = 5.0
# Seconds that a client has for its request, and that it is given to take the answer.
PATIENCE = 10.0
# Requests that are answered at a time.  Prometheus has one; more wait.
AT_ONCE = 8

# The kinds of trouble with which no mail is taken, or soon.
_NOT_READY = ("disk", "hold", "server")

log = logging.getLogger(__name__)


def unready(server: Server) -> list[str]:
    """Why a server is not ready, as keys of troubles; empty if it is.  Blocks."""
    try:
        keys = [one.key for one in server.troubles()]
    except RuntimeError:
        return ["server"]
    return [key for key in keys if key.partition(":")[0] in _NOT_READY]


class Serving:
    """The metrics of ``server``, and who reads them."""

    def __init__(self, server: Server, settings: MetricsSettings) -> None:
        self._server, self._settings = server, settings
        self._meters = Meters(server, settings.accounts)
        self._stopped = threading.Event()
        self._http: _Http | None = None
        self._threads: list[threading.Thread] = []
        server.register(self._meters)

    @property
    def port(self) -> int | None:
        """Where it listens."""
        return self._http.server_address[1] if self._http is not None else None

    def exposition(self) -> tuple[bytes, str]:
        """What Prometheus reads, and its content type.  Blocks."""
        return self._meters.exposition()

    def start(self) -> None:
        if (address := self._settings.address) is not None:
            try:
                self._http = _Http(address, self._server, self._meters)
            except OSError as error:
                why = f"cannot listen on {self._settings.listen}: {error.strerror or error}"
                log.error("metrics: %s; the server runs without", why)
                text = f"The metrics {why}. Name another address in the settings, or free this one."
                self._server.report(Trouble("metrics:listen", text))
            else:
                log.info("metrics: listening on %s port %d", *self._http.server_address[:2])
                self._run(self._http.serve_forever)
        if self._settings.textfile is not None:
            self._run(self._write_often)

    def _run(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="metrics", daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop(self) -> None:
        """No more is answered, and the file is gone: what it says would be old."""
        self._stopped.set()
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
        for thread in self._threads:
            thread.join()
        if self._settings.textfile is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()

    # -- for node_exporter ----------------------------------------------------------------------

    @property
    def _path(self) -> Path:
        assert self._settings.textfile is not None
        return self._server.project / self._settings.textfile

    def _write_often(self) -> None:
        failed = False  # one line tells of all that follow
        while not self._stopped.is_set():
            try:
                write(self._path, self.exposition()[0])
                failed = False
            except Exception as error:
                level = logging.DEBUG if failed else logging.ERROR
                log.log(level, "metrics: %s cannot be written: %s", self._path, error)
                failed = True
            self._stopped.wait(self._settings.every)


def write(path: Path, text: bytes) -> None:
    """Whoever reads ``path`` has all of the text before or all of this one, whoever it is.  Raises
    :class:`OSError`."""
    # node_exporter reads what ends in .prom.
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


# -- over HTTP ------------------------------------------------------------------------------------


# Those that listen in this process.  A child that a handler forks would keep their addresses.
_listening: set[_Http] = set()


def _in_a_child() -> None:
    for one in list(_listening):
        with contextlib.suppress(OSError):
            one.socket.close()
    _listening.clear()


os.register_at_fork(after_in_child=_in_a_child)


class _Http(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(self, address: tuple[str, int], server: Server, meters: Meters) -> None:
        self.revsmtp, self.meters = server, meters
        self.places = threading.BoundedSemaphore(AT_ONCE)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Answer)
        _listening.add(self)

    def server_close(self) -> None:
        _listening.discard(self)
        super().server_close()

    def server_bind(self) -> None:
        # Not HTTPServer's own, which asks DNS for this host's name.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: object, client_address: object) -> None:
        if not self.places.acquire(timeout=PATIENCE):
            self.shutdown_request(request)  # type: ignore[arg-type]
            return
        try:
            super().process_request(request, client_address)  # type: ignore[arg-type]
        except BaseException:  # no thread to be had
            self.places.release()
            raise

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self.places.release()

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("metrics: answering %s", client_address, exc_info=True)


class _Answer(http.server.BaseHTTPRequestHandler):
    server: _Http
    timeout = PATIENCE
    server_version = "salmon-revsmtp"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        # The socket's own patience begins anew with each octet that comes.
        self._clock = threading.Timer(self.timeout, self._too_slow)
        self._clock.daemon = True
        self._clock.start()

    def _too_slow(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def parse_request(self) -> bool:
        try:
            return super().parse_request()
        finally:
            self._clock.cancel()

    def finish(self) -> None:
        self._clock.cancel()
        super().finish()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._say(HTTPStatus.OK, *self.server.meters.exposition())
        elif path == "/healthz":
            alive = self.server.revsmtp.answers(ALIVE)
            self._text(alive, "alive" if alive else "the event loop does not answer")
        elif path == "/readyz":
            alive = self.server.revsmtp.answers(ALIVE)
            found = unready(self.server.revsmtp) if alive else ["server"]
            self._text(not found, "\n".join(found) or "ready")
        elif path == "/":
            self._say(HTTPStatus.OK, b"/metrics\n/healthz\n/readyz\n")
        else:
            self._say(HTTPStatus.NOT_FOUND, b"/metrics, /healthz and /readyz are here\n")

    do_HEAD = do_GET

    def _text(self, good: bool, text: str) -> None:
        status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
        self._say(status, f"{text}\n".encode())

    def _say(
        self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8"
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        log.debug("metrics: " + format, *arguments)
