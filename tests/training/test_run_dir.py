"""The state and the log of a run folder."""

import pytest

from mnistm_dist.training.run_dir import RunDir, read_log, read_state


def test_an_error_is_recorded_as_failed(tmp_path):
    def fail() -> None:
        with RunDir(tmp_path, active=True) as folder:
            folder.steps_done = 7
            raise RuntimeError("the\nreason")

    with pytest.raises(RuntimeError):
        fail()
    assert read_state(tmp_path) == {"state": "failed", "step": 7, "reason": "RuntimeError: the reason"}


def test_the_log_is_cut_back_to_the_checkpoint_and_a_torn_line_is_dropped(tmp_path):
    with RunDir(tmp_path, active=True) as folder:
        folder.open_log(0)
        for step in (10, 20, 30):
            folder.log({"kind": "train", "step": step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [10, 20, 30]
    with RunDir(tmp_path, active=True) as folder:
        folder.open_log(20)
        folder.log({"kind": "train", "step": 21})
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [10, 20, 21]


def test_a_row_that_cannot_be_written_is_written_with_the_next(tmp_path):
    with RunDir(tmp_path / "run", active=True) as folder:
        folder.log({"step": 1})
        (tmp_path / "run" / "log.jsonl").rename(tmp_path / "run" / "aside")
        (tmp_path / "run" / "log.jsonl").mkdir()
        folder.log({"step": 2})
        (tmp_path / "run" / "log.jsonl").rmdir()
        folder.log({"step": 3})
        folder.log({"step": 4})
    assert [row["step"] for row in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4]


def test_a_rank_that_is_not_the_first_writes_nothing(tmp_path):
    with RunDir(tmp_path / "run", active=False) as folder:
        folder.open_log(0)
        folder.log({"step": 1})
        folder.set_state("running")
        folder.write("config.yaml", "")
    assert not (tmp_path / "run").exists()
