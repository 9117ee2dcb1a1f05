"""A sweep by Optuna, with pruning: docs/sweeps.md.

python docs/sweep.py --trials 20 --shards shards/official --epochs 5     flags but --trials go to the training
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import optuna


def objective(trial: optuna.Trial) -> float:
    """Train a run and return its accuracy on val. Report each evaluation, and stop the run if it is pruned."""
    run_dir = Path("runs/sweep") / f"trial-{trial.number}"
    values = {
        "learning_rate": trial.suggest_float("learning_rate", 1e-3, 3e-2, log=True),
        "label_smoothing": trial.suggest_float("label_smoothing", 0.0, 0.2),
    }
    flags = [*train_flags, "--run-dir", str(run_dir), *(f"--{name}={value}" for name, value in values.items())]
    with subprocess.Popen([sys.executable, "-m", "mnistm_dist.train", *flags]) as run:
        reported = 0
        while True:
            ended, log = run.poll() is not None, run_dir / "log.jsonl"
            lines = log.read_text().splitlines(keepends=True) if log.exists() else []
            # The last line may be only half written.
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
            evaluations = [row for row in rows if row["kind"] == "evaluation"]
            for row in evaluations[reported:]:
                trial.report(row["val/accuracy"], row["epoch"])
            reported = len(evaluations)
            if ended:
                break
            if trial.should_prune():
                run.terminate()  # The run saves and exits: --resume would continue it.
                raise optuna.TrialPruned
            time.sleep(1)
    if run.returncode:
        raise RuntimeError(f"trial {trial.number}: the training ended with exit code {run.returncode}")
    return json.loads((run_dir / "summary.json").read_text())["val"]["accuracy"]


parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--trials", type=int, default=20)
options, train_flags = parser.parse_known_args()
# A study on disk: several of these, on any machines that share the folder, work on it together, and it can go on later.
storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("sweep.log"))
study = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True, direction="maximize")
study.optimize(objective, n_trials=options.trials)
print(f"best: {study.best_value:.4f} on val with {study.best_params}, trial {study.best_trial.number}")
