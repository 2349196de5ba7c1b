"""What Django does around a request, for a handler."""

import contextlib
import logging

from django.db import InterfaceError, OperationalError, close_old_connections, transaction
from salmon.server import SMTPError


@contextlib.contextmanager
def database():
    """A fresh connection and one transaction, which is committed when the context ends.

    When the database is not there, the provider hears 451 and keeps the message.
    """
    close_old_connections()
    try:
        with transaction.atomic():
            yield
    except (InterfaceError, OperationalError) as error:
        logging.exception("no database")
        raise SMTPError(451, "4.3.0 the database is not there, try again later") from error
    finally:
        close_old_connections()
