"""The model: ResNet18 without layer3 and layer4, with a small MLP head. 692,106 parameters for 10 classes."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


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


def create_model(num_classes: int, seed: int) -> PrunedResNet18:
    """Return the model; its initial weights depend on ``seed`` alone, and the global random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the GPUs.
        torch.default_generator.manual_seed(seed)
        return PrunedResNet18(num_classes)


def to_device(model: nn.Module, device: torch.device, memory_format: str) -> nn.Module:
    """Return the model on ``device`` in the memory format ``channels_last`` or ``contiguous``."""
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    return model.to(device).to(memory_format=layout)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def architecture(model: nn.Module, image_size: int) -> list[dict[str, Any]]:
    """Return a row for every leaf layer, in call order: name, layer, output_shape (without the batch), parameters."""
    rows: list[dict[str, Any]] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, _inputs: Any, output: Tensor) -> None:
            shape, parameters = list(output.shape[1:]), count_parameters(module)
            rows.append({"name": name, "layer": repr(module), "output_shape": shape, "parameters": parameters})

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(record(name)) for name, module in leaves]
    was_training, parameter = model.training, next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return rows
