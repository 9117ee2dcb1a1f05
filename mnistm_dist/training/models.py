"""Models: a ResNet18 without layer3 and layer4 (692,106 parameters for 10 classes), torchvision's, and your own."""

import difflib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from mnistm_dist.config import DEFAULT_MODEL
from mnistm_dist.errors import UserError, did_you_mean

# Folders of code that a model's own code calls, or is called by: this package's, torch's and Python's.
LIBRARIES = tuple(f"{Path(path).parent}/" for path in (torch.__file__, importlib.__file__, Path(__file__).parent))
# Returns a model of so many classes: float (B, 3, H, W) to logits, float (B, classes).
ModelFunction = Callable[[int], nn.Module]


class PrunedResNet18(nn.Module):
    """ResNet18's stem, layer1 and layer2 (He et al. 2015, arXiv 1512.03385), pooled, then Linear-BatchNorm-GELU-Linear.

    Input: float images (B, 3, H, W), normalised, H and W at least 16. Output: logits (B, ``num_classes``). In training,
    B must be at least 2 (BatchNorm1d). Initial weights as in torchvision's ResNet: Kaiming normal, fan out.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64))
        downsample = nn.Sequential(nn.Conv2d(64, 128, kernel_size=1, stride=2, bias=False), nn.BatchNorm2d(128))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, stride=2, downsample=downsample), BasicBlock(128, 128))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(128, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def create_model(num_classes: int, seed: int, name: str = DEFAULT_MODEL) -> nn.Module:
    """Return a model; its initial weights depend on ``seed`` alone, and the global random state is not changed.

    ``name``: as ``--model``. Raise `UserError` if there is no such model, or its function fails.
    """
    function = find_model(name)
    with torch.random.fork_rng(devices=[]), failures_of(f"model {name}: cannot be created"):
        # torch.manual_seed would also seed the GPUs.
        torch.default_generator.manual_seed(seed)
        model = function(num_classes)
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name}: the function returned {type(model).__name__}; it should be a torch.nn.Module")
    parameters = list(model.parameters())
    if not any(p.requires_grad for p in parameters) or any(map(nn.parameter.is_lazy, parameters)):
        raise UserError(f"model {name}: no parameter to train, or a lazy one; should have parameters of known shapes")
    return model


def find_model(name: str) -> ModelFunction:
    """Return the function that creates a model of that name. Raise `UserError` if there is none."""
    if name == DEFAULT_MODEL:
        return PrunedResNet18
    origin, _, function_name = name.partition(":")
    # Without this argument it lists detection models, too, whose backbones would be downloaded.
    known = torchvision.models.list_models(module=torchvision.models)
    if origin == "torchvision" and function_name in known:
        return lambda num_classes: torchvision.models.get_model(function_name, num_classes=num_classes)
    if not (origin and function_name) or origin == "torchvision":
        names = {DEFAULT_MODEL: DEFAULT_MODEL, **{one: f"torchvision:{one}" for one in known}}
        close = difflib.get_close_matches(function_name or name, names, 1)
        hint = f" (did you mean {names[close[0]]}?)" if close else ""
        raise UserError(f"model {name}: unknown{hint}; use {DEFAULT_MODEL}, torchvision:NAME or module:function")
    folder = Path.cwd()
    if str(folder) not in sys.path:
        # As with python -m; the command mnistm-dist and scripts in other folders do not have it.
        sys.path.insert(0, str(folder))
    try:
        with failures_of(f"model {name}: cannot be imported"):
            module = importlib.import_module(origin)
    except UserError as error:
        missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
        if missing is None or not f"{origin}.".startswith(f"{missing}."):
            raise
        near = did_you_mean(origin, {path.stem for path in folder.glob("*.py")})
        raise UserError(
            f"model {name}: no module {missing} in {folder}, nor installed{near}; start the command in the folder that "
            "holds it, or add that to PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        near_name = did_you_mean(function_name, [one for one, value in vars(module).items() if callable(value)])
        raise UserError(f"model {name}: {origin} has no function {function_name}{near_name}; name one of its")
    return function


def name_of(function: ModelFunction) -> str:
    """Return the name by which `find_model` finds a function. Raise `UserError` if it cannot be imported by name."""
    module, name = getattr(function, "__module__", "__main__"), getattr(function, "__qualname__", "")
    if module == "__main__" or getattr(sys.modules[module], name, None) is not function:
        raise UserError(
            f"model: {' '.join(repr(function).split()):.100} cannot be imported by its name, and a resume must build "
            "it again; define it at the top level of a module of its own, such as my_models.py, and pass "
            "my_models.net or 'my_models:net'"
        )
    return f"{module}:{name}"


@contextmanager
def failures_of(subject: str) -> Iterator[None]:
    """Turn what a model's own code raises into a `UserError` that names the line: ``SUBJECT: ...``."""
    try:
        yield
    except (
        *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError),
        *(RuntimeError, SyntaxError, TypeError, ValueError),
    ) as error:
        frames = traceback.extract_tb(error.__traceback__)
        # The model's own line, not that of the library which it calls.
        own = [frame for frame in frames if not frame.filename.startswith(("<frozen", *LIBRARIES))]
        place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{subject}: {type(error).__name__}: {reason}{place}") from error


def to_device(model: nn.Module, device: torch.device, memory_format: str) -> nn.Module:
    """Return the model on ``device`` in the memory format ``channels_last`` or ``contiguous``."""
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    return model.to(device).to(memory_format=layout)
