"""The gradient and BatchNorm's statistics of a step, to the last bit the same on any number of processes.

A step has M micro-batches, whose gradients g_0 ... g_{M-1} do not depend on the rank that computes them. Floating-point
addition is not associative, so their sum is defined as that of one binary tree over the M leaves::

    S(level, index) = S(level - 1, 2 * index) + S(level - 1, 2 * index + 1)      S(0, i) = g_i

A node whose leaves are all below M is complete. The complete nodes without a complete parent are one for each bit of M;
they are added from the right: r_0 + (r_1 + (r_2 + ...)). The gradient is that sum divided by M, once.

1. A rank computes a contiguous range of leaves. It puts each on a stack and adds the two top nodes while they are
   siblings: a binary counter. What remains are at most 2 * log2(share) + 1 complete nodes, the roots of its range; that
   is also the number of gradients in memory.
2. The flat gradient is cut into W slices, and rank s gets slice s of every rank's roots, in one all-to-all. It adds
   them in the same way, in rank order, which is that of the leaves, and divides by M.
3. One all-gather gives the slices to all ranks.

BatchNorm updates its running statistics with those of every micro-batch: running = (1 - momentum) * running +
momentum * batch. Before each forward they are set to 0, so after it they hold momentum * batch; these are gathered, and
every rank applies them in the order of the micro-batches.
"""

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mnistm_dist.errors import UserError
from mnistm_dist.training.distributed import World

# (level, index): the node over the leaves from index * 2**level up to (index + 1) * 2**level.
Node = tuple[int, int]


class TreeSum:
    """The sum of leaves that come from left to right, in the order of the tree; it is computed in their memory."""

    def __init__(self) -> None:
        self.nodes: list[tuple[Node, Tensor]] = []
        """Complete nodes, from left to right."""

    def add(self, node: Node, value: Tensor) -> list[Tensor]:
        """Add the complete node to the right of the last one; return the tensors that are no longer needed."""
        (level, index), free = node, []
        while index % 2 and self.nodes and self.nodes[-1][0][0] == level:
            free.append(value)
            value = self.nodes.pop()[1].add_(free[-1])
            level, index = level + 1, index // 2
        self.nodes.append(((level, index), value))
        return free

    def total(self) -> Tensor:
        """Return the sum of all nodes, which must begin with leaf 0."""
        *others, (_, total) = self.nodes
        for _, value in reversed(others):
            total = value.add_(total)
        return total


def roots(leaves: range) -> list[Node]:
    """Return the largest complete nodes within a range of leaves, from left to right."""
    tree = TreeSum()
    for leaf in leaves:
        tree.add((0, leaf), torch.empty(0))
    return [node for node, _ in tree.nodes]


class GradientTree:
    """Sums the gradients of a step over all micro-batches and ranks.

    Call `begin_step`, then `begin_micro_batch` and `end_micro_batch` around each forward and backward of this rank, and
    at the end `reduce`. ``shares``: the micro-batches of each rank, in rank order. Raise `UserError` for a BatchNorm
    without a momentum.
    """

    def __init__(self, model: nn.Module, world: World, shares: Sequence[range]) -> None:
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats and module.momentum is None:
                raise UserError(f"reproducible: {name}, a BatchNorm, has momentum None; give it a number")
        self.model, self.world, self.shares = model, world, shares
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.slice = -(-sum(parameter.numel() for parameter in self.parameters) // world.size)
        """Elements of the flat gradient that a rank sums; the last slice is padded."""
        self.roots = [roots(share) for share in shares]
        self.share, self.count = shares[world.rank], shares[-1].stop
        self.unused: list[Tensor] = []
        """Flat gradients whose memory is free."""

    def begin_step(self) -> None:
        """Remember BatchNorm's statistics."""
        self.tree, self.statistics = TreeSum(), list[Tensor]()
        modules = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        # A frozen BatchNorm is in evaluation mode.
        self.norms = [norm for norm in modules if norm.training and norm.track_running_stats]
        self.buffers = [norm.get_buffer(name) for norm in self.norms for name in ("running_mean", "running_var")]
        self.running = self._flat_buffers()
        counters = {id(norm.num_batches_tracked) for norm in self.norms}
        self.expected = {
            name: (id(buffer), buffer._version + len(self.share) * (id(buffer) in counters))
            for name, buffer in self.model.named_buffers()
            if id(buffer) not in map(id, self.buffers)
        }

    def begin_micro_batch(self) -> None:
        """Clear the gradients and the running statistics."""
        for parameter in self.parameters:
            parameter.grad = None
        for buffer in self.buffers:
            buffer.zero_()

    def end_micro_batch(self) -> None:
        """Take the gradients and the statistics of the micro-batch."""
        flat = self.unused.pop() if self.unused else self.parameters[0].new_zeros(self.world.size * self.slice)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        torch._foreach_copy_(self._views(flat), gradients)
        self.unused += self.tree.add((0, self.share[len(self.statistics)]), flat)
        self.statistics.append(self._flat_buffers())

    def reduce(self) -> None:
        """Give the parameters the mean gradient of the step, and BatchNorm its statistics. All ranks take part.

        Raise `UserError` for another buffer that the model has changed: it would depend on the number of processes.
        """
        for name, buffer in self.model.named_buffers():
            if self.expected.get(name, found := (id(buffer), buffer._version)) != found:
                raise UserError(
                    f"reproducible: the model changes its buffer {name}; supported are those of a BatchNorm that runs "
                    "once per forward"
                )
        for parameter, view in zip(self.parameters, self._views(self._mean_gradient()), strict=True):
            parameter.grad = view
        if self.norms:
            own = torch.stack(self.statistics)
            # Filled on the device: a copy from the host would wait for a GPU.
            keep = torch.cat(
                [own.new_full((2 * norm.num_features,), 1 - cast(float, norm.momentum)) for norm in self.norms]
            )
            for statistics in self.world.gather_rows(own, [len(share) for share in self.shares]):
                self.running.mul_(keep).add_(statistics)
            for buffer, value in zip(self.buffers, self.running.split([len(b) for b in self.buffers]), strict=True):
                buffer.copy_(value)
            for norm in self.norms:
                norm.get_buffer("num_batches_tracked").add_(self.count - len(self.share))

    def _mean_gradient(self) -> Tensor:
        """Return the mean gradient of the step, flat; its memory is free from the next step on."""
        own = [value for _, value in self.tree.nodes]
        self.unused += own
        if self.world.size == 1:
            return self.tree.total().div_(self.count)
        sent = torch.stack([value.view(self.world.size, self.slice) for value in own], dim=1)
        received = self.world.all_to_all(sent.flatten(), [len(nodes) * self.slice for nodes in self.roots])
        tree = TreeSum()
        for node, value in zip(itertools.chain(*self.roots), received.view(-1, self.slice), strict=True):
            tree.add(node, value)
        return self.world.all_gather(tree.total().div_(self.count), out=own[0])

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Return views of a flat gradient in the shapes and memory formats of the parameters."""
        ends = itertools.accumulate(parameter.numel() for parameter in self.parameters)
        return [
            flat.as_strided(p.shape, p.stride(), end - p.numel()) for p, end in zip(self.parameters, ends, strict=True)
        ]

    def _flat_buffers(self) -> Tensor:
        return torch.cat([torch.empty(0, device=self.world.device), *self.buffers])
