"""The journal keeps moves in one line: promoters of our own in threads, one request at a time, in any order.

The store is a fake that does what MLflow does; `tests/contract/test_journal.py` holds the same against MLflow.
"""

from __future__ import annotations

import re
import runpy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rayscale.errors import ConflictError, UnavailableError
from rayscale.registry import journal, moves
from rayscale.registry.journal import DONE, EXTERNAL, INTENT, PROMOTE, Entry, Journal, Kind, chain, due, gated
from rayscale.registry.models import Registry, Version

ALIAS = "champion"
HAND, TIME = "hand", "time"  # in scripts, beside the promoters: an operator moves the alias; a long time passes


shared = runpy.run_path(str(Path(__file__).parents[1] / "interrupted.py"))
Killed, Interrupted = shared["Killed"], shared["Interrupted"]


class Page(list[Any]):
    token = ""


@dataclass(eq=False)
class FakeStore:
    """One model `m` with versions 1..9 and its journal, as MLflow keeps them; also the clock of its users."""

    before_request: Callable[[str], None] = lambda what: None
    alias: dict[str, int] = field(default_factory=dict)
    entries: list[Any] = field(default_factory=list)
    now: float = 0.0

    def get_registered_model(self, name: str) -> Any:
        self.before_request("look")
        return SimpleNamespace(aliases={alias: str(number) for alias, number in self.alias.items()})

    def get_model_version(self, name: str, number: str) -> Any:
        return SimpleNamespace(name=name, version=number, tags={"digest": digest(number)}, source="",
                               run_id="", aliases=[], creation_timestamp=0)  # fmt: skip

    def set_registered_model_alias(self, name: str, alias: str, number: str) -> None:
        self.before_request("set")
        self.alias[alias] = int(number)

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        self.before_request("set")
        self.alias.pop(alias, None)

    def search_model_versions(self, filter_string: str, **_: Any) -> Page:
        self.before_request("read")
        name, _and, tag = re.match(r"name='(.*?)'( and tags.gated='(.*)')?$", filter_string).groups()  # type: ignore[union-attr]
        return Page(e for e in self.entries if e.name == name and tag in (None, e.tags.get("gated")))

    def create_model_version(self, name: str, source: str, run_id: str, tags: dict[str, str], **_: Any) -> None:
        self.before_request("append")
        number = str(len(self.entries) + 1)
        self.entries.append(SimpleNamespace(name=name, version=number, tags=tags, creation_timestamp=0))

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.before_request("sleep")
        self.now += seconds


def digest(number: int | str) -> str:
    return f"{number}" * 64


def version(number: int) -> Version:
    return Version(name="m", version=number, digest=digest(number), uri="", run_id="")


@dataclass(eq=False)
class Promoter:
    """Moves the champion in a thread of its own, one request a turn. `outcome` is what it was told."""

    store: FakeStore
    before: int | None
    to: int
    outcome: Entry | BaseException | None = None
    next: str = ""  # the request that it is about to send; "" at the end
    killed: bool = False

    def __post_init__(self) -> None:
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._back.acquire()

    def _run(self) -> None:
        promoters[threading.get_ident()] = self
        try:
            self.outcome = book(self.store).move(ALIAS, version(self.to), before=self.before, decision=PROMOTE)
        except BaseException as error:
            self.outcome = error
        self.next = ""
        self._back.release()

    def wait(self, what: str) -> None:
        self.next = what
        self._back.release()
        self._go.acquire()
        if self.killed:
            raise Killed

    def turn(self) -> None:
        """Let it send one request."""
        if self.next:
            self._go.release()
            self._back.acquire()

    def kill(self) -> None:
        self.killed = True
        self.turn()


promoters: dict[int, Promoter] = {}  # by thread


def wait_for_turn(what: str) -> None:
    if promoter := promoters.get(threading.get_ident()):
        promoter.wait(what)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    return make_store(monkeypatch)


def make_store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    promoters.clear()
    made = FakeStore(before_request=wait_for_turn)
    monkeypatch.setattr(journal, "time", made)
    monkeypatch.setattr(journal, "POLL_S", 0.3)
    return made


def registry(client: Any) -> Registry:
    """The real one, on this client."""
    made = Registry.__new__(Registry)
    made.client, made.uri = client, "fake"
    return made


def book(client: Any) -> Journal:
    return Journal(registry(client), "m")


