from django.http import JsonResponse
from tickets.models import Ticket


def tickets(request):
    found = [
        {
            "number": ticket.id,
            "from": ticket.sender,
            "subject": ticket.subject,
            "letters": [letter.text for letter in ticket.letter_set.order_by("id")],
        }
        for ticket in Ticket.objects.order_by("id")
    ]
    return JsonResponse({"tickets": found})
