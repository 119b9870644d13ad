"""Is a new version worse than the one beside it? Counts of what both did in one window, and a verdict.

Pure: no clock, no Ray. `rollout.py` keeps a trial for every canary and for every new champion's first minutes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from rayscale.serve.batching import Outcome

FAILURES, FAILURE_RATE = 5, 0.1  # at least so many, and a share of all that is higher by so much: too many
RUNS, SLOWDOWN = 50, 2.0  # after so many of both, so many times the time: too slow


def verdict(new: Outcome, old: Outcome) -> str:
    """Why the new version is to be taken back, "" where it is not; `old`: the other one's runs in the same window.

    Times are geometric means per unit of work, as pictures differ in size, and a run that waited for a busy CPU says
    little. A champion on probation answers alone: it is judged by its failures.
    """
    runs, others = new.ok + new.failed, old.ok + old.failed
    usual = old.failed / others if others else 0.0
    if new.failed >= FAILURES and new.failed >= (usual + FAILURE_RATE) * runs:
        beside = f", {old.failed} of {others} of the version beside it" if old.failed else ""
        return f"{new.failed} of {runs} runs failed{beside}"
    if min(new.timed, old.timed) >= RUNS and slowdown(new, old) >= SLOWDOWN:
        return f"{new.timed} runs took {slowdown(new, old):.1f} times as long as {old.timed} of the version beside it"
    return ""


def slowdown(new: Outcome, old: Outcome) -> float:
    """How many times as long the same work takes, by the timed runs; both have some."""
    return math.exp(new.log_s / new.timed - old.log_s / old.timed)


@dataclass(eq=False, kw_only=True)
class Trial:
    """A version that is watched: a canary, or a champion in its first minutes."""

    digest: str
    beside: str  # the version that it is compared with, and that takes over from it
    until: float
    canary: str = ""  # which; "": a champion on probation
    _first: dict[tuple[str, str], Outcome] = field(default_factory=dict)  # by replica and digest
    _last: dict[tuple[str, str], Outcome] = field(default_factory=dict)

    def hear(self, replica: str, outcomes: Mapping[str, Outcome]) -> None:
        """What a replica has counted since it started. What it said first was before the trial."""
        for digest in (self.digest, self.beside):
            self._last[replica, digest] = now = outcomes.get(digest, Outcome())
            self._first.setdefault((replica, digest), now)

    def outcome(self, digest: str) -> Outcome:
        """Of all replicas, also of those that died meanwhile."""
        spans = [(self._first[key], last) for key, last in self._last.items() if key[1] == digest]
        return Outcome(
            ok=sum(last.ok - first.ok for first, last in spans),
            failed=sum(last.failed - first.failed for first, last in spans),
            timed=sum(last.timed - first.timed for first, last in spans),
            log_s=math.fsum(last.log_s - first.log_s for first, last in spans),
        )

    def verdict(self) -> str:
        beside = self.outcome(self.beside)
        if not self.canary:  # who asks for the old version by its number, or by another alias, asks other things
            beside = beside._replace(timed=0, log_s=0.0)
        return verdict(self.outcome(self.digest), beside)

    def told(self) -> str:
        """So far, for people."""
        new, old = self.outcome(self.digest), self.outcome(self.beside)
        text = f"{new.ok + new.failed} runs, {new.failed} failed"
        return text + (f", {slowdown(new, old):.2f} times the time" if new.timed and old.timed else "")
