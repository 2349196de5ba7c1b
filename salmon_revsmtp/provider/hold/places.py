"""Where a hold store is: a folder, or a URL, which may have a password in it."""

from __future__ import annotations

import re

__all__ = ["scheme_of", "without_secrets"]

# RFC 3986 3.1, and what tells a URL from a folder.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_REST = re.compile(r"[^?#&]*")


def scheme_of(place: str) -> str | None:
    """The scheme of a URL, in lower case; ``None`` for a folder.  Raises :class:`ValueError`, whose
    text has nothing of it, for what is meant as a URL and is none."""
    if "://" not in place:
        return None
    found = _SCHEME.match(place)
    if found is None:
        raise ValueError("a URL begins with a scheme such as postgresql://")
    return found[1].lower()


def without_secrets(url: str) -> str:
    """A URL as people may see it: without the user, the password and the parameters."""
    scheme, _, rest = url.partition("://")
    before, _, after = rest.rpartition("@")
    if re.search("[?#]", before):  # it is a parameter that has the "@", or a password has both
        return f"{scheme}://..."
    found = _REST.match(after)
    return f"{scheme}://{found[0] if found else ''}"
