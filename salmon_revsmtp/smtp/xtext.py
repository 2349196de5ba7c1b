"""Two encodings: xtext (RFC 3461 4), in the parameters of delivery status notifications and in
XFORWARD, and what stands for characters in an internationalized address (RFC 6533 3)."""

from __future__ import annotations

import re

__all__ = ["decode_utf8_address", "decode_xtext", "encode_utf8_address", "encode_xtext"]

_XTEXT = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})*")
_NOT_ITSELF = re.compile(r"[^!-*,-<>-~]+")
_HEXCHARS = re.compile(r"(?:\+[0-9A-F]{2})+")
_EMBEDDED = re.compile(r"\\x\{([0-9A-Fa-f]{2,6})\}")
# RFC 6533 3: QCHAR, what stands for itself.
_QCHAR = re.compile(r"[!-*,-<>-\[\]-~]")


def decode_xtext(text: str) -> str:
    """What xtext stands for.

    Text that is none, such as ``bob+tag@example.org`` from a client that forgot to encode it, is
    its own meaning.  Octets that are no UTF-8 come out as ``\\xe9``.
    """
    if not _XTEXT.fullmatch(text):
        return text
    return _HEXCHARS.sub(_octets, text)


def _octets(found: re.Match[str]) -> str:
    return bytes.fromhex(found[0].replace("+", "")).decode("utf-8", "backslashreplace")


def encode_xtext(text: str) -> str:
    """``text`` as xtext."""
    return _NOT_ITSELF.sub(_hexchars, text)


def _hexchars(found: re.Match[str]) -> str:
    return "".join(f"+{octet:02X}" for octet in found[0].encode("utf-8", "replace"))


def decode_utf8_address(text: str) -> str:
    """``caf\\x{E9}@example.org`` as the address that it stands for."""
    return _EMBEDDED.sub(_character, text)


def _character(found: re.Match[str]) -> str:
    number = int(found[1], 16)
    return found[0] if number > 0x10FFFF or 0xD800 <= number < 0xE000 else chr(number)


def encode_utf8_address(address: str, *, ascii_only: bool) -> str:
    """An address of the type ``utf-8``: for a report in ASCII (``utf-8-addr-xtext``), or in UTF-8,
    where only that is encoded which no one can see."""
    return "".join(_encoded(char, ascii_only) for char in address)


def _encoded(char: str, ascii_only: bool) -> str:
    if _QCHAR.fullmatch(char) if ascii_only else char.isprintable() and char not in " \\":
        return char
    return f"\\x{{{ord(char):02X}}}"
