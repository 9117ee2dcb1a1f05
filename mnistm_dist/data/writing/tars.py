"""Tars whose bytes depend on nothing but what is put in: USTAR headers of our own, with no time, owner or user's name.

Python's `tarfile` is not asked for them, since which fields it leaves empty has differed between its versions.
"""

from __future__ import annotations

from mnistm_dist.data.output import OutputFile

BLOCK = 512
"""Bytes; a header is one block, and a member's data is padded to whole ones."""
_MAX_MEMBER = 8**11 - 1
_OWNER = b"0000644\0" + b"0000000\0" * 2  # mode, user, group
_TIME = b"00000000000\0"
_END = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(167)  # from the kind of member on
_END_SUM = sum(_END)


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes of a USTAR header (POSIX.1-1988) of a regular file of ``size`` bytes: mode 644, owner 0, time 0."""
    encoded = name.encode("ascii")
    assert len(encoded) <= 100, name
    assert size <= _MAX_MEMBER, size
    start = encoded.ljust(100, b"\0") + _OWNER + b"%011o\0" % size + _TIME
    # The checksum is the sum of all bytes, its own field counted as eight spaces.
    return start + b"%06o\0 " % (sum(start) + sum(b" " * 8) + _END_SUM) + _END


def add_member(tar: OutputFile, name: str, data: bytes) -> int:
    """Appends a member to a tar; returns the offset of its data in the tar, bytes."""
    return tar.append(tar_header(name, len(data)) + data + bytes(-len(data) % BLOCK)) + BLOCK


def end_tar(tar: OutputFile) -> None:
    """Appends the two empty blocks that end an archive."""
    tar.append(bytes(2 * BLOCK))
