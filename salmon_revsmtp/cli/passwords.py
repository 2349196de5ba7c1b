"""Passwords that a command reads or makes, and what is kept of them."""

from __future__ import annotations

import secrets
import sys

import click

__all__ = ["made_password", "prompted_password", "read_password", "verifier_of"]

# Random octets of a password that is made: nobody guesses 192 bits.
STRONG = 24
# Octets of a password that is read: AUTH takes lines of 12,288 (RFC 4954 4), in base64.
LONGEST = 8192


def made_password() -> str:
    """A strong one."""
    return secrets.token_urlsafe(STRONG)


def prompted_password(name: str | None) -> str:
    """Ask for one on the terminal, twice; ``name``: whose it is."""
    whose = f"Password of {name}" if name else "Password"
    # What is asked goes elsewhere than what is printed, which may go into a file.
    return str(click.prompt(whose, hide_input=True, confirmation_prompt=True, err=True))


def read_password() -> str:
    """The one line of standard input."""
    stream = sys.stdin.buffer
    line = stream.readline(LONGEST + 1)
    if len(line) > LONGEST:
        raise click.UsageError(f"the password has more than {LONGEST} octets")
    if stream.read(LONGEST).strip():
        raise click.UsageError("standard input has more than one line; the password is one")
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        raise click.UsageError("the password is no UTF-8") from None


def verifier_of(text: str) -> str:
    """What is kept of a password, by which no one can log in."""
    from scramp import ScramException

    from salmon_revsmtp.smtp.sasl import Secret
    from salmon_revsmtp.smtp.verifier import SHA_256

    if not text:
        raise click.UsageError("the password is empty")
    if any(ord(letter) < 0x20 or letter == "\x7f" for letter in text):
        raise click.UsageError("the password has control characters, which are refused")
    if text.startswith(f"{SHA_256}$"):
        raise click.UsageError("this is a verifier already")
    try:
        return str(Secret("", text).verifier(SHA_256))
    except (ScramException, UnicodeError):
        # RFC 4013: such as a letter that Unicode does not know yet.
        raise click.UsageError("the password has letters that SCRAM forbids") from None
