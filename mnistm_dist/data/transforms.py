"""uint8 images to the model's input: whole batches, on the device where they are.

Every random number comes from (seed, position), so an image is augmented in the same way on any rank, in any
micro-batch, after any restart. So does the strength, which may grow in the course of the run, as in the progressive
learning of Tan and Le 2021, arXiv 2104.00298.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mnistm_dist.config import AugmentConfig, Config
from mnistm_dist.data.hashing import uniform
from mnistm_dist.data.manifest import Split

POINTS = 5  # points per side of the square grid that an elastic deformation displaces
# Random numbers per image: shift x and y, rotation, scale, inversion, whether and how channels are permuted, cutout
# x and y, shear, displacement in x of each of the points, then in y, flip, area of the crop and its place in x and y,
# brightness, contrast, saturation.
# Add an augmentation's own at the end: the others, and so the results of old runs, then stay the same.
DRAWS = 67
# Of those, the ones of which one half means no change: their distance from it is the strength that ``ramp`` scales.
RAMPED = (*range(4), *range(9, 10 + 2 * POINTS**2), *range(64, 67))


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to ``device``; the host does not wait for a GPU, as it would for unpinned memory."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Preprocess:
    """Normalise and resize, as in evaluation, prediction and export.

    ``mean`` and ``std`` are per channel, of values from 0 to 1. Called with uint8 (B, H, W, 3), it returns float32
    (B, 3, size, size), in the memory format channels_last if the input is contiguous; on a GPU a resized image is
    contiguous, and the first convolution converts it.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32, device=device).view(1, -1, 1, 1)

    def __call__(self, images: Tensor, size: int) -> Tensor:
        return resize(self.normalise(images), size)

    def normalise(self, images: Tensor) -> Tensor:
        """Convert uint8 (B, H, W, 3) to float32 (B, 3, H, W) of mean 0 and standard deviation 1, channels_last.

        It precedes the resizing, which is linear: the same result on a quarter of the pixels. It works on whole rows,
        since torch is slow at loops over three channels: the same bits in a sixth of the time.
        """
        width = images.shape[2]
        mean, std = (values.flatten().repeat(width) for values in (self.mean, self.std))
        rows = images.float().flatten(2).div_(255).sub_(mean).div_(std)
        return rows.view(images.shape).permute(0, 3, 1, 2)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize float (B, C, H, W) to (B, C, size, size): bilinear, corners not aligned, antialiased when shrinking."""
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    shrinks = size < max(height, width)
    return functional.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=shrinks)


def create_augment(config: Config, split: Split, device: torch.device | str = "cpu") -> "Augment":
    """Return what a run does with the images of its train split."""
    preprocess, steps = Preprocess(split.mean, split.std, device), config.steps
    return Augment(config.augment, preprocess, steps.seed, run_images=steps.epochs * split.count)


class Augment:
    """`Preprocess` with the random changes of `AugmentConfig`, as in training."""

    def __init__(self, config: AugmentConfig, preprocess: Preprocess, seed: int, run_images: int = 0) -> None:
        """``run_images``: the images that the whole run trains, of which ``ramp`` is a fraction."""
        self.config, self.preprocess, self.seed = config, preprocess, seed
        self.ramp_images = config.ramp * run_images
        # Built once: on a GPU, the host waits for such a copy.
        self.device = preprocess.mean.device
        self.orders = torch.tensor(CHANNEL_ORDERS, device=self.device)
        self.grey = torch.tensor(GREY, device=self.device)
        affine = config.shift or config.rotate or config.scale or config.shear
        self.moves = bool(affine or config.elastic or config.crop)

    def __call__(self, images: Tensor, positions: np.ndarray, size: int) -> Tensor:
        """Convert uint8 (B, H, W, 3) at training ``positions`` int64 (B,) to float32 (B, 3, size, size)."""
        return self.apply(images, self.draw(positions), size)

    def draw(self, positions: np.ndarray) -> Tensor:
        """Return the random numbers of ``positions`` int64 (B,): float32 (B, DRAWS), on the device; (B, 0) if nothing
        is random."""
        draws = uniform(self.seed, positions, DRAWS if self.config != AugmentConfig() else 0)
        if self.ramp_images:
            strength = np.minimum(positions / self.ramp_images, 1).astype(np.float32)[:, None]
            draws[:, RAMPED] = 0.5 + (draws[:, RAMPED] - 0.5) * strength
        return upload(draws, self.device)

    def apply(self, images: Tensor, draws: Tensor, size: int) -> Tensor:
        """Convert uint8 (B, H, W, 3) to float32 (B, 3, size, size) by the random numbers of `draw`."""
        config = self.config
        if config.invert:
            # 255 - x is x XOR 255.
            images = images ^ (draws[:, 4] < config.invert).to(torch.uint8).mul_(255).view(-1, 1, 1, 1)
        if config.permute_channels:
            images = permute_channels(images, draws[:, 5] < config.permute_channels, draws[:, 6], self.orders)
        if config.flip:
            images = torch.where((draws[:, 60] < config.flip).view(-1, 1, 1, 1), images.flip(2), images)
        if config.colour:
            images = change_colours(images, 1 + config.colour * (2 * draws[:, 64:67] - 1), self.grey)
        floats = self.preprocess.normalise(images)
        height, width = floats.shape[-2:]
        floats = self.warp(floats, draws, size) if self.moves else resize(floats, size)
        if config.cutout:
            floats = cut_out(floats, draws[:, 7:9], config.cutout / width, config.cutout / height)
        return floats

    def compile(self) -> None:
        """Compile `apply`, each image size by itself: a few kernels instead of many, with other last bits."""
        self.apply = torch.compile(self.apply, dynamic=False)  # type: ignore[method-assign]

    def warp(self, images: Tensor, draws: Tensor, size: int) -> Tensor:
        """Crop, shear, rotate, scale and shift while resizing; the image is mirrored beyond its edges.

        The affine map takes output to input coordinates in [-1, 1]: p_in = R(angle) S(slant) p_out / scale + shift,
        with S = ((1, slant), (0, 1)) (torch.nn.functional.affine_grid), plus the elastic displacement of p_out. A crop
        comes last: the output is a square within what the others would give, at a random place.
        """
        height, width = images.shape[-2:]
        signed = draws[:, :4] * 2 - 1
        angle = signed[:, 2] * (self.config.rotate * torch.pi / 180)
        inverse_scale = 1 / (1 + signed[:, 3] * self.config.scale)
        cos, sin = torch.cos(angle) * inverse_scale, torch.sin(angle) * inverse_scale
        slant = torch.tan((draws[:, 9] * 2 - 1) * (self.config.shear * torch.pi / 180))
        shift_x = signed[:, 0] * (2 * self.config.shift / width)
        shift_y = signed[:, 1] * (2 * self.config.shift / height)
        theta = torch.stack([cos, cos * slant - sin, shift_x, sin, sin * slant + cos, shift_y], dim=1).view(-1, 2, 3)
        if self.config.crop:
            side = (1 - self.config.crop * draws[:, 61]).sqrt()
            centre = (draws[:, 62:64] * 2 - 1) * (1 - side[:, None])
            moved = theta[:, :, 2:] + theta[:, :, :2] @ centre[:, :, None]
            theta = torch.cat([theta[:, :, :2] * side.view(-1, 1, 1), moved], dim=2)
        grid = functional.affine_grid(theta, [len(images), 1, size, size], align_corners=False)
        if self.config.elastic:
            grid += elastic_displacement(
                draws[:, 10 : 10 + 2 * POINTS**2],
                2 * self.config.elastic / width,
                2 * self.config.elastic / height,
                size,
            )
        return functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def elastic_displacement(draws: Tensor, reach_x: float, reach_y: float, size: int) -> Tensor:
    """Return a smooth displacement of every pixel, float (B, size, size, 2): x and y in units of an affine grid.

    ``draws`` (B, 50) in [0, 1) displace 5 x 5 points by up to ``reach_x`` and ``reach_y``; between them it is
    interpolated, bicubic. This is the elastic deformation of Simard et al. 2003, "Best practices for convolutional
    neural networks applied to visual document analysis", with a coarse grid instead of a Gaussian filter.
    """
    points = (draws * 2 - 1).view(-1, 2, POINTS, POINTS)
    smooth = functional.interpolate(points, (size, size), mode="bicubic", align_corners=True)
    return torch.stack([smooth[:, 0] * reach_x, smooth[:, 1] * reach_y], dim=-1)


GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601, as torchvision and Pillow use it


def change_colours(images: Tensor, factors: Tensor, weights: Tensor) -> Tensor:
    """Multiply brightness, contrast and saturation of uint8 (B, H, W, 3) by ``factors`` (B, 3), in this order.

    Contrast is the distance from the mean grey of the image, saturation that from the grey of the pixel, as in
    torchvision's ColorJitter. ``weights`` (3,): the shares of the channels in grey.
    """
    brightness, contrast, saturation = factors.float().view(-1, 3, 1, 1, 1).unbind(1)
    floats = (images.float() * brightness).clamp_(0, 255)
    mean = (floats @ weights).mean((1, 2)).view(-1, 1, 1, 1)
    floats = (mean + (floats - mean) * contrast).clamp_(0, 255)
    grey = (floats @ weights).unsqueeze(3)
    return (grey + (floats - grey) * saturation).clamp_(0, 255).round_().to(torch.uint8)


CHANNEL_ORDERS = tuple(itertools.permutations(range(3)))


def permute_channels(images: Tensor, chosen: Tensor, draw: Tensor, orders: Tensor) -> Tensor:
    """Permute the channels of the ``chosen`` images, bool (B,), of uint8 (B, H, W, 3), to one of ``orders``, int64
    (6, 3), by ``draw`` in [0, 1)."""
    picked = orders[torch.where(chosen, (draw * len(CHANNEL_ORDERS)).long(), 0)]
    return images.gather(3, picked.view(-1, 1, 1, 3).expand_as(images))


def cut_out(images: Tensor, centres: Tensor, width: float, height: float) -> Tensor:
    """Set a rectangle of float (B, C, H, W) at ``centres`` (B, 2), x and y in [0, 1), to 0, which is the mean.

    ``width`` and ``height`` are fractions of the image's. DeVries and Taylor 2017, arXiv 1708.04552.
    """
    rows = (torch.arange(images.shape[-2], device=images.device) + 0.5) / images.shape[-2]
    columns = (torch.arange(images.shape[-1], device=images.device) + 0.5) / images.shape[-1]
    in_x = (columns - centres[:, :1]).abs() < width / 2
    in_y = (rows - centres[:, 1:]).abs() < height / 2
    return images.masked_fill((in_y[:, None, :, None] & in_x[:, None, None, :]), 0.0)
