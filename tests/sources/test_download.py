"""Downloads of the official set: complete after a lost connection, refused if wrong, proven by their pixels."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from layouts import noise, official_files, write_parquet, write_tar
from local_server import LocalServer
from packed_sets import ARCHIVE, SHARED

from mnistm_dist.data import fetch as transfer
from mnistm_dist.data.fetch import RemoteFile
from mnistm_dist.data.sources import download as module
from mnistm_dist.data.sources.catalog import open_source
from mnistm_dist.data.sources.download import OFFICIAL_COPIES, download, fetch_mnist
from mnistm_dist.data.sources.synthesis import read_digits
from mnistm_dist.errors import UserError, run_cli
from mnistm_dist.pack import main as pack_main

NAME = "mnist_m.tar.gz"


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[LocalServer]:
    """Serves a small set in the official layout."""
    monkeypatch.setattr(transfer, "FIRST_PAUSE", 0.001)
    folder = tmp_path / "served"
    folder.mkdir()
    write_tar(folder / NAME, official_files(noise()))
    server = LocalServer(folder)
    yield server
    server.stop()


def known(server: LocalServer, name: str = NAME, **wrong: object) -> RemoteFile:
    """Return the description of a file that is served."""
    data = (server.folder / name).read_bytes()
    facts = {"size": len(data), "checksum": ("sha256", hashlib.sha256(data).hexdigest())}
    return RemoteFile(address=f"{server.address}/{name}", **{**facts, **wrong})


def offer(monkeypatch, *copies: list[RemoteFile]) -> None:
    """Replace the public copies."""
    offered = {
        f"copy {number}": {file.address.rpartition("/")[2]: file for file in files}
        for number, files in enumerate(copies)
    }
    monkeypatch.setattr(module, "OFFICIAL_COPIES", offered)


def entry_of(publisher: str, cache_dir: Path) -> Path:
    """Return the folder of a copy in the cache."""
    return cache_dir / "downloads" / hashlib.sha256(publisher.encode()).hexdigest()[:16]


def test_every_public_copy_has_an_address_with_https():
    assert len(OFFICIAL_COPIES) > 1
    for copy in OFFICIAL_COPIES.values():
        assert all(file.address.startswith("https://") for file in copy.values())


def test_a_download_reports_its_bytes_and_is_not_fetched_twice(server, tmp_path, monkeypatch):
    offer(monkeypatch, [known(server)])
    size = (server.folder / NAME).stat().st_size
    for requests in (1, 1):
        calls: list[tuple[int, int]] = []
        path = download("official", tmp_path / "cache", progress=lambda *now, calls=calls: calls.append(now))
        assert path.read_bytes() == (server.folder / NAME).read_bytes()
        assert calls[-1] == (size, size)
        assert len(server.requests) == requests
    assert open_source(str(path)).counts == {"train": 40, "test": 12}
    assert path.parents[1] == tmp_path / "cache" / "downloads"


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("facts", [{}, {"size": None, "checksum": None}])
def test_a_download_continues_after_a_lost_connection(server, tmp_path, monkeypatch, ranges, facts):
    offer(monkeypatch, [known(server, **facts)])
    server.ranges = ranges
    server.cut_once[NAME] = 20_000
    calls: list[tuple[int, int]] = []
    path = download("official", tmp_path / "cache", progress=lambda *now: calls.append(now))
    data = (server.folder / NAME).read_bytes()
    assert path.read_bytes() == data
    (first, second) = server.requests
    assert (first[1], second[1]) == (None, f"bytes={calls[-2][0]}-")
    assert 0 < calls[-2][0] <= 20_000
    assert calls[-1][0] == len(data)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_content_encoding_that_only_names_the_files_own_compression_is_not_undone(server, tmp_path, ranges):
    server.ranges, server.encoded, server.cut_once = ranges, {NAME: False}, {NAME: 20_000}
    path = download(f"{server.address}/{NAME}", tmp_path / "cache")
    assert path.read_bytes() == (server.folder / NAME).read_bytes()


def test_a_download_continues_what_an_earlier_call_left(server, tmp_path, monkeypatch):
    offer(monkeypatch, [known(server)])
    data = (server.folder / NAME).read_bytes()
    partial = entry_of("copy 0", tmp_path / "cache") / f"{NAME}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(data[:7_000])
    assert download("official", tmp_path / "cache").read_bytes() == data
    assert [wanted for _, wanted in server.requests] == ["bytes=7000-"]
    assert not partial.exists()


@pytest.mark.parametrize("left", [b"x" * 7_000, b"x" * 1_000_000])
def test_a_wrong_part_of_an_earlier_call_is_fetched_again(server, tmp_path, monkeypatch, left):
    offer(monkeypatch, [known(server)])
    partial = entry_of("copy 0", tmp_path / "cache") / f"{NAME}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(left)
    calls: list[tuple[int, int]] = []
    path = download("official", tmp_path / "cache", progress=lambda *now: calls.append(now))
    assert path.read_bytes() == (server.folder / NAME).read_bytes()
    assert calls[-1][0] == calls[-1][1] == path.stat().st_size


def test_a_changed_file_in_the_cache_is_fetched_again(server, tmp_path, monkeypatch):
    offer(monkeypatch, [known(server)])
    path = download("official", tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert download("official", tmp_path / "cache").read_bytes() == (server.folder / NAME).read_bytes()


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>Sorry</html>", b"\n<HTML>", b'{"error": "rate limit"}'])
def test_a_web_page_in_place_of_the_archive_is_refused_at_its_first_bytes(server, tmp_path, page):
    server.lies[NAME] = page.ljust(5_000_000)
    with pytest.raises(UserError, match="it sends a page of text"):
        download(f"{server.address}/{NAME}", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob(NAME))


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (lambda data: data[:-1] + b"x", "its sha256 is not the expected "),
        (lambda data: data[:-9], "bytes of the expected "),
        (lambda data: data + b"x" * 5_000_000, "the largest accepted size"),
        (lambda data: b"", "it ends after 0 bytes of the expected "),
    ],
)
def test_a_wrong_file_in_place_of_the_archive_is_refused_and_not_kept(server, tmp_path, monkeypatch, lie, reason):
    offer(monkeypatch, [known(server)])
    server.lies[NAME] = lie((server.folder / NAME).read_bytes())
    with pytest.raises(UserError) as caught:
        download("official", tmp_path / "cache")
    assert reason in str(caught.value)
    assert f"{server.address}/{NAME}" in str(caught.value)
    assert not (entry_of("copy 0", tmp_path / "cache") / NAME).exists()


def test_if_a_copy_is_gone_the_next_one_is_downloaded(server, tmp_path, monkeypatch):
    server.lies["page.zip"] = b"<html>"
    (server.folder / "page.zip").write_bytes(b"")
    gone = RemoteFile(address=f"{server.address}/gone.zip")
    page = RemoteFile(address=f"{server.address}/page.zip")
    offer(monkeypatch, [gone], [page], [known(server)])
    lines: list[str] = []
    assert download("official", tmp_path / "cache", say=lines.append).name == NAME
    assert lines[0] == "downloading from copy 0"
    assert "the server has no such file" in lines[1]
    assert "a page of text" in lines[3]
    offer(monkeypatch, [gone], [page])
    with pytest.raises(UserError, match=r"no public copy .* no such file; .* a page of text"):
        download("official", tmp_path / "other")


def test_a_copy_of_several_files_becomes_a_folder(server, tmp_path, monkeypatch):
    write_parquet(tmp_path / "parquet", noise())
    files = sorted((tmp_path / "parquet" / "data").iterdir())
    for file in files:
        shutil.copy(file, server.folder)
    offer(monkeypatch, [known(server, file.name) for file in files])
    source = open_source(str(download("official", tmp_path / "cache")))
    assert (source.layout, source.counts) == ("parquet", {"train": 40, "test": 12})


def test_a_server_that_does_not_answer_is_reported_after_a_few_tries(server, tmp_path):
    server.stop()
    with pytest.raises(UserError, match="the connection failed 5 times in a row"):
        download(f"{server.address}/{NAME}", tmp_path)


@pytest.mark.parametrize("address", ["pipe:cat x", "file:///etc/passwd", "ftp://host/x", "mnist_m.tar.gz", "https://"])
def test_an_address_of_another_kind_is_refused(tmp_path, address):
    with pytest.raises(UserError, match="expected official or an address"):
        download(address, tmp_path)


@pytest.mark.parametrize("path", ["", "..", "%2e%2e", "a%00b", "..%2f..%2fevil"])
def test_no_address_gives_a_file_outside_of_the_cache(tmp_path, path):
    (name,) = module._copy_at(f"https://host/{path}")
    assert (tmp_path / name).resolve().parent == tmp_path


def test_pack_refuses_a_download_whose_pixels_are_not_official(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MNISTM_DIST_CACHE", str(tmp_path / "cache"))
    arguments = ["--download", f"{server.address}/{NAME}", "--out", str(tmp_path / "out" / "set")]
    assert run_cli(pack_main, arguments) == 2
    error = capsys.readouterr().err
    assert "its pixels and labels are not those of the official set" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    # Only its pixels show the damage; the message says how to download the file again.
    _, _, removal = error.partition("remove it with ")
    subprocess.run(shlex.split(removal), check=True)
    requests = len(server.requests)
    assert run_cli(pack_main, arguments) == 2
    assert len(server.requests) > requests


@pytest.mark.parametrize("arguments", [[], ["sample", "--download", "official"]])
def test_pack_needs_either_a_source_or_a_download(arguments, capsys, tmp_path):
    assert run_cli(pack_main, [*arguments, "--out", str(tmp_path / "set")]) == 2
    assert "either SOURCE or --download official" in capsys.readouterr().err


@pytest.mark.skipif(not ARCHIVE.exists(), reason="the official archive is not in ../shared/data")
def test_the_official_archive_is_complete_after_a_lost_connection(server, tmp_path, monkeypatch):
    (server.folder / NAME).unlink()
    (server.folder / NAME).symlink_to(ARCHIVE)
    server.cut_once[NAME] = 60_000_000
    offer(monkeypatch, [known(server)])
    path = download("official", tmp_path / "cache")
    assert path.stat().st_size == ARCHIVE.stat().st_size
    assert [wanted is None for _, wanted in server.requests] == [True, False]


@pytest.fixture
def mnist_mirror(server, monkeypatch) -> LocalServer:
    """A local mirror of MNIST; torchvision gets its checksums, since the files are compressed again."""
    from torchvision.datasets import MNIST

    if not SHARED.exists():
        pytest.skip("MNIST is not in ../shared/data")
    for file in (SHARED / "mnist").iterdir():
        shutil.copy(file, server.folder)
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in server.folder.iterdir()}
    monkeypatch.setattr(MNIST, "mirrors", [f"{server.address}/"])
    monkeypatch.setattr(MNIST, "resources", [(name, sums[name]) for name, _ in MNIST.resources])
    return server


def test_mnist_is_downloaded_by_torchvision_once(mnist_mirror, tmp_path, capsys):
    folder = fetch_mnist(tmp_path)
    requests = len(mnist_mirror.requests)
    assert fetch_mnist(tmp_path) == folder
    assert len(mnist_mirror.requests) == requests > 0
    np.testing.assert_array_equal(read_digits(folder, "test")[1], read_digits(SHARED / "mnist", "test")[1])
    assert capsys.readouterr() == ("", "")


def test_mnist_auto_is_read_by_the_synthesis(mnist_mirror, tmp_path):
    source = open_source("mnist+photos", mnist="auto", photos=str(SHARED / "photos"), cache_dir=tmp_path)
    assert source.counts == {"train": 55_000, "val": 15_000}


def test_a_wrong_file_of_mnist_is_refused_in_one_line(mnist_mirror, tmp_path):
    mnist_mirror.lies["train-images-idx3-ubyte.gz"] = b"<html>"
    with pytest.raises(UserError, match="torchvision could not download MNIST"):
        fetch_mnist(tmp_path)
