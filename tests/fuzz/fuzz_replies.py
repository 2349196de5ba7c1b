"""Fuzz the parser of a peer's replies."""

from target import fuzz

fuzz("replies")
