"""What the Maildir of an address is called.

A stranger chooses the address: its local part is any text (RFC 5321 4.1.2, RFC 6531), with slashes,
spaces and quotes, or three hundred octets long.  So:

- Whatever is one mailbox has one name: letters are lower case, Unicode is NFC, quotes that are not
  needed are gone, and a domain is in A-labels (xn--), however it was spelled.
- Whatever is not one mailbox has another name.  Letters and digits of any script stand for
  themselves, and so do ``. _ - + =``, and the ``@`` between local part and domain.  All else is
  written as ``%`` and two hexadecimal digits for each octet (RFC 3986), the ``%`` too.
- A name that is too long for a file system is cut, and ends in ``~`` and the SHA-256 of the whole.
  No other has a ``~``.
- No name begins with a dot or a hyphen, none has a slash, none is that of a Maildir's own folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import unicodedata
from dataclasses import dataclass

from salmon_revsmtp.smtp.addresses import AddressError, parse_path, to_ascii

__all__ = ["Mailbox", "pattern"]

# Octets of a name.  File systems take 255.
LONGEST = 240
# Octets of one that is cut, before "~" and 64 digits.
KEPT = 170

_PLAIN = re.compile(r"[A-Za-z0-9._=+-]")
# The folders of a Maildir: a name has one of them only if it has no domain.
_RESERVED = ("new", "cur", "tmp")
# RFC 5321 4.1.2 Dot-string: it needs no quotes.
_NO_QUOTES = re.compile(r"[^\x00-\x20\x7f<>()\[\]\\,;:@\"]+")


@dataclass(frozen=True)
class Mailbox:
    """An address in the one form in which addresses are compared.

    ``local``   the local part without quotes, in lower case.
    ``domain``  in A-labels; ``""``: none.
    """

    local: str
    domain: str

    @classmethod
    def of(cls, address: str) -> Mailbox:
        """That of any address, however odd it is."""
        local, at, domain = address.rpartition("@")
        if not at:
            local, domain = address, ""
        return cls(_lower(_unquoted(local)), _domain(domain))

    @classmethod
    def of_setting(cls, value: object) -> Mailbox:
        """That of an address that a person wrote.  Raises :class:`ValueError`."""
        if not isinstance(value, str):
            raise ValueError("that is no text")
        address = value.strip()
        try:
            parsed = parse_path(f"<{address}>")
        except AddressError:  # which quotes it
            raise ValueError("that is no address") from None
        if parsed != (address, "") or not address:
            raise ValueError("that is no address")
        found = cls.of(address)
        if not found.domain and found.local != "postmaster":  # RFC 5321 4.5.1
            raise ValueError("it has no domain")
        if not address.endswith("]"):
            to_ascii(address.rpartition("@")[2])
        return found

    @property
    def folder(self) -> str:
        """The name of its Maildir."""
        name = _escaped(self.local) + (f"@{_escaped(self.domain)}" if self.domain else "")
        if name.startswith((".", "-")) or name in _RESERVED or not name:
            name = "".join(f"%{octet:02X}" for octet in name[:1].encode()) + name[1:] or "%"
        octets = name.encode()
        if len(octets) <= LONGEST:
            return name
        digest = hashlib.sha256(octets).hexdigest()
        head = octets[:KEPT].decode(errors="ignore")
        return re.sub(r"%[0-9A-F]?\Z", "", head) + f"~{digest}"

    @property
    def spellings(self) -> tuple[list[str], list[str]]:
        """The local parts, and the domains, that it may be routed by, in lower case."""
        forms = [unicodedata.normalize(form, self.local) for form in ("NFC", "NFD")]
        quoted = [re.sub(r'(["\\])', r"\\\1", one) for one in forms]
        locals_ = [f'"{one}"' for one in quoted]
        locals_ += [one for one in forms if _NO_QUOTES.fullmatch(one)]
        domains = [self.domain]
        if "xn--" in self.domain:
            with contextlib.suppress(UnicodeError):  # a name of IDNA2008 only, such as xn--fa-hia
                unicode = self.domain.encode("ascii").decode("idna")
                domains += [unicodedata.normalize(form, unicode) for form in ("NFC", "NFD")]
        return list(dict.fromkeys(locals_)), list(dict.fromkeys(domains))


def pattern(mailboxes: list[Mailbox] | None) -> str:
    """The route of these mailboxes; ``None``: of every address."""
    if mailboxes is None:
        return ".+"
    addresses = []
    for one in dict.fromkeys(mailboxes):
        locals_, domains = (f"(?:{'|'.join(map(re.escape, some))})" for some in one.spellings)
        addresses.append(f"{locals_}@{domains}" if one.domain else locals_)
    # Salmon has routes match in any case.  To Python "s" is then the old long "s", too, which is
    # another letter; addresses are in lower case when they are routed.
    return f"(?-i:{'|'.join(addresses)})"


def _unquoted(local: str) -> str:
    if len(local) > 1 and local.startswith('"') and local.endswith('"'):
        return re.sub(r"\\(.)", r"\1", local[1:-1], flags=re.DOTALL)
    return local


def _lower(text: str) -> str:
    # Also letters that are lower case in one of the two forms only.
    text = unicodedata.normalize("NFC", text).lower()
    return unicodedata.normalize("NFC", text)


def _domain(domain: str) -> str:
    """In A-labels; an address literal, or what is no domain, as it is in lower case."""
    try:
        return to_ascii(domain) if domain else ""
    except AddressError:
        return _lower(domain)


def _escaped(text: str) -> str:
    return "".join(letter if _shown(letter) else _as_octets(letter) for letter in text)


def _shown(letter: str) -> bool:
    if letter.isascii():
        return _PLAIN.match(letter) is not None
    return letter.isprintable()


def _as_octets(letter: str) -> str:
    return "".join(f"%{octet:02X}" for octet in letter.encode("utf-8", "surrogatepass"))
