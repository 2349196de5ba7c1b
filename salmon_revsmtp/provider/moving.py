"""A hold moves from one store to another, while nothing else uses either.

What is held is copied, the oldest first, some messages together; the order is kept.  A record on
disk says which message of the one store is which of the other.  The order of writes:

1. Some messages are safe in the new store, all of them or none.
2. The record of them is synced.

A move that was interrupted goes on behind the last message of the record.  What the new store has
behind that one came between 1 and 2: it is recorded, once it is seen that it is what comes next in
the old store.  In the end all of it is read again from both stores and compared.  Nothing is
deleted: the old store is as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from salmon_revsmtp.files import make_private_file, sync_folder
from salmon_revsmtp.provider.hold.store import Held, HoldStore
from salmon_revsmtp.smtp.content import Content

__all__ = ["Move", "MoveError", "Moved"]

# Messages that are read at a time, and messages and octets that are made safe together.
PAGE = 100
OCTETS = 8 * 1024 * 1024


class MoveError(Exception):
    """A hold is not moved; the text says why, and what to do."""


@dataclass
class Moved:
    """What there is in the new store.

    ``resumed``  messages that were there already, of a move that was interrupted.
    ``missing``  keys, in the old store, of those that cannot be read there and were left.
    """

    messages: int = 0
    octets: int = 0
    resumed: int = 0
    accounts: set[str] = field(default_factory=set)
    missing: list[int] = field(default_factory=list)


class Move:
    """Moves what ``old`` holds to ``new``.

    ``names``   of both, for people.
    ``record``  the file that says how far it is; it goes when all is done.
    ``told``    told what is done, and of how many messages it is: ``"copied"``, ``"compared"``.
    """

    def __init__(
        self,
        old: HoldStore,
        new: HoldStore,
        names: tuple[str, str],
        record: Path,
        told: Callable[[str, int], None] = lambda what, messages: None,
    ) -> None:
        self._old, self._new, self._names = old, new, names
        self._record, self._told = record, told
        self._pairs: list[tuple[int, int]] = []

    def run(self) -> Moved:
        """Move, or go on.  Raises :class:`MoveError` and :class:`OSError`; then it can be run
        again."""
        for store, name in zip((self._old, self._new), self._names, strict=True):
            if others := store.others():
                raise MoveError(
                    f"{name} is in use by {', '.join(others)}: stop all servers that have it. One "
                    "that died is forgotten after half a minute"
                )
        moved = Moved()
        self._begin_or_resume()
        moved.resumed = len(self._pairs)
        self._copy()
        self._compare(moved)
        self._record.unlink()
        return moved

    # -- the record -----------------------------------------------------------------------------

    def _begin_or_resume(self) -> None:
        head = {"from": self._names[0], "to": self._names[1]}
        try:
            lines = self._record.read_text().split("\n")[:-1]  # a half one is not counted
        except FileNotFoundError:
            lines = []
        if not lines:
            if self._new.listing(messages=1):
                raise MoveError(
                    f"{self._names[1]} holds mail already, and no move to it was begun here; it "
                    "has to be empty"
                )
            make_private_file(self._record)
            self._note(head)
            sync_folder(self._record.parent)
            return
        if json.loads(lines[0]) != head:
            there = json.loads(lines[0])
            raise MoveError(
                f"a move from {there['from']} to {there['to']} was interrupted: run that again, or "
                f"delete {self._record} to give it up"
            )
        # What is behind the last whole line goes: the next one begins there.
        os.truncate(self._record, sum(len(line.encode()) + 1 for line in lines))
        self._pairs = [(old, new) for line in lines[1:] for old, new in json.loads(line)]
        self._find_unrecorded()

    def _find_unrecorded(self) -> None:
        """Record what was made safe before the end, and is not in the record."""
        after_old, after_new = self._pairs[-1] if self._pairs else (0, 0)
        waiting = (one for one, _ in self._readable(after_old))
        found: list[tuple[int, int]] = []
        for there in _all(self._new, after_new):
            here = next(waiting, None)
            if here is None or replace(here, key=there.key) != there:
                raise MoveError(
                    f"{self._names[1]} holds the message {there.key}, which this move has not "
                    "brought: something else has used one of the two. Empty it, delete "
                    f"{self._record}, and begin anew"
                )
            found.append((here.key, there.key))
        if found:
            self._note(found)
            self._pairs += found

    def _note(self, line: object) -> None:
        with self._record.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    # -- the messages ---------------------------------------------------------------------------

    def _readable(self, after: int) -> Iterator[tuple[Held, bytes | Content]]:
        """What the old store has behind a key, with its octets, as far as it has these."""
        for held in _all(self._old, after):
            content = self._old.load([held.key]).get(held.key)
            if content is not None:
                yield held, content

    def _copy(self) -> None:
        some: list[tuple[Held, bytes | Content]] = []
        octets = 0
        for one in self._readable(self._pairs[-1][0] if self._pairs else 0):
            some.append(one)
            octets += one[0].size
            if len(some) >= PAGE or octets >= OCTETS:
                self._keep(some)
                some, octets = [], 0
        if some:
            self._keep(some)

    def _keep(self, some: Sequence[tuple[Held, bytes | Content]]) -> None:
        keys = self._new.adopt(some)
        pairs = [(held.key, key) for (held, _), key in zip(some, keys, strict=True)]
        self._note(pairs)
        self._pairs += pairs
        self._told("copied", len(self._pairs))

    def _compare(self, moved: Moved) -> None:
        copied = {old for old, _ in self._pairs}
        moved.missing = [held.key for held in _all(self._old, 0) if held.key not in copied]
        for old, new in self._pairs:
            here, there = self._old.find(old), self._new.find(new)
            same = here is not None and there is not None and replace(here, key=new) == there
            if not same or self._digest(self._old, old) != self._digest(self._new, new):
                raise MoveError(
                    f"the message {old} of {self._names[0]} is not the same as {new} of "
                    f"{self._names[1]}: something else has used one of the two. Empty "
                    f"{self._names[1]}, delete {self._record}, and begin anew"
                )
            assert here is not None
            moved.messages += 1
            moved.octets += here.size
            moved.accounts.add(here.account)
            if moved.messages % PAGE == 0:
                self._told("compared", moved.messages)

    @staticmethod
    def _digest(store: HoldStore, key: int) -> bytes | None:
        content = store.load([key]).get(key)
        if content is None:
            return None
        digest = hashlib.sha256()
        for piece in [content] if isinstance(content, bytes) else content.pieces():
            digest.update(piece)
        return digest.digest()


def _all(store: HoldStore, after: int) -> Iterator[Held]:
    """What a store holds, the oldest first, from after a key."""
    while page := store.listing(after=after, messages=PAGE):
        yield from page
        after = page[-1].key
