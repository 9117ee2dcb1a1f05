"""torchrun with several agents: a node dies, a node joins, and the run ends with the model of an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import output_of
from test_gradient_tree import model_of
from test_resume import wait_for_step

from mnistm_dist.config import RunConfig
from mnistm_dist.errors import UserError
from mnistm_dist.training.resume import start_of
from mnistm_dist.training.run_dir import read_log, read_state

RESTARTS = {"TORCHELASTIC_MAX_RESTARTS": "10", "TORCHELASTIC_RUN_ID": "job-7"}


@pytest.mark.parametrize(
    ("run", "environment", "expected"),
    [
        ({}, {"TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "none"}, (None, None)),
        ({"run_dir": "r"}, {}, (None, "r")),
        ({}, RESTARTS, ("auto", "runs/job-7")),
        ({"resume": "auto"}, RESTARTS, ("auto", "runs/job-7")),
        ({"run_dir": "r"}, {**RESTARTS, "TORCHELASTIC_RUN_ID": "none"}, ("auto", "r")),
        ({"resume": "runs/a"}, RESTARTS, ("runs/a", None)),
    ],
)
def test_a_launch_with_restarts_resumes_its_own_run(run, environment, expected):
    assert start_of(RunConfig(**run), environment) == expected


@pytest.mark.parametrize(
    ("run", "environment", "named"),
    [
        ({}, {"TORCHELASTIC_RUN_ID": "none"}, "use --run-dir, or --rdzv-id"),
        ({"run_dir": "r"}, {"TORCHELASTIC_USE_AGENT_STORE": "True"}, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        ({"resume": "r/checkpoints/step-00000004"}, {}, "would begin at r/checkpoints/step-00000004"),
    ],
)
def test_a_launch_whose_restarts_would_fail_or_start_over_is_refused(run, environment, named):
    with pytest.raises(UserError, match=named):
        start_of(RunConfig(**run), {**RESTARTS, **environment})


FLAGS = (
    *("--precision", "fp32"),
    *("--recipe", "fast", "--batch-size", 32, "--micro-batch", 8, "--image-size", 28, "--max-steps", 250),
    *("--epochs", 60, "--checkpoint-every", 20, "--log-every", 5, "--evaluate-every", 1000, "--reproducible"),
    *("--tracker", "none", "--no-report"),
)


class Job:
    """A job of torchrun with up to three agents of one process each; the first agent has the rendezvous."""

    def __init__(self, folder: Path, shards: Path, environment: dict[str, str]) -> None:
        self.run, self.environment = folder / "run", {**environment, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.flags = ["-m", "mnistm_dist.train", "--shards", shards, "--run-dir", self.run, *FLAGS]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.agents: list[subprocess.Popen[str]] = []
        self.outputs: list[Path] = []

    def add_agent(self) -> subprocess.Popen[str]:
        rendezvous = f"last_call_timeout=3,is_host={int(not self.agents)}"
        torchrun = [
            *("-m", "torch.distributed.run", "--nnodes=1:3", "--nproc-per-node=1", "--max-restarts=10"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.port}", "--rdzv-id=job"),
            *("--local-addr=127.0.0.1", f"--rdzv-conf={rendezvous}"),
        ]
        self.outputs.append(self.run.with_name(f"agent-{len(self.agents)}.log"))
        with self.outputs[-1].open("w") as output:
            agent = subprocess.Popen(
                list(map(str, [sys.executable, *torchrun, *self.flags])),
                cwd=self.run.parent,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )
        self.agents.append(agent)
        return agent

    def kill(self, agent: subprocess.Popen[str]) -> None:
        """SIGKILL to an agent and its trainer, as when a node loses power."""
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        for pid in (agent.pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        agent.wait()

    def worlds(self) -> list[int]:
        """The world size of each launch."""
        return [row["world_size"] for row in read_log(self.run / "log.jsonl") if row["kind"] in ("start", "resume")]

    def wait_for_world(self, size: int) -> None:
        deadline = time.monotonic() + 120
        while self.worlds()[-1:] != [size]:
            assert time.monotonic() < deadline, self.outputs[0].read_text()[-3000:]
            time.sleep(0.1)

    def wait_for_end(self) -> None:
        for agent, output in zip(self.agents, self.outputs, strict=True):
            assert agent.wait(240) in (0, -signal.SIGKILL), output.read_text()[-4000:]
        assert read_state(self.run)["state"] == "finished"


@pytest.fixture
def new_job(tmp_path, small_set, environment):
    jobs: list[Job] = []

    def start(name: str) -> Job:
        (tmp_path / name).mkdir()
        jobs.append(Job(tmp_path / name, small_set, environment))
        return jobs[-1]

    yield start
    for job in jobs:
        for agent in job.agents:
            if agent.poll() is None:
                job.kill(agent)


@pytest.fixture
def undisturbed(run_command, small_set, tmp_path) -> str:
    """The model of one process that nothing happens to."""
    output_of(run_command("train", "--shards", small_set, "--run-dir", "undisturbed", *FLAGS))
    return model_of(tmp_path / "undisturbed")


def a_node_dies(job: Job) -> None:
    first, last = job.add_agent(), job.add_agent()
    wait_for_step(first, job.run, 25)
    job.wait_for_world(2)
    job.kill(last)
    job.wait_for_world(1)
    job.wait_for_end()


def a_node_joins(job: Job) -> None:
    first = job.add_agent()
    wait_for_step(first, job.run, 25)
    job.add_agent()
    job.wait_for_world(2)
    job.wait_for_end()
    assert job.worlds() == [1, 2]


def one_of_three_dies_and_another_joins(job: Job) -> None:
    first, _, last = (job.add_agent() for _ in range(3))
    wait_for_step(first, job.run, 25)
    job.wait_for_world(3)
    job.kill(last)
    job.wait_for_world(2)
    job.add_agent()
    job.wait_for_world(3)
    job.wait_for_end()


CHANGES = [a_node_dies, a_node_joins, one_of_three_dies_and_another_joins]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_the_run_ends_with_the_model_of_an_undisturbed_one(new_job, undisturbed, change):
    job = new_job("job")
    change(job)
    assert model_of(job.run) == undisturbed


@pytest.mark.soak
@pytest.mark.timeout(6000)
@pytest.mark.parametrize("change", CHANGES)
def test_ten_times(new_job, undisturbed, change):
    for attempt in range(10):
        job = new_job(str(attempt))
        change(job)
        assert model_of(job.run) == undisturbed, attempt
