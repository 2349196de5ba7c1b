"""The customer's Salmon project: the example's shape, with a handler that does nothing.

Logging is the example project's, journal and repeat suppression are on, as they always are.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT

__all__ = ["ACCOUNT", "CERTIFICATE", "DOMAIN", "KEY", "PASSWORD", "WAITS", "agent", "project"]

DOMAIN = "example.org"
ACCOUNT, PASSWORD = "acme", "of no importance"

# Seconds that a handler waits for something else.
WAITS = 0.1

# localhost's, self-signed, of the demo.
CERTIFICATE = ROOT / "salmon_revsmtp/demo/localhost-certificate.pem"
KEY = ROOT / "salmon_revsmtp/demo/localhost-key.pem"

_SETTINGS = """
import json
from pathlib import Path

_keys = json.loads(Path("bench.json").read_text())
collection_agents, smtp_services = _keys["agents"], {"default": _keys["service"]}
port = _keys.get("port", 0)
relay_config = {"host": "localhost", "port": 8825}
globals().update(_keys["settings"])
handlers = ["app.handlers." + _keys["handler"]]
router_defaults = {"host": r"([0-9]+\\.)?example\\.org"}
"""

_BOOT = """
import logging.config

import salmon_revsmtp
from salmon import queue
from salmon.routing import Router
from salmon.server import LMTPReceiver, Relay, SMTPReceiver

from . import settings

logging.config.fileConfig("config/logging.conf")
settings.relay = Relay(**settings.relay_config)
settings.receiver = RECEIVER
Router.defaults(**settings.router_defaults)
Router.load(settings.handlers)
Router.UNDELIVERABLE_QUEUE = queue.Queue("run/undeliverable")
"""

# boot module -> the receiver that it makes
_RECEIVERS = {
    "boot": "salmon_revsmtp.attach(settings)",
    "lmtp": 'LMTPReceiver("127.0.0.1", settings.port)',
    "smtp": 'SMTPReceiver("127.0.0.1", settings.port)',
}

# handler module -> what it is
_HANDLERS = {
    "nothing": """
from salmon.routing import route, stateless


@route("(person)@(host)", person="[a-z]+")
@stateless
def NOTHING(message, person=None, host=None):
    pass
""",
    "arrivals": """
import time

from salmon.routing import route, stateless

_file = open("run/arrivals", "a", buffering=1)


@route("(person)@(host)", person="[a-z]+")
@stateless
def ARRIVALS(message, person=None, host=None):
    print(message["Message-Id"], time.monotonic(), file=_file)
""",
    "pushes": """
import os

from salmon.queue import Queue
from salmon.routing import route, stateless

_queue = Queue("run/inbound")


@route("(person)@(host)", person="[a-z]+")
@stateless
def PUSHES(message, person=None, host=None):
    _queue.push(message)
    folder = os.open("run/inbound/new", os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
""",
    "nothing_beside": """
from salmon.routing import nolocking, route, stateless


@route("(person)@(host)", person="[a-z]+")
@stateless
@nolocking
def NOTHING_BESIDE(message, person=None, host=None):
    pass
""",
    "waits": f"""
import time

from salmon.routing import nolocking, route, stateless


@route("(person)@(host)", person="[a-z]+")
@stateless
@nolocking
def WAITS(message, person=None, host=None):
    time.sleep({WAITS})
""",
    "refuses_spam": """
from salmon.routing import route, stateless
from salmon.server import SMTPError


@route("(person)@(host)", person="[a-z]+")
@stateless
def REFUSES_SPAM(message, person=None, host=None):
    if message["Subject"] == "spam":
        raise SMTPError(554, "5.7.1 this is spam")
""",
}


def agent(port: int, name: str = "isp", tls: bool = False, **keys: Any) -> dict[str, Any]:
    """The settings of an agent that collects from a port of the loopback."""
    return {
        "name": name,
        "protocol": "odmr",
        "server": "localhost" if tls else "127.0.0.1",
        "port": port,
        "tls": "starttls" if tls else "none",
        "ca_file": str(CERTIFICATE) if tls else None,
        "account": ACCOUNT,
        "password": PASSWORD,
        "domains": [DOMAIN],
        **keys,
    }


@contextmanager
def project(
    *agents: dict[str, Any],
    port: int = 0,
    handler: str = "nothing",
    settings: dict[str, Any] | None = None,
    **service: Any,
) -> Iterator[Path]:
    """A project in a temporary folder, which is removed at the end.

    ``port``      where Salmon's own receivers listen, if one is started.
    ``handler``   ``"nothing"``; ``"pushes"`` into a queue; ``"nothing_beside"``: nothing, beside
                  others; ``"waits"``, beside others; ``"arrivals"``: it writes down when it saw
                  which message; or ``"refuses_spam"``.
    ``settings``  more of them, such as those of a provider.
    """
    folder = Path(tempfile.mkdtemp(prefix="revsmtp-bench-"))
    try:
        for one in ("config", "app/handlers", "run", "logs"):
            (folder / one).mkdir(parents=True)
        for one in ("config", "app", "app/handlers"):
            (folder / one / "__init__.py").touch()
        (folder / "config/settings.py").write_text(_SETTINGS)
        for name, receiver in _RECEIVERS.items():
            (folder / f"config/{name}.py").write_text(_BOOT.replace("RECEIVER", receiver))
        for name, text in _HANDLERS.items():
            (folder / f"app/handlers/{name}.py").write_text(text)
        shutil.copy(ROOT / "config/logging.conf", folder / "config")
        keys = {
            "agents": agents,
            "service": {"hostname": "mail.example.org", "domains": [DOMAIN], **service},
            "port": port,
            "handler": handler,
            "settings": settings or {},
        }
        (folder / "bench.json").write_text(json.dumps(keys))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
