"""The state of a run before its first step: its model is created, given its initial weights, checked and described."""

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mnistm_dist.config import Config
from mnistm_dist.errors import UserError
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.distributed import World, prepare
from mnistm_dist.training.gradient_tree import GradientTree
from mnistm_dist.training.models import create_model, failures_of, to_device
from mnistm_dist.training.optim import WeightAverage, create_optimizer
from mnistm_dist.training.train_state import TrainState


def create_train_state(
    config: Config, world: World, num_classes: int, shares: Sequence[range], *, resumed: bool
) -> TrainState:
    """Return the state before the first step, or to restore a checkpoint into. All ranks take part.

    ``shares``: the micro-batches of each rank. Initial weights are those of ``init_from``, or depend on the seed alone.
    Raise `UserError` for a model that cannot be trained, and for weights that do not fit.
    """
    model, new_tensors = world.run_on_all_ranks(lambda: initial_model(config, num_classes, resumed=resumed))
    # Before DDP wraps it: DDP lays out its buckets by the strides of the parameters.
    model = to_device(model, world.device, config.machine.memory_format)
    network, sizes = config.network, config.steps.image_size
    layers = world.run_on_main(lambda: check_model(model, network.model, num_classes, sizes))
    if config.machine.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = create_optimizer(model, config.optim, world.precision)
    train_model, optimizer = prepare(world, model, optimizer, config.machine)
    return TrainState(
        model=model,
        train_model=train_model,
        optimizer=optimizer,
        ema=WeightAverage(model, config.optim.ema_decay) if config.optim.ema_decay else None,
        tree=GradientTree(model, world, shares) if config.machine.reproducible else None,
        layers=layers,
        new_tensors=new_tensors,
    )


def initial_model(config: Config, num_classes: int, *, resumed: bool) -> tuple[nn.Module, list[str]]:
    """Return the model, and the tensors that ``init_from`` did not set. A resumed run does not read ``init_from``.

    Raise `UserError` if the model cannot be created, or the weights are not those of the first launch or do not fit.
    """
    network = config.network
    model = create_model(num_classes, config.steps.seed, network.model)
    if network.init_from is None or resumed:
        return model, []
    path, sha256 = checkpoints.find_weights(network.init_from)
    if sha256 != network.init_sha256:
        raise UserError(f"init_from {path}: its sha256 is {sha256}, not {network.init_sha256}; start a new run")
    return model, load_initial_weights(model, path, num_classes)


def load_initial_weights(model: nn.Module, path: Path, num_classes: int) -> list[str]:
    """Load a file of weights; return the tensors of the last layer if those in the file are of other classes: they stay
    as they are.

    Raise `UserError` that names the tensors for weights that do not fit.
    """
    advice = "name a run, or a .safetensors file: safetensors.torch.save_file(state_dict, PATH) writes one"
    own, weights = model.state_dict(), checkpoints.load_tensors(path, advice)
    other = {name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape}
    # Those of the last layer differ in their first dimension only, which is the number of classes.
    head = {name for name in other if own[name].shape == (num_classes, *weights[name].shape[1:])}
    if len({(name.rpartition(".")[0], weights[name].shape[:1]) for name in head}) > 1:
        head = set()
    wrong = {
        "missing": own.keys() - weights.keys(),
        "unexpected": weights.keys() - own.keys(),
        "of another shape": other - head,
    }
    if problems := [f"{problem}: {', '.join(sorted(names)):.200}" for problem, names in wrong.items() if names]:
        raise UserError(f"init_from {path}: the weights of another model; {'; '.join(problems)}; choose its --model")
    model.load_state_dict({name: value for name, value in weights.items() if name not in head}, strict=False)
    return sorted(head)


def check_model(model: nn.Module, name: str, num_classes: int, image_sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return `architecture` at the last of ``image_sizes``, pixels, if ``model`` can be trained; it is not changed.

    At each size a copy classifies one image in evaluation mode and two in training mode, and computes gradients. Raise
    `UserError` for outputs that are no logits, for a size that the model refuses, and for parameters without a
    gradient, for which DDP would wait.
    """
    device = next(model.parameters()).device
    for size in dict.fromkeys(image_sizes):
        failures = f"model {name}: fails on images of {size} px; choose another --image-size or --model"
        with torch.random.fork_rng(devices=[]), failures_of(failures):
            probe = copy.deepcopy(model)
            outputs = [probe.train(count > 1)(torch.zeros(count, 3, size, size, device=device)) for count in (1, 2)]
        for count, output in enumerate(outputs, start=1):
            shape, dtype = tuple(getattr(output, "shape", ())), getattr(output, "dtype", type(output).__name__)
            if not isinstance(output, Tensor) or shape != (count, num_classes) or not output.is_floating_point():
                raise UserError(
                    f"model {name}: gives {dtype} {shape} for images ({count}, 3, {size}, {size}) in "
                    f"{'training' if count > 1 else 'evaluation'}; should be logits, float ({count}, {num_classes}); "
                    "wrap it in a function of your own"
                )
        with failures_of(failures):
            nn.functional.cross_entropy(outputs[-1].float(), torch.zeros(2, dtype=torch.long, device=device)).backward()
        if unused := [one for one, p in probe.named_parameters() if p.requires_grad and p.grad is None]:
            raise UserError(
                f"model {name}: no gradient for {', '.join(unused):.200} at {size} px; remove them, or freeze "
                "them with requires_grad_(False)"
            )
    return architecture(probe, image_sizes[-1])


def architecture(model: nn.Module, image_size: int) -> list[dict[str, Any]]:
    """Return a row for every layer, in the order in which they first return: name, layer, output_shape (without the
    batch), parameters (trainable ones), flops. ``model`` is left in evaluation mode and with hooks.

    Layers are modules without children, and those with parameters or computation of their own. Each parameter counts
    once. flops: of one image's forward pass, as torch.utils.flop_counter counts: convolutions, matrix products and
    attention, two for each multiplication with its addition.
    """
    counter, flops, running = FlopCounterMode(display=False), Counter[nn.Module](), [model]
    shapes: dict[nn.Module, list[int]] = {}
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, _inputs: Any) -> None:
        flops[running[-1]] += counter.get_total_flops() - flops.total()
        running.append(module)

    def leave(module: nn.Module, _inputs: Any, output: Any) -> None:
        flops[running.pop()] += counter.get_total_flops() - flops.total()
        first = output[0] if isinstance(output, tuple | list) else output
        shapes.setdefault(module, list(getattr(first, "shape", ())[1:]))

    for module in names:
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    # With gradients: without, attention takes a fused path that is not counted.
    with torch.enable_grad(), counter:
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device))
    rows, counted = [], set[nn.Parameter]()
    for module in [*shapes, *(module for module in names if module not in shapes)]:
        own = {parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad} - counted
        counted |= own
        is_leaf = not list(module.children())
        row = {
            "name": names[module],
            "layer": repr(module) if is_leaf else type(module).__name__,
            "output_shape": shapes.get(module, []),
            "parameters": sum(parameter.numel() for parameter in own),
            "flops": flops[module],
        }
        if row["parameters"] or row["flops"] or (is_leaf and module in shapes):
            rows.append(row)
    return rows
