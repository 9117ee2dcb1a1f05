"""The judge of ``python -m benchmarks faithful`` finds what it looks for, and its launches kill, resume and hang."""

import json
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import faithful as bench
from benchmarks.faithful import Launch, ask, describe, faithful, launch, print_answers
from benchmarks.faithful_judge import (
    KILL_AT,
    QUESTIONS,
    SAVE_AT,
    Record,
    compare,
    judge_ends,
    judge_evaluation,
    judge_once,
    judge_order,
    judge_resume,
    read_record,
)
from benchmarks.faithful_tools import BATCH, EPOCHS, SAMPLES, LitData, MosaicStreaming, Ordered, Step, Tool
from benchmarks.options import Faithful
from mnistm_dist.errors import UserError

# Python 3.12 and later: the libraries' threads do nothing while the processes are forked.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def steps(epochs: range = range(EPOCHS), first: int = 0) -> list[Step]:
    """Return the steps of one process that reads each sample once per epoch, from step ``first`` of the first epoch."""
    return [
        (epoch, [epoch] * len(ids), ids)
        for epoch in epochs
        for at in range(first * BATCH if epoch == epochs[0] else 0, SAMPLES, BATCH)
        if (ids := list(range(at, min(at + BATCH, SAMPLES))))
    ]


WHOLE = Record(steps=[steps()], evaluated=[list(range(SAMPLES))], ended=[True])


def test_an_order_without_faults_is_answered_with_yes():
    resumed = Record(steps=[steps(range(1, 2), SAVE_AT)])
    answers = [
        judge_once(WHOLE),
        judge_evaluation(WHOLE),
        judge_ends(WHOLE),
        judge_order(WHOLE, WHOLE),
        judge_resume(resumed, WHOLE, SAVE_AT),
        compare(WHOLE.global_steps(), WHOLE.global_steps()),
    ]
    assert [answer.answer for answer in answers] == ["yes"] * len(answers)


