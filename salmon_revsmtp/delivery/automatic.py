"""Mail that no person has sent, or that says so: it is answered with nothing (RFC 3834 2).

A notification about such mail helps no one, and may go round in circles.
"""

from __future__ import annotations

import re

from salmon_revsmtp.delivery.trace import header_end

__all__ = ["MAX_SEARCHED", "why_automatic"]

# Octets of a header in which this is looked for.
MAX_SEARCHED = 1024 * 1024
# Of a field's value, what matters.
MAX_VALUE = 200

_TELLING = re.compile(
    rb"^(auto-submitted|precedence|return-path|content-type|from|list-[!-9;-~]+|x-auto[!-9;-~]+)"
    rb"[ \t]*:([^\n]*(?:\n[ \t][^\n]*)*)",
    re.IGNORECASE | re.MULTILINE,
)
_COMMENT = re.compile(r"\([^()]*\)")
_MAILER_DAEMON = re.compile(r"(?:^|[<\s])\"?mailer-daemon\"?@", re.IGNORECASE)
# RFC 3834 2, and what list managers and mailers call theirs: "news-bounces+ann=example.net".
_SENDERS = re.compile(
    r"mailer-daemon|owner-.*|.*-(?:owner|request)|.*-return-.*"
    r"|(?:.*[-_+.])?(?:bounce|bounces|bounced)(?:[-_+.=].*)?",
    re.IGNORECASE | re.DOTALL,
)


def why_automatic(reverse_path: str, message: bytes) -> str:
    """What shows that a message is automatic, or that its sender is no person, in words for the
    log; ``""`` if nothing does.

    ``message``  its header is enough; LF or CRLF line ends.  It takes linear time.
    """
    if not reverse_path:
        return "it has the null sender"
    local = reverse_path.rpartition("@")[0].strip('"')
    if _SENDERS.fullmatch(local):
        return "its sender is no person"
    header = message[:MAX_SEARCHED].replace(b"\r\n", b"\n")
    header = header[: header_end(header)]
    for name, value in _TELLING.findall(header):
        field = name.decode("ascii").lower()
        if _tells(field, " ".join(value[:MAX_VALUE].decode("latin-1").split())):
            return f"it has the header {field}"
    return ""


def _tells(field: str, value: str) -> bool:
    plain = _COMMENT.sub("", value).strip().lower()
    if field == "auto-submitted":
        return plain.partition(";")[0].strip() != "no"
    if field == "precedence":
        return plain in ("bulk", "list", "junk", "auto_reply")
    if field == "return-path":
        return plain == "<>"
    if field == "content-type":
        kind = plain.partition(";")[0].strip()
        return kind in ("multipart/report", "message/delivery-status")
    if field == "from":
        return bool(_MAILER_DAEMON.search(value))
    if field == "x-auto-response-suppress":  # MS-OXCMAIL
        return plain != "none"
    # RFC 2369 and RFC 2919, where "List-Post: NO" is said by a list, too; X-Autoreply and its kin.
    return field.startswith("list-") or plain not in ("", "no", "none")
