"""What ``salmon-revsmtp provider`` asks of the running server, by its control socket, or of its own
process where none runs.

    {"do": "provider accounts", "account": "acme"}      one of them; all without a name
        {"account": {...}}
    {"do": "provider sessions"}
        {"session": {...}}
    {"do": "provider live"}                             what became of live mail since the start
        {"live": {"live": 5, "fell back": 1, "recipient": 6, ...}}
    {"do": "provider held", "keys": [7]}                these, as far as there are any
    {"do": "provider held", "account": "acme", "state": "aside", "after": 7, "limit": 50}
        {"held": {...}}
    {"do": "provider show", "key": 7, "whole": false}   the header, or the whole message
        {"held": {...}, "cut": false}                   there is more of the header
        {"octets": "..."}                               a piece, in base64
    {"do": "provider drop", "keys": [7, 8]}             or retry, or bounce
        {"key": 7, "done": true, "remark": ""}

Each ends with ``{"end": true}``.  However much there is, no more than a page of it is in memory,
and the next page is read when this one is written.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from salmon_revsmtp.customer.report import iso
from salmon_revsmtp.delivery.trace import header_end
from salmon_revsmtp.provider.accounts import Account, AccountsUnavailableError
from salmon_revsmtp.provider.hold.store import Held, State
from salmon_revsmtp.provider.server import Provider
from salmon_revsmtp.provider.settings import AccountSettings
from salmon_revsmtp.provider.settling import CUSTOMER_SAYS
from salmon_revsmtp.provider.upkeep import Treated, Upkeep
from salmon_revsmtp.server.control import MOST_KEYS, Answers
from salmon_revsmtp.server.health import OLDEST, Holding
from salmon_revsmtp.server.providing import Providing
from salmon_revsmtp.smtp.content import Content, beginning

__all__ = ["ProviderRequests"]

# Rows that are read at a time, and messages that are treated at a time: a bounce takes a sync or
# two, and who asked waits 10 seconds for a sign.
PAGE = 200
AT_ONCE = 20
# Octets in an answer, before base64; and what is shown of a header, which may be a whole message.
PIECE = 48 * 1024
MOST_HEADER = 64 * 1024

Row = dict[str, Any]


class _Found(NamedTuple):
    """An account to list: where it is from, and ``None`` twice where there is none."""

    name: str
    account: Account | None
    source: str | None


class ProviderRequests:
    """Answers requests about what ``providing`` holds.

    ``provider``  has the sessions; ``None`` where customers cannot call.
    """

    def __init__(self, providing: Providing, provider: Provider | None = None) -> None:
        self._providing, self._provider = providing, provider
        self._kinds: Mapping[str, Callable[[Row], AsyncIterator[Row]]] = {
            "provider accounts": self._accounts,
            "provider sessions": self._sessions,
            "provider live": self._live,
            "provider held": self._held,
            "provider show": self._show,
            "provider retry": lambda request: self._treat(request, Upkeep.retry),
            "provider bounce": lambda request: self._treat(request, Upkeep.bounce),
            "provider drop": lambda request: self._treat(request, Upkeep.drop),
        }

    async def answer(self, request: Row) -> Answers:
        """The answers to a request.  Raises :class:`OSError` when the store cannot."""
        kind = self._kinds.get(str(request.get("do")))
        if kind is None:
            yield {"error": "no such request"}
            return
        async for answer in kind(request):
            yield answer
        yield {"end": True}

    async def holdings(self) -> dict[str, Holding]:
        """What is held for each account, and who of them is there.  Raises :class:`OSError`."""
        online = Counter(
            one.account.name
            for one in (self._provider.sessions if self._provider else ())
            if one.account is not None and one.reversed_at is not None
        )
        nodes = self._provider.nodes if self._provider else None
        with contextlib.suppress(OSError):  # then only this host's are known
            elsewhere = await asyncio.to_thread(nodes.sessions) if nodes is not None else ()
            online.update(one.account for one in elsewhere)
        held = await asyncio.to_thread(self._holdings)
        last = self._provider.last_seen if self._provider else lambda name: None
        return {
            name: (held.get(name) or Holding())._replace(online=online[name], seen=last(name))
            for name in {*held, *online}
        }

    def _elsewhere(self, name: str) -> tuple[AccountSettings | None, bool]:
        """The settings of an account that ours do not have, and whether there is none."""
        accounts = self._providing.accounts
        if accounts.lookups is None or accounts.in_settings(name):
            return None, False
        try:
            found = accounts.fetch(name)
        except AccountsUnavailableError:
            return None, False
        return (None, True) if found is None else (found.settings, False)

    def _holdings(self) -> dict[str, Holding]:
        store, found = self._providing.store, {}
        usages = store.usages()
        standings = store.standings(usages)
        for name, used in usages.items():
            if used.messages:
                waiting = store.listing(name, messages=OLDEST, state=State.WAITING)
                reasons = (one.reason for one in waiting)
                account, gone = self._elsewhere(name)
                found[name] = Holding(
                    *(used.messages, used.octets),
                    aside=standings[name].aside if name in standings else 0,
                    oldest=waiting[0].arrived if waiting else None,
                    deferred=next((one for one in reasons if one.startswith(CUSTOMER_SAYS)), ""),
                    account=account,
                    gone=gone,
                )
        return found

    # -- accounts and sessions ------------------------------------------------------------------

    async def _accounts(self, request: Row) -> AsyncIterator[Row]:
        await asyncio.to_thread(lambda: self._providing.store)
        open_now = self._open_sessions()
        with contextlib.suppress(OSError):  # then only this host's are known
            for one in reversed(await self._sessions_elsewhere()):
                open_now.setdefault(one["account"], []).insert(0, one)
        found = self._found(request.get("account"))
        while page := await asyncio.to_thread(lambda: list(itertools.islice(found, PAGE))):
            for row in await asyncio.to_thread(self._account_rows, page):
                mine = open_now.get(row["account"], [])
                push = [one for one in mine if one["push"]]
                last = self._provider.last_seen(row["account"]) if self._provider else None
                last = time.time() if mine else last
                row["last_seen"] = None if last is None else iso(last)
                row["push"] = push[-1]["since"] if push else None
                row["peer"] = mine[-1]["peer"] if mine else None
                failed = self._provider.logins.by_account if self._provider else Counter[str]()
                row["failed_logins"] = failed[row["account"]]
                yield {"account": row}

    def _found(self, wanted: str | None) -> Iterator[_Found]:
        """The accounts of the settings, those of plugins, and names for which mail is held without
        one; all, or the one of that name.  Blocks.  Raises :class:`OSError`."""
        accounts, names = self._providing.accounts, set()
        for one in accounts:
            names.add(one.name)
            if wanted in (None, one.name):
                yield _Found(one.name, one, "settings")
        listed = accounts.listing() if wanted is None else accounts.where(wanted)
        for plugin, one in listed:
            if one.name not in names:
                names.add(one.name)
                yield _Found(one.name, one, plugin)
        for name in sorted(set(self._providing.store.usages()) - names):
            if wanted in (None, name):
                found = [_Found(name, one, plugin) for plugin, one in accounts.where(name)]
                yield found[0] if found else _Found(name, None, None)

    def _account_rows(self, some: Sequence[_Found]) -> list[Row]:
        store, rows = self._providing.store, []
        # Most have nothing, and a database is not asked about each of many thousands.
        usages = {one.name: store.usage(one.name) for one in some}
        standings = store.standings([name for name, used in usages.items() if used.messages])
        for name, account, source in some:
            used, standing = usages[name], standings.get(name)
            settings = account.settings if account else None
            rows.append(
                {
                    "account": name,
                    "from": source,
                    "enabled": settings.enabled if settings else None,
                    "domains": list(account.domains) if account else [],
                    "messages": used.messages,
                    "quota_messages": settings.quota_messages if settings else None,
                    "bytes": used.octets,
                    "quota_bytes": settings.quota_bytes if settings else None,
                    "oldest": iso(standing.oldest) if standing else None,
                    "aside": standing.aside if standing else 0,
                }
            )
        return rows

    async def _sessions(self, request: Row) -> AsyncIterator[Row]:
        for rows in self._open_sessions().values():
            for row in rows:
                yield {"session": row}
        for row in await self._sessions_elsewhere():
            yield {"session": row}

    async def _live(self, request: Row) -> AsyncIterator[Row]:
        yield {"live": dict(self._providing.live.counts)}

    async def _sessions_elsewhere(self) -> list[Row]:
        """Those of other hosts, the oldest first.  Raises :class:`OSError`."""
        nodes = self._provider.nodes if self._provider is not None else None
        if nodes is None:
            return []
        return [
            {
                "account": one.account,
                "peer": one.peer,
                "since": iso(one.since),
                "push": one.push,
                "live": None,
                "fell_back": None,
                "messages": None,
                "tls": one.tls,
                "host": one.node,
            }
            for one in await asyncio.to_thread(nodes.sessions)
        ]

    def _open_sessions(self) -> dict[str, list[Row]]:
        """By account, the oldest first.  On the event loop's own thread."""
        found: dict[str, list[Row]] = {}
        ahead = time.time() - asyncio.get_running_loop().time()
        for one in self._provider.sessions if self._provider else ():
            if one.account is None or one.reversed_at is None:
                continue
            host, port = one.peer
            found.setdefault(one.account.name, []).append(
                {
                    "account": one.account.name,
                    "peer": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
                    "since": iso(one.reversed_at + ahead),
                    "push": one.push,
                    "live": one.live.passed_on if one.live is not None else 0,
                    "fell_back": one.live.fell_back if one.live is not None else 0,
                    "messages": one.sent,
                    "tls": one.tls_version,
                    "host": None,
                }
            )
        return found

    # -- held messages --------------------------------------------------------------------------

    async def _held(self, request: Row) -> AsyncIterator[Row]:
        store = await asyncio.to_thread(lambda: self._providing.store)
        if (keys := request.get("keys")) is not None:
            for key in keys:
                if (held := await asyncio.to_thread(store.find, int(key))) is not None:
                    yield {"held": _held_row(held)}
            return
        state = State[request["state"].upper()] if request.get("state") else None
        account, after = request.get("account"), int(request.get("after", 0))
        limit = request.get("limit")
        while limit is None or limit > 0:
            most = PAGE if limit is None else min(PAGE, limit)
            page = await asyncio.to_thread(store.listing, account, after, most, state)
            for held in page:
                yield {"held": _held_row(held)}
            if len(page) < most:
                return
            after = page[-1].key
            limit = None if limit is None else limit - len(page)

    async def _show(self, request: Row) -> AsyncIterator[Row]:
        key = int(request["key"])
        held, content = await asyncio.to_thread(self._find, key)
        if held is None or content is None:
            return
        if request.get("whole"):
            pieces, cut = _pieces(content), False
        else:
            header, cut = await asyncio.to_thread(_header, content)
            pieces = _pieces(header)
        yield {"held": _held_row(held), "cut": cut}
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield {"octets": base64.b64encode(piece).decode("ascii")}

    def _find(self, key: int) -> tuple[Held | None, bytes | Content | None]:
        store = self._providing.store
        return store.find(key), store.load([key]).get(key)

    async def _treat(
        self, request: Row, how: Callable[[Upkeep, Sequence[int]], list[Treated]]
    ) -> AsyncIterator[Row]:
        keys = list(dict.fromkeys(map(int, request["keys"])))
        if len(keys) > MOST_KEYS:
            raise ValueError(f"{len(keys)} keys, {MOST_KEYS} are taken")
        upkeep = await asyncio.to_thread(
            lambda: Upkeep(self._providing.store, self._providing.notices)
        )
        for start in range(0, len(keys), AT_ONCE):
            for one in await asyncio.to_thread(how, upkeep, keys[start : start + AT_ONCE]):
                yield asdict(one)


def _header(content: bytes | Content) -> tuple[bytes, bool]:
    """The header of a message, with LF line ends, and whether there is more of it."""
    start = beginning(content, MOST_HEADER)
    more = len(start) == MOST_HEADER
    start = start.replace(b"\r\n", b"\n")
    end = header_end(start)
    return start[:end], more and end == len(start)


def _pieces(content: bytes | Content) -> Iterator[bytes]:
    for part in [content] if isinstance(content, bytes) else content.pieces():
        yield from (part[start : start + PIECE] for start in range(0, len(part), PIECE))


def _held_row(held: Held) -> Row:
    return {
        "key": held.key,
        "account": held.account,
        "from": held.envelope.reverse_path,
        "to": list(held.envelope.recipients),
        "size": held.size,
        "arrived": iso(held.arrived),
        "state": held.state.name.lower(),
        "strikes": held.strikes,
        "reason": held.reason,
    }