def test_the_epoch_with_the_most_samples_repeated_or_missed_is_counted():
    # The second epoch: sample 0 is read in place of 5 and of 6, and once more by another rank.
    epoch, epochs, ids = (first := steps())[len(first) // 2]
    first[len(first) // 2] = (epoch, epochs, [0 if sample in (5, 6) else sample for sample in ids])
    answer = judge_once(Record(steps=[first, [(1, [1], [0])]]))
    assert (answer.answer, answer.counts) == ("no", {"repeated": 3, "missed": 2, "of_the_next_epoch": 0})


def test_samples_beyond_the_last_epoch_are_counted_apart():
    answer = judge_once(Record(steps=[[*steps(), (1, [1 + 1, 1 + 1], [3, 4])]]))
    assert (answer.answer, answer.counts["of_the_next_epoch"]) == ("yes", 2)


def test_an_evaluation_that_pads_is_not_exact():
    answer = judge_evaluation(Record(steps=[[]], evaluated=[[*range(1, SAMPLES), 7], [7]]))
    assert (answer.answer, answer.counts) == ("no", {"repeated": 2, "missed": 1})


def test_global_batches_are_compared_over_all_ranks_in_any_order():
    halves: list[list[Step]] = [[], []]
    for epoch, epochs, ids in steps():
        for rank in (0, 1):
            part = ids[::-1][rank::2]
            halves[rank].append((epoch, epochs[: len(part)], part))
    split = Record(steps=halves)
    assert compare(split.global_steps(), WHOLE.global_steps()).answer == "yes"
    # The order within a rank is not that of one process.
    assert judge_order(Record(steps=[halves[0]]), WHOLE).answer == "no"
    epoch, epochs, ids = halves[1][3]
    halves[1][3] = (epoch, epochs, [SAMPLES - 1, *ids[1:]])
    answer = compare(Record(steps=halves).global_steps(), WHOLE.global_steps())
    assert (answer.answer, answer.counts["steps"] - answer.counts["equal_steps"]) == ("partly", 1)


def test_a_resume_that_skips_or_repeats_steps_is_counted():
    late = judge_resume(Record(steps=[steps(range(1, 2), SAVE_AT + 1)]), WHOLE, SAVE_AT)
    assert (late.answer, late.counts["missed"], late.counts["repeated"]) == ("no", BATCH, 0)
    early = judge_resume(Record(steps=[steps(range(1, 2), SAVE_AT - 2)]), WHOLE, SAVE_AT)
    assert (early.answer, early.counts["missed"], early.counts["repeated"]) == ("no", 0, 2 * BATCH)
    nothing = judge_resume(Record(steps=[[]]), WHOLE, SAVE_AT)
    assert (nothing.answer, nothing.counts["missed"]) == ("no", SAMPLES - SAVE_AT * BATCH)


def test_an_epoch_that_starts_again_is_resumed_partly():
    answer = judge_resume(Record(steps=[steps(range(1, 2))]), WHOLE, saved_at=0)
    assert (answer.answer, answer.counts["steps_trained_again"]) == ("partly", KILL_AT)
    assert (answer.counts["repeated"], answer.counts["missed"]) == (0, 0)


def test_ranks_with_unequal_steps_do_not_end():
    answer = judge_ends(Record(steps=[steps(), steps()[:-1]], ended=[True, True]), Record(steps=[], ended=[False] * 2))
    assert (answer.answer, answer.counts["ranks_hung_with_an_all_reduce_per_step"]) == ("no", 2)
    assert judge_ends(Record(steps=[steps(), steps()], ended=[True, False])).answer == "no"


def test_the_files_of_the_ranks_are_read_up_to_where_they_were_killed(tmp_path):
    (tmp_path / "a").write_text('{"step": [0, [0, 0], [4, 5]]}\n{"evaluated": [4]}\n{"ended": true}\n')
    (tmp_path / "b").write_text('{"step": [0, [0], [6]]}\n{"error": "ValueError: no"}\n')
    record = read_record([tmp_path / "a", tmp_path / "b"])
    assert record.global_steps() == {(0, 0): [4, 5, 6]}
    assert (record.evaluated, record.ended, record.error) == ([[4], []], [True, False], "ValueError: no")


class Uneven(Tool):
    """Rank 0 has a step more than the others."""

    name = "uneven"

    def train(self) -> Iterator[Step]:
        for step in range(3 if self.rank else 4):
            yield 0, [0], [step]


class Wrong(Uneven):
    name = "wrong"

    def train(self) -> Iterator[Step]:
        yield 0, [0], [0]
        raise RuntimeError("no such shard\nsecond line")


def test_a_rank_that_waits_for_another_one_hangs_and_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "COLLECTIVE_TIMEOUT", 1)
    numbers = count()

    def run(job: Launch) -> Record:
        return launch(Uneven, job, tmp_path, tmp_path / str(next(numbers)))

    whole, lockstep = run(Launch(world_size=2)), run(Launch(world_size=2, lockstep=True))
    assert (whole.ended, [len(rank) for rank in whole.steps]) == ([True, True], [4, 3])
    assert lockstep.ended == [False, False]


def test_the_error_of_a_tool_is_its_answer(tmp_path):
    numbers = count()
    answers = ask(Wrong, lambda job: launch(Wrong, job, tmp_path, tmp_path / str(next(numbers))), [1])
    found = {question: answer for question, _, answer in answers}
    assert {question: answer.answer for question, answer in found.items()} == {"ends": "no", "once": "no"}
    assert found["once"].counts == {"error": "RuntimeError: no such shard"}


def test_only_the_shared_memory_of_the_own_folder_is_removed(tmp_path):
    own, other = (f"test{os.getpid()}{name}" for name in "ab")
    names = [Path("/dev/shm") / f"{prefix}_{part}" for prefix in (own, other) for part in ("locals", "barrier")]
    try:
        for name in names:
            name.write_bytes(f"{tmp_path if name.name.startswith(own) else '/elsewhere'}/train\0{0}".encode())
        MosaicStreaming.clean(tmp_path)
        assert [name.exists() for name in names] == [False, False, True, True]
    finally:
        for name in names:
            name.unlink(missing_ok=True)


@pytest.mark.slow
def test_torch_and_ours_are_measured_with_real_kills(capsys):
    result = faithful(Faithful(only=("torch Dist", "mnistm_dist"), ranks=(1, 2)))
    answers = {(row["tool"].split()[0], row["question"], row["ranks"]): row["answer"] for row in result["rows"]}
    assert {answer for (tool, *_), answer in answers.items() if tool == "mnistm_dist"} == {"yes"}
    assert {question for tool, question, _ in answers if tool == "mnistm_dist"} == set(QUESTIONS)
    torch = {(question, ranks): answer for (tool, question, ranks), answer in answers.items() if tool == "torch"}
    assert {key for key, answer in torch.items() if answer != "yes"} == {
        *(("resume", 1), ("elastic", 1), ("once", 2), ("batches", 2), ("resume", 2), ("elastic", 2))
    }
    rows = [row for row in result["rows"] if (row["question"], row["ranks"]) == ("once", 2)]
    assert {row["tool"]: row["counts"]["repeated"] for row in rows if row["counts"]["repeated"]} == {
        "torch DistributedSampler": 1
    }
    print_answers(result)
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["torch", "DistributedSampler", *("yn", "p", "pp", "pp", "yy", "yy", "yy")]


def test_a_tool_that_is_not_installed_has_a_row_that_says_how_to_install_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(LitData, "version", lambda: None)
    monkeypatch.setattr(command, "pin", lambda count: [0])
    monkeypatch.setenv("WDS_SECURE", "1")
    assert command.main(["faithful", "--only", "LitData", "--json", str(tmp_path / "out.json")]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    (row,) = document["rows"]
    assert (document["bench"], row["tool"], row["version"], row["answer"]) == ("faithful", "LitData", None, "no")
    assert {"tool", "version", "question", "ranks", "answer", "counts"} <= set(row)
    assert "pip install litdata" in capsys.readouterr().out


def test_faithful_refuses_names_and_numbers_that_do_not_exist():
    with pytest.raises(UserError, match=r"'dali'.*LitData"):
        faithful(Faithful(only=("dali",)))
    with pytest.raises(ValueError, match=r"--ranks: found 5"):
        Faithful(ranks=(1, 5))


def test_counts_are_told_without_zeros():
    assert describe({"equal_steps": 0, "steps": 3, "repeated": 2, "missed": 0}) == "0 of 3 steps equal, 2 repeated"
    assert Ordered.notes["once"].startswith("documented")
