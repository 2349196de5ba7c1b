"""Fuzz what is before Salmon's parser: messages of strangers."""

from target import fuzz

fuzz("parser")
