"""What an error of the network means for a person: what came back, and what to try.

What was being done, and to whom, is said by whoever did it.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import time

__all__ = ["came_back", "certificate_refused", "listen_advice", "reach_advice"]

# Ports below this one need a privilege (Linux: net.ipv4.ip_unprivileged_port_start).
FIRST_FREE_PORT = 1024

_REACH = {
    errno.ECONNREFUSED: "is it running, is the port right?",
    errno.EHOSTUNREACH: "is this machine online, and is there a way to that address?",
    errno.ENETUNREACH: "is this machine online, and has it addresses of that kind (IPv6)?",
    errno.ETIMEDOUT: "is it running, is the port right, does a firewall drop the packets?",
    errno.ECONNRESET: "is the port right, or does something on the way break connections off?",
    errno.EACCES: "a firewall of this machine forbids it",
    errno.EPERM: "a firewall of this machine forbids it",
}

# X509_V_ERR_..., which Python has no names for.
_NOT_YET_VALID, _EXPIRED = 9, 10
_SELF_SIGNED, _SELF_SIGNED_CA, _NO_ISSUER, _NOT_VERIFIABLE = 18, 19, 20, 21
_OTHER_NAME, _OTHER_ADDRESS = 62, 64


def came_back(error: BaseException) -> str:
    """The system's own words for an error, without what its maker has put around them."""
    if isinstance(error, TimeoutError) and not error.errno:
        return "no answer in time"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ssl.SSLError):
        # asyncio wraps the words into a sentence; a name that is not found has no such number.
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return str(error) or type(error).__name__


def reach_advice(error: BaseException, setting: str = "") -> str:
    """What to try when a host cannot be reached; ``setting`` is where a person wrote its name.
    Empty where no one can tell."""
    if isinstance(error, socket.gaierror | UnicodeError):
        check = f"check {setting}; " if setting else ""
        return f"{check}is the name right, and does DNS work here?"
    if isinstance(error, TimeoutError):
        return _REACH[errno.ETIMEDOUT]
    return _REACH.get(getattr(error, "errno", None) or 0, "")


def listen_advice(error: OSError, port: int) -> str:
    """What to try when an address cannot be listened on; empty where no one can tell."""
    number = error.errno or errno.EADDRNOTAVAIL
    if isinstance(error, socket.gaierror):
        return "is the host right? 0.0.0.0 and [::] are all addresses of this machine"
    if number == errno.EADDRINUSE:
        return (
            "another program has it, maybe a mail server, or this one a second time; "
            f"`ss -ltnp 'sport = :{port}'` says which"
        )
    if number == errno.EADDRNOTAVAIL:
        return "this machine has no such address; 0.0.0.0 and [::] are all that it has"
    if number in (errno.EACCES, errno.EPERM) and port < FIRST_FREE_PORT:
        return (
            f"ports below {FIRST_FREE_PORT} need a privilege: AmbientCapabilities="
            "CAP_NET_BIND_SERVICE in a systemd unit, or "
            f"`sysctl net.ipv4.ip_unprivileged_port_start={port}`"
        )
    return ""


def certificate_refused(error: ssl.SSLCertVerificationError, pins: bool) -> str:
    """Why a server's certificate was not accepted, and what to set.  ``pins``: the certificate may
    be named by its fingerprint."""
    what = f"its certificate was not accepted ({error.verify_message})"
    code = error.verify_code
    if code in (_OTHER_NAME, _OTHER_ADDRESS):
        return f"{what}; set server to a name that it is for"
    if code in (_EXPIRED, _NOT_YET_VALID):
        clock = time.strftime("%Y-%m-%d %H:%M", time.localtime())
        owner = "its owner has to renew it" if code == _EXPIRED else "it is valid later"
        return f"{what}; {owner}, unless the clock here is wrong, which says {clock}"
    if code in (_SELF_SIGNED, _SELF_SIGNED_CA, _NO_ISSUER, _NOT_VERIFIABLE):
        pin = ", or fingerprint to its own," if pins else ""
        return (
            f"{what}: no CA that is trusted here has signed it; set ca_file to the certificate or "
            f"CA to trust{pin} if you know that it is the right one"
        )
    return f"{what}; set ca_file to the certificate or CA to trust"
