"""The tools of ``python -m benchmarks faithful``, each used as its documentation shows it.

A tool has a class. One object of it lives in each rank; it yields the ids that this rank reads, step by step, and saves
and loads a state in the way that the tool documents. ``notes`` say which limits the tool documents itself. The global
batch is always `BATCH`: a loader that takes the batch of one process gets BATCH / world size.
"""

import importlib
import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.data.distributed import DistributedSampler

SAMPLES = 223  # a prime number: no world size but 1 divides it
BATCH = 12  # samples per step, over all processes; each world size from 1 to 4 divides it
EPOCHS = 2
SEED = 7
WORKERS = 2  # DataLoader workers of each process
SHARDS = 24  # of 9 or 10 samples: 1 to 4 processes of two workers get equally many shards
# The epoch of a step, and the epochs and ids of the samples that this rank read in it.
Step = tuple[int, list[int], list[int]]


class Ids(Dataset[int]):
    """A map-style dataset: sample i is the number i."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        return index


class Tool:
    """What all tools have; each adds its batches, its evaluation, and how it saves and loads its state."""

    name: ClassVar[str]
    package: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()  # imported before the processes are forked
    source: ClassVar[str]  # where its documentation shows this use
    saves_mid_epoch: ClassVar[bool] = True  # False: a checkpoint is of the beginning of the epoch
    notes: ClassVar[dict[str, str]] = {}  # question -> why it is not answered with yes; what the tool documents itself

    def __init__(self, data: Path, rank: int, world_size: int) -> None:
        self.data, self.rank, self.world_size = data, rank, world_size
        self.batch = BATCH // world_size
        self.epoch = self.done = 0  # where training starts: the epoch, and the steps of it that are done

    @classmethod
    def version(cls) -> str | None:
        """Return the installed version; None if the tool is not installed."""
        try:
            return metadata.version(cls.package)
        except metadata.PackageNotFoundError:
            return None

    @classmethod
    def write(cls, data: Path) -> None:
        """Write the samples in the tool's format, for those that read files."""

    @classmethod
    def clean(cls, data: Path) -> None:
        """Remove what a killed launch has left outside ``data``."""

    def train(self) -> Iterator[Step]:
        """Yield this rank's steps, from the loaded state or from the beginning, up to the last epoch."""
        for epoch in range(self.epoch, EPOCHS):
            self.epoch = epoch
            for batch in self.steps(epoch):
                self.done += 1
                ids = torch.as_tensor(batch).tolist()
                yield epoch, [epoch] * len(ids), ids
            self.done = 0

    def steps(self, epoch: int) -> Iterator[Any]:
        """Yield the batches of an epoch that are left."""
        raise NotImplementedError

    def evaluate(self) -> Iterator[list[int]]:
        """Yield the ids of this rank's evaluation batches that count in the result."""
        raise NotImplementedError

    def state(self) -> Any:
        """Return what a checkpoint holds."""
        return {"epoch": self.epoch}

    def load(self, state: Any) -> None:
        """Continue where a checkpoint was written."""
        self.epoch = state["epoch"]

    def save_to(self, folder: Path) -> None:
        """Save the state of this rank."""
        torch.save(self.state(), folder / f"state-{self.rank}.pt")

    def load_from(self, folder: Path) -> None:
        """Load the state of this rank; a rank that the saving world did not have loads that of rank 0."""
        own = folder / f"state-{self.rank}.pt"
        self.load(torch.load(own if own.exists() else folder / "state-0.pt", weights_only=False))


class StatefulTool(Tool):
    """A tool whose loader of training batches holds its own place: ``state_dict`` and ``load_state_dict``."""

    train_loader: Any

    def state(self) -> Any:
        return {"epoch": self.epoch, "loader": self.train_loader.state_dict()}

    def load(self, state: Any) -> None:
        super().load(state)
        self.train_loader.load_state_dict(state["loader"])


