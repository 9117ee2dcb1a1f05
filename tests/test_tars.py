"""Tars: headers that every reader takes as meant."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from packed_sets import tiny_source

from mnistm_dist.data.packing.writer import pack, tar_header


@settings(max_examples=100, deadline=None)
@given(key=st.from_regex(r"[a-z0-9]{1,90}", fullmatch=True), size=st.integers(0, 8**11 - 1))
def test_a_tar_header_is_read_by_pythons_tarfile_as_meant(key: str, size: int) -> None:
    info = tarfile.TarInfo.frombuf(tar_header(f"{key}.png", size), "ascii", "strict")
    assert (info.name, info.size, info.type) == (f"{key}.png", size, tarfile.REGTYPE)
    assert (info.mode, info.uid, info.gid, info.mtime, info.uname, info.gname) == (0o644, 0, 0, 0, "", "")


def test_the_tar_program_lists_a_shard(tmp_path: Path) -> None:
    pack(tiny_source(), tmp_path / "set", num_shards=1)
    listed = subprocess.run(
        ["tar", "tf", tmp_path / "set" / "val-000000.tar"], capture_output=True, text=True, check=True
    )
    assert sorted(listed.stdout.split()) == ["00000021.cls", "00000021.png", "00000022.cls", "00000022.png"]
    assert listed.stderr == ""
