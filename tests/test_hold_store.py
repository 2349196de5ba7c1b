"""What every hold store must do: a third party's passes the same tests.

To try another store, give ``STORES`` a function that, given the test's request and a folder,
returns one that opens a store.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.messages import MESSAGE

from salmon_revsmtp.provider.hold import embedded
from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.provider.hold.store import (
    Arrival,
    Feed,
    Held,
    HoldStore,
    HoldStoreError,
    Settled,
    Standing,
    State,
    Usage,
)
from salmon_revsmtp.smtp.content import whole
from salmon_revsmtp.smtp.envelope import Envelope

Open = Callable[[], HoldStore]


def embedded_store(request: pytest.FixtureRequest, folder: Path) -> Open:
    return lambda: EmbeddedStore(folder)


def postgres_store(request: pytest.FixtureRequest, folder: Path) -> Open:
    from salmon_revsmtp.provider.hold.postgres import PostgresStore

    cluster = request.getfixturevalue("database")
    url = cluster.url(cluster.schema())
    return lambda: PostgresStore(url, folder)


STORES: dict[str, Callable[[pytest.FixtureRequest, Path], Open]] = {
    "embedded": embedded_store,
    "postgres": postgres_store,
}
LARGE = b"Subject: large\r\n\r\n" + b"x" * embedded.LARGE


@pytest.fixture(
    params=["embedded", pytest.param("postgres", marks=pytest.mark.interop)],
)
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], HoldStore]]:
    """Opens the store, again and again; what was open is closed before."""
    opened: list[HoldStore] = []
    open_one = STORES[request.param](request, tmp_path / "hold")

    def open_again() -> HoldStore:
        for one in opened:
            one.close()
        opened[:] = [open_one()]
        return opened[0]

    yield open_again
    for one in opened:
        one.close()


def arrival(*recipients: str, data: bytes = MESSAGE, **envelope: object) -> Arrival:
    """A message; the account of a recipient is its domain's first label."""
    accounts = tuple(one.partition("@")[2].partition(".")[0] for one in recipients)
    fields: dict[str, object] = {"reverse_path": "a@example.net", **envelope}
    return Arrival(Envelope(recipients=recipients, **fields), accounts, [data])  # type: ignore[arg-type]


def contents(store: HoldStore, *keys: int) -> dict[int, bytes]:
    return {key: whole(data) for key, data in store.load(keys).items()}


def take(store: HoldStore, account: str, **limits: int) -> list[int]:
    limits = {"messages": 1000, "octets": 1 << 40, **limits}
    return [one.key for one in store.feed(account).take(**limits)]


def test_mail_is_there_when_the_store_is_opened_again(
    open_store: Callable[[], HoldStore],
) -> None:
    envelope = Envelope(
        "a@example.net",
        ("b@acme.example", "c@acme.example"),
        {"ENVID": "x+2By", "SMTPUTF8": ""},
        {"b@acme.example": {"NOTIFY": "NEVER"}, "c@acme.example": {}},
        "client.example.net",
        False,
    )
    [[key]] = open_store().put(
        [Arrival(envelope, ("acme", "acme"), [b"Received: us\r\n", MESSAGE])]
    )
    for _ in range(2):
        one = open_store()
        found = one.find(key)
        assert found is not None and found.envelope == envelope
        assert (found.account, found.state, found.strikes) == ("acme", State.WAITING, 0)
        assert found.size == len(MESSAGE) + 14
        assert contents(one, key) == {key: b"Received: us\r\n" + MESSAGE}
        assert one.usage("acme") == Usage(1, len(MESSAGE) + 14)


@pytest.mark.parametrize("data", [b"", b"\n\n", bytes(range(256)), b"no end", LARGE])
def test_content_is_kept_octet_for_octet(open_store: Callable[[], HoldStore], data: bytes) -> None:
    [[key]] = open_store().put([arrival("b@acme.example", data=data)])
    assert contents(open_store(), key) == {key: data}


def test_the_null_sender_and_addresses_in_utf_8(open_store: Callable[[], HoldStore]) -> None:
    store = open_store()
    sent = [
        arrival("b@acme.example", reverse_path=""),
        arrival("b\u00fccher@acme.example", reverse_path='"a b\u2028"@x.example'),
    ]
    keys = [key for [key] in store.put(sent)]
    found = [store.find(key) for key in keys]
    assert [one.envelope for one in found if one] == [one.envelope for one in sent]