class TorchSampler(Tool):
    """torch's DistributedSampler and DataLoader."""

    name, package = "torch DistributedSampler", "torch"
    source = (
        "https://docs.pytorch.org/docs/stable/data.html#torch.utils.data.distributed.DistributedSampler, "
        "https://github.com/pytorch/examples/blob/main/imagenet/main.py"
    )
    saves_mid_epoch = False
    notes: ClassVar = {
        "once": "documented: adds samples to make the number divisible by that of the processes (drop_last drops them)",
        "batches": "only the last batch of an epoch differs, by those samples",
        "resume": "no state in mid-epoch: the example saves after each epoch, and a killed epoch starts again",
        "elastic": "as resume and batches",
    }

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        self.loader: Any = DataLoader

    def steps(self, epoch: int) -> Iterator[Any]:
        sampler: DistributedSampler[int] = DistributedSampler(Ids(), seed=SEED)
        sampler.set_epoch(epoch)
        yield from self.loader(Ids(), self.batch, sampler=sampler, num_workers=WORKERS)

    def evaluate(self) -> Iterator[list[int]]:
        # The example's validate(): equal parts for all ranks, then the rest, which each rank adds to the sum.
        sampler: DistributedSampler[int] = DistributedSampler(Ids(), shuffle=False, drop_last=True)
        for batch in self.loader(Ids(), self.batch, sampler=sampler, num_workers=WORKERS):
            yield batch.tolist()
        rest = Subset(Ids(), range(len(sampler) * self.world_size, SAMPLES))
        if len(rest) and self.rank == 0:
            yield from (batch.tolist() for batch in self.loader(rest, self.batch))


class TorchData(StatefulTool, TorchSampler):
    """torchdata's StatefulDataLoader with its StatefulDistributedSampler."""

    name, package, modules = "torchdata StatefulDataLoader", "torchdata", ("torchdata.stateful_dataloader.sampler",)
    source = "https://github.com/meta-pytorch/data/blob/v0.11.0/torchdata/stateful_dataloader/README.md"
    saves_mid_epoch = True
    notes: ClassVar = {
        "once": TorchSampler.notes["once"],
        "batches": TorchSampler.notes["batches"],
        "elastic": "documented: handles the state of the workers, not across ranks",
    }

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        stateful = importlib.import_module("torchdata.stateful_dataloader")
        sampling = importlib.import_module("torchdata.stateful_dataloader.sampler")
        self.loader = stateful.StatefulDataLoader
        self.sampler = sampling.StatefulDistributedSampler(Ids(), seed=SEED)
        self.train_loader = self.loader(Ids(), self.batch, sampler=self.sampler, num_workers=WORKERS)

    def steps(self, epoch: int) -> Iterator[Any]:
        self.sampler.set_epoch(epoch)
        yield from self.train_loader


class Accelerate(Tool):
    """Accelerate's prepared DataLoader, with its seedable sampler."""

    name, package, modules = "Accelerate prepared loader", "accelerate", ("accelerate",)
    source = "https://huggingface.co/docs/accelerate/usage_guides/checkpoint"
    notes: ClassVar = {
        "once": "documented: even_batches repeats samples so that all processes have batches of one size",
        "batches": "only the last batch of an epoch differs, by those samples",
        "elastic": "as batches",
    }

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        package = importlib.import_module("accelerate")
        importlib.import_module("accelerate.utils").set_seed(SEED)
        config = package.DataLoaderConfiguration(use_seedable_sampler=True)
        self.accelerator = package.Accelerator(cpu=True, dataloader_config=config)
        model = torch.nn.Linear(1, 1)
        self.model, self.optimizer, self.loader, self.eval_loader = self.accelerator.prepare(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            DataLoader(Ids(), self.batch, shuffle=True, num_workers=WORKERS),
            DataLoader(Ids(), self.batch, num_workers=WORKERS),
        )

    def steps(self, epoch: int) -> Iterator[Any]:
        # The guide does not call set_epoch. Without it, a resumed process begins with the order of epoch 0.
        self.loader.set_epoch(epoch)
        yield from self.accelerator.skip_first_batches(self.loader, self.done) if self.done else self.loader

    def evaluate(self) -> Iterator[list[int]]:
        for batch in self.eval_loader:
            gathered = self.accelerator.gather_for_metrics(batch)
            if self.accelerator.is_main_process:
                yield gathered.tolist()

    def save_to(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder / "accelerate"))
        (folder / "step.json").write_text(json.dumps([self.epoch, self.done]))

    def load_from(self, folder: Path) -> None:
        self.accelerator.load_state(str(folder / "accelerate"))
        self.epoch, self.done = json.loads((folder / "step.json").read_text())


