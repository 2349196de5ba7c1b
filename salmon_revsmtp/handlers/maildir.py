"""Keeps the mail: a Maildir for each address, below the folder ``maildirs`` of the settings.

``mailboxes`` names the addresses that exist; without it every one does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from salmon.routing import nolocking, route, stateless

from salmon_revsmtp.handlers import options
from salmon_revsmtp.handlers.mailboxes import Mailboxes
from salmon_revsmtp.handlers.names import pattern

if TYPE_CHECKING:
    from salmon.mail import MailRequest

__all__ = ["STORE", "check_handler"]

_existing = options.addresses("mailboxes")
_mailboxes = Mailboxes(options.folder("maildirs", "run/mail"), _existing)


@route(pattern(_existing))
@stateless
@nolocking
def STORE(message: MailRequest) -> None:
    """Store it for its recipient before the 250."""
    _mailboxes.store(message)


def check_handler(network: bool) -> str:
    """For ``check``: whether the folder of the Maildirs can be written."""
    return _mailboxes.try_folder()
