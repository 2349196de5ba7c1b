from app.database import database
from salmon.routing import route, stateless
from salmon.server import SMTPError
from tickets.models import Letter, Ticket


@route("help@(host)")
@stateless
def OPEN(message, host=None):
    with database():
        ticket = Ticket.objects.create(sender=message.From, subject=message["Subject"] or "")
        keep(ticket, message)


@route("help-(number)@(host)", number="[0-9]{1,9}")
@stateless
def REPLY(message, number=None, host=None):
    with database():
        ticket = Ticket.objects.filter(id=number).first()
        if ticket is None or ticket.closed:
            raise SMTPError(550, f"5.1.1 there is no open ticket {number}")
        keep(ticket, message)


def keep(ticket, message):
    Letter.objects.create(ticket=ticket, text=message.body() or "", original=message.Data)
