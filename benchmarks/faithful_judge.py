"""The judge of ``python -m benchmarks faithful``: from what the ranks of a launch wrote to counted answers.

It sees the ids that each rank read, step by step, and nothing of the tool that delivered them.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.faithful_tools import EPOCHS, SAMPLES, Step

QUESTIONS = {
    "once": "Is each training sample seen once per epoch?",
    "batches": "Are the global batches those of the first number of ranks?",
    "resume": "After a kill in mid-epoch: do the same batches follow, on as many ranks?",
    "elastic": "And on another number of ranks?",
    "evaluation": "Does evaluation count each sample once?",
    "ends": "Does every rank end, with as many steps as the others?",
    "order": "Does the same seed give the same order in new processes?",
}
# Steps of the second epoch after which the state is saved, and after which the processes are killed.
SAVE_AT, KILL_AT = 8, 11

# The ids of steps, by epoch and number in the epoch.
Steps = dict[tuple[int, int], list[int]]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a launch did, by rank."""

    steps: list[list[Step]]
    """For each step its epoch, and the epochs and ids of its samples."""
    evaluated: list[list[int]] = field(default_factory=list)
    """The ids that each rank counted."""
    ended: list[bool] = field(default_factory=list)
    error: str = ""
    """Of the first rank that failed; empty if none did."""

    def rank_steps(self, rank: int) -> Steps:
        """Return the ids of each step of a rank in their order, by epoch and number in the epoch."""
        steps: Steps = {}
        seen: Counter[int] = Counter()
        for epoch, _, ids in self.steps[rank]:
            steps[epoch, seen[epoch]] = ids
            seen[epoch] += 1
        return steps

    def global_steps(self) -> Steps:
        """Return the ids of each step over all ranks, sorted, by epoch and number in the epoch."""
        steps: Steps = {}
        for rank in range(len(self.steps)):
            for key, ids in self.rank_steps(rank).items():
                steps[key] = sorted(steps.get(key, []) + ids)
        return steps

    def samples(self, epoch: int) -> Counter[int]:
        """Return how often each id was seen in an epoch."""
        pairs = chain.from_iterable(zip(epochs, ids, strict=True) for _, epochs, ids in chain(*self.steps))
        return Counter(sample for at, sample in pairs if at == epoch)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to a question on a number of ranks."""

    answer: str
    """yes, no or partly."""
    counts: dict[str, Any]


def count_once(seen: Counter[int], wanted: Counter[int]) -> dict[str, int]:
    """Return how many samples were seen more often than wanted, and how many less often."""
    return {"repeated": (seen - wanted).total(), "missed": (wanted - seen).total()}


def judge_once(record: Record) -> Answer:
    """Judge the epoch in which most samples were repeated or missed."""
    every = Counter(range(SAMPLES))
    counts = max((count_once(record.samples(epoch), every) for epoch in range(EPOCHS)), key=lambda c: sum(c.values()))
    beyond = sum(record.samples(EPOCHS).values())
    return Answer(answer="no" if any(counts.values()) else "yes", counts={**counts, "of_the_next_epoch": beyond})


def judge_evaluation(record: Record) -> Answer:
    """Judge what an evaluation counted."""
    counts = count_once(Counter(chain(*record.evaluated)), Counter(range(SAMPLES)))
    return Answer(answer="no" if any(counts.values()) else "yes", counts=counts)


def compare(found: Steps, wanted: Steps) -> Answer:
    """Judge steps against those that are wanted: yes if all are equal, partly if some are."""
    equal = sum(wanted.get(key) == ids for key, ids in found.items())
    counts = {"equal_steps": equal, "steps": len(found.keys() | wanted.keys())}
    return Answer(answer="yes" if equal == counts["steps"] else "partly" if equal else "no", counts=counts)


def judge_resume(resumed: Record, whole: Record, saved_at: int) -> Answer:
    """Judge the second epoch after a resume, from the step of the checkpoint on, against a run that was not killed.

    The counts are of the epoch that the model has seen: up to the checkpoint, and after the resume. The answer is at
    most partly if the checkpoint is of the beginning of the epoch: its steps are trained again.
    """
    last = {key: ids for key, ids in whole.global_steps().items() if key[0] == 1}
    wanted = {key: ids for key, ids in last.items() if key[1] >= saved_at}
    found = {(1, saved_at + number): ids for (epoch, number), ids in resumed.global_steps().items() if epoch == 1}
    answer = compare(found, wanted)
    before = chain.from_iterable(ids for key, ids in last.items() if key not in wanted)
    samples = count_once(resumed.samples(1) + Counter(before), Counter(range(SAMPLES)))
    counts = {**answer.counts, **samples, "steps_trained_again": KILL_AT - saved_at}
    return Answer(answer="partly" if answer.answer == "yes" and not saved_at else answer.answer, counts=counts)


def judge_order(again: Record, whole: Record) -> Answer:
    """Judge the steps of each rank, up to the kill, against the same launch in other processes."""
    runs: list[Steps] = []
    for record in (again, whole):
        ranks = [record.rank_steps(rank) for rank in range(len(record.steps))]
        # A rank's epochs are numbered apart from those of the others.
        keys = [(rank, key) for rank, steps in enumerate(ranks) for key in steps if key < (1, KILL_AT)]
        runs.append({(rank * EPOCHS + key[0], key[1]): ranks[rank][key] for rank, key in keys})
    return compare(*runs)


def judge_ends(whole: Record, lockstep: Record | None = None) -> Answer:
    """Judge whether all ranks ended with equally many steps; ``lockstep``: what an all-reduce per step made of it."""
    steps = [len(rank) for rank in whole.steps]
    counts = {"steps_of_the_shortest_rank": min(steps), "steps_of_the_longest_rank": max(steps)}
    counts["ranks_hung"] = whole.ended.count(False)
    if lockstep is not None:
        counts["ranks_hung_with_an_all_reduce_per_step"] = lockstep.ended.count(False)
    return Answer(answer="yes" if all(whole.ended) and len(set(steps)) == 1 else "no", counts=counts)


def read_record(paths: Sequence[Path]) -> Record:
    """Read the files of the ranks of a launch."""
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    return Record(
        steps=[[row["step"] for row in rank if "step" in row] for rank in rows],
        evaluated=[list(chain.from_iterable(row.get("evaluated", []) for row in rank)) for rank in rows],
        ended=[any("ended" in row for row in rank) for rank in rows],
        error=next((row["error"] for rank in rows for row in rank if "error" in row), ""),
    )
