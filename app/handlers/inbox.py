"""Everyone else's mail goes into a Maildir of its own, as it came."""

from pathlib import Path

from salmon import queue
from salmon.routing import route, stateless

PEOPLE = "ada|grace|alan|δοκιμή"


@route("(person)@(host)", person=PEOPLE)
@stateless
def STORE(message, person=None, host=None):
    """``message.Data`` is the whole message in bytes, with LF line ends."""
    folder = Path("run/mail")
    folder.mkdir(parents=True, exist_ok=True)
    queue.Queue(str(folder / person)).push(message.Data)
