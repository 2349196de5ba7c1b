"""Orders: one address per product; a product that is sold out refuses the mail."""

import logging

from salmon.routing import route, stateless
from salmon.server import SMTPError

SOLD_OUT = {"anvil"}


@route("order-(product)@(host)", product="[a-z]+")
@stateless
def ORDER(message, product=None, host=None):
    """SMTPError becomes the answer to the provider, which tells the sender."""
    if product in SOLD_OUT:
        raise SMTPError(550, f"5.1.6 {product} is sold out")
    logging.info("order for %s from %s", product, message.From)
