"""The console's password: in clear text, or what scrypt (RFC 7914) has made of it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

__all__ = ["BadHash", "Password", "hashed"]

# What OWASP asks for at least where 16 MiB are to be enough: some 0.2 s on a small machine.
N, R, P = 2**14, 8, 5
# Octets of the salt and of the hash.
SALT, HASH = 16, 32
# Octets that one check may take, whatever the hash asks for.
MOST_MEMORY = 128 * 1024**2

_BEGIN = "scrypt$"


class BadHash(ValueError):
    """It begins as a hash, and is none that can be checked."""


def hashed(text: str) -> str:
    """``scrypt$n$r$p$salt$hash`` of a password."""
    salt = secrets.token_bytes(SALT)
    made = _scrypt(text, salt, N, R, P, HASH)
    return f"{_BEGIN}{N}${R}${P}${_base64(salt)}${_base64(made)}"


class Password:
    """What a password must be.  Raises :class:`BadHash`.

    ``slow``  a check takes its time, and some memory.
    """

    def __init__(self, setting: str) -> None:
        self.slow = setting.startswith(_BEGIN)
        # Who has been right is known again at once, without the password being kept.
        self._key = secrets.token_bytes(32)
        self._right: bytes | None = None
        if not self.slow:
            self._right = self._digest(setting)
            return
        try:
            n, r, p, salt, made = setting.removeprefix(_BEGIN).split("$")
            self._costs = int(n), int(r), int(p)
            self._salt, self._hash = (
                base64.b64decode(salt, validate=True),
                base64.b64decode(made, validate=True),
            )
        except ValueError:
            raise BadHash(
                "it begins with 'scrypt$' and is not what `salmon-revsmtp console password` prints"
            ) from None
        n_, r_, p_ = self._costs
        if n_ < 2 or n_ & (n_ - 1) or min(r_, p_) < 1 or len(self._hash) < 16:
            raise BadHash("its numbers are none of scrypt's")
        if 128 * n_ * r_ + 128 * r_ * p_ > MOST_MEMORY:
            raise BadHash(f"a check would take more than {MOST_MEMORY // 1024**2} MiB")

    def known(self, text: str) -> bool:
        """Whether it is right, as far as that can be said at once."""
        return self._right is not None and hmac.compare_digest(self._digest(text), self._right)

    def check(self, text: str) -> bool:
        """Whether it is right; takes as long as scrypt takes."""
        if self.known(text):
            return True
        if not self.slow:
            return False
        made = _scrypt(text, self._salt, *self._costs, len(self._hash))
        if not hmac.compare_digest(made, self._hash):
            return False
        self._right = self._digest(text)
        return True

    def _digest(self, text: str) -> bytes:
        return hmac.digest(self._key, _octets(text), "sha256")


def _scrypt(text: str, salt: bytes, n: int, r: int, p: int, size: int) -> bytes:
    most = 2 * MOST_MEMORY
    return hashlib.scrypt(_octets(text), salt=salt, n=n, r=r, p=p, maxmem=most, dklen=size)


def _octets(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _base64(octets: bytes) -> str:
    return base64.b64encode(octets).decode("ascii")
