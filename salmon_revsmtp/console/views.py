"""The pages: what each asks of the server, and what a form on it has the server do.

A view gets a request and the server, and blocks as long as it likes; who logged in, and whether a
form is the console's own, has been seen to before.  A form is answered with a redirection to a page
that says what was done, so that a reload does nothing twice.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlencode

from starlette.datastructures import ImmutableMultiDict
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from salmon_revsmtp.console import words
from salmon_revsmtp.console.chart import drawn
from salmon_revsmtp.console.render import render

if TYPE_CHECKING:
    from salmon_revsmtp import Server
    from salmon_revsmtp.console.events import Line

__all__ = ["PAGES", "View"]

Row = dict[str, Any]
Kind = Literal["undeliverable", "unsent"]
View = Callable[[Request, "Server"], Response]

# Messages on a page, and past collections.
PAGE = 50
# Lines of the log.
SHOWN = 300
# Messages that are named before they are deleted.
NAMED = 20
DAY, WEEK = 86400.0, 7 * 86400.0

OUTCOMES: tuple[str, ...] = (
    "collected",
    "no-mail",
    "requested",
    "refused",
    "deferred",
    "failed",
    "disabled",
)
OUTCOMES += ("busy",)

QUEUES: dict[Kind, tuple[str, str]] = {
    "undeliverable": (
        "Undeliverable",
        "Mail that no handler has taken. It was answered with 250, so it is yours to deal with.",
    ),
    "unsent": ("Unsent", "Notifications that the relay has not taken; tried every five minutes."),
}


# -- what all pages have --------------------------------------------------------------------------


def _page(
    request: Request, server: Server, template: str, section: str, **context: Any
) -> Response:
    """A page, with what every page has."""
    rows = context.pop("rows_of_status", None) or server.status()
    troubles = sum(row["status"] == "trouble" for row in rows)
    waiting = sum(
        row["messages"] for row in rows if row["status"] == "queue" and row["queue"] in QUEUES
    )
    nav = [("/", "Health", "health", troubles)]
    if any(row["status"] == "agent" for row in rows):
        nav.append(("/agents", "Agents", "agents", 0))
    if any(row["status"] == "provider" for row in rows):
        nav.append(("/provider", "Provider", "provider", 0))
    nav += [("/queues", "Queues", "queues", waiting), ("/log", "Log", "log", 0)]
    return render(
        request,
        template,
        section=section,
        nav=nav,
        troubles=troubles,
        project=server.project.name,
        version=server.version,
        said=_said(request),
        w=words,
        **context,
    )


def _done(request: Request, path: str, said: str, number: int = 0) -> Response:
    """To a page that says what was done."""
    query = urlencode({"said": said, **({"n": number} if number else {})})
    joint = "&" if "?" in path else "?"
    return RedirectResponse(f"{request.scope['root_path']}{path}{joint}{query}", 303)


#: What a page says after a form.  The address names one of these and a number, and no text: no
#: link can make a page say what its writer likes.
SAID = {
    "sent": ("good", "It collects now."),
    "busy": ("good", "It collects already."),
    "enabled": ("good", "It is enabled."),
    "disabled": ("good", "It is disabled. A push session that was open ends."),
    "retry": ("good", "{} tried again."),
    "bounce": ("good", "{} returned to the sender."),
    "untold": ("bad", "{} taken out. Not every sender could be told; the log says why."),
    "drop": ("good", "{} deleted."),
    "not": ("bad", "{} not treated: the log, or the message itself, says why."),
    "none": ("bad", "No message was chosen."),
}


def _said(request: Request) -> Mapping[str, str] | None:
    kind, text = SAID.get(request.query_params.get("said", ""), ("", ""))
    if not kind:
        return None
    number = request.query_params.get("n", "")
    counted = f"{int(number):,} messages were" if number.isdecimal() and len(number) < 7 else ""
    if number == "1":
        counted = "1 message was"
    return {"kind": kind, "text": text.format(counted or "They were")}


def _missing(error: LookupError) -> Exception:
    """There is no such page."""
    return HTTPException(404, str(error.args[0]) if error.args else None)


# -- health ---------------------------------------------------------------------------------------


def health(request: Request, server: Server) -> Response:
    rows = server.status()

    def of(kind: str) -> list[Row]:
        return [row for row in rows if row["status"] == kind]

    return _page(
        request,
        server,
        "health.html",
        "health",
        rows_of_status=rows,
        title="Health",
        found=[{**row, **_where(row["trouble"])} for row in of("trouble")],
        tiles=_tiles(rows, server),
        agents=of("agent"),
        about=of("server")[0],
        certificates=of("certificate"),
        services=of("service"),
    )


def _where(key: str) -> dict[str, str | None]:
    """The page that is about a trouble."""
    kind, _, rest = key.partition(":")
    name = rest.rpartition(":")[0] or rest
    pages = {
        "agent": (f"/agents/{quote(rest.partition(':')[0], safe='')}", "Its page"),
        "account": (words.account(name), "Its page"),
        "undeliverable": ("/queues", "See them"),
        "unsent": ("/queues", "See them"),
    }
    path, link = pages.get(kind, (None, None))
    return {"path": path, "link": link}


def _tiles(rows: Sequence[Row], server: Server) -> list[Row]:
    tiles: list[Row] = []
    agents = [row for row in rows if row["status"] == "agent"]
    if agents:
        push = sum(bool(row["push"]) for row in agents)
        enabled = sum(bool(row["enabled"]) for row in agents)
        text = f"{push} with a push session" if push else f"{enabled} enabled"
        tiles.append(_tile("/agents", "Agents", f"{len(agents)}", text))
        traffic = server.traffic(None, DAY, 1)
        messages = sum(number for _, number, _ in traffic)
        size = sum(octets for _, _, octets in traffic)
        tiles.append(_tile("/agents", "Collected today", f"{messages:,}", words.octets(size)))
    for row in rows:
        if row["status"] == "provider":
            online = f"{row['online']:,}"
            if row["accounts"] is not None:  # else they are not only in the settings
                online += f" of {row['accounts']:,}"
            text = f"{row['sessions']:,} session{'' if row['sessions'] == 1 else 's'}"
            tiles.append(_tile("/provider", "Accounts online", online, text))
            tiles.append(
                _tile("/provider", "Held", f"{row['messages']:,}", words.octets(row["bytes"]))
            )
        elif row["status"] == "queue":
            text = f"since {words.moment(row['oldest'])}" if row["oldest"] else "empty"
            path = "/queues" if row["queue"] in QUEUES else "/"
            bad = row["queue"] == "undeliverable" and row["messages"] > 0
            tiles.append(_tile(path, row["queue"].capitalize(), f"{row['messages']:,}", text, bad))
    return tiles


def _tile(path: str, name: str, figure: str, text: str, bad: bool = False) -> Row:
    return {"path": path, "name": name, "figure": figure, "text": text, "bad": bad}


# -- agents ---------------------------------------------------------------------------------------


def agents(request: Request, server: Server) -> Response:
    return _page(request, server, "agents.html", "agents", title="Agents", rows=server.agents())


def agent(request: Request, server: Server) -> Response:
    row = _agent(request, server)
    name = row["agent"]
    outcome = request.query_params.get("outcome", "")
    outcome = outcome if outcome in OUTCOMES else ""
    return _page(
        request,
        server,
        "agent.html",
        "agents",
        title=row["title"],
        row=row,
        outcome=outcome,
        outcomes=OUTCOMES,
        history=server.history(name, PAGE, outcome or None),
        dialogue=server.dialogue(name),
        settings=[(key, words.value(one)) for key, one in server.settings_of(name).items()],
        day=drawn("day", "Last day", server.traffic(name, DAY, 48), DAY),
        week=drawn("week", "Last week", server.traffic(name, WEEK, 42), WEEK),
    )


def _agent(request: Request, server: Server) -> Row:
    name = request.path_params["agent"]
    for row in server.agents():
        if row["agent"] == name:
            return row
    raise _missing(LookupError(f"there is no agent {name}"))


def send(request: Request, server: Server) -> Response:
    row = _agent(request, server)
    server.collect(row["agent"])
    return _done(request, _back(row["agent"]), "busy" if row["running"] else "sent")


def enable(request: Request, server: Server) -> Response:
    name, enabled = request.path_params["agent"], _form(request).get("enabled") == "yes"
    server.set_enabled(name, enabled)
    return _done(request, _back(name), "enabled" if enabled else "disabled")


def _back(agent: str) -> str:
    return f"/agents/{quote(agent, safe='')}"


def check(request: Request, server: Server) -> Response:
    """Answered at once: it changes nothing, and a reload checks again."""
    name = _agent(request, server)["agent"]
    found = server.check(name)
    error = found.get("error")
    facts = [(key, words.value(one)) for key, one in found.items() if key not in ("agent", "error")]
    return _page(
        request,
        server,
        "checked.html",
        "agents",
        title=f"Check of {name}",
        agent=name,
        good=not error,
        error=error,
        facts=facts,
    )


# -- the provider ---------------------------------------------------------------------------------


def provider(request: Request, server: Server) -> Response:
    return _page(
        request,
        server,
        "provider.html",
        "provider",
        title="Provider",
        accounts=server.accounts(),
        sessions=server.sessions(),
    )


def account(request: Request, server: Server) -> Response:
    row = _account(server, request.query_params.get("name", ""))
    after = request.query_params.get("after", "")
    start = _number(after) if after else 0
    held = server.held(row["account"], PAGE + 1, start)
    return _page(
        request,
        server,
        "account.html",
        "provider",
        title=row["account"],
        row=row,
        held=held[:PAGE],
        later=start > 0,
        after=str(held[PAGE - 1]["key"]) if len(held) > PAGE else "",
    )


def _account(server: Server, name: str) -> Row:
    for row in server.accounts():
        if row["account"] == name:
            return row
    raise _missing(LookupError(f"there is no account {name}"))


def held(request: Request, server: Server) -> Response:
    try:
        found = server.held_message(_number(request.query_params.get("key", "")))
    except LookupError as error:
        raise _missing(error) from None
    name = found["account"]
    return _page(
        request,
        server,
        "message.html",
        "provider",
        title=f"Held message {found['key']}",
        up=words.account(name),
        up_name=name,
        treat="/provider/treat",
        account=name,
        key=found["key"],
        bounces=True,
        header=found["header"],
        cut=found["cut"],
        facts=[
            ("From", found["from"] or "<>"),
            ("To", ", ".join(found["to"])),
            ("Size", words.octets(found["size"])),
            ("Came", words.moment(found["arrived"])),
            ("State", found["state"]),
            ("What was said last", found["reason"] or "nothing yet"),
        ],
    )


def treat_held(request: Request, server: Server) -> Response:
    """Retry, bounce or drop; the latter two when they are asked for twice."""
    form = _form(request)
    name = form.get("account", "")
    path = words.account(name)
    keys = [_number(key) for key in form.getlist("key")]
    do = form.get("do")
    ways = {
        "retry": server.retry_held,
        "bounce": server.bounce_held,
        "drop": server.drop_held,
    }
    if do not in ways:
        raise _missing(LookupError("there is nothing of that kind to do"))
    if not keys:
        return _done(request, path, "none")
    rows = []
    for key in keys:
        with contextlib.suppress(LookupError):
            found = server.held_message(key)
            if found["account"] == name:
                rows.append(found)
    if do != "retry" and form.get("sure") != "yes":
        return _ask(
            *(request, server, "provider", str(do), rows, "/provider/treat", path), account=name
        )
    return _treated(request, path, str(do), ways[str(do)]([row["key"] for row in rows]))


def _number(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 19):
        raise _missing(LookupError("that is no key of a message"))
    return int(key)


QUESTIONS = {
    "bounce": ("Return to the sender?", "Each sender is told that it was not delivered.", "Bounce"),
    "drop": ("Delete?", "No one is told, and it does not come back.", "Drop"),
}


def _ask(
    request: Request,
    server: Server,
    section: str,
    do: str,
    rows: Sequence[Row],
    path: str,
    back: str,
    account: str = "",
) -> Response:
    """Whether it is meant."""
    title, question, button = QUESTIONS[do]
    number = f"{len(rows):,} message{'' if len(rows) == 1 else 's'}"
    return _page(
        request,
        server,
        "sure.html",
        section,
        title=title,
        question=f"{number}. {question}",
        button=f"{button} {number}",
        do=do,
        rows=rows[:NAMED],
        more=max(0, len(rows) - NAMED),
        keys=[row["key"] for row in rows],
        path=path,
        back=back,
        account=account,
    )


def _treated(request: Request, path: str, do: str, rows: Sequence[Row]) -> Response:
    good = sum(bool(row["done"]) for row in rows)
    if good < len(rows) or not rows:
        return _done(request, path, "not", len(rows) - good)
    if do == "bounce" and any(row["remark"] for row in rows):
        do = "untold"
    return _done(request, path, do, good)


# -- queues ---------------------------------------------------------------------------------------


def queues(request: Request, server: Server) -> Response:
    found = []
    for kind, (name, text) in QUEUES.items():
        after = request.query_params.get(kind) or None
        try:
            rows = server.waiting(kind, PAGE + 1, after)
        except LookupError:  # it has gone meanwhile
            rows = server.waiting(kind, PAGE + 1, None)
        more = rows[PAGE - 1]["key"] if len(rows) > PAGE else ""
        found.append({"kind": kind, "name": name, "text": text, "rows": rows[:PAGE], "after": more})
    return _page(request, server, "queues.html", "queues", title="Queues", queues=found)


def _kind(request: Request) -> Kind:
    for kind in QUEUES:
        if kind == request.path_params["kind"]:
            return kind
    raise _missing(LookupError("there is no such queue"))


def waiting(request: Request, server: Server) -> Response:
    kind = _kind(request)
    try:
        found = server.waiting_message(kind, request.path_params["key"])
    except LookupError as error:
        raise _missing(error) from None
    return _page(
        request,
        server,
        "message.html",
        "queues",
        title=found["subject"] or "(no subject)",
        up="/queues",
        up_name="Queues",
        treat=f"/queues/{kind}/treat",
        key=found["key"],
        bounces=False,
        ask_to=kind == "undeliverable" and not found["envelope"],
        header=found["header"],
        cut=found["cut"],
        facts=[
            ("From", found["from"] or "<>"),
            ("To", ", ".join(found["to"])),
            ("Size", words.octets(found["size"])),
            ("Since", words.moment(found["since"])),
            ("Why it is here", found["reason"] or "that is not known"),
        ],
    )


def treat_waiting(request: Request, server: Server) -> Response:
    """Retry, or drop when that is asked for twice."""
    kind, form = _kind(request), _form(request)
    keys, do = [str(key) for key in form.getlist("key")], form.get("do")
    if not keys:
        return _done(request, "/queues", "none")
    if do == "retry":
        rows = server.retry_waiting(kind, keys, str(form.get("to") or "") or None)
    elif do == "drop" and form.get("sure") == "yes":
        rows = server.drop_waiting(kind, keys)
    elif do == "drop":
        there = []
        for key in keys:
            with contextlib.suppress(LookupError):
                there.append(server.waiting_message(kind, key))
        return _ask(request, server, "queues", "drop", there, f"/queues/{kind}/treat", "/queues")
    else:
        raise _missing(LookupError("there is nothing of that kind to do"))
    return _treated(request, "/queues", str(do), rows)


# -- the log --------------------------------------------------------------------------------------

LEVELS = (("", "any level"), ("warning", "warnings and errors"), ("error", "errors"))


def log(request: Request, server: Server) -> Response:
    text = request.query_params.get("q", "")[:200]
    level = request.query_params.get("level", "")
    level = level if level in dict(LEVELS) else ""
    kept = reversed(request.app.state.hub.lines.since())
    found = (line for line in kept if _shows(line, text.lower(), level))
    return _page(
        request,
        server,
        "log.html",
        "log",
        title="Log",
        lines=list(itertools.islice(found, SHOWN)),
        q=text,
        level=level,
        levels=LEVELS,
        most=SHOWN,
    )


def _shows(line: Line, text: str, level: str) -> bool:
    least = {"warning": ("warning", "error"), "error": ("error",)}.get(level)
    return text in line.text.lower() and (least is None or line.level in least)


def _form(request: Request) -> ImmutableMultiDict[str, str]:
    """What was sent, as whoever checked it has read it."""
    form: ImmutableMultiDict[str, str] = request.state.form
    return form


#: What the server answers: path, methods, view.  A POST comes here when it is known to be meant.
PAGES: list[tuple[str, tuple[str, ...], View]] = [
    ("/", ("GET",), health),
    ("/agents", ("GET",), agents),
    ("/agents/{agent}", ("GET",), agent),
    ("/agents/{agent}/send", ("POST",), send),
    ("/agents/{agent}/enable", ("POST",), enable),
    ("/agents/{agent}/check", ("POST",), check),
    ("/provider", ("GET",), provider),
    ("/provider/account", ("GET",), account),
    ("/provider/message", ("GET",), held),
    ("/provider/treat", ("POST",), treat_held),
    ("/queues", ("GET",), queues),
    ("/queues/{kind}/treat", ("POST",), treat_waiting),
    ("/queues/{kind}/{key}", ("GET",), waiting),
    ("/log", ("GET",), log),
]
