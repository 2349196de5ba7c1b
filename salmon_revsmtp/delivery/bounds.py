"""What Salmon's parser may be given: a bound on the work that a message makes.

Python's email package, and Salmon on top of it, take a time that grows with the square of what
they read, in a dozen places: a parameter list of many ``;``, lines that are compared with the
boundary of every multipart around them, a header line of many words, and so on.  A stranger's
message of 100 KB could hold up everyone else's for hours.  So :func:`excess` looks at a message
first.  It reads it once, in a time that grows with its length and no faster, follows the same
structure as Python's parser, and counts what that parser, and a handler that uses the result, would
have to do.  What is beyond a limit is not parsed by us at any time.

The counts are of what is quadratic in CPython 3.10 to 3.13 and Salmon 3.3; what is linear there is
bounded by the size of the message already.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.message import Message

__all__ = ["LIMITS", "ParserLimits", "Structure", "address_excess", "examine", "excess"]

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class ParserLimits:
    """What one message may be, before it is kept instead of parsed.  Each limit is far beyond what
    mail has; at the limit, a handler that reads everything takes a second or so on a slow machine.

    ``address``         octets of the sender's or the recipient's address.  A route such as
                        ``(list)-(action)@(host)`` with ``.+`` in it takes the third power of that.
                        RFC 5321 4.5.3.1.3 has 256; addresses that were rewritten on the way (SRS,
                        VERP) are longer.
    ``field``           octets of a header field.  A ``To:`` with 1,000 recipients, all with encoded
                        names, has 150 KB.
    ``headers``         octets of the headers of all parts, which cost the most: up to 2 seconds for
                        each MiB.  A digest of 1,000 messages has 5 MB.
    ``parameter_field`` octets of a ``Content-...`` or ``MIME-Version`` field, whose parameters are
                        looked for each time that one is asked for.  A file name of 255 characters,
                        as RFC 2231 has it, takes 3 KB.
    ``parameters``      ``;`` in such a field: the time is this times its octets.
    ``boundary``        octets of a multipart's boundary, which is compiled into a regular
                        expression.  RFC 2046 5.1.1 has 70.
    ``fields``          fields of one header: each is looked for among all.  Mail with a long way
                        behind it has 100.
    ``field_pairs``     the sum of the squares of ``fields``, over the headers of all parts: twenty
                        headers of a thousand fields, or 5,000 of 60.
    ``depth``           parts within parts; the parser calls itself for each, and Python ends that
                        at 1,000.  A forward of a forward adds two.  Exchange allows 30, Postfix
                        (``mime_nesting_limit``) 100.
    ``parts``           of all multiparts, messages and delivery reports.  Each costs 2 KB and
                        0.1 ms.  A digest has hundreds.
    ``comparisons``     of a line with the boundary of a multipart around it.  50 MiB of base64
                        in five multiparts has 3.5 million.
    ``encoded_words``   RFC 2047 words in all headers.  Salmon guesses the charset of each whose own
                        is wrong, which takes 0.6 ms.  1,000 recipients have 2,000 or so.
    ``word_pairs``      the sum of the squares of the blanks of each long line of a header: when a
                        message is written again (``str(message)``), a line is measured anew for
                        each word.  It allows a line of 7,000 words, 1,000 recipients in one line
                        have 3,000.
    ``special_pairs``   the sum of the squares of the ``<>@,:;()[]"`` in each field:
                        ``email.utils.getaddresses`` copies a group for each member.  It allows
                        16,000 in one field; 1,000 recipients have 7,000.
    ``unended``         encoded words that begin and do not end, times the octets that follow:
                        ``email.header.decode_header`` looks for each one's end.
    """

    address: int = 512
    field: int = 256 * KIB
    headers: int = 8 * MIB
    parameter_field: int = 8 * KIB
    parameters: int = 250
    boundary: int = 256
    fields: int = 1000
    field_pairs: int = 20_000_000
    depth: int = 50
    parts: int = 5000
    comparisons: int = 10_000_000
    encoded_words: int = 5000
    word_pairs: int = 50_000_000
    special_pairs: int = 256_000_000
    unended: int = 20_000_000


LIMITS = ParserLimits()

# A field or line that is shorter is not worth a look: what it can cost is within what its octets
# cost anyway.
SHORT = 200

# What begins a line of a header in Python's parser (feedparser.headerRE), which is not quite
# RFC 5322: no blank before the colon, and a name may be missing.  A line with two hyphens may be
# that, or the separator of a multipart.
_HEADER_LINE = re.compile(rb"[ \t]|From |[!-9;-~]*:")
_AFTER_HEADER = re.compile(rb"\n(?![ \t]|From |(?!--)[!-9;-~]*:)")
MAX_FOLDS = 10_000  # a regular expression takes memory for each
_FIELD = re.compile(rb"^([!-9;-~]+):([^\n]*(?:\n[ \t][^\n]*){0,%d})" % MAX_FOLDS, re.MULTILINE)
_SPECIALS = b'<>@,:;()[]"'
_BLANKS = b" \t"
# What a header line is cut at when it is written anew: blanks, and what Python takes for line ends.
_CUTS = b" \t\r\x0b\x0c\x1c\x1d\x1e"
_WORD_CHARSET = re.compile(rb"=\?([^?]{4,40})\?")

# Codecs of Python that are no charsets of mail, and take the square of what they decode.
_SLOW_CODECS = (b"punycode", b"idna")

_MESSAGE, _MULTIPART, _REPORT = range(3)


class _ExcessError(Exception):
    """Beyond a limit; the text says what, and the limit."""


@dataclass(frozen=True)
class Structure:
    """How Python's parser would see a message, as far as the time it takes depends on that.

    ``parts``  how many there are, the message itself included.
    ``depth``  the most parts that are within one another; 0 for a message without parts.
    """

    parts: int
    depth: int


def address_excess(*addresses: str) -> str | None:
    """Why a message from or to these is not to be routed; ``None`` if it may be."""
    longest = max(map(len, addresses))
    if longest > LIMITS.address:
        return f"an address of {longest:,} characters (limit {LIMITS.address:,})"
    return None


def excess(message: bytes, limits: ParserLimits | None = None) -> str | None:
    """Why a message is not to be given to the parser, in words that nothing of the message is in;
    ``None`` if it may be.  The time that this takes grows with the message and no faster."""
    try:
        examine(message, limits)
    except _ExcessError as found:
        return str(found)
    return None


def examine(message: bytes, limits: ParserLimits | None = None) -> Structure:
    """The structure of a message.  Raises an exception whose text says what is beyond a limit."""
    if b"\r" in message:  # which ends a line for the parser, with or without LF
        message = message.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return _Examination(message, limits or LIMITS).structure()


@dataclass(eq=False)
class _Entity:
    """A part that has parts.

    ``kind``       whose parts are found how.
    ``separator``  a multipart's, with its ``--``.  ``None``: no line can be it.
    ``digest``     its parts are messages unless they say otherwise (RFC 2046 5.1.5).
    ``looked_for`` whether a line ends its present part.
    """

    kind: int
    separator: bytes | None = None
    digest: bool = False
    looked_for: bool = False


class _Examination:
    """One message, from its beginning to its end, as email.feedparser goes through it.

    ``_open`` are the parts that have parts and in which we are.  A line that ends the part of one
    of them ends whatever is within it; where several are meant, it is the outermost's.
    """

    def __init__(self, data: bytes, limits: ParserLimits) -> None:
        self._data, self._limits = data, limits
        self._open: list[_Entity] = []
        self._separators: dict[bytes, int] = {}  # looked for -> the outermost that it is of
        self._reports = 0  # those of which a block is being read, which an empty line ends
        self._empty_line = -1  # the next one, as far as known
        self._parts, self._depth = 0, 0
        self._headers = self._comparisons = self._encoded_words = 0
        self._field_pairs = self._word_pairs = self._special_pairs = self._unended = 0

    def structure(self) -> Structure:
        at: int | None = 0
        while at is not None:
            at = self._part(at)
        return Structure(self._parts, self._depth)

    # -- parts ------------------------------------------------------------------------------------

    def _part(self, at: int) -> int | None:
        """Go through the part that begins at ``at``, or through its beginning if it has parts
        itself; returns where the next part begins, if there is one."""
        self._parts += 1
        self._hold("parts", self._parts, "parts")
        at, field = self._header(at)
        within = self._kind_of(field)
        if within is None:
            return self._after(*self._line_that_ends(at, None))
        self._open.append(within)
        self._depth = max(self._depth, len(self._open))
        self._hold("depth", self._depth, "parts within one another")
        if within.kind == _MESSAGE:
            return at
        if within.kind == _REPORT:
            self._look_for(len(self._open) - 1)
            return at
        return self._after(*self._line_that_ends(at, within.separator))

    def _after(self, at: int, index: int | None) -> int | None:
        """Go on after the part that the line at ``at`` ends, which is of the ``index``-th that is
        open; returns where the next part begins, if there is one."""
        while index is not None:
            for inner in range(len(self._open) - 1, index, -1):
                self._look_no_more_for(inner)
            del self._open[index + 1 :]
            self._look_no_more_for(index)
            entity = self._open[index]
            if entity.kind == _REPORT:
                at = self._line_end(at)
                ended_by = self._ended_by(at)
                if at < len(self._data) and ended_by is None:
                    self._look_for(index)
                    return at
                self._open.pop()
                index = ended_by
                continue
            if self._closes(at, entity):
                at, index = self._line_that_ends(self._line_end(at), None)
                continue
            # A separator right after a separator is passed over, also one that closes.
            at = self._line_end(at)
            while self._ended_by(at) is None and self._is_of(at, entity.separator):
                at = self._line_end(at)
            self._look_for(index)
            return at
        return None

    def _look_for(self, index: int) -> None:
        """A line that ends the present part of this one is looked for from now on."""
        entity = self._open[index]
        entity.looked_for = True
        if entity.kind == _REPORT:
            self._reports += 1
        elif entity.separator is not None:
            self._separators.setdefault(entity.separator, index)

    def _look_no_more_for(self, index: int) -> None:
        entity = self._open[index]
        if not entity.looked_for:
            return
        entity.looked_for = False
        if entity.kind == _REPORT:
            self._reports -= 1
        elif entity.separator is not None and self._separators.get(entity.separator) == index:
            del self._separators[entity.separator]

    # -- lines ------------------------------------------------------------------------------------

    def _line_that_ends(self, start: int, own: bytes | None) -> tuple[int, int | None]:
        """The first line from ``start`` that ends a part, or that is the separator ``own`` of the
        innermost that is open: where it is, and whose.  ``None``: the message ends first."""
        if not self._open:
            return len(self._data), None
        found, index = self._find(start, own)
        looked_for = sum(entity.looked_for for entity in self._open) + (own is not None)
        if looked_for:
            lines = self._data.count(b"\n", start, found) + 1
            self._comparisons += lines * looked_for
            self._hold("comparisons", self._comparisons, "comparisons of lines with boundaries")
        return found, index

    def _find(self, start: int, own: bytes | None) -> tuple[int, int | None]:
        data, end = self._data, len(self._data)
        if self._reports:
            end = self._next_empty_line(start)
        if self._separators or own is not None:
            at = start if data.startswith(b"--", start) else data.find(b"\n--", start, end) + 1
            while 0 < at < end or (at == start == 0 and data.startswith(b"--")):
                index = self._ended_by(at)
                if index is not None:
                    return at, index
                if own is not None and self._is_of(at, own):
                    return at, len(self._open) - 1
                at = data.find(b"\n--", at, end) + 1
        return (end, self._ended_by(end)) if end < len(data) else (end, None)

    def _next_empty_line(self, start: int) -> int:
        if self._empty_line < start:
            data = self._data
            if data.startswith(b"\n", start):
                self._empty_line = start
            else:
                found = data.find(b"\n\n", start)
                self._empty_line = found + 1 if found >= 0 else len(data)
        return self._empty_line

    def _ended_by(self, at: int) -> int | None:
        """Which of those that are open the line at ``at`` ends a part of."""
        if self._reports and self._data.startswith(b"\n", at):
            return next(
                index
                for index, entity in enumerate(self._open)
                if entity.looked_for and entity.kind == _REPORT
            )
        if not self._separators or not self._data.startswith(b"--", at):
            return None
        line = self._separator_at(at)
        found = self._separators.get(line)
        if line.endswith(b"--"):
            closed = self._separators.get(line[:-2])
            if found is None or (closed is not None and closed < found):
                return closed
        return found

    def _is_of(self, at: int, separator: bytes | None) -> bool:
        if separator is None or not self._data.startswith(separator, at):
            return False
        return self._separator_at(at) in (separator, separator + b"--")

    def _closes(self, at: int, entity: _Entity) -> bool:
        return self._separator_at(at) != entity.separator

    def _separator_at(self, at: int) -> bytes:
        return self._data[at : self._line_end(at)].removesuffix(b"\n").rstrip(_BLANKS)

    def _line_end(self, at: int) -> int:
        """Where the line after this one begins."""
        return self._data.find(b"\n", at) + 1 or len(self._data)

    # -- headers ----------------------------------------------------------------------------------

    def _header(self, start: int) -> tuple[int, bytes | None]:
        """Check the header at ``start``; returns where its body begins, and the value of its first
        ``Content-Type``."""
        data, at = self._data, start
        while _HEADER_LINE.match(data, at):
            if data.startswith(b"--", at):
                if self._ended_by(at) is not None:
                    return at, self._fields(start, at)
                at = self._line_end(at)
                continue
            after = _AFTER_HEADER.search(data, at)
            at = after.end() if after else len(data)
        content_type = self._fields(start, at)
        if not self._reports and data.startswith(b"\n", at):
            at += 1
        return at, content_type

    def _fields(self, start: int, end: int) -> bytes | None:
        self._headers += end - start
        self._hold("headers", self._headers, "octets of headers")
        content_type = None
        count = 0
        for field in _FIELD.finditer(self._data, start, end):
            count += 1
            name_end = field.end(1)
            # Most fields are neither long nor of these names, and this costs them little.
            if name_end - field.start() == 12 and field[1].lower() == b"content-type":
                if content_type is None:
                    content_type = field[2]
                self._parameters(field[2])
            if field.end() - name_end > SHORT:
                self._long_field(field[1].lower(), field[2])
                if self._data.startswith((b"\n ", b"\n\t"), field.end(), end):
                    raise _ExcessError(f"a folded header field (limit {MAX_FOLDS:,} lines)")
        self._hold("fields", count, "header fields")
        self._field_pairs += count * count
        self._hold("field_pairs", self._field_pairs, "pairs of header fields")
        # "=?=" is the end of one that is in base64.
        words = self._data.count(b"=?", start, end) - self._data.count(b"=?=", start, end)
        if words:
            self._encoded_words += words
            self._hold("encoded_words", self._encoded_words, "encoded words")
            for charset in _WORD_CHARSET.findall(self._data, start, end):
                _refuse_slow(charset)
        return content_type

    def _long_field(self, name: bytes, value: bytes) -> None:
        size = len(value)
        self._hold("field", size, "octets in a header field")
        if name.startswith(b"content-") or name == b"mime-version":
            self._hold("parameter_field", size, "octets in a field with parameters")
            self._hold("parameters", value.count(b";"), "parameters in a field")
        self._special_pairs += _count(value, _SPECIALS) ** 2
        self._hold("special_pairs", self._special_pairs, "pairs of <>@,:;()[] in a field")
        for line in value.split(b"\n"):
            if len(line) > SHORT:
                self._word_pairs += _count(line, _CUTS) ** 2
        self._hold("word_pairs", self._word_pairs, "pairs of words in a header line")
        unended = value[value.rfind(b"?=") + 1 :]
        self._unended += unended.count(b"=?") * len(unended)
        self._hold("unended", self._unended, "octets after encoded words that do not end")

    def _parameters(self, value: bytes) -> None:
        """What a ``Content-Type`` makes of the text of its part."""
        flat = value.lower()
        if b"*" in flat and len(flat) <= self._limits.parameter_field:
            # A charset in pieces, or in hexadecimal (RFC 2231): as Python reads it.
            try:
                parameters = _as_parsed(value).get_params() or []
            except Exception as error:
                raise _unreadable(error) from None
            flat = b" ".join(_octets(one) for _, one in parameters)
        for codec in _SLOW_CODECS:
            if codec in flat:
                for word in re.split(rb"[\s;=\"']+", flat):
                    _refuse_slow(word)

    def _kind_of(self, content_type: bytes | None) -> _Entity | None:
        """What a part with this ``Content-Type`` is, if it may have parts."""
        if content_type is None:
            return _Entity(_MESSAGE) if self._open and self._open[-1].digest else None
        flat = content_type.lower()
        if b"multipart/" not in flat and b"message/" not in flat:
            return None
        try:
            parsed = _as_parsed(content_type)
            kind = parsed.get_content_type()
            if kind == "message/delivery-status":
                return _Entity(_REPORT)
            if kind.startswith("message/"):
                return _Entity(_MESSAGE)
            boundary = parsed.get_boundary() if kind.startswith("multipart/") else None
        except Exception as error:
            raise _unreadable(error) from None
        if boundary is None:
            return None
        self._hold("boundary", len(boundary), "characters in a boundary")
        try:
            separator = f"--{boundary}".encode("ascii", "surrogateescape")
        except UnicodeEncodeError:  # no line of a message has such a character
            return _Entity(_MULTIPART)
        if b"\n" in separator:
            return _Entity(_MULTIPART)
        return _Entity(_MULTIPART, separator, digest=kind == "multipart/digest")

    def _hold(self, limit: str, count: int, what: str) -> None:
        most = getattr(self._limits, limit)
        if count > most:
            raise _ExcessError(f"{count:,} {what} (limit {most:,})")


def _as_parsed(content_type: bytes) -> Message:
    """A message of which only the ``Content-Type`` is known, for the parser's own reading of it."""
    message = Message()
    value = content_type.decode("ascii", "surrogateescape")
    message.set_raw("Content-Type", value.lstrip(" \t").rstrip("\r\n"))
    return message


def _octets(parameter: str | tuple[str | None, str | None, str]) -> bytes:
    text = parameter if isinstance(parameter, str) else parameter[2]
    return text.lower().encode("utf-8", "replace")


def _unreadable(error: Exception) -> _ExcessError:
    """The parser would raise this, too."""
    return _ExcessError(f"a Content-Type on which Python raises {type(error).__name__}")


def _refuse_slow(charset: bytes) -> None:
    name = re.sub(rb"[^a-z0-9.]+", b"_", charset.lower()).strip(b"_")  # as encodings looks it up
    if name in _SLOW_CODECS:
        raise _ExcessError(f"the charset {name.decode()}, which is none")


def _count(text: bytes, octets: bytes) -> int:
    return len(text) - len(text.translate(None, octets))
