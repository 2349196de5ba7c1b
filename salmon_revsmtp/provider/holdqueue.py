"""The hold queue: mail that waits for its customer, on disk.

One file per message: a line of JSON with the envelope, then the message, octet for octet.  The
order of writes, so that a crash at any instruction loses nothing:

1. The file is written under ``tmp/`` and synced, then renamed into ``hold/``, and ``hold/`` is
   synced.  Only then has :meth:`HoldQueue.put` taken the message; where the last sync fails, the
   file is removed again.
2. When the customer has answered, recipients that it took are struck off by writing the file anew
   in the same way, over the old one.  Those that it refused for good go first into ``refused/``,
   and stay where that fails.
3. Only when no recipient is left is the file removed.  Many that are answered together share a
   sync.  Where that fails nothing is undone: at worst a power cut brings a message back.

A crash between the customer's 250 and step 2 sends the message again (RFC 1047's duplicate), which
is better than not at all.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path

from salmon_revsmtp.files import sync_folder
from salmon_revsmtp.smtp.addresses import domain_of
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["HoldQueue"]

log = logging.getLogger(__name__)

# Of an envelope, what the rest of it follows from.
_FIELDS = tuple(one.name for one in fields(Envelope) if one.init)


class HoldQueue:
    """Messages that wait below a folder, which is made if it is not there.  Its methods block."""

    def __init__(self, folder: Path) -> None:
        folder = folder.absolute()
        self._tmp, self._hold = folder / "tmp", folder / "hold"
        self._refused, self._broken = folder / "refused", folder / "broken"
        for one in (self._tmp, self._hold, self._refused, self._broken):
            one.mkdir(parents=True, exist_ok=True)
        self._numbers = itertools.count()
        self._known: dict[tuple[str, int], Envelope | None] = {}

    def put(self, envelope: Envelope, data: bytes) -> str:
        """Take a message; it survives a power cut when this returns its key."""
        key = f"{time.time_ns():020d}-{os.getpid()}-{next(self._numbers)}"
        self._write(self._hold, key, envelope, data)
        try:
            sync_folder(self._hold)
        except BaseException:
            (self._hold / key).unlink(missing_ok=True)
            raise
        return key

    def waiting(self, domains: Collection[str]) -> list[str]:
        """The keys of messages with a recipient in one of these domains, oldest first."""
        with os.scandir(self._hold) as entries:
            found = sorted((entry.name, entry.inode()) for entry in entries)
        # A file is never changed, but written anew.
        known = {one: self._known.get(one) or self._envelope(one[0]) for one in found}
        self._known = known
        return [key for (key, _), envelope in known.items() if _wanted(envelope, domains)]

    def load(self, key: str, domains: Collection[str]) -> tuple[Envelope, bytes] | None:
        """A message for its recipients in these domains; ``None`` if it is gone or unreadable."""
        stored = self._read(key)
        if stored is None:
            return None
        envelope, data = stored
        return replace(envelope, recipients=_wanted(envelope, domains)), data

    def settle_all(self, answers: Iterable[tuple[str, Mapping[str, Reply]]]) -> None:
        """Take note of what the customer said of messages, by their keys: 2yz is gone, 5yz is set
        aside under ``refused/``, 4yz stays.

        Raises the first :class:`OSError` after all have been tried; what it concerns stays, too."""
        errors = []
        for key, replies in answers:
            try:
                self._settle(key, replies)
            except OSError as error:
                errors.append(error)
        try:
            sync_folder(self._hold)
        except OSError as error:
            log.error("folder=%s cannot be synced: %s", self._hold, error)
        if errors:  # the others have nothing to do with it
            raise errors[0]

    def _settle(self, key: str, replies: Mapping[str, Reply]) -> None:
        envelope = self._envelope(key)
        if envelope is None:
            return
        refused = tuple(one for one in envelope.recipients if _says(replies, one, "permanent"))
        failure = self._refuse(key, refused) if refused else None
        left = tuple(
            one
            for one in envelope.recipients
            if not _says(replies, one, "positive") and (failure or one not in refused)
        )
        if not left:
            (self._hold / key).unlink()
        elif left != envelope.recipients:
            self._write_again(self._hold, key, left)
        if failure is not None:
            raise failure

    def _refuse(self, key: str, recipients: tuple[str, ...]) -> OSError | None:
        """Set a message aside; or why that cannot be."""
        try:
            self._write_again(self._refused, key, recipients)
            sync_folder(self._refused)
        except OSError as error:
            return error
        return None

    def __len__(self) -> int:
        return sum(1 for _ in self._hold.iterdir())

    def _write_again(self, folder: Path, key: str, recipients: tuple[str, ...]) -> None:
        if stored := self._read(key):
            envelope, data = stored
            self._write(folder, key, replace(envelope, recipients=recipients), data)

    def _write(self, folder: Path, key: str, envelope: Envelope, data: bytes) -> None:
        path = self._tmp / key
        try:
            with path.open("wb") as file:
                said = {name: getattr(envelope, name) for name in _FIELDS}
                file.write(json.dumps(said).encode() + b"\n")
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            path.rename(folder / key)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _read(self, key: str) -> tuple[Envelope, bytes] | None:
        envelope = self._envelope(key)
        if envelope is None:
            return None
        try:
            with (self._hold / key).open("rb") as file:
                file.readline()
                size = os.fstat(file.fileno()).st_size
                return envelope, file.read(size)  # without a size it is read twice over
        except FileNotFoundError:
            return None  # another session has settled it meanwhile

    def _envelope(self, key: str) -> Envelope | None:
        """The first line of a message's file; the message may be large."""
        path = self._hold / key
        try:
            with path.open("rb") as file:
                said = json.loads(file.readline())
            said["recipients"] = tuple(said["recipients"])
            return Envelope(**said)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            log.error("key=%s is unreadable, set aside in %s: %s", key, self._broken, error)
            path.rename(self._broken / key)
            return None


def _wanted(envelope: Envelope | None, domains: Collection[str]) -> tuple[str, ...]:
    recipients = envelope.recipients if envelope is not None else ()
    return tuple(one for one in recipients if domain_of(one) in domains)


def _says(replies: Mapping[str, Reply], recipient: str, what: str) -> bool:
    return recipient in replies and bool(getattr(replies[recipient], what))
