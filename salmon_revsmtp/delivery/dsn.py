"""Delivery status notifications: the message that tells a sender who did not get the mail.

RFC 3464 for the report, RFC 6522 for the multipart around it, RFC 3461 6.2 for who wants one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from email.message import Message
from email.mime.base import MIMEBase
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from email.utils import formatdate, make_msgid

from salmon_revsmtp.delivery.maildir import disk_reply
from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.delivery.trace import header_end
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Notifier", "notification"]

# Octets of the original's headers that go back; a message may be nothing but a header.
MAX_HEADERS = 64 * 1024

log = logging.getLogger(__name__)


class Notifier:
    """Makes notifications, and has them sent.

    ``hostname``  asked for our name.
    ``outbox``    where they wait until the relay takes them.
    """

    def __init__(self, hostname: Callable[[], str], outbox: Outbox) -> None:
        self._hostname = hostname
        self._outbox = outbox

    def notify(
        self, envelope: Envelope, failed: Mapping[str, Reply], content: bytes
    ) -> Reply | None:
        """Tell the sender about the failed recipients.

        Nothing goes to a null sender, and nothing about a recipient with ``NOTIFY=NEVER``.
        Returns ``None`` when the notification is safe on disk or none is owed, else the 4yz with
        which to answer the message.
        """
        wanted = {
            recipient: reply
            for recipient, reply in failed.items()
            if _wants_failures(envelope.rcpt_options.get(recipient, {}))
        }
        if not envelope.reverse_path or not wanted:
            return None
        message = notification(self._hostname(), envelope, wanted, content)
        try:
            self._outbox.put(envelope.reverse_path, message.as_bytes())
        except OSError as error:
            to = angle(envelope.reverse_path)
            log_safely(log, logging.ERROR, "to=%s the notification was not kept: %s", to, error)
            return disk_reply(error)
        self._outbox.send_soon()
        to = angle(envelope.reverse_path)
        log_safely(log, logging.INFO, "to=%s is told of %d failed recipients", to, len(wanted))
        return None


def _wants_failures(options: Mapping[str, str]) -> bool:
    """RFC 3461 4.1: without NOTIFY, failures are what is told."""
    notify = options.get("NOTIFY", "FAILURE").upper()
    return "FAILURE" in notify.split(",")


def notification(
    hostname: str, envelope: Envelope, failed: Mapping[str, Reply], content: bytes
) -> Message:
    """The report as a message of pure ASCII, which any relay takes."""
    report = MIMEMultipart("report", report_type="delivery-status")
    report["From"] = f"Mail Delivery System <MAILER-DAEMON@{hostname}>"
    report["To"] = _header_safe(envelope.reverse_path)
    report["Subject"] = "Undelivered mail"
    report["Date"] = formatdate(localtime=True)
    report["Message-ID"] = make_msgid(domain=_header_safe(hostname))
    report["Auto-Submitted"] = "auto-replied"  # RFC 3834 5: no one is to answer this
    report.attach(MIMEText(_explanation(hostname, failed), "plain", "utf-8"))
    report.attach(_status(hostname, envelope, failed))
    headers = content[:MAX_HEADERS]
    headers = headers[: header_end(headers)].removesuffix(b"\n")
    part = MIMEText(headers.decode("utf-8", "replace") + "\n", "rfc822-headers", "utf-8")
    report.attach(part)
    return report


def _explanation(hostname: str, failed: Mapping[str, Reply]) -> str:
    lines = [f"This is the mail system at {hostname}.", ""]
    lines += ["Your message was not delivered to:", ""]
    lines += [f"  <{recipient}>: {reply}" for recipient, reply in failed.items()]
    lines += ["", "Its headers follow.", ""]
    return "\n".join(lines)


def _status(hostname: str, envelope: Envelope, failed: Mapping[str, Reply]) -> Message:
    """message/delivery-status (RFC 3464 2.1): a block for the message, one per recipient."""
    part = MIMEBase("message", "delivery-status")
    part.attach(
        _block(
            ("Reporting-MTA", f"dns; {hostname}"),
            ("Original-Envelope-Id", envelope.mail_options.get("ENVID")),
        )
    )
    for recipient, reply in failed.items():
        kind = "rfc822" if recipient.isascii() else "utf-8"  # RFC 6533 3
        part.attach(
            _block(
                ("Original-Recipient", envelope.rcpt_options.get(recipient, {}).get("ORCPT")),
                ("Final-Recipient", f"{kind}; {recipient}"),
                ("Action", "failed"),
                ("Status", reply.status or "5.0.0"),
                ("Diagnostic-Code", f"smtp; {str(reply)[:400]}"),
            )
        )
    return part


def _block(*fields: tuple[str, str | None]) -> Message:
    block = Message()
    for name, value in fields:
        if value is not None:
            block[name] = _header_safe(value)
    return block


def _header_safe(text: str) -> str:
    """No line ends, ASCII only (RFC 6533's ``\\x{...}`` form for the rest)."""
    flat = re.sub(r"[\x00-\x1f\x7f]+", " ", text)
    return "".join(char if char.isascii() else f"\\x{{{ord(char):X}}}" for char in flat)
