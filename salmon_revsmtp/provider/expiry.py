"""Mail that waits for too long: its sender is warned, and in the end told that it was given up.

Every so often, in a thread, the oldest messages of each account are looked at.  The order is as for
a refusal: the notification is safe on disk, then the message goes.  Ages are by the store's clock,
which no one sets: a wall clock that jumps expires nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator

from salmon_revsmtp.foreign import angle
from salmon_revsmtp.hooks import HookCaller
from salmon_revsmtp.provider.accounts import Account, Accounts, AccountsUnavailableError
from salmon_revsmtp.provider.hold.store import Held, HoldStore, Settled
from salmon_revsmtp.provider.notices import Notices
from salmon_revsmtp.safelog import log_safely

__all__ = ["CHECK_EVERY", "Expiry"]

log = logging.getLogger(__name__)

# Seconds between two looks.
CHECK_EVERY = 300.0
# Messages that are looked at, and given up, at a time.
PAGE = 100

HOUR, DAY = 3600.0, 86400.0


class Expiry:
    """Gives up what has waited for too long."""

    def __init__(
        self, accounts: Accounts, store: HoldStore, notices: Notices, hooks: HookCaller
    ) -> None:
        self._accounts, self._store = accounts, store
        self._notices, self._hooks = notices, hooks
        self._warned: Counter[str] = Counter()  # the key up to which senders have been warned

    def check(self) -> None:
        """One look.  Blocks; never raises."""
        for account in self._all():
            try:
                self._check(account)
            except Exception as error:
                text = "account=%s what is too old cannot be given up: %s"
                log_safely(log, logging.ERROR, text, account.name, error)

    def _all(self) -> Iterator[Account]:
        """Those that mail may be held for.  One that cannot be looked up now has its turn the next
        time."""
        yield from self._accounts
        for name in self._store.usages() if self._accounts.lookups is not None else ():
            if not self._accounts.in_settings(name):
                with contextlib.suppress(AccountsUnavailableError):
                    if (found := self._accounts.fetch(name)) is not None:
                        yield found

    def _check(self, account: Account) -> None:
        now, settings = self._store.now(), account.settings
        if not self._store.usage(account.name).messages:
            return
        for held in self._older(account, now - settings.hold_days * DAY):
            self._give_up(held, settings.hold_days)
        if settings.warn_hours is None:
            return
        before = now - settings.warn_hours * HOUR
        for held in self._older(account, before, after=self._warned[account.name]):
            self._warned[account.name] = held.key
            if held.warned:
                continue
            self._warn(held, held.arrived + settings.hold_days * DAY)

    def _older(self, account: Account, arrived: float, after: int = 0) -> Iterator[Held]:
        """What came before, the oldest first."""
        while page := self._store.listing(account.name, after, PAGE):
            for held in page:
                if held.arrived > arrived:
                    return
                yield held
            after = page[-1].key

    def _give_up(self, old: Held, days: float) -> None:
        """One that a session is sending is left to its customer's answer."""
        held = self._store.claim([old.key]).get(old.key)
        if held is None:
            return
        try:
            # One whose file is lost is told of, too, without its header.
            content = self._store.load([held.key]).get(held.key, b"")
            if failure := self._notices.expired(held, content, days):
                to = angle(held.envelope.reverse_path)
                raise OSError(f"the notification for {to}: {failure}")
            self._store.settle([Settled(held.key, held.envelope.recipients)])
        finally:
            self._store.release([held.key])
        log_safely(
            log,
            logging.WARNING,
            "account=%s key=%d from=%s to=%s bytes=%d held for %g days, given up%s",
            *(held.account, held.key, angle(held.envelope.reverse_path)),
            " ".join(map(angle, held.envelope.recipients[:20])),
            *(held.size, days),
            f": {held.reason}" if held.reason else "",
        )
        if self._hooks.implemented("message_expired"):
            self._hooks.call(
                "message_expired", account=held.account, envelope=held.envelope, key=held.key
            )

    def _warn(self, held: Held, until: float) -> None:
        content = self._store.load([held.key]).get(held.key)
        if content is None:
            return
        if failure := self._notices.delayed(held, content, until):
            raise OSError(f"the notification for {angle(held.envelope.reverse_path)}: {failure}")
        self._store.note_warned(held.key)