class WebDatasetSplit(Tool):
    """WebDataset with deterministic shuffles, split_by_node and split_by_worker."""

    name, package, modules = "WebDataset split_by_node", "webdataset", ("webdataset",)
    source = (
        "https://github.com/webdataset/webdataset/blob/main/README.md#the-webdataset-pipeline-api, "
        "https://github.com/webdataset/webdataset/blob/main/FAQ.md (detshuffle, split_by_node, split_by_worker)"
    )
    saves_mid_epoch = False
    notes: ClassVar = {
        "batches": "documented: whole shards are split over processes and workers",
        "resume": "no state in mid-epoch is documented: a killed epoch starts again",
        "elastic": "as resume and batches",
        "ends": "documented: exactly balanced numbers of samples are tricky, and resampling is usual",
    }

    @classmethod
    def write(cls, data: Path) -> None:
        wds = importlib.import_module("webdataset")
        for shard in range(SHARDS):
            with (data / f"{shard:06d}.tar").open("wb") as file, wds.TarWriter(file) as tar:
                for sample in range(shard, SAMPLES, SHARDS):
                    tar.write({"__key__": f"{sample:06d}", "cls": sample})

    def tars(self) -> list[str]:
        """Return the paths of the shards."""
        return [str(tar) for tar in sorted(self.data.glob("*.tar"))]

    def decode(self) -> list[Any]:
        """Return the stages from samples to batches of ids."""
        wds = importlib.import_module("webdataset")
        return [wds.decode(), wds.to_tuple("cls"), wds.batched(self.batch)]

    def loader(self, *shuffles: Any) -> Any:
        """Return a loader of README's pipeline with ``shuffles`` of shards and of samples."""
        wds = importlib.import_module("webdataset")
        dataset = wds.DataPipeline(
            wds.SimpleShardList(self.tars()),
            *shuffles[:1],
            wds.split_by_node,
            wds.split_by_worker,
            wds.tarfile_to_samples(),
            *shuffles[1:],
            *self.decode(),
        )
        return wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS)

    def steps(self, epoch: int) -> Iterator[Any]:
        wds = importlib.import_module("webdataset")
        # The epoch at which detshuffle starts: workers are new in each epoch, so it would not count by itself.
        shuffles = [wds.detshuffle(size, seed=SEED, epoch=epoch - 1) for size in (100, 1000)]
        yield from (ids for (ids,) in self.loader(*shuffles))

    def evaluate(self) -> Iterator[list[int]]:
        yield from (torch.as_tensor(ids).tolist() for (ids,) in self.loader())


