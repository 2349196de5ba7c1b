"""What is held for whom, in the memory of one host of several."""

from __future__ import annotations

from salmon_revsmtp.provider.hold.postgres.usages import MOST_LEFT, Usages
from salmon_revsmtp.provider.hold.store import Usage


def test_an_account_that_always_changes_hears_of_what_others_hand_over() -> None:
    usages = Usages()
    usages.add({"acme": 100_000}, {"acme": 100_000})
    for left in range(MOST_LEFT + 1):
        assert usages.of("acme").messages == 100_000 + left
        with usages.changing({"acme"}):
            usages.begin_reading()
            usages.read({"acme": Usage(3, 3)})
            usages.add({"acme": 1}, {"acme": 1})
    assert usages.of("acme") == Usage(4, 4), "and not over its quota for ever"
    with usages.changing({"acme"}):
        usages.begin_reading()
        usages.read({"acme": Usage(9, 9)})
    assert usages.of("acme") == Usage(4, 4), "as a rule what we know is newer"
    usages.begin_reading()
    usages.read({"acme": Usage(9, 9)})
    assert usages.of("acme") == Usage(9, 9)