def race(store: FakeStore, script: Sequence[str]) -> tuple[Promoter, Promoter, bool]:
    """A moves 1 -> 2 and B 1 -> 3, in turns by the script, then alternately to their ends.

    Returns both, and whether the operator's hand, who moves it to 9, fell between a look and its request.
    """
    a, b = Promoter(store, 1, 2), Promoter(store, 1, 3)
    unseen = False
    for step in script:
        match step:
            case "A" | "B":
                (a if step == "A" else b).turn()
            case "time":
                store.now += journal.PATIENCE_S + 1
            case "hand":
                unseen = unseen or "set" in (a.next, b.next)
                store.alias[ALIAS] = 9
            case "kill":
                a.kill()
    while a.next or b.next:
        a.turn()
        b.turn()
    return a, b, unseen


def agreed(store: FakeStore) -> tuple[Entry, ...]:
    """The next command finds what happened; then alias and journal say the same."""
    stood = store.alias.get(ALIAS)
    last, stands = book(store).heal(ALIAS)
    assert store.alias.get(ALIAS) == stood == stands, "healing moved an alias"
    counted = chain(book(store).read(), ALIAS)
    if last is not None:
        assert counted[-1] == last
        assert last.stands == stands
        assert last.kind != INTENT
    return counted


def winners(*tried: Promoter) -> list[Promoter]:
    for one in tried:
        assert isinstance(one.outcome, Entry | ConflictError | UnavailableError | Killed), repr(one.outcome)
    return [one for one in tried if isinstance(one.outcome, Entry)]


LATE = ["A"] * 5 + ["B"] * 3 + [TIME] + ["B"] * 30 + ["A"]
"""A stops just before it sets the alias, B gives it up, wins, and A goes on."""

A_OR_B = st.lists(st.sampled_from(["A", "B"]), max_size=24)


def with_one(event: str, *more: str) -> st.SearchStrategy[list[str]]:
    """Turns of A and B in any order, and each of these once, anywhere."""
    step = st.sampled_from(["A", "B"])
    return st.lists(step, max_size=24).flatmap(
        lambda turns: st.permutations(range(len(turns) + 1)).map(
            lambda places: insert(turns, [(places[i % len(places)], e) for i, e in enumerate((event, *more))])
        )
    )


def insert(turns: list[str], events: list[tuple[int, str]]) -> list[str]:
    made = list(turns)
    for place, event in sorted(events, reverse=True):
        made.insert(place, event)
    return made


