"""Delivery status notifications: the message that tells a sender what became of the mail.

RFC 3464 for the report, RFC 6522 for the multipart around it, RFC 3461 6 for what is told and what
comes back, RFC 6533 where addresses or headers are UTF-8.  All of it is made here, octet by octet,
of what it is given: nothing is looked up, and nothing of the message is parsed but where its header
ends.
"""

from __future__ import annotations

import binascii
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.header import Header
from email.utils import formatdate, make_msgid
from typing import BinaryIO, Literal, NamedTuple

from salmon_revsmtp.delivery.trace import header_end
from salmon_revsmtp.foreign import printable
from salmon_revsmtp.smtp.addresses import AddressError, parse_path
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.xtext import encode_utf8_address

__all__ = ["MAX_FULL", "MAX_HEADERS", "MAX_LISTED", "Action", "RecipientStatus", "notification"]

# A forged sender makes us send all this to someone who has nothing to do with it.

# Octets of a message that goes back whole, where its sender asked for that: as Postfix has it
# (bounce_size_limit).
MAX_FULL = 50_000
# Octets of its header; a message may be nothing but a header.
MAX_HEADERS = 32 * 1024
# Recipients that are reported one by one, and the octets of their reports; the others are counted.
MAX_LISTED = 50
MAX_REPORTS = 16 * 1024
# Octets of what a server said.  Its reply may be 64 KiB long.
MAX_DIAGNOSTIC = 400
# RFC 5322 2.1.1: octets of a line.  No address of more than 320 is anyone's (RFC 5321 4.5.3.1).
MAX_LINE = 998
MAX_ADDRESS = 900
FOLD_AT = 76

#: RFC 3464 2.3.3.
Action = Literal["failed", "delayed", "delivered", "relayed", "expanded"]

_STATUS = re.compile(r"[245]\.[0-9]{1,3}\.[0-9]{1,3}")
_NO_TOKEN = re.compile(r"[^A-Za-z0-9-]")
_SEVEN_BIT = re.compile(rb"[\t\n\x20-\x7e]*")
_BARE_OR_NUL = re.compile(rb"\r|\x00")
_LONG_LINE = re.compile(rb"[^\n]{%d}" % (MAX_LINE + 1))

_SUBJECTS = {
    "failed": "Undelivered mail",
    "delayed": "Delayed mail",
    "delivered": "Delivered mail",
    "relayed": "Relayed mail",
    "expanded": "Delivered mail",
}
_SENTENCES = {
    "failed": "Your message was not delivered to:",
    "delayed": "Your message has not been delivered yet, and will be tried again, to:",
    "delivered": "Your message was delivered to:",
    "relayed": "Your message was passed on to a server that sends no notifications, for:",
    "expanded": "Your message was delivered to a list of recipients, for:",
}


@dataclass(frozen=True)
class RecipientStatus:
    """What became of a message for one recipient.

    ``recipient``        its mailbox, as the envelope has it.
    ``action``           RFC 3464 2.3.3.
    ``status``           RFC 3463, such as ``"5.1.1"``; anything else becomes ``"5.0.0"``, or that
                         of the action's class.
    ``diagnostic``       what was said; ``""`` if nothing was.
    ``diagnostic_type``  ``"smtp"`` for an SMTP reply, else of our own: ``"x-..."``.
    ``remote_mta``       the name of the server that said it; ``""`` if it was no other.
    ``retry_until``      of a delayed one: until when it is tried, in seconds since the epoch.
    """

    recipient: str
    action: Action
    status: str
    diagnostic: str = ""
    diagnostic_type: str = "smtp"
    remote_mta: str = ""
    retry_until: float | None = None

    @classmethod
    def failed(cls, recipient: str, reply: Reply, remote_mta: str = "") -> RecipientStatus:
        """The reply says why it was not delivered, for good."""
        return cls(recipient, "failed", reply.status, str(reply), remote_mta=remote_mta)


class _Part(NamedTuple):
    kind: str
    encoding: str
    octets: bytes

    def encoded(self) -> bytes:
        head = f"Content-Type: {self.kind}\nContent-Transfer-Encoding: {self.encoding}\n\n"
        return head.encode() + self.octets


