"""docs/sweep.py: a sweep by Optuna, with a trial that is pruned; and the flags of W&B's agent."""

import json
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from mnistm_dist import config as configuration
from mnistm_dist.cli import parse_train_flags

QUICK = ("--batch-size", "32", "--image-size", "16", "--threads", "1", "--tracker", "none", "--no-report")


def test_a_sweep_finishes_its_trials_and_names_the_best(small_set, cache_dir, tmp_path):
    pytest.importorskip("optuna", reason='needs pip install "mnistm-dist[sweeps]"')
    flags = ["--trials", "2", "--shards", str(small_set), "--cache-dir", str(cache_dir), "--epochs", "1", *QUICK]
    command = [sys.executable, ROOT / "docs" / "sweep.py", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = {}
    for number in (0, 1):
        run = tmp_path / "runs" / "sweep" / f"trial-{number}"
        config = configuration.load(run / "config.yaml")
        results[number] = json.loads((run / "summary.json").read_text())["val"]["accuracy"]
        assert 1e-3 <= config.optim.learning_rate <= 3e-2
    best = max(results, key=lambda number: results[number])
    assert f"best: {results[best]:.4f} on val with " in done.stdout


def test_a_pruned_trial_is_stopped_and_can_be_resumed(small_set, cache_dir, tmp_path):
    optuna = pytest.importorskip("optuna", reason='needs pip install "mnistm-dist[sweeps]"')
    from optuna.distributions import FloatDistribution
    from optuna.storages.journal import JournalFileBackend

    # Earlier trials that are better at every epoch than any run can be.
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "sweep.log")))
    study = optuna.create_study(storage=storage, study_name="sweep", direction="maximize")
    trial = optuna.trial.create_trial(
        params={"learning_rate": 0.01},
        distributions={"learning_rate": FloatDistribution(1e-3, 3e-2, log=True)},
        value=2.0,
        intermediate_values=dict.fromkeys(range(1, 1000), 2.0),
    )
    study.add_trials([trial] * 5)
    flags = ["--trials", "1", "--shards", str(small_set), "--cache-dir", str(cache_dir), "--epochs", "1000", *QUICK]
    command = [sys.executable, ROOT / "docs" / "sweep.py", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert study.trials[-1].state.name == "PRUNED"
    state = json.loads((tmp_path / "runs" / "sweep" / "trial-5" / "state.json").read_text())
    assert state["state"] == "preempted"


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        ("--learning_rate=0.02", "learning_rate", 0.02),
        ("--optim.learning_rate=0.02", "learning_rate", 0.02),
        ("--optim.learning-rate=0.02", "learning_rate", 0.02),
        ("--machine.compile=true", "compile", True),
        ("--run.report=False", "report", False),
        ("--steps.image_size=[32, 48]", "image_size", (32, 48)),
        ("--max_steps=None", "max_steps", None),
        ("--ema_decay=0", "ema_decay", 0.0),
    ],
)
def test_a_flag_of_an_agent_of_wandb_is_read(flag, field, value):
    assert configuration.fields_of(parse_train_flags([flag]).config)[field] == value


def test_the_agent_of_wandb_starts_a_training_with_the_sweep_of_the_docs():
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    text = (ROOT / "docs" / "sweeps.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    sweep = yaml.safe_load(text)
    chosen = {name: {"value": spec.get("values", [0.0123])[-1]} for name, spec in sweep["parameters"].items()}
    chosen["steps.image_size"] = {"value": [32, 48]}
    parts = create_sweep_command_args({"args": chosen})
    argv = [word for part in sweep["command"] for word in (parts["args"] if part == "${args}" else [part])]
    config = parse_train_flags(argv[argv.index("mnistm_dist.train") + 1 :]).config
    assert (config.optim.learning_rate, config.optim.ema_decay) == (0.0123, 0.995)
    assert (config.steps.image_size, config.data.shards) == ((32, 48), "shards/official")