# --- races ------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(script=A_OR_B)
def test_of_two_promoters_exactly_one_wins_and_the_other_is_told_who(script: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        store = make_store(patch)
        store.alias[ALIAS] = 1
        a, b, _ = race(store, script)
        (winner,) = winners(a, b)
        (loser,) = {a, b} - {winner}
        assert isinstance(loser.outcome, ConflictError)
        assert f"from 1 to {winner.to} (promote)" in str(loser.outcome)
        assert store.alias == {ALIAS: winner.to}
        assert [e.kind for e in agreed(store)] == [INTENT, DONE]


def test_without_the_journals_check_both_win(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: looking at the alias before and after is not enough."""
    store.alias[ALIAS] = 1
    monkeypatch.setattr(Journal, "_check", lambda self, intent: None)
    monkeypatch.setattr(
        Journal, "_concluded", lambda self, intent: intent if self._stands(intent.alias) == intent.to else None
    )
    a, b, _ = race(store, ["A", "B"] * 3 + ["A", "A", "B", "B"])
    assert winners(a, b) == [a, b]


@settings(max_examples=150, deadline=None)
@given(script=with_one(TIME))
@example(LATE)
@example(LATE[:19] + ["A"] * 4)  # before B, who wins, has written that it is done
def test_a_promoter_that_is_overtaken_moves_nothing_that_stays(script: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        store = make_store(patch)
        store.alias[ALIAS] = 1
        a, b, _ = race(store, script)
        won = winners(a, b)
        assert len(won) <= 1
        agreed(store)
        assert store.alias[ALIAS] == (won[0].to if won else 1)


def test_the_overtaken_one_does_come_late_and_takes_it_back(store: FakeStore) -> None:
    """The example above is what it claims to be."""
    store.alias[ALIAS] = 1
    a, b, _ = race(store, LATE)
    assert winners(a, b) == [b]
    counted = agreed(store)
    assert [(e.kind, e.before, e.to) for e in counted] == [
        ("intent", 1, 2), ("abandoned", 1, 2), ("intent", 1, 3), ("done", 1, 3),
        ("external", 3, 2), ("intent", 2, 3), ("done", 2, 3)]  # fmt: skip
    assert counted[-1].decision == "taken back"


@settings(max_examples=150, deadline=None)
@given(script=with_one(HAND))
def test_what_was_moved_by_hand_stays_there(script: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        store = make_store(patch)
        store.alias[ALIAS] = 1
        a, b, unseen = race(store, script)
        assert len(winners(a, b)) <= 1
        counted = agreed(store)
        if not unseen:  # MLflow carries no condition: that window remains
            assert store.alias[ALIAS] == 9
            assert not counted or (counted[-1].kind, counted[-1].to) == (EXTERNAL, 9)


# --- crashes ----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(script=with_one("kill", TIME))
def test_whoever_is_killed_anywhere_the_next_command_makes_alias_and_journal_agree(script: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        store = make_store(patch)
        store.alias[ALIAS] = 1
        a, b, _ = race(store, script)
        assert len(winners(a, b)) <= 1
        agreed(store)
        now = store.alias[ALIAS]
        after = book(store).move(ALIAS, version(4), before=now, decision=PROMOTE)
        assert (store.alias[ALIAS], after.kind) == (4, DONE)


@pytest.mark.parametrize(("before", "to"), [(1, 2), (None, 2), (1, None), (2, 2)])
@pytest.mark.parametrize("error", [Killed(), ConnectionError("refused")])
def test_every_step_may_be_the_last(store: FakeStore, before: int | None, to: int | None, error: BaseException) -> None:
    """Killed, or MLflow away, before request k or just after it; the next command heals, the one after it moves."""
    for k, late in product(range(9), (False, True)):
        store.alias, store.entries = {} if before is None else {ALIAS: before}, []
        client = Interrupted(store, k, late=late, error=error)
        with pytest.raises((Killed, UnavailableError)):
            book(client).move(ALIAS, version(to) if to else None, before=before, decision=PROMOTE)
        assert store.alias.get(ALIAS) == (to if (k, late) >= (5, True) else before)
        assert len(agreed(store)) == (2 if (k, late) >= (2, True) else 0)  # the intent, and what came of it
        book(store).move(ALIAS, version(5), before=store.alias.get(ALIAS), decision=PROMOTE)
        assert [e.kind for e in agreed(store)[-2:]] == [INTENT, DONE]
        assert store.alias == {ALIAS: 5}
    store.alias, store.entries = {ALIAS: 1}, []
    client = Interrupted(store, 9, late=False, error=error)  # control: there are nine
    assert book(client).move(ALIAS, version(2), before=1, decision=PROMOTE).kind == DONE


# --- healing ----------------------------------------------------------------------------------------------------


def test_a_hand_is_written_down_once_and_moves_go_on_from_there(store: FakeStore) -> None:
    book(store).move(ALIAS, version(1), before=None, decision=PROMOTE)
    store.alias[ALIAS] = 7
    for _ in range(2):
        last, stands = book(store).heal(ALIAS)
        assert last is not None
        assert (last.kind, last.before, last.to, last.digest, stands) == (EXTERNAL, 1, 7, digest(7), 7)
    assert [e.kind for e in book(store).read()] == [INTENT, DONE, EXTERNAL]
    with pytest.raises(ConflictError, match="moved from 1 to 7 by hand"):
        book(store).move(ALIAS, version(2), before=1, decision=PROMOTE)
    assert store.alias == {ALIAS: 7}
    del store.alias[ALIAS]
    assert book(store).heal(ALIAS)[1] is None
    book(store).move(ALIAS, version(2), before=None, decision=PROMOTE)
    assert store.alias == {ALIAS: 2}


def test_an_unfinished_move_is_left_alone_for_a_while(store: FakeStore) -> None:
    store.alias[ALIAS] = 1
    a = Promoter(store, 1, 2)
    while a.next != "set":
        a.turn()
    b = Promoter(store, 1, 3)
    began = store.now
    while a.next and b.next and store.now < began + journal.PATIENCE_S - 1:
        b.turn()
    assert [e.kind for e in book(store).read()] == [INTENT]
    while b.next:
        b.turn()
    assert store.now >= began + journal.PATIENCE_S
    assert store.alias == {ALIAS: 3}
    a.kill()


def test_who_is_too_slow_gives_up_by_itself(store: FakeStore) -> None:
    store.alias[ALIAS] = 1
    a = Promoter(store, 1, 2)
    while a.next != "append":
        a.turn()
    a.turn()  # the intent
    store.now += journal.HASTE_S + 1
    while a.next:
        assert a.next != "set"
        a.turn()
    assert isinstance(a.outcome, UnavailableError)
    assert [e.kind for e in agreed(store)] == ["intent", "abandoned"]
    assert store.alias == {ALIAS: 1}


def test_aliases_of_one_model_do_not_mind_each_other(store: FakeStore) -> None:
    book(store).move(ALIAS, version(1), before=None, decision=PROMOTE)
    made = book(store).move("canary", version(2), before=None, decision="canary", weight=5.0)
    assert (made.weight, store.alias) == (5.0, {ALIAS: 1, "canary": 2})
    book(store).move("canary", version(2), before=2, decision="canary", weight=20.0)
    last = book(store).last("canary")
    assert last is not None
    assert (last.kind, last.weight) == (DONE, 20.0)
    book(store).move("canary", None, before=2, decision="rollback", why="too many errors")
    assert store.alias == {ALIAS: 1}
    assert len(chain(book(store).read(), ALIAS)) == 2


def test_a_gate_that_was_passed_or_forced_is_found_by_digest_and_alias(store: FakeStore) -> None:
    for number, decision in ((1, PROMOTE), (2, "forced"), (3, "rollback")):
        book(store).move(ALIAS, version(number), before=store.alias.get(ALIAS), decision=decision)
    store.alias[ALIAS] = 4
    book(store).heal(ALIAS)
    for number, decision in ((3, PROMOTE), (4, "forced"), (2, PROMOTE)):
        book(store).move("other", version(number), before=store.alias.get("other"), decision=decision)

    def found(alias: str) -> list[bool]:
        return [gated(registry(store), "m", digest(n), alias) for n in (1, 2, 3, 4, 5)]

    assert found(ALIAS) == [True, True, False, False, False]
    assert found("other") == [False, True, True, True, False]
    assert found("another") == [False] * 5


def test_the_history_tells_what_came_of_each_move(store: FakeStore) -> None:
    store.alias[ALIAS] = 1
    race(store, LATE)
    book(store).append(replace(book(store).read()[2], id="lost", number=0))  # an intent that came too late
    store.alias[ALIAS] = 9
    agreed(store)
    told = [(m.decision, m.before, m.version, m.moved, m.why_not) for m in moves._journalled(book(store).read())]
    assert told == [
        (PROMOTE, 1, 2, False, "abandoned"),
        (PROMOTE, 1, 3, True, ""),
        (EXTERNAL, 3, 2, True, ""),
        ("taken back", 2, 3, True, ""),
        (PROMOTE, 1, 3, False, "another one won"),
        (EXTERNAL, 3, 9, True, ""),
    ]


# --- the pure part ----------------------------------------------------------------------------------------------

KINDS: tuple[Kind, ...] = ("intent", "done", "abandoned", "external")
ENTRY = st.builds(
    Entry,
    kind=st.sampled_from(KINDS),
    alias=st.sampled_from([ALIAS, ALIAS, "other"]),
    before=st.sampled_from([None, 1, 2]),
    to=st.sampled_from([None, 1, 2]),
    id=st.sampled_from("abcdefgh"),
    after=st.sampled_from(["", *"abcdefgh"]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ENTRY, max_size=30))
def test_what_counts_is_one_line_and_counts_for_ever(drawn: list[Entry]) -> None:
    entries = [replace(entry, number=i) for i, entry in enumerate(drawn, 1)]
    whole = chain(entries, ALIAS)
    assert chain(list(reversed(entries)), ALIAS) == whole  # by number, not by arrival
    for k in range(len(entries)):
        part = chain(entries[:k], ALIAS)
        assert whole[: len(part)] == part
    for last, entry in pairwise(whole):
        assert (entry.after, entry.before) == (last.id, last.stands)
        assert (entry.kind in (DONE, "abandoned")) <= (last.kind == INTENT)
        assert (entry.kind == INTENT) <= (last.kind != INTENT)
    twice = sorted([*entries, *(replace(e, number=e.number + 1000) for e in entries)], key=lambda e: e.number)
    if len({e.id for e in entries}) == len(entries):  # requests sent twice change nothing
        assert chain(twice, ALIAS) == whole


@given(ENTRY, st.sampled_from([None, 1, 2]))
def test_what_is_due_makes_them_agree(last: Entry, stands: int | None) -> None:
    kind = due(last, stands)
    if kind is None:
        assert last.stands == stands
        assert last.kind != INTENT
        return
    to = stands if kind == EXTERNAL else last.to
    entry = replace(last, kind=kind, before=last.stands, to=to, id="new", after=last.id)
    assert entry.stands == stands
    assert due(entry, stands) is None
