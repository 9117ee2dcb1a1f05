"""The benchmarks of training steps: ``step``, the trainer against simpler loops, and ``ranks``, one process against
several."""

import shutil
import tempfile
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines import airbench_loop, bare_loop, build_model, plain_script, time_steps
from benchmarks.measure import (
    STEPS,
    Contender,
    Measurement,
    Result,
    clock,
    default_device,
    default_precision,
    open_training,
    run,
)
from benchmarks.options import Ranks, Step
from benchmarks.runs import train_steps
from mnistm_dist.config import Config
from mnistm_dist.data.manifest import Manifest
from mnistm_dist.data.order import auto_micro_batch
from mnistm_dist.training.hardware import native_precisions

PLAIN, BARE, AIRBENCH = "plain script", "bare loop", "airbench-style loop"
# Blocks of steps with and without communication, interleaved, after one that does not count.
BLOCKS = 2


def step(options: Step) -> Result:
    """Measure the loops in this process, and the trainer in one of its own. Raises `UserError`."""
    torch.set_num_threads(options.threads)
    config, manifest, data = open_training(options)
    steps, precision = options.steps or STEPS[default_device().type], default_precision()
    compiles = options.compile and any(map(shutil.which, ("c++", "g++", "clang++")))

    def bare(layout: torch.memory_format = torch.channels_last, compiled: bool = False, **variant: Any) -> Any:
        model: Any = build_model(config, manifest, layout)
        model = torch.compile(model) if compiled else model
        return bare_loop(config, manifest, data, model, layout=layout, **{"precision": precision, **variant})

    loops = {
        PLAIN: plain_script(config, manifest, data),
        BARE: bare(),
        AIRBENCH: airbench_loop(config, manifest, data, precision=precision, compiled=compiles),
        f"{BARE}, one prepared batch": bare(prepared=True),
        f"{BARE}, contiguous": bare(torch.contiguous_format),
        # fp16 needs a loss scale.
        **{
            f"{BARE}, {other}": bare(precision=other)
            for other in native_precisions(default_device().type)
            if other not in (precision, "fp16")
        },
        **({f"{BARE}, compiled": bare(compiled=True)} if compiles else {}),
    }
    contenders = [
        Contender(
            name=name,
            measure=partial(time_steps, config, loop, steps),
            against=(PLAIN if name in (PLAIN, BARE, AIRBENCH) else BARE,),
        )
        for name, loop in loops.items()
    ]
    measure = partial(train_steps, options)
    contenders.insert(2, Contender(name="trainer", measure=measure, against=(BARE, AIRBENCH, PLAIN)))
    if torch.cuda.is_available():
        measure = partial(train_steps, options, 1, "--cuda-graph")
        contenders.insert(3, Contender(name="trainer, CUDA graphs", measure=measure, against=("trainer", AIRBENCH)))
    result = run(
        options,
        contenders,
        warm_up=1,
        memory_format="channels_last",
        image_size=config.steps.image_size[0],
        steps=steps,
        compile="measured" if compiles else "not asked for, or there is no C++ compiler",
        training_set_megabytes=round(data.images.nbytes / 1e6, 1),
        peak_megabytes="of the trainer's process in its steps, with the touched pages of the mapped training set; "
        "a whole epoch touches all of training_set_megabytes, once per node",
        flops="of the model's forward and backward pass; utilisation: against a large matrix product of this precision",
    )
    flops, best = model_flops(config, manifest), matmul_flops_per_second(precision)
    result["conditions"] |= {"model_megaflops_per_image": flops / 1e6, "matmul_teraflops_per_second": best / 1e12}
    result["conditions"]["model_flops_utilisation"] = {
        row["name"]: round(row["images_per_second"] * flops / best, 4) for row in result["rows"]
    }
    return result


def model_flops(config: Config, manifest: Manifest) -> float:
    """Return the floating-point operations of the model's forward and backward pass for an image, as torch counts."""
    model = build_model(config, manifest, torch.channels_last)
    images = torch.zeros(2, 3, *config.steps.image_size * 2, device=default_device())
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops() / len(images)