def test_a_feed_has_each_message_once_the_oldest_first(
    open_store: Callable[[], HoldStore],
) -> None:
    store = open_store()
    keys = [key for [key] in store.put([arrival("b@acme.example") for _ in range(5)])]
    assert keys == sorted(keys)
    feed = store.feed("acme")
    assert [one.key for one in feed.take(2, 1 << 40)] == keys[:2]
    assert [one.key for one in feed.take(1000, 1 << 40)] == keys[2:]
    assert feed.take(1000, 1 << 40) == []
    [[later]] = store.put([arrival("b@acme.example")])
    assert [one.key for one in feed.take(1000, 1 << 40)] == [later]


def test_a_feed_gives_no_more_octets_than_one_message_too_many(
    open_store: Callable[[], HoldStore],
) -> None:
    store = open_store()
    keys = [key for [key] in store.put([arrival("b@acme.example", data=b"x" * 100)] * 5)]
    assert take(store, "acme", octets=250) == keys[:3]


def test_two_feeds_never_have_the_same_message(open_store: Callable[[], HoldStore]) -> None:
    store = open_store()
    keys = [key for [key] in store.put([arrival("b@acme.example") for _ in range(4)])]
    one, other = store.feed("acme"), store.feed("acme")
    assert [held.key for held in one.take(2, 1 << 40)] == keys[:2]
    assert [held.key for held in other.take(1000, 1 << 40)] == keys[2:]
    one.close()  # what it had is anyone's
    other.start_over()
    assert [held.key for held in other.take(1000, 1 << 40)] == keys[:2]


class Meddling(list[str]):
    """A list of domains: while one feed looks into it, another takes what it can in a thread."""

    def __init__(self, domain: str, other: Feed) -> None:
        super().__init__([domain])
        self.taken: list[int] = []
        self.thread = threading.Thread(target=self._take, args=[other])

    def _take(self, other: Feed) -> None:
        self.taken += [held.key for held in other.take(1000, 1 << 40)]

    def __contains__(self, domain: object) -> bool:
        if self.thread.ident is None:
            self.thread.start()
            self.thread.join(0.5)  # it may have to wait for us
        return super().__contains__(domain)


def test_two_feeds_in_two_threads_never_have_the_same_message(
    open_store: Callable[[], HoldStore],
) -> None:
    store = open_store()
    keys = [key for [key] in store.put([arrival("b@acme.example") for _ in range(4)])]
    domains = Meddling("acme.example", store.feed("acme"))
    taken = [held.key for held in store.feed("acme", domains).take(1000, 1 << 40)]
    domains.thread.join()
    assert sorted(taken + domains.taken) == keys


def test_what_is_answered_is_no_ones_until_it_is_settled(
    open_store: Callable[[], HoldStore],
) -> None:
    store = open_store()
    [[key]] = store.put([arrival("b@acme.example", "c@acme.example")])
    feed = store.feed("acme")
    assert len(feed.take(10, 1 << 40)) == 1
    feed.leave([key])
    feed.close()
    assert take(store, "acme") == []
    store.settle([Settled(key, ["b@acme.example"], "later")])
    [left] = store.feed("acme").take(10, 1 << 40)
    assert (left.envelope.recipients, left.reason) == (("c@acme.example",), "later")


def test_what_is_left_comes_again_when_a_feed_starts_over(
    open_store: Callable[[], HoldStore],
) -> None:
    """Not before, or what a customer defers would go round and round."""
    store = open_store()
    [[left], [other]] = store.put([arrival("b@acme.example", "c@acme.example")] * 2)
    feed = store.feed("acme")
    assert [one.key for one in feed.take(1, 1 << 40)] == [left]
    assert feed.has(left) and not feed.has(other)
    feed.leave([left])
    store.settle([Settled(left, ["b@acme.example"], "later")])
    assert [one.key for one in feed.take(10, 1 << 40)] == [other]
    assert feed.take(10, 1 << 40) == []
    feed.start_over()
    [again] = feed.take(10, 1 << 40)
    assert (again.key, again.envelope.recipients) == (left, ("c@acme.example",))