def notification(
    hostname: str,
    envelope: Envelope,
    recipients: Sequence[RecipientStatus],
    message: bytes | memoryview | BinaryIO,
    *,
    arrived: float | None = None,
    eight_bit: bool = False,
) -> bytes:
    """A notification to the sender of ``envelope``, with LF line ends.

    ``hostname``    our name: a host name, or an address literal.
    ``recipients``  at least one; who does not want to be told of which is the caller's to know
                    (:meth:`Envelope.wants`).
    ``message``     the message as it came, LF or CRLF line ends.  Of a file, no more is read than
                    goes back.
    ``arrived``     when it came, in seconds since the epoch.
    ``eight_bit``   whoever this is sent to takes 8BITMIME.  Else all of it is ASCII, but the
                    ``To`` of a sender that is not; that one needs SMTPUTF8 in any case.

    A message goes back whole if its sender asked for that (RET=FULL), it has failed, it is small,
    and it need not be altered for it.  Else its header does.
    """
    listed = _listed(envelope, recipients)
    returned, whole = _returned(envelope, recipients, message, eight_bit)
    parts = (
        _explanation(hostname, recipients, listed, whole),
        _status(hostname, envelope, listed, arrived, eight_bit),
        returned,
    )
    bodies = [part.encoded() for part in parts]
    boundary = _boundary(bodies)
    lines = [
        f'Content-Type: multipart/report; report-type=delivery-status;\n boundary="{boundary}"',
        "MIME-Version: 1.0",
        *_field("From", f"Mail Delivery System <MAILER-DAEMON@{_ascii(hostname)}>"),
        f"To: {_to(envelope.reverse_path)}",
        f"Subject: {_SUBJECTS[_gravest(recipients)]}",
        f"Date: {formatdate(localtime=True)}",
        f"Message-ID: {make_msgid(domain=_ascii(hostname))}",
        "Auto-Submitted: auto-replied",  # RFC 3834 5: no one is to answer this
    ]
    head = "\n".join(lines).encode("utf-8", "replace")
    mark = f"\n--{boundary}".encode()
    return b"".join((head, b"\n", *(mark + b"\n" + body for body in bodies), mark, b"--\n"))


def _boundary(bodies: Sequence[bytes]) -> str:
    while True:
        # "=_" is in no line of quoted-printable (RFC 2045 6.7).
        boundary = f"=_{secrets.token_hex(16)}"
        if not any(boundary.encode() in body for body in bodies):
            return boundary


def _gravest(recipients: Sequence[RecipientStatus]) -> str:
    actions = {one.action for one in recipients}
    return next((action for action in _SUBJECTS if action in actions), "failed")


def _listed(
    envelope: Envelope, recipients: Sequence[RecipientStatus]
) -> list[tuple[RecipientStatus, list[str]]]:
    """Those that are reported one by one, with the lines of each: as many as there is room for."""
    room = MAX_REPORTS
    listed: list[tuple[RecipientStatus, list[str]]] = []
    for one in recipients[:MAX_LISTED]:
        lines = list(_about(envelope, one))
        room -= sum(len(line) + 1 for line in lines) + 1
        if room < 0 and listed:
            break
        listed.append((one, lines))
    return listed


# -- for a person -----------------------------------------------------------------------------


def _explanation(
    hostname: str,
    recipients: Sequence[RecipientStatus],
    listed: Sequence[tuple[RecipientStatus, list[str]]],
    whole: bool,
) -> _Part:
    lines = [f"This is the mail system at {printable(hostname)}."]
    for action, sentence in _SENTENCES.items():
        shown = [one for one, _ in listed if one.action == action]
        others = sum(one.action == action for one in recipients) - len(shown)
        if shown or others:
            lines += ["", sentence, ""]
            lines += _shown(shown)
        if others:
            lines += ["", f"  and to {others} others, who are not listed"]
    lines += ["", "It follows." if whole else "Its header follows.", ""]
    return _text("text/plain", "\n".join(lines).encode("utf-8", "replace"))


def _shown(recipients: Sequence[RecipientStatus]) -> Iterator[str]:
    """Those that heard the same, together."""
    by_reason: dict[tuple[str, str, float | None], list[str]] = {}
    for one in recipients:
        reason = (_cut(one.diagnostic, MAX_DIAGNOSTIC), one.remote_mta, one.retry_until)
        by_reason.setdefault(reason, []).append(one.recipient)
    for (diagnostic, server, until), mailboxes in by_reason.items():
        yield from (f"  <{printable(_cut(mailbox, MAX_ADDRESS))}>" for mailbox in mailboxes)
        said = f"{printable(server)} said: " if server else ""
        if diagnostic:
            yield from _folded(f"    {said}{printable(_flat(diagnostic))}", "    ")
        if until is not None:
            yield f"    It is tried until {formatdate(until, localtime=True)}."


