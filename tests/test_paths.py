"""Paths: ~ is expanded, a URL is no folder, a run that was moved finds its shards, printed commands can be pasted."""

import shutil

import pytest
from conftest import error_of, output_of

from mnistm_dist import evaluate, export, pack, plan, predict, report, train, verify
from mnistm_dist.training.run_dir import read_state

QUICK = ("--batch-size", 8, "--image-size", 16, "--threads", 1, "--no-report", "--tracker", "none")


@pytest.fixture
def home(tmp_path, monkeypatch, tiny_copy):
    """The user's home, which has a packed set ``set``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_home_is_expanded_in_flags_in_recipes_and_in_variables(home, run_main, monkeypatch):
    (home / "my.yaml").write_text("recipe: fast\ndata: {shards: ~/set}\nrun: {run_dir: ~/run}")
    monkeypatch.setenv("MNISTM_DIST_CACHE", "~/cache")
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    output_of(run_main(train.main, "--recipe=~/my.yaml", "--max-steps", 1, *QUICK))
    output_of(run_main(plan.main, "~/run", "--step", 0, "--save=~/batch.png"))
    output_of(run_main(evaluate.main, "~/run", "--shards=~/set"))
    output_of(run_main(report.main, "~/run", "--out=~/report.html"))
    assert {path.name for path in home.iterdir()} >= {"run", "cache", "batch.png", "report.html"}
    assert not (home / "~").exists()


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (train.main, ["--run-dir", "s3://bucket/x"]),
        (train.main, ["--resume", "s3://bucket/x"]),
        (train.main, ["--cache-dir", "s3://bucket/x"]),
        (evaluate.main, ["s3://bucket/x"]),
        (evaluate.main, ["run", "--out", "s3://bucket/x"]),
        (predict.main, ["run", "s3://bucket/x"]),
        (plan.main, ["run", "--step", 0, "--save", "s3://bucket/x.png"]),
        (report.main, ["run", "--out", "s3://bucket/x"]),
        (export.main, ["run", "--to", "onnx", "--out", "s3://bucket/x"]),
        (pack.main, ["sample", "--out", "s3://bucket/x"]),
        (verify.main, ["s3://bucket/x"]),
    ],
)
def test_a_url_is_refused_where_only_a_local_path_works(main, arguments, run_main, tmp_path):
    assert "s3://bucket/x" in (line := error_of(run_main(main, *arguments)))
    assert "should be a local path, not a URL" in line
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_moved_finds_its_shards_from_another_folder_or_names_them(home, run_main, monkeypatch):
    output_of(run_main(train.main, "--shards", "set", "--run-dir", "run", "--max-steps", 1, *QUICK))
    (home / "elsewhere").mkdir()
    shutil.move(home / "run", home / "elsewhere" / "moved")
    monkeypatch.chdir(home / "elsewhere")

    def commands() -> list[tuple[object, ...]]:
        step = read_state(home / "elsewhere" / "moved")["step"]
        resume = (train.main, "--resume", "moved", "--max-steps", step + 1)
        return [resume, (evaluate.main, "moved"), (plan.main, "moved", "--step", 0)]

    for command in commands():
        output_of(run_main(*command))
    (home / "set").rename(home / "renamed")
    for main, *arguments in commands():
        line = error_of(run_main(main, *arguments))
        assert f"{home}/set: no such folder; name a packed set with --shards" in line
    for main, *arguments in commands():
        output_of(run_main(main, *arguments, "--shards", "../renamed"))


def test_printed_commands_can_be_pasted(home, run_main):
    flags = ("--shards", "set", "--run-dir", "my run", "--max-steps", 1, *QUICK)
    output_of(run_main(train.main, *flags))
    assert "--resume 'my run'" in error_of(run_main(train.main, *flags))
    done = run_main(train.main, "--resume", "my run")
    assert "python -m mnistm_dist.report 'my run'" in done.stderr
    assert "--resume 'my run' --max-steps none" in done.stderr