def test_a_message_goes_with_its_last_recipient(open_store: Callable[[], HoldStore]) -> None:
    store = open_store()
    [[key]] = store.put([arrival("b@acme.example", "c@acme.example", data=LARGE)])
    store.settle([Settled(key, ["b@acme.example"])])
    assert contents(store, key) == {key: LARGE}
    assert store.usage("acme") == Usage(1, len(LARGE))
    store.settle([Settled(key, ["c@acme.example"]), Settled(key, ["c@acme.example"])])
    assert (contents(store, key), store.find(key)) == ({}, None)
    assert store.usage("acme") == Usage()
    assert open_store().usages() == {}


@pytest.mark.parametrize("data", [MESSAGE, LARGE])
def test_a_message_for_several_accounts_is_each_ones_own(
    open_store: Callable[[], HoldStore], data: bytes
) -> None:
    store = open_store()
    [[first, second]] = store.put(
        [arrival("b@acme.example", "x@other.example", "c@acme.example", data=data)]
    )
    assert store.usages() == {name: Usage(1, len(data)) for name in ("acme", "other")}
    [held] = store.feed("acme").take(10, 1 << 40)
    assert held.envelope.recipients == ("b@acme.example", "c@acme.example")
    store.settle([Settled(first, held.envelope.recipients)])
    assert contents(store, first, second) == {second: data}
    [other] = store.feed("other").take(10, 1 << 40)
    assert other.envelope.recipients == ("x@other.example",)
    store.settle([Settled(second, other.envelope.recipients)])
    assert contents(store, second) == {}


def test_a_feed_of_some_domains(open_store: Callable[[], HoldStore]) -> None:
    store = open_store()
    mixed = Envelope("", ("a@x.example", "b@y.example"))
    only = Envelope("", ("c@y.example",))
    keys = store.put(
        [Arrival(one, ("acme",) * len(one.recipients), [b"x"]) for one in (mixed, only)]
    )
    [held] = store.feed("acme", ["x.example"]).take(10, 1 << 40)
    assert held.envelope.recipients == ("a@x.example",)
    store.settle([Settled(held.key, held.envelope.recipients)])
    rest = store.feed("acme").take(10, 1 << 40)
    assert [(one.key, *one.envelope.recipients) for one in rest] == [
        (keys[0][0], "b@y.example"),
        (keys[1][0], "c@y.example"),
    ]


def test_what_breaks_sessions_is_set_aside_until_someone_says_otherwise(
    open_store: Callable[[], HoldStore],
) -> None:
    store = open_store()
    [[bad], [good]] = store.put([arrival("b@acme.example"), arrival("b@acme.example")])
    for strikes in range(1, 4):
        found = store.strike(bad, 3, "it broke")
        assert found is not None and (found.strikes, found.reason) == (strikes, "it broke")
    assert found is not None and found.state is State.ASIDE
    assert store.strike(999_999, 3, "it broke") is None
    feed = store.feed("acme")
    assert [one.key for one in feed.take(10, 1 << 40)] == [good]
    assert [one.key for one in store.listing("acme")] == [bad, good]
    woken: list[Collection[str]] = []
    store.watch(woken.append)
    assert store.retry([bad, good, 999_999]) == 2
    assert [set(one) for one in woken] == [{"acme"}]
    assert [one.key for one in feed.take(10, 1 << 40)] == [bad]


def test_what_is_claimed_no_feed_gets_until_it_is_released(
    open_store: Callable[[], HoldStore],
) -> None:
    store = open_store()
    keys = [key for [key] in store.put([arrival("b@acme.example") for _ in range(3)])]
    feed = store.feed("acme")
    claimed = store.claim([*keys[:2], 999_999])
    assert [(one.key, one.account) for one in claimed.values()] == [(k, "acme") for k in keys[:2]]
    assert store.claim(keys[:2]) == {}
    assert [one.key for one in feed.take(10, 1 << 40)] == keys[2:]
    assert store.claim(keys[2:]) == {}
    store.settle([Settled(keys[0], ["b@acme.example"])])
    woken: list[Collection[str]] = []
    store.watch(woken.append)
    store.release(keys[:2])
    assert [set(one) for one in woken] == [{"acme"}]
    assert [one.key for one in feed.take(10, 1 << 40)] == keys[1:2]
    feed.close()
    assert list(store.claim(keys)) == keys[1:]