# -- for a program ----------------------------------------------------------------------------


def _status(
    hostname: str,
    envelope: Envelope,
    listed: Sequence[tuple[RecipientStatus, list[str]]],
    arrived: float | None,
    eight_bit: bool,
) -> _Part:
    """RFC 3464 2.1: a block for the message, one per recipient."""
    block = list(_field("Reporting-MTA", f"dns; {hostname}"))
    if envelope.envelope_id is not None:
        block = [*_field("Original-Envelope-Id", envelope.envelope_id), *block]
    if arrived is not None:
        block.append(f"Arrival-Date: {formatdate(arrived, localtime=True)}")
    blocks = [block, *(lines for _, lines in listed)]
    text = "\n".join("".join(line + "\n" for line in lines) for lines in blocks)
    octets = text.encode("utf-8", "replace")
    if octets.isascii():
        return _Part("message/delivery-status", "7bit", octets)
    return _global("message/global-delivery-status", octets, eight_bit)


def _about(envelope: Envelope, one: RecipientStatus) -> Iterator[str]:
    """RFC 3464 2.3."""
    if original := envelope.original_recipient(one.recipient):
        yield from _field("Original-Recipient", _typed(*original, envelope.smtputf8))
    kind = "rfc822" if one.recipient.isascii() else "utf-8"
    yield from _field("Final-Recipient", _typed(kind, one.recipient, envelope.smtputf8))
    yield f"Action: {one.action}"
    fallback = {"failed": "5", "delayed": "4"}.get(one.action, "2") + ".0.0"
    yield f"Status: {one.status if _STATUS.fullmatch(one.status) else fallback}"
    if one.remote_mta:
        yield from _field("Remote-MTA", f"dns; {_cut(one.remote_mta, MAX_ADDRESS)}")
    if one.diagnostic:
        kind = _NO_TOKEN.sub("", one.diagnostic_type) or "smtp"
        said = _cut(_ascii(one.diagnostic), MAX_DIAGNOSTIC)
        yield from _field("Diagnostic-Code", f"{kind}; {said}")
    if one.retry_until is not None and one.action == "delayed":
        yield f"Will-Retry-Until: {formatdate(one.retry_until, localtime=True)}"


def _typed(kind: str, address: str, smtputf8: bool) -> str:
    """An address with its type.  One that is not ASCII is a ``utf-8`` one, and UTF-8 only if the
    sender knows that (RFC 6533 3)."""
    kind = _NO_TOKEN.sub("", kind) or "rfc822"
    if kind == "utf-8" or not address.isascii():
        kind = "utf-8"
        address = encode_utf8_address(address, ascii_only=not smtputf8)
    return f"{kind}; {_cut(address, MAX_ADDRESS)}"


def _field(name: str, value: str) -> Iterator[str]:
    """A field as lines, folded where it has spaces (RFC 5322 2.2.3)."""
    if not name.endswith("-Recipient"):  # these are in UTF-8 where they may be
        value = _ascii(value)
    yield from _folded(f"{name}: {_flat(value)}", " ")


def _folded(text: str, indent: str) -> Iterator[str]:
    """Lines of at most 76 characters, unless a word is longer than that.  Nothing is lost: where a
    line is broken there was a space."""
    line = ""
    for number, word in enumerate(text.split(" ")):
        # A line of spaces would end the header for some.
        if line.strip() and word and len(line) + 1 + len(word) > FOLD_AT and number > 1:
            yield line
            line = indent + word
        else:
            line = f"{line} {word}" if number else word
    yield line


