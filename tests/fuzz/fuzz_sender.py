"""Fuzz the client role: messages, and bytes of a hostile server."""

from target import fuzz

fuzz("sender")
