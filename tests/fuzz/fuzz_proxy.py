"""Fuzz the header of a load balancer: what one says that is not as it should be."""

from target import fuzz

fuzz("proxy")