def _flat(text: str) -> str:
    """In one line, whatever anyone takes for a line end."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text).strip()


def _ascii(text: str) -> str:
    """Flat, and in ASCII: ``\\x{E9}`` for the rest (RFC 6533 3)."""
    flat = _flat(text)
    return "".join(char if char.isascii() else f"\\x{{{ord(char):X}}}" for char in flat)


def _cut(text: str, length: int) -> str:
    return text if len(text.encode("utf-8", "replace")) <= length else _start(text, length)


def _start(text: str, length: int) -> str:
    octets = text.encode("utf-8", "replace")[: length - 3]
    return octets.decode("utf-8", "ignore") + "..."


def _to(mailbox: str) -> str:
    """The ``To`` header: the mailbox, if it is one that can stand there."""
    try:
        fits = parse_path(f"<{mailbox}>") == (mailbox, "") and len(mailbox) <= MAX_ADDRESS
    except AddressError:
        fits = False
    if fits and mailbox.isprintable():
        return f"<{mailbox}>" if mailbox.startswith('"') else mailbox
    # RFC 6857 3.1.7: what cannot, is the name of a group that has no members.
    name = Header(_cut(mailbox, MAX_ADDRESS), "utf-8").encode(linesep="\n")
    return f"{name} :;"


# -- what comes back --------------------------------------------------------------------------


def _returned(
    envelope: Envelope,
    recipients: Sequence[RecipientStatus],
    message: bytes | memoryview | BinaryIO,
    eight_bit: bool,
) -> tuple[_Part, bool]:
    """RFC 3461 4.3, 6.2; and whether it is the whole message."""
    start = _start_of(message, max(MAX_FULL, MAX_HEADERS) + 1)
    content = start.replace(b"\r\n", b"\n")
    whole = None
    if envelope.returns_full and any(one.action == "failed" for one in recipients):
        whole = _whole(content, envelope.smtputf8, eight_bit) if len(start) <= MAX_FULL else None
    return whole or _headers(content, envelope.smtputf8, eight_bit), whole is not None


def _start_of(message: bytes | memoryview | BinaryIO, octets: int) -> bytes:
    if isinstance(message, bytes | memoryview):
        return bytes(message[:octets])
    return message.read(octets)


def _whole(content: bytes, smtputf8: bool, eight_bit: bool) -> _Part | None:
    """``None`` if it cannot go as it is: ``message/rfc822`` may not be encoded (RFC 2046 5.2.1)."""
    if _is_utf8(content[: header_end(content)]) and smtputf8:
        return _global("message/global", content, eight_bit)
    if _BARE_OR_NUL.search(content) or _LONG_LINE.search(content):
        return None
    if content.isascii():
        return _Part("message/rfc822", "7bit", content)
    return _Part("message/rfc822", "8bit", content) if eight_bit else None


def _headers(content: bytes, smtputf8: bool, eight_bit: bool) -> _Part:
    headers = content[: header_end(content)]
    if len(headers) > MAX_HEADERS:
        cut = headers.rfind(b"\n", 0, MAX_HEADERS) + 1
        headers = headers[: cut or MAX_HEADERS]
    headers = headers.removesuffix(b"\n") + b"\n"
    if smtputf8 and _is_utf8(headers):
        return _global("message/global-headers", headers, eight_bit)
    return _text("text/rfc822-headers", headers)


def _is_utf8(octets: bytes) -> bool:
    """UTF-8, and not ASCII."""
    try:
        return not octets.isascii() and bool(octets.decode())
    except UnicodeDecodeError:
        return False


def _text(kind: str, octets: bytes) -> _Part:
    """Text as it is if any server takes it so, else in quoted-printable.  Every octet comes out
    again, also of what is in no known charset; that is called Latin-1, which has them all."""
    if _SEVEN_BIT.fullmatch(octets) and not _LONG_LINE.search(octets):
        return _Part(f"{kind}; charset=us-ascii", "7bit", octets)
    charset = "us-ascii" if octets.isascii() else "utf-8" if _is_utf8(octets) else "iso-8859-1"
    return _Part(f"{kind}; charset={charset}", "quoted-printable", _quoted(octets))


def _global(kind: str, octets: bytes, eight_bit: bool) -> _Part:
    """RFC 6532 3.7, RFC 6533 4 to 6: unlike others of their kind, these may be encoded."""
    if eight_bit and not _BARE_OR_NUL.search(octets) and not _LONG_LINE.search(octets):
        return _Part(kind, "8bit", octets)
    return _Part(kind, "quoted-printable", _quoted(octets))


def _quoted(octets: bytes) -> bytes:
    """Quoted-printable, a lone CR too."""
    lines = octets.split(b"\n")
    return b"\n".join(binascii.b2a_qp(line, quotetabs=False, istext=False) for line in lines)
