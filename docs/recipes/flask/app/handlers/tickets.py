import logging

import web
from salmon.routing import route, stateless
from salmon.server import SMTPError
from sqlalchemy.exc import InterfaceError, OperationalError


@route("help@(host)")
@stateless
def OPEN(message, host=None):
    ticket = web.Ticket(
        sender=message.From, subject=message["Subject"] or "", original=message.Data
    )
    try:
        with web.app.app_context():  # its end gives the connection back
            web.db.session.add(ticket)
            web.db.session.commit()
    except (InterfaceError, OperationalError) as error:
        logging.exception("no database")
        raise SMTPError(451, "4.3.0 the database is not there, try again later") from error
