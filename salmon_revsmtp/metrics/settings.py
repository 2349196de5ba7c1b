"""What a user may say of the metrics: ``metrics``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

__all__ = ["MetricsSettings"]

_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]/]+)):([0-9]{1,5})", re.ASCII)
ADDRESS = "'host:port' such as '127.0.0.1:9366' or '[::1]:9366', or None"


class MetricsSettings(BaseModel):
    """``metrics``: what Prometheus reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    listen: Annotated[str | None, Field(description=ADDRESS)] = None
    """Where ``/metrics``, ``/healthz`` and ``/readyz`` are answered.  There is no password, and no
    mail either; keep it on loopback, or in a network that is yours."""
    textfile: Annotated[Path | None, Field(description="a path that ends in .prom, or None")] = None
    """A file for the textfile collector of node_exporter."""
    every: Annotated[float, Field(ge=1, le=3600, description="seconds, 1 to 3600")] = 15
    """How often ``textfile`` is written."""
    accounts: Annotated[int, Field(ge=0, le=100_000, description="a number, 0 to 100,000")] = 1000
    """Accounts of the provider that have a label of their own; all others together have
    ``other``."""

    @property
    def address(self) -> tuple[str, int] | None:
        """``listen`` as host and port."""
        if self.listen is None:
            return None
        match = _ADDRESS.fullmatch(self.listen)
        assert match is not None
        return match[1] or match[2], int(match[3])

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str | None) -> str | None:
        if value is not None:
            match = _ADDRESS.fullmatch(value)
            if match is None or int(match[3]) > 65535:
                raise ValueError("that is no address with a port")
        return value

    @field_validator("textfile")
    @classmethod
    def _textfile(cls, value: Path | None) -> Path | None:
        if value is not None and (value.suffix != ".prom" or "\0" in str(value)):
            raise ValueError("node_exporter reads no other names")
        return value