@pytest.mark.parametrize("when", ["claim", "release"])
def test_what_is_claimed_is_anyones_again_although_the_store_cannot_be_read(
    open_store: Callable[[], HoldStore], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    store = open_store()
    keys = [key for [key] in store.put([arrival("b@acme.org"), arrival("c@acme.org")])]
    find = store.find

    def fails(key: int) -> Held | None:
        if when == "claim" and key == keys[0]:
            return find(key)
        raise OSError("the disk is gone")

    if when == "claim":
        monkeypatch.setattr(store, "find", fails)
        with pytest.raises(OSError, match="the disk is gone"):
            store.claim(keys)
    else:
        claimed = store.claim(keys)
        monkeypatch.setattr(store, "find", fails)
        store.release(claimed)
    monkeypatch.undo()
    assert take(store, "acme") == keys


def test_what_is_held_can_be_asked_for_while_mail_comes(
    open_store: Callable[[], HoldStore],
) -> None:
    """Also for accounts that had none."""
    store = open_store()
    store.put([arrival(f"b@a{number}.org") for number in range(5000)])
    failed: list[BaseException] = []
    done = threading.Event()

    def come() -> None:
        try:
            for number in range(100):
                store.put([arrival(f"b@new{number}.org")])
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    coming = threading.Thread(target=come)
    try:
        coming.start()
        while not done.is_set():
            assert len(store.usages()) >= 5000
    finally:
        sys.setswitchinterval(before)
        coming.join()
    assert not failed and len(store.usages()) == 5100


def test_what_is_claimed_is_as_it_is_now(open_store: Callable[[], HoldStore]) -> None:
    """A message that was set aside, and one that some recipients have got."""
    store = open_store()
    [[one], [other]] = store.put([arrival("b@acme.example", "c@acme.example")] * 2)
    store.strike(one, 1, "it broke")
    store.settle([Settled(other, ["b@acme.example"], "later")])
    claimed = store.claim([one, other])
    assert (claimed[one].state, claimed[one].reason) == (State.ASIDE, "it broke")
    assert claimed[other].envelope.recipients == ("c@acme.example",)


def test_what_one_settles_in_parts_no_other_gets_whole(
    open_store: Callable[[], HoldStore],
) -> None:
    """Whoever looks for mail while another's answer is settled."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    store = open_store()
    names = [f"r{number}@acme.example" for number in range(200)]
    [[key]] = store.put([arrival(*names)])
    got: list[str] = []

    def work() -> None:
        while store.find(key) is not None:
            feed = store.feed("acme")
            for held in feed.take(10, 1 << 40):
                first = held.envelope.recipients[0]
                got.append(first)
                feed.leave([key])
                store.settle([Settled(key, [first], "later")])
            feed.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    sys.setswitchinterval(before)
    assert sorted(got) == sorted(names)


def test_whoever_watches_hears_of_mail_once_it_is_safe(
    open_store: Callable[[], HoldStore],
) -> None:
    store = open_store()
    seen: list[tuple[set[str], int]] = []
    store.watch(lambda names: seen.append((set(names), len(store.listing("acme")))))
    store.put([arrival("b@acme.example", "b@other.example"), arrival("c@acme.example")])
    assert seen == [({"acme", "other"}, 2)]


def test_the_listing_goes_on_after_a_key(open_store: Callable[[], HoldStore]) -> None:
    store = open_store()
    names = ("acme", "other", "acme")
    keys = [key for [key] in store.put([arrival(f"b@{name}.example") for name in names])]
    assert [one.key for one in store.listing()] == keys
    assert [one.key for one in store.listing(after=keys[0], messages=1)] == keys[1:2]
    assert [one.key for one in store.listing("acme", after=keys[0])] == keys[2:]


def test_what_is_set_aside_is_listed_and_counted(open_store: Callable[[], HoldStore]) -> None:
    store = open_store()
    names = ("acme", "acme", "other", "acme")
    keys = [key for [key] in store.put([arrival(f"b@{name}.example") for name in names])]
    for key in keys[1:3]:
        store.strike(key, 1, "it broke")
    standings = store.standings(["acme", "other", "no one"])
    assert {name: one.aside for name, one in standings.items()} == {"acme": 1, "other": 1}
    first = {one.account: one.arrived for one in reversed(store.listing())}
    assert {name: one.oldest for name, one in standings.items()} == first
    assert [one.key for one in store.listing(state=State.ASIDE)] == keys[1:3]
    assert [one.key for one in store.listing("acme", state=State.ASIDE)] == keys[1:2]
    assert [one.key for one in store.listing("acme", state=State.WAITING)] == [keys[0], keys[3]]
    assert store.listing("acme", keys[1], state=State.ASIDE) == []
    store.retry(keys)
    assert store.standings(["acme"])["acme"].aside == 0
    assert store.standings([]) == {}


@pytest.mark.parametrize("data", [MESSAGE, LARGE, (b"x" * 78 + b"\r\n") * 10_000])
def test_what_another_store_has_held_is_as_it_was(
    open_store: Callable[[], HoldStore], tmp_path: Path, data: bytes
) -> None:
    other = EmbeddedStore(tmp_path / "other")
    [[first, _]] = other.put([arrival("b@acme.org", "c@acme.org", "d@other.org", data=data)])
    other.settle([Settled(first, ["b@acme.org"], "later")])
    other.strike(first, 1, "it broke")
    other.note_warned(first)
    held = [replace(one, arrived=1000.25) for one in other.listing()]
    loaded = other.load([one.key for one in held])
    store = open_store()
    keys = store.adopt([(one, loaded[one.key]) for one in held])
    other.close()
    assert list(keys) == sorted(keys)
    store = open_store()
    assert list(store.listing()) == [
        replace(one, key=key) for one, key in zip(held, keys, strict=True)
    ]
    assert contents(store, *keys) == dict.fromkeys(keys, data)
    assert store.usages() == {name: Usage(1, len(data)) for name in ("acme", "other")}
    assert store.standings(["acme", "other"])["acme"] == Standing(1000.25, 1)
    assert store.others() == []


def test_from_several_threads_at_once(open_store: Callable[[], HoldStore]) -> None:
    store = open_store()
    done: list[int] = []

    def work(number: int) -> None:
        feed = store.feed(f"a{number}")
        for _ in range(20):
            [[key]] = store.put([arrival(f"b@a{number}.example")])
            [held] = feed.take(10, 1 << 40)
            assert held.key == key and contents(store, key)
            store.settle([Settled(key, held.envelope.recipients)])
        done.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(done) == [0, 1, 2, 3]
    assert store.usages() == {}


# -- the embedded store ----------------------------------------------------------------------------


def test_a_second_process_is_told_who_has_the_store(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path / "hold")
    code = (
        "import sys; from pathlib import Path\n"
        "from salmon_revsmtp.provider.hold.embedded import EmbeddedStore\n"
        "EmbeddedStore(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "hold")]
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode != 0
    assert f"process {os.getpid()} has it" in second.stderr
    store.close()
    assert subprocess.run(command).returncode == 0


def test_no_one_else_can_read_what_is_held(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = EmbeddedStore(tmp_path / "hold")
        store.put([arrival("b@acme.example"), arrival("b@acme.example", data=LARGE)])
        paths = [tmp_path / "hold", *(tmp_path / "hold").rglob("*")]
        assert [one for one in paths if one.stat().st_mode & 0o077] == []
        store.close()
    finally:
        os.umask(before)


def test_what_a_crash_left_goes_when_the_store_is_opened(tmp_path: Path) -> None:
    folder = tmp_path / "hold"
    store = EmbeddedStore(folder)
    [[key]] = store.put([arrival("b@acme.example", data=LARGE)])
    store.close()
    for place in ("tmp", "bodies"):
        (folder / place / "left").write_bytes(b"x")
    store = EmbeddedStore(folder)
    assert contents(store, key) == {key: LARGE}
    assert [one.name for one in folder.glob("*/left")] == []
    store.close()


def test_a_file_that_cannot_be_synced_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EmbeddedStore(tmp_path / "hold")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: exec("raise OSError(5, 'Input/output error')"))
        with pytest.raises(OSError, match="Input/output error"):
            store.put([arrival("b@acme.example"), arrival("b@acme.example", data=LARGE)])
    assert store.usages() == {}
    assert store.listing() == []
    assert list((tmp_path / "hold").glob("*/*-*")) == []
    store.close()


def test_what_cannot_be_committed_is_not_held(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path / "hold")
    [[first]] = store.put([arrival("b@acme.example")])
    other = sqlite3.connect(tmp_path / "hold/index.sqlite3", isolation_level=None)
    other.execute("CREATE TRIGGER no BEFORE INSERT ON held BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(OSError, match=r"hold.*no"):
        store.put([arrival("b@acme.example"), arrival("b@other.example", data=LARGE)])
    other.execute("DROP TRIGGER no")
    other.close()
    assert store.usages() == {"acme": Usage(1, len(MESSAGE))}
    assert [one.key for one in store.listing()] == [first]
    assert list((tmp_path / "hold/bodies").iterdir()) == []
    store.put([arrival("b@acme.example")])
    assert store.usage("acme").messages == 2
    store.close()


def test_the_log_grows_seldom_and_a_crash_at_any_size_of_it_loses_nothing(tmp_path: Path) -> None:
    """A file that grows costs each sync more; what it grows by is no mail."""
    store = EmbeddedStore(tmp_path / "hold")
    sizes, kept = [], []
    for number in range(60):
        [[key]] = store.put([arrival("b@acme.example", data=b"%d\r\n" % number)])
        kept.append(key)
        sizes.append((tmp_path / "hold/index.sqlite3-wal").stat().st_size)
        if number % 7 == 0:
            crashed = tmp_path / f"crashed-{number}"
            shutil.copytree(tmp_path / "hold", crashed)
            again = EmbeddedStore(crashed)
            assert [held.key for held in again.listing("acme")] == kept
            again.close()
    store.close()
    assert len(set(sizes)) < 12


def test_a_folder_that_cannot_be_used_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "hold").mkdir()
    (tmp_path / "hold/index.sqlite3").write_bytes(b"this is no database" * 100)
    with pytest.raises(HoldStoreError, match=r"opening the hold store .*not a database"):
        EmbeddedStore(tmp_path / "hold")
    (tmp_path / "file").write_text("x")
    with pytest.raises(HoldStoreError, match="opening the hold store"):
        EmbeddedStore(tmp_path / "file")


@pytest.mark.parametrize("left", [None, 0, 1000])
def test_a_message_whose_file_is_missing_or_cut_off_keeps_no_other_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, left: int | None
) -> None:
    store = EmbeddedStore(tmp_path / "hold")
    [[lost], [kept]] = store.put([arrival("b@acme.org", data=LARGE), arrival("b@acme.org")])
    [file] = (tmp_path / "hold/bodies").iterdir()
    if left is None:
        file.unlink()
    else:
        os.truncate(file, left)
    for _ in range(2):
        assert list(store.load([lost, kept])) == [kept]
    held = store.find(lost)
    assert held is not None and held.state is State.ASIDE
    assert file.name in held.reason and "a@example.net" in caplog.text
    assert take(store, "acme") == [kept]
    store.close()


def test_a_file_is_deleted_only_when_its_message_cannot_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even after a power cut: that its message is gone is synced before."""
    done: list[str] = []
    fsync, unlink = os.fsync, Path.unlink

    def synced(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        done.append(f"sync {name}")
        fsync(descriptor)

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        done.append(f"delete {path.parent.name}")
        unlink(path, missing_ok)

    store = EmbeddedStore(tmp_path / "hold")
    [[small], [large]] = store.put([arrival("b@acme.org"), arrival("b@acme.org", data=LARGE)])
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "unlink", unlinked)
    store.settle([Settled(small, ["b@acme.org"])])
    assert done == []
    store.settle([Settled(large, ["b@acme.org"])])
    assert done == ["sync index.sqlite3-wal", "delete bodies"]
    store.close()


def test_a_store_on_a_disk_without_room_for_a_name_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mail in it is what will make room."""
    store = EmbeddedStore(tmp_path / "hold")
    [[key]] = store.put([arrival("b@acme.org")])
    store.close()

    def full(path: Path, *pieces: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embedded, "_write_private", full)
    store = EmbeddedStore(tmp_path / "hold")
    assert take(store, "acme") == [key]
    store.close()
