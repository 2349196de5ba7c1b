"""A process that brings up others to be killed: imports everything once, then forks.

    python -m support.killable FOLDER KEYS DELIVERY

DELIVERY is a mode, and where there are several the number of threads, such as ``"router 4"``.  A
line of JSON on standard input is a run: ``{"do": "collect", "die_at": 17}`` forks a child that
collects in FOLDER with an agent of these KEYS (``"consume"``: that handles the queue; ``"serve"``:
a server, which has a session open), and that kills itself at the 17th line that it comes to of the
code which makes a message safe, or, with ``"after"``, from the first call of that function on, such
as ``"service/recipients.py:verdict"``; ``"die_in":
"RCPT"`` kills it when a session has answered RCPT, and ``"stop_in"`` stops that.  Answers: ``pid
4711``, and when it is dead ``ended -9``.  The handlers write a ledger: ``begin`` and ``end``, the
message, its recipient, and the digest of what queue mode stored for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from salmon.mail import MailRequest
from salmon.routing import Router, nolocking, route, stateless
from salmon.server import SMTPError

from salmon_revsmtp import QueueConsumer
from salmon_revsmtp.delivery.router import RouterDelivery
from salmon_revsmtp.delivery.trace import envelope_lines
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.daemon import Daemon
from salmon_revsmtp.service.session import Session
from salmon_revsmtp.smtp.commands import State
from support.configuration import configuration
from support.dying import die_at

# Where a death may cost or double a message; elsewhere it is no more than a cut connection.
PERILOUS = ("delivery/", "journal/", "net/driver.py", "service/")
LEDGER = "ledger"


def write_down(what: str, message: MailRequest) -> None:
    stored = envelope_lines(message.From, message.To) + message.Data + b"\n"
    digest = hashlib.sha256(stored).hexdigest()
    line = f"{what} {message['Subject']} {message.To} {digest}\n"
    descriptor = os.open(LEDGER, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def handle(message: MailRequest, name: str = "") -> None:
    write_down("begin", message)
    if name == "boom":
        raise RuntimeError("handler bug")
    write_down("end", message)
    if name == "never":
        raise SMTPError(550, "5.1.1 no such user")


route("(name)@example.org", name="[a-z]+")(stateless(nolocking(handle)))


class Sent:
    """Salmon's relay: what it was given goes into the ledger."""

    def deliver(self, message: Any, To: str, From: str) -> None:
        descriptor = os.open(LEDGER, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"sent notification {To} -\n".encode())
        os.close(descriptor)


def _is_in(session: Session, instant: str) -> bool:
    """Whether what has come of a message, and has been answered, is that much."""
    receiver: Any = session.machine
    if instant == "the message":  # somewhere in it
        return bool(receiver.content_octets > 100_000)
    if instant == "the first RCPT":
        return len(receiver._recipients) == 1
    state, recipients = receiver._state, len(receiver._recipients)
    return recipients == 2 and state is State[instant] and not receiver.content_octets


def do_in(instant: str, do: Callable[[Session], None]) -> None:
    """Do something to a session at an instant: after ``"the first RCPT"`` of two, after the second
    ``"RCPT"``, after ``"DATA"``, within ``"the message"``."""
    receive = Session.data_received

    def received(session: Any, data: bytes) -> None:
        receive(session, data)
        if _is_in(session, instant):
            do(session)

    Session.data_received = received  # type: ignore[method-assign, assignment]


def die_in(instant: str) -> None:
    """Kill this process at an instant, or at ``"the end"``, before the message is answered."""
    if instant == "the end":
        RouterDelivery.deliver = lambda *_: die()  # type: ignore
    else:
        do_in(instant, lambda _: die())


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def collect(keys: dict[str, Any], delivery: str, serve: bool) -> None:
    plugins = Plugins.load()
    mode, _, threads = delivery.partition(" ")
    service: dict[str, Any] = {"hostname": "mail.example.org", "delivery": mode}
    service["delivery_threads"] = int(threads or 1)
    valid = configuration(keys, plugins=plugins, default=service)
    with Collector(valid, plugins, Sent) as collector:
        asyncio.run(Daemon(collector, plugins).run() if serve else collector.collect(valid.agents))


def run(request: dict[str, Any], keys: dict[str, Any], delivery: str) -> None:
    if number := request.get("die_at"):
        die_at(number, PERILOUS, request.get("after", ""))
    if instant := request.get("die_in"):
        die_in(instant)
    if instant := request.get("stop_in"):
        do_in(instant, Session.shut_down)
    if request["do"] in ("collect", "serve"):
        collect(keys, delivery, request["do"] == "serve")
    else:
        QueueConsumer("run/inbound", relay=Sent).start(one_shot=True)


def main() -> None:
    folder, keys, delivery = sys.argv[1:]
    os.chdir(folder)
    logging.disable(logging.CRITICAL)
    Router.LOG_EXCEPTIONS = False
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            run(json.loads(line), json.loads(keys), delivery)
            sys.stdout.flush()
            os._exit(0)
        print("pid", pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print("ended", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
