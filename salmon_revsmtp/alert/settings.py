"""What a user may say of the alarm: ``alert``."""

from __future__ import annotations

import re
import shutil
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["AlertSettings"]

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

_ADDRESS = re.compile(r"[^@\s\x00-\x1f\x7f<>,;]+@[^@\s\x00-\x1f\x7f<>,;]+")
ADDRESS = "an address such as 'postmaster@example.org', or None"


class AlertSettings(BaseModel):
    """``alert``: who is told of what needs a person."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, defer_build=True
    )

    after: Annotated[
        str, Field(description="a time above 0 such as '30m', '1h' or '1d' (s, m, h, d)")
    ] = "1h"
    """How long a trouble has to last before anyone is told. Most are over by themselves before."""
    command: Annotated[
        tuple[str, ...],
        Field(description="a list of texts: a program and its arguments, without a shell"),
    ] = ()
    """A program that tells you.  It gets the text on standard input, and the facts in its
    environment."""
    mail: Annotated[str | None, Field(description=ADDRESS)] = None
    """Who gets a mail, through ``settings.relay``.  While the relay is down it waits in
    ``run/unsent``."""
    sender: Annotated[str | None, Field(description=ADDRESS)] = None
    """Who the mail is from, for those who read it; ``mail`` by default.  What becomes of it is
    reported to no one."""

    @property
    def seconds(self) -> float:
        """``after`` in seconds."""
        return float(int(self.after[:-1]) * SECONDS[self.after[-1]])

    @field_validator("after")
    @classmethod
    def _after(cls, value: str) -> str:
        if not re.fullmatch(r"0*[1-9][0-9]{0,6}[smhd]", value, re.ASCII):
            raise ValueError("that is no time")
        return value

    @field_validator("command", mode="before")
    @classmethod
    def _a_list(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError("a single string is not a list")
        return value

    @field_validator("command")
    @classmethod
    def _command(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any("\0" in word for word in value):
            raise ValueError("a NUL is refused")
        if value and shutil.which(value[0]) is None:
            raise ValueError("there is no such program, or it may not be executed")
        return value

    @field_validator("mail", "sender")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and not (value.isascii() and _ADDRESS.fullmatch(value)):
            raise ValueError("that is no address")
        return value

    @model_validator(mode="after")
    def _someone(self) -> AlertSettings:
        if not self.command and self.mail is None:
            raise ValueError("command: missing, and no mail: name the one or the other, or both")
        return self
