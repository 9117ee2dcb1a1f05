"""The official set from a server: whole after a cut, refused when it is something else, and proven by its pixels."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from layouts import noise, official_files, write_parquet, write_tar
from local_server import LocalServer

from mnistm_dist.cache import main as cache_door
from mnistm_dist.data import fetch as transfer
from mnistm_dist.data.cache import entries
from mnistm_dist.data.fetch import RemoteFile
from mnistm_dist.data.sources import download as module
from mnistm_dist.data.sources.catalog import open_source
from mnistm_dist.data.sources.download import OFFICIAL_COPIES, Copy, download, fetch_mnist
from mnistm_dist.data.sources.idx import read_digits
from mnistm_dist.errors import UserError, run_cli
from mnistm_dist.pack import main as pack_door

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ARCHIVE = SHARED / "mnist_m.tar.gz"
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
    """What is known of a file that is served."""
    data = (server.folder / name).read_bytes()
    facts = {"size": len(data), "checksum": ("sha256", hashlib.sha256(data).hexdigest())}
    return RemoteFile(address=f"{server.address}/{name}", **{**facts, **wrong})


def offer(monkeypatch, *copies: list[RemoteFile]) -> None:
    """Puts copies in the place of the public ones."""
    offered = [
        Copy(
            name=f"copy{number}",
            said_by=f"copy {number}",
            files={file.address.rpartition("/")[2]: file for file in files},
        )
        for number, files in enumerate(copies)
    ]
    monkeypatch.setattr(module, "OFFICIAL_COPIES", offered)


def test_the_public_copies_say_where_they_are_quoted_and_can_be_told_apart():
    assert len({copy.name for copy in OFFICIAL_COPIES}) == len(OFFICIAL_COPIES) > 1
    for copy in OFFICIAL_COPIES:
        assert copy.said_by
        assert all(file.address.startswith("https://") for file in copy.files.values())


def test_a_download_tells_its_bytes_and_is_not_fetched_twice(server, tmp_path, monkeypatch):
    offer(monkeypatch, [known(server)])
    size = (server.folder / NAME).stat().st_size
    for requests in (1, 1):
        told: list[tuple[int, int]] = []
        path = download("official", tmp_path / "cache", progress=lambda *now, told=told: told.append(now))
        assert path.read_bytes() == (server.folder / NAME).read_bytes()
        assert told[-1] == (size, size)
        assert len(server.requests) == requests
    assert open_source(str(path)).counts == {"train": 40, "test": 12}
    assert [(entry.kind, entry.path.name) for entry in entries(tmp_path / "cache")] == [("downloads", "copy0")]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("facts", [{}, {"size": None, "checksum": None}])
def test_after_a_cut_it_goes_on_where_it_ended(server, tmp_path, monkeypatch, ranges, facts):
    offer(monkeypatch, [known(server, **facts)])
    server.ranges = ranges
    server.cut_once[NAME] = 20_000
    told: list[tuple[int, int]] = []
    path = download("official", tmp_path / "cache", progress=lambda *now: told.append(now))
    data = (server.folder / NAME).read_bytes()
    assert path.read_bytes() == data
    (first, second) = server.requests
    assert (first[1], second[1]) == (None, f"bytes={told[-2][0]}-")
    assert 0 < told[-2][0] <= 20_000
    assert told[-1][0] == len(data)


def test_what_an_earlier_call_left_behind_is_gone_on_with(server, tmp_path, monkeypatch):
    offer(monkeypatch, [known(server)])
    data = (server.folder / NAME).read_bytes()
    partial = tmp_path / "cache" / "downloads" / "copy0" / f"{NAME}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(data[:7_000])
    assert download("official", tmp_path / "cache").read_bytes() == data
    assert [wanted for _, wanted in server.requests] == ["bytes=7000-"]
    assert not partial.exists()


@pytest.mark.parametrize("left", [b"x" * 7_000, b"x" * 1_000_000])
def test_a_wrong_earlier_part_is_fetched_anew(server, tmp_path, monkeypatch, left):
    offer(monkeypatch, [known(server)])
    partial = tmp_path / "cache" / "downloads" / "copy0" / f"{NAME}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(left)
    told: list[tuple[int, int]] = []
    path = download("official", tmp_path / "cache", progress=lambda *now: told.append(now))
    assert path.read_bytes() == (server.folder / NAME).read_bytes()
    assert told[-1][0] == told[-1][1] == path.stat().st_size


def test_a_file_in_the_cache_that_has_changed_is_fetched_anew(server, tmp_path, monkeypatch):
    offer(monkeypatch, [known(server)])
    path = download("official", tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert download("official", tmp_path / "cache").read_bytes() == (server.folder / NAME).read_bytes()


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>Sorry</html>", b"\n<HTML>", b'{"error": "rate limit"}'])
def test_a_page_of_text_in_place_of_the_archive_is_refused_at_its_first_bytes(server, tmp_path, page):
    server.lies[NAME] = page.ljust(5_000_000)
    with pytest.raises(UserError, match="it sends a page of text"):
        download(f"{server.address}/{NAME}", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob(NAME))


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (lambda data: data[:-1] + b"x", "its sha256 is not the expected "),
        (lambda data: data[:-9], "bytes of the expected "),
        (lambda data: data + b"x" * 5_000_000, "the largest accepted size"),
        (lambda data: b"", "it ends after 0 bytes of the expected "),
    ],
)
def test_another_file_in_place_of_the_archive_is_refused_and_leaves_nothing_that_looks_whole(
    server, tmp_path, monkeypatch, lie, said
):
    offer(monkeypatch, [known(server)])
    server.lies[NAME] = lie((server.folder / NAME).read_bytes())
    with pytest.raises(UserError) as caught:
        download("official", tmp_path / "cache")
    assert said in str(caught.value)
    assert f"{server.address}/{NAME}" in str(caught.value)
    assert not (tmp_path / "cache" / "downloads" / "copy0" / NAME).exists()


def test_a_copy_that_is_gone_is_passed_over_and_the_next_one_taken(server, tmp_path, monkeypatch):
    server.lies["page.zip"] = b"<html>"
    (server.folder / "page.zip").write_bytes(b"")
    gone = RemoteFile(address=f"{server.address}/gone.zip")
    page = RemoteFile(address=f"{server.address}/page.zip")
    offer(monkeypatch, [gone], [page], [known(server)])
    said: list[str] = []
    assert download("official", tmp_path / "cache", say=said.append).name == NAME
    assert said[0] == "downloading from copy 0"
    assert "the server has no such file" in said[1]
    assert "a page of text" in said[3]
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


def test_a_server_that_is_not_there_is_said_after_a_few_tries(server, tmp_path):
    server.stop()
    with pytest.raises(UserError, match="the connection failed 5 times in a row"):
        download(f"{server.address}/{NAME}", tmp_path)


@pytest.mark.parametrize("address", ["pipe:cat x", "file:///etc/passwd", "ftp://host/x", "mnist_m.tar.gz", "https://"])
def test_an_address_of_another_kind_is_refused(tmp_path, address):
    with pytest.raises(UserError, match="accepted are official and addresses https://"):
        download(address, tmp_path)


@pytest.mark.parametrize("path", ["", "..", "%2e%2e", "a%00b", "..%2f..%2fevil"])
def test_no_address_names_a_file_outside_of_the_cache(tmp_path, path):
    copy = module._copy_at(f"https://host/{path}")
    (name,) = copy.files
    assert (tmp_path / name).resolve().parent == tmp_path


def test_the_door_packs_a_download_only_when_its_pixels_are_official(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MNISTM_DIST_CACHE", str(tmp_path / "cache"))
    arguments = ["--download", f"{server.address}/{NAME}", "--out", str(tmp_path / "out" / "set")]
    assert run_cli(pack_door, arguments) == 2
    error = capsys.readouterr().err
    assert "its pixels and labels are not those of the official set" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    # It has nothing but its pixels to tell that it is bad: the line says how the file is had anew.
    (entry,) = entries(tmp_path / "cache")
    assert f"remove it with python -m mnistm_dist.cache clear {entry.path.name}" in error
    assert run_cli(cache_door, ["clear", entry.path.name]) == 0
    requests = len(server.requests)
    assert run_cli(pack_door, arguments) == 2
    assert len(server.requests) > requests


@pytest.mark.parametrize("arguments", [[], ["sample", "--download", "official"]])
def test_the_door_needs_either_a_source_or_a_download(arguments, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        pack_door([*arguments, "--out", str(tmp_path / "set")])
    assert caught.value.code == 2
    assert "either SOURCE or --download official is needed" in capsys.readouterr().err


@pytest.mark.skipif(not ARCHIVE.exists(), reason="the official archive is not in ../shared/data")
def test_the_official_archive_comes_whole_over_a_connection_that_breaks(server, tmp_path, monkeypatch):
    (server.folder / NAME).unlink()
    (server.folder / NAME).symlink_to(ARCHIVE)
    server.cut_once[NAME] = 60_000_000
    offer(monkeypatch, [known(server)])
    path = download("official", tmp_path / "cache")
    assert path.stat().st_size == ARCHIVE.stat().st_size
    assert [wanted is None for _, wanted in server.requests] == [True, False]


@pytest.fixture
def mnist_mirror(server, monkeypatch) -> LocalServer:
    """A mirror of MNIST here; torchvision is told its checksums, since our files are MNIST compressed anew."""
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
    np.testing.assert_array_equal(read_digits(folder, "test").labels, read_digits(SHARED / "mnist", "test").labels)
    assert capsys.readouterr() == ("", "")


def test_mnist_auto_serves_the_synthesis(mnist_mirror, tmp_path):
    source = open_source("mnist+photos", mnist="auto", photos=str(SHARED / "photos"), cache_dir=tmp_path)
    assert source.counts == {"train": 55_000, "val": 15_000}


def test_mnist_that_is_something_else_is_refused_in_one_line(mnist_mirror, tmp_path):
    mnist_mirror.lies["train-images-idx3-ubyte.gz"] = b"<html>"
    with pytest.raises(UserError, match="MNIST could not be downloaded by torchvision"):
        fetch_mnist(tmp_path)
