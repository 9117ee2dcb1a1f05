"""``sbatch slurm/train.sh`` on a real Slurm of two nodes: start, preemption, requeue, failure, end."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cluster import Cluster, missing
from conftest import ROOT, TEST, VAL
from safetensors.torch import load_file

from mnistm_dist.training.models import create_model
from mnistm_dist.training.run_dir import read_log, read_state

ABSENT = missing()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(ABSENT is not None, reason=f"no Slurm: {ABSENT}")]

SCRIPT = ROOT / "slurm" / "train.sh"
STEPS = 80
FLAGS = (
    *("--precision", "fp32"),
    *("--recipe", "fast", "--batch-size", 32, "--image-size", 28, "--epochs", 8, "--evaluate-every", 4),
    *("--checkpoint-every", 20, "--log-every", 4, "--threads", 1, "--no-report"),
)
PATIENCE = 200.0
"""Seconds for a job to complete, on two cores that may be busy."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that was submitted, and where it writes."""

    cluster: Cluster
    number: int
    run: Path
    log_path: Path

    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def ended(self, seconds: float = PATIENCE) -> dict[str, str]:
        """Wait for the end of the job and of all its processes; return Slurm's record of it."""
        job = self.cluster.wait(self.number, *ENDED, seconds=seconds)
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not self.processes(), self.log()
        return job

    def output_of(self) -> None:
        job = self.ended()
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), self.log()
        assert read_state(self.run) == {"state": "finished", "step": STEPS, "reason": None}

    def wait_for_step(self, step: int) -> None:
        """Wait until the run's log has the step."""
        deadline = time.monotonic() + PATIENCE
        while not any(row["step"] >= step for row in read_log(self.run / "log.jsonl")):
            assert time.monotonic() < deadline, (
                f"step {step} did not come; {self.cluster.job(self.number)}\n{self.log()}"
            )
            time.sleep(0.05)

    def processes(self, rank: int | None = None) -> list[int]:
        """Return the processes with this job's variables on both nodes, or the one trainer of a rank."""
        wanted = {f"SLURM_CONF={self.cluster.environment['SLURM_CONF']}", f"SLURM_JOB_ID={self.number}"}
        if rank is not None:
            wanted.add(f"RANK={rank}")
        result = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = path.read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if wanted <= set(variables):
                result.append(int(path.parent.name))
        return result

    def model(self) -> bytes:
        return (self.run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors").read_bytes()

    def launches(self) -> list[tuple[str, int]]:
        """Kind and world size of each launch."""
        rows = read_log(self.run / "log.jsonl")
        return [(row["kind"], row["world_size"]) for row in rows if row["kind"] in ("start", "resume")]


def submit(
    cluster: Cluster,
    environment: dict[str, str],
    folder: Path,
    *flags: object,
    options=("--nodes", 2),
    run: Path | None = None,
) -> Job:
    """``sbatch OPTIONS slurm/train.sh FLAGS`` in a folder."""
    environment = {**environment, "PYTHON": sys.executable}
    given = () if run is None else ("--run-dir", run)
    command = ("sbatch", "--parsable", *options, SCRIPT, *flags, *given)
    number = int(cluster.command(*command, cwd=folder, environment=environment))
    return Job(
        cluster=cluster,
        number=number,
        run=run or folder / "runs" / f"slurm-{number}",
        log_path=folder / f"mnistm_dist-{number}.log",
    )


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with 2 CPUs, 8 GB and no GPU each."""
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def gpu_cluster():
    """Two nodes with 8 CPUs and 4 GPUs each, as configured in Slurm."""
    with Cluster(cpus=8, gpus=4) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def reference(cluster, environment, small_set, tmp_path_factory) -> Job:
    """An uninterrupted run of two nodes."""
    job = submit(cluster, environment, tmp_path_factory.mktemp("reference"), "--shards", small_set, *FLAGS)
    job.output_of()
    return job


def test_two_nodes_train_one_model_with_only_nodes_overridden(cluster, environment, small_set, tmp_path):
    """The run folder has a space in its name."""
    flags = ("--shards", small_set, *FLAGS, "--max-steps", 4)
    job = submit(cluster, environment, tmp_path, *flags, run=tmp_path / "a run")
    ended = job.ended()
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), job.log()
    summary = json.loads((job.run / "summary.json").read_text())
    assert (summary["world_size"], summary["device"], summary["steps"]) == (2, "cpu", 4)
    assert (summary["val"]["total"], summary["test"]["total"]) == (VAL, TEST)
    run_environment = json.loads((job.run / "environment.json").read_text())
    assert (run_environment["slurm_job_id"], run_environment["slurm_nodes"]) == (str(job.number), "node[1-2]")
    log = job.log()
    assert f"job {job.number}, launch 1: nodes node[1-2], processes per node 1, CPUs per process 2" in log
    assert "GPUs per node 0 (training on CPU)" in log
    assert "CPU (no GPU found)" in log
    assert job.launches() == [("start", 2)]


@pytest.mark.slow
def test_usr1_saves_and_requeues_and_the_run_ends_like_an_uninterrupted_one(
    cluster, environment, small_set, tmp_path, reference
):
    job = submit(cluster, environment, tmp_path, "--shards", small_set, *FLAGS)
    job.wait_for_step(8)
    cluster.command("scancel", "--batch", "--signal=USR1", job.number)
    cluster.wait(job.number, "PENDING", seconds=60)
    state = read_state(job.run)
    assert (state["state"], state["reason"]) == ("preempted", "SIGUSR1")
    assert (job.run / "checkpoints" / f"step-{state['step']:08d}" / "state.json").exists()
    job.output_of()
    assert cluster.job(job.number)["Restarts"] == "1"
    assert job.launches() == [("start", 2), ("resume", 2)]
    assert job.model() == reference.model()
    log = job.log()
    assert "saved, to be requeued" in log
    assert f"job {job.number}, launch 2" in log


@pytest.mark.slow
def test_usr1_during_the_start_of_the_trainers_is_handled(cluster, environment, small_set, tmp_path):
    job = submit(cluster, environment, tmp_path, "--shards", small_set, *FLAGS)
    while not job.processes(rank=0):
        time.sleep(0.05)
    assert not job.run.exists()
    cluster.command("scancel", "--batch", "--signal=USR1", job.number)
    cluster.wait(job.number, "PENDING", seconds=PATIENCE)
    assert read_state(job.run)["state"] == "preempted"
    assert 0 < read_state(job.run)["step"] < STEPS
    cluster.command("scancel", job.number)
    assert job.ended()["JobState"] == "CANCELLED"


@pytest.mark.slow
def test_scancel_saves_and_ends_the_job(cluster, environment, small_set, tmp_path):
    job = submit(cluster, environment, tmp_path, "--shards", small_set, *FLAGS)
    job.wait_for_step(8)
    cluster.command("scancel", job.number)
    result = job.ended(seconds=45)
    assert (result["JobState"], result["Restarts"]) == ("CANCELLED", "0")
    state = read_state(job.run)
    assert (state["state"], state["reason"]) == ("preempted", "SIGTERM")
    assert (job.run / "checkpoints" / f"step-{state['step']:08d}" / "state.json").exists()
    time.sleep(2)
    assert cluster.job(job.number)["JobState"] == "CANCELLED"


@pytest.mark.slow
def test_a_killed_task_fails_the_job_within_a_minute(cluster, environment, small_set, tmp_path):
    job = submit(cluster, environment, tmp_path, "--shards", small_set, *FLAGS)
    job.wait_for_step(24)
    (victim,) = job.processes(rank=1)
    os.kill(victim, signal.SIGKILL)
    assert job.ended(seconds=60)["JobState"] == "FAILED"
    assert read_state(job.run)["state"] == "failed"


@pytest.mark.slow
def test_a_job_whose_head_was_killed_resumes_on_another_node(cluster, environment, small_set, tmp_path, reference):
    """A survivor of the job takes over the lock of the killed rank 0, or it remains until its heartbeat is missed."""
    flags = ("--shards", small_set, *FLAGS)
    job = submit(cluster, environment, tmp_path, *flags, run=tmp_path / "run")
    job.wait_for_step(24)
    (victim,) = job.processes(rank=0)
    os.kill(victim, signal.SIGKILL)
    assert job.ended(seconds=60)["JobState"] == "FAILED"

    again = submit(cluster, environment, tmp_path, *flags, run=job.run, options=("--nodes", 1, "--nodelist", "node2"))
    again.output_of()
    assert again.launches() == [("start", 2), ("resume", 1)]
    left, right = (
        load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors") for run in (job.run, reference.run)
    )
    assert all(torch.equal(left[name], right[name]) for name, _ in create_model(10, 0).named_parameters())


@pytest.mark.slow
def test_two_tasks_on_each_node_are_a_world_of_four(cluster, environment, small_set, tmp_path):
    options = ("--nodes", 2, "--ntasks-per-node", 2)
    job = submit(cluster, environment, tmp_path, "--shards", small_set, *FLAGS, "--max-steps", 4, options=options)
    assert job.ended()["JobState"] == "COMPLETED", job.log()
    assert json.loads((job.run / "summary.json").read_text())["world_size"] == 4


def test_a_wrong_argument_ends_the_job_with_2_and_one_line(cluster, environment, tmp_path):
    job = submit(cluster, environment, tmp_path, "--epochs", "many")
    result = job.ended(seconds=60)
    assert (result["JobState"], result["ExitCode"], result["Restarts"]) == ("FAILED", "2:0", "0")
    errors = [line for line in job.log().splitlines() if line.startswith("error:")]
    assert len(errors) == 1, job.log()
    assert "--epochs: found 'many'" in errors[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_tasks_without_a_common_world_are_refused(cluster, environment, small_set, tmp_path):
    """Without the check, each node would train the model alone and succeed."""
    command = ["srun", "--nodes", "2", "--ntasks", "2", sys.executable, "-m", "mnistm_dist.train", "--run-dir", "run"]
    done = subprocess.run(
        [*command, "--shards", str(small_set)],
        cwd=tmp_path,
        env={**environment, **cluster.environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 2
    assert "world size: found 1, Slurm's step has 2 tasks" in done.stderr
    assert not (tmp_path / "run").exists()


SHOW = """#!/bin/bash
[ "$1" = -m ] || exit 0
given="GPUs $CUDA_VISIBLE_DEVICES, CPUs $SLURM_CPUS_PER_TASK, ${@:3}"
echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE on $(hostname), $given"
"""


def shown_by(cluster: Cluster, folder: Path, *flags: object, options=()) -> int:
    """Submit a job that prints the variables of each task instead of training; return its number."""
    show = folder / "show"
    show.write_text(SHOW)
    show.chmod(0o755)
    command = ("sbatch", "--parsable", "--nodes", 2, *options, "--output", "log", SCRIPT, *flags)
    number = int(cluster.command(*command, cwd=folder, environment={**os.environ, "PYTHON": str(show)}))
    assert cluster.wait(number, *ENDED, seconds=60)["JobState"] == "COMPLETED", (folder / "log").read_text()
    return number


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "local_world_size", "gpus"),
    [
        ((), 4, "0,1,2,3"),
        (("--gpus-per-node", "2"), 2, "0,1"),
        (("--gres", "gpu:4"), 4, "0,1,2,3"),
        (("--ntasks-per-node", "4", "--gpus-per-task", "1"), 4, "0,1,2,3"),
        (("--gpus-per-node", "4", "--gpu-bind", "single:1"), 4, "0,1,2,3"),
        (("--ntasks-per-node", "2"), 2, "0,1,2,3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_each_gpu_has_a_task_that_sees_all_gpus_of_its_node(gpu_cluster, tmp_path, options, local_world_size, gpus):
    """A script in place of Python prints the variables of each task."""
    number = shown_by(gpu_cluster, tmp_path, "--run-dir", "a run", options=options)
    world_size, cpus = 2 * local_world_size, 8 // local_world_size
    arguments = f"--expect-world-size {world_size} --resume auto --run-dir runs/slurm-{number} --run-dir a run"
    shown = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("rank")]
    assert sorted(shown) == [
        f"rank {rank} of {world_size}, {rank % local_world_size} of {local_world_size} "
        f"on node{rank // local_world_size + 1}, GPUs {gpus}, CPUs {cpus}, {arguments}"
        for rank in range(world_size)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "python", "named"),
    [
        (("--ntasks", "3"), sys.executable, "--ntasks: 3, this job starts 8"),
        ((), "/bin/false", "/bin/false cannot import mnistm_dist"),
    ],
)
def test_a_job_that_cannot_start_as_asked_ends_with_2_and_one_line(
    gpu_cluster, environment, tmp_path, options, python, named
):
    command = ("sbatch", "--parsable", "--nodes", 2, *options, "--output", "log", SCRIPT)
    number = int(gpu_cluster.command(*command, cwd=tmp_path, environment={**environment, "PYTHON": python}))
    assert gpu_cluster.wait(number, *ENDED, seconds=60)["ExitCode"] == "2:0"
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith("error: ")
    assert named in line


@pytest.mark.slow
def test_a_requeued_job_that_began_at_a_named_checkpoint_resumes_from_the_latest(gpu_cluster, tmp_path):
    """Another start from the named checkpoint would discard the training of each launch."""
    arguments = ("--resume", "r/checkpoints/step-00000640")
    number = shown_by(gpu_cluster, tmp_path, *arguments)
    gpu_cluster.command("scontrol", "requeue", number)
    gpu_cluster.wait(number, "COMPLETED", seconds=60, restarts=1)
    first, second = (line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("rank 0 "))
    assert first.endswith("--resume auto --resume r/checkpoints/step-00000640")
    assert second.endswith("--resume auto --resume r/checkpoints/step-00000640 --resume r")
