"""Bounces of mail that we sent with a return address of its own (VERP)."""

import logging

from salmon.routing import route, stateless


@route("bounces-(number)@(host)", number="[0-9]+")
@stateless
def BOUNCED(message, number=None, host=None):
    """A bounce comes from the null reverse-path; its number says what bounced."""
    logging.info("message %s bounced: %s", number, message["Subject"])
