"""`OrderedSampler`: this package's training order for any map-style dataset and any training loop."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from mnistm_dist.data.order import FullOrder, step_positions


class OrderedSampler(Sampler[list[int]]):
    """The indices of one rank, step by step: the ``batch_sampler`` of a ``torch.utils.data.DataLoader``.

    The order is endless: epoch after epoch, each a permutation, without a gap. Step s takes the positions from
    ``s * batch_size`` up to ``(s + 1) * batch_size`` of it, and each rank a contiguous part of them. The images of a
    step depend on size, seed and batch size alone: no sample is repeated or dropped within an epoch, and a run that
    continues at ``start_step`` continues exactly, on any number of processes.

    Args:
        size: samples in the dataset.
        batch_size: samples per step, over all processes; a multiple of ``world_size``.
        epochs: passes over the dataset. The last step ends with the first batch that completes the last one.
        seed: of the order.
        rank: this process.
        world_size: number of processes.
        start_step: steps done; all that a checkpoint needs to store.

    Raises:
        ValueError: the batch is not a multiple of the world size.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        epochs: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} is not a multiple of the {world_size} processes")
        self.order = FullOrder(size=size, seed=seed)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.start_step, self.last_step = start_step, -(-epochs * size // batch_size)

    def __len__(self) -> int:
        """Return the number of steps left."""
        return max(0, self.last_step - self.start_step)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's indices of each step."""
        for step in range(self.start_step, self.last_step):
            share = {"batch_size": self.batch_size, "world_size": self.world_size, "rank": self.rank}
            yield self.order.ids(step_positions(step, **share)).tolist()
