"""A message as Salmon gives it to handlers, made in less time.

Python's parser goes through a message line by line, also through the text of one that has no parts.
There is nothing in it to be found: it becomes the payload as it is.  So such a message is parsed
without its text, and is given that at once.  What comes of it is the same.
"""

from __future__ import annotations

from email.message import Message

from salmon.mail import MailRequest

__all__ = ["mail_request"]

# The end of the last line of a header, and the empty line.
_SEPARATOR = b"\n\n"


def mail_request(peer: tuple[str, int], sender: str, recipient: str, message: bytes) -> MailRequest:
    """The same as ``MailRequest(peer, sender, recipient, message)``.  LF ends a message's lines."""
    text = message.find(_SEPARATOR) + len(_SEPARATOR)
    if text < len(_SEPARATOR):
        return MailRequest(peer, sender, recipient, message)
    octets = memoryview(message)
    # As email.message_from_bytes decodes it.
    header = str(octets[:text], "ascii", "surrogateescape")
    request = MailRequest(peer, sender, recipient, header)
    parsed = request.base.mime_part
    # There is a payload already where the parser has seen the header end before the empty line.
    if _may_have_parts(parsed) or parsed.get_payload():
        return MailRequest(peer, sender, recipient, message)
    request.Data = message
    parsed.set_payload(str(octets[text:], "ascii", "surrogateescape"))
    return request


def _may_have_parts(parsed: Message) -> bool:
    return "content-type" in parsed and parsed.get_content_maintype() in ("multipart", "message")
