"""What the trainer is compared with: `plain_script`, the source report's training as one would first write it, and
`bare_loop`, the trainer's work and nothing around it.

Each is a generator that trains one step and yields CUDA events from before and after its work (None on a CPU).
"""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.measure import ENDLESS, Measurement, clock, default_device, rate
from mnistm_dist.config import Config
from mnistm_dist.data.loader import Reader, train_batches
from mnistm_dist.data.manifest import Manifest
from mnistm_dist.data.order import FullOrder
from mnistm_dist.data.transforms import Augment, Preprocess
from mnistm_dist.training.models import create_model
from mnistm_dist.training.optim import create_optimizer

Steps = Iterator[tuple[Any, Any]]


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
    return create_model(len(manifest.classes), config.steps.seed).to(default_device()).to(memory_format=layout).train()


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
    """Train with the trainer's batches, augmentation, loss and optimizer. ``model`` may be compiled, or wrapped in DDP.

    ``prepared``: one batch, read and augmented once, is used again and again: the difference is the cost of the data.
    """
    steps, split, device = config.steps, manifest.splits["train"], next(model.parameters()).device
    optimizer, images = create_optimizer(model, config.optim, precision), None
    augment = Augment(config.augment, Preprocess(split.mean, split.std, device), steps.seed)
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
        yield begin, mark(device)


def mark(device: torch.device) -> Any:
    """Return a CUDA event after the work that is queued now; None on a CPU."""
    stream = torch.cuda.current_stream() if device.type == "cuda" else None
    return stream and stream.record_event(torch.cuda.Event(enable_timing=True))


def time_steps(config: Config, loop: Steps, count: int) -> Measurement:
    """Train ``count`` steps. On a GPU, measure its peak memory and the share of the time in which it had no work."""
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
    return result
