"""Domains, mailboxes and the paths of MAIL and RCPT (RFC 5321 4.1.2, RFC 6531 3.3)."""

from __future__ import annotations

import functools
import re

from salmon_revsmtp.foreign import without_login

__all__ = ["AddressError", "domain_of", "parse_path", "to_ascii"]

# RFC 5321 4.1.2, with RFC 6531's UTF-8.  Dots stand where they like: addresses with ".." or a dot
# before the "@" exist, and mail comes for them.
_ATOM = r"[^\x00-\x20\x7f<>()\[\]\\,;:@\"]+"
_QUOTED = r"\"(?:[^\"\\\x00-\x1f\x7f]|\\[\x20-\x7e])*\""
_DOMAIN = r"(?:[^\x00-\x2c\x2f\x3a-\x40\x5b-\x5e\x60\x7b-\x7f]+|\[[^\[\]\\\x00-\x20\x7f]+\])"
_ROUTE = rf"(?:@{_DOMAIN}(?:,@{_DOMAIN})*:)?"
_PATH = re.compile(rf"<{_ROUTE}((?:{_ATOM}|{_QUOTED})(?:@{_DOMAIN})?|)>")

# Letters that IDNA2003 (Python's codec) maps to others and IDNA2008 keeps: the domain that the
# user means is not the one that we should ask for (RFC 5894 7.2).
_DEVIATIONS = "\u00df\u1e9e\u03c2\u200c\u200d"


class AddressError(ValueError):
    """Not a domain, mailbox or path; the text says what is wrong with it."""


@functools.lru_cache(maxsize=256)  # a session's recipients are of a few domains
def to_ascii(domain: str) -> str:
    """A domain in the form that goes on the wire and is compared: lower case, IDNA A-labels.

    Raises :class:`AddressError` for what is no domain.  (RFC 5890 2.3.2.1, RFC 3490 4)
    """
    name = domain.strip(" \t").rstrip(".")
    if any(letter in name for letter in _DEVIATIONS):
        raise AddressError(
            f"{without_login(domain)!r}: IDNA2003 and IDNA2008 disagree about this name, write its "
            "xn-- form"
        )
    if len(name) > 253:  # and no work on it: its A-labels are longer still
        raise AddressError(
            f"{without_login(domain)[:80]!r} is too long for a domain name (RFC 1035 2.3.4)"
        )
    try:
        ascii_name = name.encode("idna").decode("ascii").lower()
    except UnicodeError as error:
        raise AddressError(f"{without_login(domain)!r} is no domain name: {error}") from None
    if not re.fullmatch(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*", ascii_name):
        raise AddressError(f"{without_login(domain)!r} is no domain name")
    if len(ascii_name) > 253:
        raise AddressError(
            f"{without_login(domain)!r} is too long for a domain name (RFC 1035 2.3.4)"
        )
    return ascii_name


def domain_of(mailbox: str) -> str:
    """The domain of a mailbox as :func:`to_ascii` has it; ``""`` if there is none to compare.

    An address literal (``[192.0.2.1]``) comes back as it is, lower case.
    """
    domain = mailbox.rpartition("@")[2] if "@" in mailbox else ""
    if domain.startswith("["):
        return domain.lower()
    try:
        return to_ascii(domain) if domain else ""
    except AddressError:
        return ""


def parse_path(text: str) -> tuple[str, str]:
    """``<path> parameters`` -> (mailbox, ``parameters``); the null path is ``""``.

    A source route is read and dropped (RFC 5321 4.1.1.3, appendix C).  Raises
    :class:`AddressError` when the text does not begin with a path.
    """
    found = _PATH.match(text.lstrip(" "))
    if not found:
        raise AddressError(f"{text[:80]!r} does not begin with a path in angle brackets")
    rest = text.lstrip(" ")[found.end() :]
    if rest and not rest.startswith(" "):
        raise AddressError(f"{rest[:80]!r} after the path")
    return found[1], rest.strip(" ")
