"""What this machine is called where no one has said."""

from __future__ import annotations

import socket

__all__ = ["machine_name"]


def machine_name() -> str:
    """The machine's fully qualified name.  May ask DNS, and block."""
    return socket.getfqdn() or "localhost"
