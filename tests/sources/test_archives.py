"""Damaged and hostile tars and zips are refused with the name of the file and the member."""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile

import pytest
from layouts import WRITE, image_folder_files, noise, official_files, refusal, write_folder, write_tar, write_zip

from mnistm_dist.data.sources import archives

PARTS = noise()
IMAGE = "mnist_m/mnist_m_train/00000003.png"


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize(
    "member", ["../evil.png", "mnist_m/../../evil.png", "/etc/evil.png", "a\\..\\evil.png", "C:/x.png"]
)
def test_a_path_outside_of_an_archive_is_refused(tmp_path, kind, member):
    path = WRITE[kind](tmp_path / "set", official_files(PARTS) | {member: b""})
    assert f"{member}: a path outside of the archive" in refusal(path)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_duplicate_name_is_refused(tmp_path, kind):
    path = WRITE[kind](tmp_path / "set", official_files(PARTS) | {f"./{IMAGE}": b"another"})
    assert "00000003.png: duplicate name in the archive" in refusal(path)


@pytest.mark.parametrize("kind", WRITE)
def test_an_oversized_member_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1 << 20)
    path = WRITE[kind](tmp_path / "set", official_files(PARTS) | {IMAGE: bytes(2 << 20)})
    assert "00000003.png: 2,097,152 bytes; accepted are at most 1 MiB" in refusal(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    path = write_tar(tmp_path / "set.tar", official_files(PARTS), "w")
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("mnist_m/mnist_m_train/link.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    assert "mnist_m/mnist_m_train/link.png: a link or device" in refusal(path)


def test_links_and_encrypted_members_in_a_zip_are_refused(tmp_path):
    link = zipfile.ZipInfo("mnist_m/mnist_m_train/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = write_zip(tmp_path / "set.zip", official_files(PARTS))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    assert "link.png: a link" in refusal(path)
    path = write_zip(tmp_path / "locked.zip", official_files(PARTS))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert "encrypted" in refusal(path)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_truncated_tar_is_refused(tmp_path, mode, share):
    path = write_tar(tmp_path / "set", official_files(PARTS), mode)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    message = refusal(path)
    assert "damaged or not a complete tar" in message or "truncated" in message or "as expected" in message


def test_a_tar_cut_between_two_members_is_refused(tmp_path):
    path = write_tar(tmp_path / "set.tar", {**official_files(PARTS), "mnist_m/z_README.txt": b"last"}, "w")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mnist_m/z_README")])
    assert "truncated: it has no end mark" in refusal(path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("header", [bytes(512), b"\xff"])
def test_a_damaged_header_inside_a_tar_is_not_its_end(tmp_path, mode, header):
    path = write_tar(tmp_path / "set.tar", image_folder_files(PARTS), "w")
    with tarfile.open(path) as tar:
        place = tar.getmembers()[25].offset
    data = bytearray(path.read_bytes())
    data[place : place + len(header)] = header
    path.write_bytes(gzip.compress(data, 1) if mode == "w:gz" else data)
    assert "damaged: data follow its end mark; download it again" in refusal(path)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_changed_byte_in_a_compressed_archive_is_noticed(tmp_path, kind):
    path = WRITE[kind](tmp_path / kind, official_files(PARTS))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert "damaged or not" in refusal(path)


def test_a_truncated_zip_is_refused(tmp_path):
    path = write_zip(tmp_path / "set.zip", official_files(PARTS))
    path.write_bytes(path.read_bytes()[:-300])
    assert "not a complete zip" in refusal(path)


def test_a_member_of_a_zip_that_is_longer_than_its_size_is_refused(tmp_path):
    path = write_zip(tmp_path / "set.zip", official_files(PARTS))
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = struct.pack("<I", archive.getinfo(IMAGE).file_size)
    at = data.rindex(IMAGE.encode()) - 46 + 24
    assert data[at : at + 4] == size
    path.write_bytes(data[:at] + struct.pack("<I", 100) + data[at + 4 :])
    assert "00000003.png: damaged" in refusal(path)


def test_decompression_bombs_are_refused(tmp_path):
    bomb = tmp_path / "bomb.tar.gz"
    with gzip.open(bomb, "wb", 1) as file:
        for number in range(3):
            member = tarfile.TarInfo(f"README{number}.txt")
            member.size = 60 << 20
            file.write(member.tobuf())
            file.write(bytes(60 << 20))
    assert "unpacks to more than 100 times its size" in refusal(bomb)
    files = {f"mnist_m/mnist_m_train/{index:08d}.png": bytes(40 << 20) for index in range(5)}
    assert "unpacks to more than 100 times its size" in refusal(write_zip(tmp_path / "bomb.zip", files))


def test_a_link_to_nothing_and_a_pipe_in_a_folder_are_refused(tmp_path):
    folder = write_folder(tmp_path / "set", official_files(PARTS))
    image = folder / IMAGE
    image.unlink()
    image.symlink_to("/nowhere.png")
    assert f"{image}: missing or not a regular file" in refusal(folder)
    image.unlink()
    os.mkfifo(image)
    assert f"{image}: missing or not a regular file" in refusal(folder)
