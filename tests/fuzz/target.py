"""Run one target under atheris: the arguments are libFuzzer's."""

from __future__ import annotations

import sys

import atheris

__all__ = ["fuzz"]

# What a target is about; more would make it slower and find no more.
INSTRUMENTED = {
    "receiver": ["salmon_revsmtp.smtp.commands", "salmon_revsmtp.smtp.receiver"],
    "sender": ["salmon_revsmtp.smtp.sender", "salmon_revsmtp.smtp.replies"],
    "session": ["salmon_revsmtp.smtp.commands", "salmon_revsmtp.smtp.turn"],
    "replies": ["salmon_revsmtp.smtp.replies"],
    "parser": ["salmon_revsmtp.delivery.bounds"],
    "proxy": ["salmon_revsmtp.net.proxyheader"],
}


def fuzz(name: str) -> None:
    """Never returns: libFuzzer ends the process."""
    with atheris.instrument_imports(include=INSTRUMENTED[name]):
        import properties

        from salmon_revsmtp.smtp import sasl

    # A password is hashed this often to make guessing slow; here it only makes fuzzing slow.
    sasl.ITERATIONS = 1
    atheris.Setup(sys.argv, properties.TARGETS[name])
    atheris.Fuzz()
