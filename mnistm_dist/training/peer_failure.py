"""A process of the run that has gone: what each of the others says of it, in one line, in place of forty."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from mnistm_dist.errors import PeerFailure

_GONE = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Application timeout caused pair closure|"
    r"Timed out waiting \d+ms|[Ww]atchdog caught collective operation timeout|remote process exited|"
    r"communicator was aborted"
)
"""What gloo and NCCL say where another process is dead, or silent for longer than a collective operation may take."""


@contextmanager
def peer_failures(collective_timeout: float) -> Iterator[None]:
    """Turns what a collective operation says of a dead or silent process into a `PeerFailure`; every other error passes
    through. ``collective_timeout``: seconds, to be named in the line."""
    try:
        yield
    except RuntimeError as error:
        found = _GONE.search(str(error))
        if found is None:
            raise
        raise PeerFailure(
            f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}: another process of the run was killed, or "
            f"silent for --collective-timeout {collective_timeout:g} s ({found[0]}); look in its node's log for why, "
            "a training goes on from its last checkpoint with --resume auto"
        ) from error
