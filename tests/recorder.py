"""Record which images the training consumed: for tests that look inside the ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mnistm_dist.data.loader import Batch, Reader
from mnistm_dist.training import trainer as loop


def record_batches() -> None:
    """Append ``[step, [id, ...]]`` to ``consumed-RANK.jsonl`` before each training step."""
    original = loop.train_batches
    path = Path(f"consumed-{os.environ.get('RANK', '0')}.jsonl")

    def recorded(reader: Reader, *args: Any, start_step: int = 0, **kwargs: Any) -> Iterator[list[Batch]]:
        batches = original(reader, *args, start_step=start_step, **kwargs)
        for step, micro_batches in enumerate(batches, start=start_step):
            ids = [int(sample) for batch in micro_batches for sample in batch.ids]
            with path.open("a") as file:
                file.write(json.dumps([step, ids]) + "\n")
            yield micro_batches

    loop.train_batches = recorded
