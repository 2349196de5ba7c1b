"""Fuzz the server role: bytes of a hostile client."""

from target import fuzz

fuzz("receiver")
