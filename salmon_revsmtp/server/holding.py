"""``hold``: a handler has a message held for a customer, after whatever filtering it likes.

The hold store belongs to one process.  In that one, the message goes into it; in another, such as
the consumer of a queue, the running server is asked by its control socket to take a file; where
none runs, the store is opened for the one message.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salmon.server import SMTPError

from salmon_revsmtp.delivery.handed import handed_envelope, handed_octets
from salmon_revsmtp.delivery.maildir import disk_reply
from salmon_revsmtp.files import make_folder
from salmon_revsmtp.server.control import NoServer, ask
from salmon_revsmtp.smtp.envelope import Client, Envelope
from salmon_revsmtp.smtp.replies import Reply

if TYPE_CHECKING:
    from salmon.mail import MailRequest

    from salmon_revsmtp.server.providing import Providing

__all__ = ["Holder", "hold", "provide"]

# Seconds to wait for a running server: its disk may be slow.
PATIENCE = 60.0

# The project's folder: a handler may change that of the process.
PROJECT = Path.cwd()

# What holds mail in this process.
_here: list[Providing] = []


def provide(providing: Providing | None) -> None:
    """This process holds mail by ``providing`` from now on; ``None``: no more.  Opens the store,
    and blocks.  Raises :class:`OSError`."""
    if providing is not None:
        _ = providing.store
    _here[:] = [] if providing is None else [providing]


def hold(message: MailRequest, *, sender: str | None = None, recipient: str | None = None) -> None:
    """Hold a message for the account that has its recipient's domain; it is safe on disk when this
    returns.  For handlers at a provider::

        @route(".*")
        @stateless
        def START(message):
            salmon_revsmtp.hold(message)

    ``sender`` and ``recipient`` are those of the envelope if they are not given.  The octets are
    those that came; header fields that were added to ``message`` go on top of them, and where
    others were changed or deleted the header is written anew.

    Raises :class:`salmon.server.SMTPError`: 550 for a domain that no account has, 452 over quota
    or on a full disk, 451 where it cannot be held now.  Let it pass, and the client hears it.
    """
    reply = _held(handed_envelope(message, sender, recipient), handed_octets(message))
    if not reply.positive:
        raise SMTPError(reply.code, f"{reply.status} {reply.message}")


def _held(envelope: Envelope, data: bytes) -> Reply:
    if _here:
        return _here[0].hold(envelope, data)
    try:
        return _ask_server(envelope, data)
    except NoServer:
        return _alone(envelope, data)
    except OSError as error:
        return Reply(451, f"asking the running server: {error}", "4.3.0")


class Holder:
    """The server's end of :func:`hold` in another process."""

    def __init__(self, providing: Providing) -> None:
        self._providing = providing

    def take(self, request: dict[str, Any]) -> dict[str, Any]:
        """Hold the message in the file that a request names; returns the reply.  Blocks."""
        folder = self._providing.incoming
        name = str(request.get("file"))
        if "/" in name or not name or name.startswith("."):
            return {"error": "no such file"}
        envelope = Envelope(
            str(request.get("sender")),
            (str(request.get("recipient")),),
            client=Client(**request["client"]) if request.get("client") else None,
        )
        reply = self._providing.hold(envelope, (folder / name).read_bytes())
        return {"code": reply.code, "text": reply.message, "status": reply.status}


def _ask_server(envelope: Envelope, data: bytes) -> Reply:
    """Have the running server hold it.  Raises :class:`NoServer` and :class:`OSError`."""
    folder = _configured().incoming
    make_folder(folder)
    path = folder / f"{os.getpid()}-{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        request = {
            "do": "hold",
            "file": path.name,
            "sender": envelope.reverse_path,
            "recipient": envelope.recipients[0],
            "client": vars(envelope.client) if envelope.client is not None else None,
        }
        for answer in ask(request, patience=PATIENCE):
            if "code" in answer:
                return Reply(answer["code"], answer["text"], answer["status"])
            return Reply(451, f"the running server: {answer.get('error')}", "4.3.0")
        return Reply(451, "the running server ended", "4.3.0")
    finally:
        path.unlink(missing_ok=True)


def _alone(envelope: Envelope, data: bytes) -> Reply:
    """No server runs: open the store for this one message."""
    providing = _configured()
    try:
        return providing.hold(envelope, data)
    except OSError as error:
        return disk_reply(error)
    finally:
        providing.close()
        providing.close_store()


def _configured() -> Providing:
    """What holds mail by this project's settings."""
    import importlib

    from salmon_revsmtp.delivery.outbox import Outbox
    from salmon_revsmtp.delivery.rates import RateLimit
    from salmon_revsmtp.journal.counts import CountJournal
    from salmon_revsmtp.plugins.manager import Plugins
    from salmon_revsmtp.server.configuration import load
    from salmon_revsmtp.server.project import DEFAULT_SETTINGS
    from salmon_revsmtp.server.providing import Providing

    name = os.environ.get("SALMON_SETTINGS_MODULE", DEFAULT_SETTINGS)
    settings = importlib.import_module(name)
    plugins = Plugins.load()
    outbox = Outbox(lambda: settings.relay)
    rates = RateLimit(CountJournal())
    return Providing(load(settings, plugins), plugins, outbox, rates, PROJECT)
