"""What this machine is, and which versions are measured on it."""

from __future__ import annotations

import os
import platform
import ssl
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks import peers

__all__ = ["describe"]


def describe() -> dict[str, str]:
    """One line per fact."""
    packages = ("salmon-revsmtp", "salmon-mail", "aiosmtplib", "pydantic")
    return {
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "processor": f"{os.cpu_count()} x {_first('/proc/cpuinfo', 'model name')}",
        "memory": _first("/proc/meminfo", "MemTotal"),
        "system": f"{_first('/etc/os-release', 'PRETTY_NAME')}, {platform.release()}",
        "load at the start": " ".join(f"{one:.2f}" for one in os.getloadavg()),
        "Python": f"{platform.python_version()}, {ssl.OPENSSL_VERSION}",
        "packages": ", ".join(f"{one} {version(one)}" for one in packages),
        **peers.versions(),
    }


def _first(file: str, key: str) -> str:
    """The value of a key in a file of ``key: value`` or ``key="value"`` lines."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return "unknown"
    for line in lines:
        if line.startswith(key):
            return line[len(key) :].strip(" \t:=").strip('"')
    return "unknown"
