"""``provider move-hold``: all of a hold in another store, as it was, however often it is
interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.messages import MESSAGE
from support.project import Project

from salmon_revsmtp.provider import moving
from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.provider.hold.store import Arrival, Held, HoldStore, Settled
from salmon_revsmtp.provider.moving import Move, MoveError
from salmon_revsmtp.smtp.content import Content, whole
from salmon_revsmtp.smtp.envelope import Envelope

LARGE = (b"x" * 78 + b"\r\n") * 10_000
NAMES = ("/old", "/new")


def fill(store: HoldStore, messages: int = 25) -> None:
    for number in range(messages):
        data = LARGE if number % 10 == 3 else MESSAGE + b"%d\r\n" % number
        recipients = ("b@acme.example", "c@acme.example", "d@other.example")
        envelope = Envelope(f"m{number}@example.net", recipients, {"ENVID": str(number)})
        [[first, _]] = store.put([Arrival(envelope, ("acme", "acme", "other"), [data])])
        if number % 4 == 1:
            store.settle([Settled(first, ["b@acme.example"], "later")])
        if number % 7 == 2:
            store.strike(first, 1, "it broke")


def contents(store: HoldStore) -> list[tuple[Held, bytes]]:
    """All that is held, but for its keys."""
    held = store.listing(messages=10_000)
    found = store.load([one.key for one in held])
    return [(replace(one, key=0), whole(found[one.key])) for one in held]


@pytest.fixture
def old(tmp_path: Path) -> Iterator[EmbeddedStore]:
    store = EmbeddedStore(tmp_path / "old")
    fill(store)
    yield store
    store.close()


@pytest.fixture(params=["embedded", pytest.param("postgres", marks=pytest.mark.interop)])
def new(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HoldStore]:
    store: HoldStore
    if request.param == "embedded":
        store = EmbeddedStore(tmp_path / "new")
    else:
        from salmon_revsmtp.provider.hold.postgres import PostgresStore

        database = request.getfixturevalue("database")
        store = PostgresStore(database.url(database.schema()), tmp_path / "new")
    yield store
    store.close()


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "run/move-hold"


def test_all_of_it_is_there_as_it_was_and_in_its_order(
    old: HoldStore, new: HoldStore, record: Path
) -> None:
    before = contents(old)
    moved = Move(old, new, NAMES, record).run()
    assert (moved.messages, moved.accounts, moved.missing) == (50, {"acme", "other"}, [])
    assert contents(new) == contents(old) == before
    assert new.usages() == old.usages()
    assert not record.exists()


@pytest.mark.parametrize("when", ["before it is safe", "before it is recorded", "in its record"])
def test_a_move_that_is_interrupted_goes_on_and_brings_nothing_twice(
    old: HoldStore,
    new: HoldStore,
    record: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    """Again and again, at each batch."""
    monkeypatch.setattr(moving, "PAGE", 7)
    adopt, note = new.adopt, Move._note

    def dies_before(moved: Sequence[tuple[Held, bytes | Content]]) -> Sequence[int]:
        keys = adopt(moved) if not died else []
        died.append(1)
        if len(died) > 1:
            raise OSError("killed")
        return keys

    def dies_at_the_record(self: Move, line: Any) -> None:
        if isinstance(line, list):
            died.append(1)
            if len(died) > 1:
                if when == "in its record":
                    with record.open("a") as file:
                        file.write(json.dumps(line)[:-3])
                raise OSError("killed")
        note(self, line)

    interrupted = 0
    for _ in range(20):
        died: list[int] = []
        with monkeypatch.context() as patch:
            if when == "before it is safe":
                patch.setattr(new, "adopt", dies_before)
            else:
                patch.setattr(Move, "_note", dies_at_the_record)
            try:
                moved = Move(old, new, NAMES, record).run()
            except OSError:
                interrupted += 1
                continue
        break
    assert interrupted >= 3
    assert moved.messages == 50 and moved.resumed > 0
    assert contents(new) == contents(old)
    assert not record.exists()


def test_what_is_not_empty_is_left_alone(old: HoldStore, new: HoldStore, record: Path) -> None:
    fill(new, 1)
    with pytest.raises(MoveError, match="/new holds mail already"):
        Move(old, new, NAMES, record).run()
    assert len(new.listing()) == 2


def begun(old: HoldStore, new: HoldStore, record: Path, patch: pytest.MonkeyPatch) -> None:
    """A move of which the half is done."""
    patch.setattr(moving, "PAGE", 7)
    with patch.context() as later:
        later.setattr(Move, "_compare", lambda self, moved: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Move(old, new, NAMES, record).run()


def test_a_move_to_elsewhere_that_was_not_ended_is_named(
    old: HoldStore, new: HoldStore, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(old, new, record, monkeypatch)
    with pytest.raises(MoveError, match=r"a move from /old to /new was interrupted: run that"):
        Move(old, new, ("/old", "/elsewhere"), record).run()


@pytest.mark.parametrize("what", ["it has more", "it is settled", "it is another"])
def test_a_store_that_something_else_has_used_meanwhile_is_noticed(
    old: HoldStore, new: HoldStore, record: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    begun(old, new, record, monkeypatch)
    if what == "it has more":
        fill(new, 1)
    elif what == "it is settled":
        new.settle([Settled(new.listing()[0].key, ["b@acme.example", "c@acme.example"])])
    else:
        new.strike(new.listing()[0].key, 5, "it broke")
    with pytest.raises(MoveError, match="something else has used one of the two"):
        Move(old, new, NAMES, record).run()


def test_a_message_whose_content_is_lost_is_named_and_the_others_are_moved(
    old: HoldStore, new: HoldStore, record: Path, tmp_path: Path
) -> None:
    file = sorted((tmp_path / "old/bodies").iterdir())[0]
    file.unlink()
    moved = Move(old, new, NAMES, record).run()
    assert moved.messages == 48 and len(moved.missing) == 2
    assert len(new.listing()) == 48


@pytest.mark.interop
def test_a_database_that_another_process_uses_is_left_alone(
    old: HoldStore, record: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from salmon_revsmtp.provider.hold.postgres import PostgresStore

    database = request.getfixturevalue("database")
    url = database.url(database.schema())
    one, other = (PostgresStore(url, tmp_path / name) for name in "ab")
    with pytest.raises(MoveError, match=f"/new is in use by process {os.getpid()} on "):
        Move(old, one, NAMES, record).run()
    other.close()
    assert Move(old, one, NAMES, record).run().messages == 50
    one.close()


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def at_a_provider(project: Project) -> Project:
    settings = project.folder / "config/settings.py"
    settings.write_text(
        settings.read_text().partition("\nimport os")[0]
        + "\ncustomer_accounts = [{'name': 'acme', 'password': 'x', 'domains': ['example.org']}]\n"
        + "provider = {'listen': '127.0.0.1:0', 'hold': 'run/new'}\n"
    )
    store = EmbeddedStore(project.folder / "run/hold")
    fill(store)
    store.close()
    return project


def test_the_command_says_what_it_did(at_a_provider: Project) -> None:
    done = at_a_provider.run("provider", "move-hold", "run/hold")
    assert (done.returncode, done.stderr) == (0, "")
    here = at_a_provider.folder.resolve()
    assert done.stdout.startswith("copied and compared: 50 messages, ")
    assert done.stdout.endswith(
        f"held for 2 accounts. {here}/run/hold still has them: start no server on it.\n"
    )
    done = at_a_provider.run("provider", "move-hold", "run/new", "run/newer", "--json")
    [row] = map(json.loads, done.stdout.splitlines())
    assert (row["from"], row["to"]) == (f"{here}/run/new", f"{here}/run/newer")
    assert (row["messages"], row["accounts"], row["missing"]) == (50, 2, [])


@pytest.mark.parametrize(
    ("places", "status", "said"),
    [
        (["run/nothing"], 2, "there is no hold store in the folder"),
        (["run/new"], 2, "FROM and TO are the same"),
        (["mysql://u:s3cret@h/x"], 2, "no hold store has URLs with mysql://; there are: a folder,"),
        (["?postgresql://u:s3cret@h/x"], 2, "a URL begins with a scheme"),
        (["run/hold", "postgresql://u:s3cret@127.0.0.1:1/x"], 1, "opening the hold store"),
    ],
)
def test_what_cannot_be_is_said_without_a_password(
    at_a_provider: Project, places: list[str], status: int, said: str
) -> None:
    done = at_a_provider.run("provider", "move-hold", *places)
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    assert "s3cret" not in done.stderr
