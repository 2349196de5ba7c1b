"""Hands the mail on by SMTP to the server that ``smtp_server`` of the settings names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salmon.routing import nolocking, route, stateless

from salmon_revsmtp.handlers import options
from salmon_revsmtp.handlers.forward import forward
from salmon_revsmtp.handlers.nexthop import next_hop

if TYPE_CHECKING:
    from salmon.mail import MailRequest

__all__ = ["FORWARD", "check_handler"]

ALLOWED = "'host:port' such as '127.0.0.1:25'"

_server = options.server("smtp_server", ALLOWED, unix=False)
_next_hop = next_hop("smtp", _server, options.hostname(), options.handler_timeout())


@route(".+")
@stateless
@nolocking
def FORWARD(message: MailRequest) -> None:
    """Hand it on; what the server there says becomes the answer."""
    forward(message, _next_hop)


def check_handler(network: bool) -> str | None:
    """For ``check``: whether the server answers."""
    return _next_hop.try_it() if network else None
