"""What the trainer is compared with: `plain_script`, the source report's training as one would first write it,
`bare_loop`, the trainer's work and nothing around it, and `airbench_loop`, made for speed alone.

Each is a generator that trains one step and yields CUDA events from before and after its work (None on a CPU).
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import ENDLESS, Measurement, clock, default_device, rate
from mnistm_dist.config import Config
from mnistm_dist.data.loader import Reader, train_batches
from mnistm_dist.data.manifest import Manifest
from mnistm_dist.data.order import FullOrder
from mnistm_dist.data.transforms import create_augment
from mnistm_dist.training.models import create_model
from mnistm_dist.training.optim import WeightAverage, create_optimizer

Steps = Iterator[tuple[Any, Any]]
# Steps in which the kernels of a GPU are counted.
PROFILED_STEPS = 5


def plain_script(config: Config, manifest: Manifest, data: Any) -> Steps:
    """Train the report's recipe as a script of some 20 lines does: NCHW, float32, Adam, images in memory.

    ``config``: only its batch size and image size are used.
    """
    device, split, size = data.labels.device, manifest.splits["train"], config.steps.image_size * 2
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (split.mean, split.std))
    model = create_model(len(manifest.classes), seed=0).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.95, 0.999), weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    while True:
        begin = mark(device)
        ids = torch.randint(split.count, (config.steps.batch_size,), generator=generator).to(device)
        images = data.images[ids].permute(0, 3, 1, 2).contiguous().float() / 255
        images = torch.nn.functional.interpolate(images, size, mode="bilinear", align_corners=False)
        loss = torch.nn.functional.cross_entropy(model((images - mean) / std), data.labels[ids])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield begin, mark(device)


def build_model(config: Config, manifest: Manifest, layout: torch.memory_format) -> torch.nn.Module:
    """Return the trainer's model with its initial weights."""
    model = create_model(len(manifest.classes), config.steps.seed, config.network.model)
    return model.to(default_device()).to(memory_format=layout).train()


def bare_loop(
    config: Config,
    manifest: Manifest,
    data: Reader,
    model: Any,
    *,
    precision: str,
    layout: torch.memory_format = torch.channels_last,
    prepared: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Steps:
    """Train with the trainer's batches, augmentation, loss, optimizer and average of the weights. ``model`` may be
    compiled, or wrapped in DDP.

    ``prepared``: one batch, read and augmented once, is used again and again: the difference is the cost of the data.
    """
    steps, split, device = config.steps, manifest.splits["train"], next(model.parameters()).device
    optimizer, images = create_optimizer(model, config.optim, precision), None
    augment = create_augment(config, split, device)
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    average = WeightAverage(bare, config.optim.ema_decay) if config.optim.ema_decay else None
    batches = train_batches(
        data,
        FullOrder(size=split.count, seed=steps.seed),
        batch_size=steps.batch_size,
        micro_batch=steps.batch_size // world_size,
        world_size=world_size,
        rank=rank,
        stop_step=ENDLESS,
    )
    while True:
        if images is None or not prepared:
            batch = next(batches)[0]
        # The data is read: from here on the GPU has work.
        begin = mark(device)
        if images is None or not prepared:
            images = augment(batch.images, batch.positions, steps.image_size[0]).contiguous(memory_format=layout)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        loss = torch.nn.functional.cross_entropy(
            logits.float(), batch.labels, label_smoothing=config.optim.label_smoothing
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if average:
            average.update(bare, ENDLESS)
        yield begin, mark(device)


def airbench_loop(config: Config, manifest: Manifest, data: Any, *, precision: str, compiled: bool) -> Steps:
    """Train the model as cifar10-airbench does (github.com/KellerJordan/cifar10-airbench): the set normalised on the
    device, an epoch permuted and shifted there at once, weights in half precision, SGD. It can neither be resumed nor
    split over processes.

    ``config``: only its batch size, image size and label smoothing are used. The images fit the device.
    """
    device, split, size = data.labels.device, manifest.splits["train"], config.steps.image_size * 2
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    model: Any = build_model(config, manifest, torch.channels_last).to(half)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.85, weight_decay=1e-2, nesterov=True)
    model = torch.compile(model) if compiled else model
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (split.mean, split.std))
    images = ((data.images.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(half)
    images = functional.pad(images, (4, 4, 4, 4), mode="reflect").contiguous(memory_format=torch.channels_last)
    while True:
        top, left = torch.randint(9, (2,)).tolist()
        rows, columns = (slice(start, start + data.images.shape[1]) for start in (top, left))
        order, batch_size = torch.randperm(split.count, device=device), config.steps.batch_size
        for first in range(0, split.count - batch_size + 1, batch_size):
            begin, ids = mark(device), order[first : first + batch_size]
            batch = functional.interpolate(images[ids][:, :, rows, columns], size, mode="bilinear")
            loss = functional.cross_entropy(
                model(batch).float(), data.labels[ids], label_smoothing=config.optim.label_smoothing
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            yield begin, mark(device)


def mark(device: torch.device) -> Any:
    """Return a CUDA event after the work that is queued now; None on a CPU."""
    stream = torch.cuda.current_stream() if device.type == "cuda" else None
    return stream and stream.record_event(torch.cuda.Event(enable_timing=True))


def time_steps(config: Config, loop: Steps, count: int) -> Measurement:
    """Train ``count`` steps. On a GPU, measure its peak memory, the share of the time in which it had no work, and its
    kernels per step."""
    images, on_gpu = count * config.steps.batch_size, torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = clock()
    events = [next(loop) for _ in range(count)]
    result = rate(images, start)
    if on_gpu:
        busy = sum(begin.elapsed_time(end) for begin, end in events) / 1000
        result["gpu_waits_share"] = 1 - busy * result["images_per_second"] / images
        result["gpu_peak_megabytes"] = torch.cuda.max_memory_allocated() / 1e6
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(PROFILED_STEPS):
                next(loop)
            torch.cuda.synchronize()
        names = [event.name for event in profiler.events() if event.device_type is torch.autograd.DeviceType.CUDA]
        result["kernels_per_step"] = sum(not name.startswith("Mem") for name in names) / PROFILED_STEPS
    return result
