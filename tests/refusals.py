"""How a source is refused: for the tests of all that reads sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from mnistm_dist.data.sources.catalog import open_source
from mnistm_dist.errors import UserError


def refusal(source: Path, **options: str) -> str:
    """Return the line in which a source is refused, when it is opened or while it is read."""
    with pytest.raises(UserError) as caught:
        list(open_source(str(source), **options).samples())
    message = str(caught.value)
    assert str(source) in message
    assert "\n" not in message
    return message