def matmul_flops_per_second(precision: str) -> float:
    """Return what the device reaches in a product of two large matrices, the best of five."""
    size, dtype = 8192 if torch.cuda.is_available() else 2048, torch.bfloat16 if precision == "bf16" else torch.float32
    matrix, seconds = torch.randn(size, size, device=default_device(), dtype=dtype), []
    for _ in range(5):
        started, _ = clock()
        matrix @ matrix
        seconds.append(clock()[0] - started)
    return 2 * size**3 / min(seconds)


def ranks(options: Ranks) -> Result:
    """Measure the trainer at each world size, with the same global batch, also reproducible; the bare loop under DDP;
    and the plain script on as many threads as the largest world has. Raises `UserError`."""
    # Decoded before the first launch is timed; the launches find it in the cache.
    config, manifest, data = open_training(options)
    gpus = torch.cuda.device_count()
    sizes = options.processes or ((1,) if gpus == 1 else (1, gpus or 2))
    threads, steps = max(sizes) * options.threads, options.steps or STEPS[default_device().type]
    torch.set_num_threads(threads)
    script = plain_script(config, manifest, data)
    # Its first step costs more; the processes have a warm-up of their own.
    next(script)
    plain = PLAIN if gpus else f"plain script, {threads} threads"
    contenders = [Contender(name=plain, measure=partial(time_steps, config, script, steps), against=(plain,))]
    for size in sizes:
        name, reference = (f"{n} process{'es' * (n > 1)}" for n in (size, sizes[0]))
        against = (plain,) if size == sizes[0] else (reference, plain)
        contenders.append(Contender(name=name, measure=partial(train_steps, options, size), against=against))
        if size > 1:
            # The same micro-batch as above, so that only the sum of the gradients differs.
            micro_batch = auto_micro_batch(batch_size=options.batch_size, world_size=size)
            measure = partial(train_steps, options, size, "--reproducible", "--micro-batch", micro_batch)
            contenders.append(Contender(name=f"{name}, reproducible", measure=measure, against=(name,)))
            measure = partial(measure_communication, options, size, steps)
            contenders.append(Contender(name=f"{BARE}, {name}", measure=measure, against=(name,)))
    return run(
        options,
        contenders,
        warm_up=0,
        image_size=config.steps.image_size[0],
        steps=steps,
        communication_share="1 - seconds without the gradients' all-reduce / seconds with it: the part that the "
        "backward pass does not hide, and waiting for the slower process",
    )


def measure_communication(options: Ranks, world_size: int, steps: int) -> Measurement:
    """Measure the bare loop under DDP in ``world_size`` processes on this machine."""
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="mnistm_dist-bench-") as folder:
        arguments = (options, world_size, steps, f"file://{folder}/rendezvous", results)
        torch.multiprocessing.spawn(bare_loop_process, arguments, nprocs=world_size)
        return results.get()


def bare_loop_process(rank: int, options: Ranks, world_size: int, steps: int, rendezvous: str, results: Any) -> None:
    """Train blocks of steps with and without communication; rank 0 puts the result into ``results``. All ranks take
    part."""
    torch.set_num_threads(options.threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(init_method=rendezvous, rank=rank, world_size=world_size)
    config, manifest, data = open_training(options)
    model = build_model(config, manifest, torch.channels_last)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    # As in the trainer. As an argument it is deprecated in torch 2.14, and its new name is unknown to 2.10.
    wrapped.broadcast_buffers = False
    loop = bare_loop(config, manifest, data, wrapped, precision=default_precision(), rank=rank, world_size=world_size)
    time_steps(config, loop, steps)
    rates, shares = [], []
    for _ in range(BLOCKS):
        rates.append(time_steps(config, loop, steps)["images_per_second"])
        with wrapped.no_sync():
            shares.append(1 - rates[-1] / time_steps(config, loop, steps)["images_per_second"])
    if rank == 0:
        results.put({"images_per_second": median(rates), "communication_share": median(shares)})
    torch.distributed.destroy_process_group()
