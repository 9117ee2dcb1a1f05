"""How ranks wait for each other and for a GPU: with limits, and without asking at every short step."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mnistm_dist.config import MachineConfig
from mnistm_dist.errors import PeerFailure
from mnistm_dist.training import distributed
from mnistm_dist.training.distributed import StopConsensus, World, peer_failures, prepare


def world_of(**given: Any) -> World:
    """Rank 0 of two, with values of its own."""
    values = {"rank": 0, "size": 2, "local_rank": 0, "is_main": True, "precision": "fp32", "threads": 1}
    others = {"accelerator": None, "control": None, "device": torch.device("cpu")}
    return World(**{**values, **others, "collective_timeout": timedelta(seconds=0.2), **given})


@pytest.fixture
def group(tmp_path):
    """The default process group, of one process, with a second group for control."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.new_group(backend="gloo", timeout=timedelta(seconds=7))
    if dist.is_initialized():
        dist.destroy_process_group()


# The stop consensus


@pytest.fixture
def asked(group, monkeypatch):
    """A consensus of one process whose steps take 2 ms; and the step of each exchange."""
    seconds, steps = [0.0], []
    monkeypatch.setattr(distributed, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    original, consensus = dist.all_reduce, StopConsensus(group)

    def all_reduce(*arguments: Any, **extra: Any) -> Any:
        steps.append(round(seconds[0] / 0.002))
        return original(*arguments, **extra)

    def step(action: int, milliseconds: float = 2.0) -> int:
        seconds[0] += milliseconds / 1000
        return consensus.exchange(action)

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    return step, steps


def test_ranks_ask_each_other_every_few_steps_if_steps_are_short(asked):
    step, steps = asked
    for _ in range(18):
        assert step(0) == 0
    assert steps == [1, 2, 7, 12, 17]


def test_ranks_ask_each_other_at_every_step_if_steps_are_long(asked):
    step, steps = asked
    for _ in range(6):
        step(0, milliseconds=20)
    assert steps == [10, 20, 30, 40, 50, 60]


def test_an_action_between_two_exchanges_is_not_lost(asked):
    step, _ = asked
    answers = [step(2 if number == 4 else 0) for number in range(1, 15)]
    # Asked at step 4, sent at step 7, known at step 12.
    assert [number for number, answer in enumerate(answers, start=1) if answer] == [12]


# Limits


class StuckEvent:
    """A GPU whose queue waits for a peer."""

    def query(self) -> bool:
        return False


def test_a_gpu_that_waits_for_a_silent_peer_is_a_peer_failure_after_the_timeout(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=StuckEvent))
    with pytest.raises(PeerFailure, match=r"silent for --collective-timeout 0\.2 s"), peer_failures(0.2):
        world_of().fetch(SimpleNamespace(is_cuda=True))


def test_the_limit_of_the_setup_is_long_and_that_of_the_run_its_own(group):
    backend = group._get_backend(torch.device("cpu"))
    world = world_of(control=group, size=1)
    world.limit_waits(distributed.SETUP_TIMEOUT)
    assert backend.options._timeout == timedelta(hours=12)
    world.limit_waits(world.collective_timeout)
    assert backend.options._timeout == timedelta(seconds=0.2)


@pytest.mark.parametrize(("device", "destroyed"), [("cpu", True), ("cuda", False)])
def test_an_error_exit_does_not_wait_for_nccl(group, monkeypatch, device, destroyed):
    world = world_of(control=group, device=torch.device(device))

    def barrier(*_: object) -> None:
        raise RuntimeError("Timed out waiting 200ms")

    monkeypatch.setattr(World, "_barrier", barrier)
    assert world.shutdown() is False
    assert dist.is_initialized() is not destroyed


# Compilation


def test_each_image_size_is_compiled_by_itself(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(options) or model)
    accelerator = SimpleNamespace(prepare_model=lambda model, **_: model, prepare_optimizer=lambda optimizer: optimizer)
    model = torch.nn.Linear(1, 1)
    prepare(world_of(accelerator=accelerator), model, torch.optim.SGD(model.parameters()), MachineConfig(compile=True))
    assert compiled == [{"dynamic": False}]
