"""A job that may lose nodes: torchrun on each, as docs/resume.md shows it, on a real Slurm of two nodes."""

import re
import sys

import pytest
from cluster import Cluster
from conftest import ROOT, output_of
from test_train_script import ABSENT, Job

from mnistm_dist.training.run_dir import read_state

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(ABSENT is not None, reason=f"no Slurm: {ABSENT}")]

FLAGS = (
    *("--precision", "fp32", "--recipe", "fast", "--batch-size", 32, "--micro-batch", 8, "--image-size", 28),
    *("--epochs", 60, "--max-steps", 250, "--checkpoint-every", 20, "--log-every", 5, "--evaluate-every", 1000),
    *("--tracker", "none", "--no-report", "--reproducible"),
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_goes_on_without_a_lost_node_and_ends_with_the_model_of_an_undisturbed_run(
    run_command, environment, small_set, tmp_path
):
    page = (ROOT / "docs" / "resume.md").read_text()
    (script,) = re.findall(r"```\n(#SBATCH .*?)```", page, re.DOTALL)
    # On two nodes of one process instead of four of eight, and with the flags of this test.
    changes = {
        "--nodes=4": "--nodes=2",
        "torchrun --nnodes 1:4 --nproc-per-node 8": "./torchrun --nnodes 1:2 --nproc-per-node 1",
        "--reproducible --max-world 32 ...": " ".join(map(str, ("--shards", small_set, "--run-dir", "run", *FLAGS))),
    }
    for old, new in changes.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    # Both nodes have this machine's address, by which torchrun finds out whether it is the one of the rendezvous.
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(
        f"#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "
        '--rdzv-conf "last_call_timeout=5,is_host=$((SLURM_NODEID == 0))" "$@"\n'
    )
    torchrun.chmod(0o755)
    (tmp_path / "job").write_text(f"#!/bin/bash\n{script}")
    with Cluster() as cluster:
        command = ("sbatch", "--parsable", "--output", "log", "job")
        number = int(cluster.command(*command, cwd=tmp_path, environment=environment))
        job = Job(cluster=cluster, number=number, run=tmp_path / "run", log_path=tmp_path / "log")
        job.wait_for_step(25)
        cluster.lose("node2")
        ended = job.ended(seconds=240)
    assert (ended["JobState"], read_state(job.run)["state"]) == ("COMPLETED", "finished"), f"{ended}\n{job.log()}"
    assert job.launches() == [("start", 2), ("resume", 1)], job.log()
    output_of(run_command("train", "--shards", small_set, "--run-dir", "undisturbed", *FLAGS))
    left, right = (
        (tmp_path / run / "checkpoints" / "step-00000250" / "model.safetensors").read_bytes()
        for run in ("run", "undisturbed")
    )
    assert left == right
