"""Fuzz the provider before the reversal: bytes of a hostile customer."""

from target import fuzz

fuzz("session")