class WebDatasetResampled(WebDatasetSplit):
    """WebDataset with resampled shards, as its FAQ recommends for DDP."""

    name = "WebDataset resampled"
    source = "https://github.com/webdataset/webdataset/blob/main/FAQ.md (issues 278 and 434)"
    notes: ClassVar = {
        "once": "documented: shards are drawn with replacement, and an epoch is a number of batches",
        "batches": "each worker draws its own shards",
        "resume": WebDatasetSplit.notes["resume"],
        "elastic": "as resume and batches",
    }

    def steps(self, epoch: int) -> Iterator[Any]:
        wds = importlib.import_module("webdataset")
        dataset = wds.DataPipeline(
            # By default it draws from the time and the process id.
            wds.ResampledShards(self.tars(), seed=SEED + epoch, deterministic=True),
            wds.tarfile_to_samples(),
            wds.detshuffle(1000, seed=SEED, epoch=epoch - 1),
            *self.decode(),
        )
        loader = wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS).with_epoch(SAMPLES // BATCH)
        yield from (ids for (ids,) in loader)


class MosaicStreaming(StatefulTool):
    """MosaicML Streaming's StreamingDataset and StreamingDataLoader."""

    name, package, modules = "MosaicML Streaming", "mosaicml-streaming", ("streaming",)
    source = "https://docs.mosaicml.com/projects/streaming/en/latest/distributed_training/fast_resumption.html"
    notes: ClassVar = {
        "once": "documented: repeats samples, and drops none, so that each process has the same number",
        "batches": "only the last batch of an epoch differs, by those samples",
        "elastic": "as batches",
        "evaluation": "as once",
    }

    @classmethod
    def write(cls, data: Path) -> None:
        package = importlib.import_module("streaming")
        for split in ("train", "val"):
            # About ten samples in a shard.
            with package.MDSWriter(out=str(data / split), columns={"id": "int"}, size_limit=300) as writer:
                for sample in range(SAMPLES):
                    writer.write({"id": sample})

    @classmethod
    def clean(cls, data: Path) -> None:
        # As clean_stale_shared_memory() of "FAQs and tips", but only what names this folder: other runs may be alive.
        for names in Path("/dev/shm").glob("*_locals"):
            if str(data).encode() in names.read_bytes():
                for left in names.parent.glob(names.name.replace("locals", "*")):
                    left.unlink()

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        self.train_loader = self.open("train", shuffle=True, shuffle_seed=SEED)

    def open(self, split: str, **options: Any) -> Any:
        """Return the loader of a split."""
        package = importlib.import_module("streaming")
        dataset = package.StreamingDataset(local=str(self.data / split), batch_size=self.batch, **options)
        return package.StreamingDataLoader(dataset, batch_size=self.batch, num_workers=WORKERS)

    def steps(self, epoch: int) -> Iterator[Any]:
        yield from (batch["id"] for batch in self.train_loader)

    def evaluate(self) -> Iterator[list[int]]:
        yield from (batch["id"].tolist() for batch in self.open("val", shuffle=False))


class LitData(StatefulTool):
    """LitData's StreamingDataset and StreamingDataLoader."""

    name, package, modules = "LitData", "litdata", ("litdata",)
    source = "https://github.com/Lightning-AI/litData/blob/main/README.md (multi-GPU; pause, resume)"
    notes: ClassVar = {
        "once": "documented: drop_last=True, for training, drops samples so that every rank has the same number",
        "batches": "documented: chunks are assigned to ranks and workers, then shuffled",
        "elastic": "documented: no sample is repeated; drop_last drops from what is left",
    }

    @classmethod
    def write(cls, data: Path) -> None:
        package = importlib.import_module("litdata.streaming.writer")
        writer = package.BinaryWriter(str(data), chunk_size=9)
        for sample in range(SAMPLES):
            writer.add_item(sample, {"id": sample})
        writer.done()
        writer.merge()

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        self.train_loader = self.open(shuffle=True, drop_last=True)

    def open(self, **options: Any) -> Any:
        """Return a loader of the samples."""
        package = importlib.import_module("litdata")
        dataset = package.StreamingDataset(str(self.data), seed=SEED, **options)
        return package.StreamingDataLoader(dataset, batch_size=self.batch, num_workers=WORKERS)

    def steps(self, epoch: int) -> Iterator[Any]:
        yield from (batch["id"] for batch in self.train_loader)

    def evaluate(self) -> Iterator[list[int]]:
        yield from (torch.as_tensor(batch["id"]).tolist() for batch in self.open(shuffle=False, drop_last=False))


class Ordered(Tool):
    """Ours in a loop of one's own: OrderedSampler in a DataLoader."""

    name, package = "mnistm_dist OrderedSampler", "mnistm-dist"
    source = "docs/sampler.md"
    notes: ClassVar = {
        "once": "documented: epochs follow without a gap, so samples of the next epoch fill the last batch of a run",
        "evaluation": "documented: it is a sampler for training",
    }

    def train(self) -> Iterator[Step]:
        from mnistm_dist import OrderedSampler

        share = {"rank": self.rank, "world_size": self.world_size}
        sampler = OrderedSampler(SAMPLES, BATCH, epochs=EPOCHS, seed=SEED, start_step=self.done, **share)
        for batch in DataLoader(Ids(), batch_sampler=sampler, num_workers=WORKERS):
            first = self.done * BATCH
            own = range(first + self.rank * self.batch, first + (self.rank + 1) * self.batch)
            self.done += 1
            # Epochs follow one another without a gap: a step may hold the end of one and the beginning of the next.
            yield first // SAMPLES, [position // SAMPLES for position in own], batch.tolist()

    def state(self) -> Any:
        return {"step": self.done}

    def load(self, state: Any) -> None:
        self.done = state["step"]


class Packed(Ordered):
    """Ours as the trainer reads packed shards: streaming, in the windowed order; canonical batches in evaluation."""

    name = "mnistm_dist packed shards"
    source = "README.md: --reader streaming --batch-size 12 --micro-batch 3 --shuffle-streams 12"
    notes: ClassVar = {"once": Ordered.notes["once"]}

    @classmethod
    def write(cls, data: Path) -> None:
        from PIL import Image

        from mnistm_dist import pack

        for split in ("train", "val"):
            for name in ("even", "odd"):
                (data / "source" / split / name).mkdir(parents=True)
            for sample in range(SAMPLES):
                # The first two bytes of the image are the id.
                image = Image.new("RGB", (16, 16), (*divmod(sample, 256), split == "val"))
                image.save(data / "source" / split / ("even", "odd")[sample % 2] / f"{split}{sample:06d}.png")
        places = ["--out", str(data / "shards"), "--num-shards", str(SHARDS), "--cache-dir", str(data / "cache")]
        assert pack.main([str(data / "source"), *places]) == 0, "pack failed"

    def open(self, split: str) -> Any:
        """Return the reader of a split."""
        from mnistm_dist.config import DataConfig
        from mnistm_dist.data.loader import open_reader
        from mnistm_dist.data.shards import ShardSet

        shards, config = ShardSet.open(self.data / "shards"), DataConfig(order="windowed", reader="streaming")
        return open_reader(shards, split, config, cache_dir=self.data / "cache", device="cpu", threads=1)

    def train(self) -> Iterator[Step]:
        from mnistm_dist.data.loader import train_batches
        from mnistm_dist.data.order import WindowedOrder
        from mnistm_dist.data.shards import ShardSet

        reader = self.open("train")
        shards = ShardSet.open(self.data / "shards").split("train").shards
        counts = [shard.count for shard in shards]
        order = WindowedOrder(shard_counts=counts, seed=SEED, batch_size=BATCH, streams=12, window=1024)
        share = {"world_size": self.world_size, "rank": self.rank, "start_step": self.done}
        last = -(-EPOCHS * SAMPLES // BATCH)
        for parts in train_batches(reader, order, batch_size=BATCH, micro_batch=3, stop_step=last, **share):
            epoch = self.done * BATCH // SAMPLES
            self.done += 1
            epochs = [int(position) // SAMPLES for part in parts for position in part.positions]
            yield epoch, epochs, [sample for part in parts for sample in read_ids(part.images)]

    def evaluate(self) -> Iterator[list[int]]:
        from mnistm_dist.data.loader import evaluation_batches

        # The trainer's canonical batches have 250 images: here, too, ranks have unequal numbers of them.
        batches = evaluation_batches(self.open("val"), batch_size=25, rank=self.rank, world_size=self.world_size)
        yield from (read_ids(batch.images)[: batch.count] for batch in batches)


def read_ids(images: torch.Tensor) -> list[int]:
    """Return the ids in the first two bytes of images, uint8 (n, H, W, 3)."""
    first = images[:, 0, 0].long()
    return (first[:, 0] * 256 + first[:, 1]).tolist()


TOOLS: tuple[type[Tool], ...] = (
    TorchSampler,
    Accelerate,
    TorchData,
    WebDatasetSplit,
    WebDatasetResampled,
    MosaicStreaming,
    LitData,
    Ordered,
    Packed,
)
