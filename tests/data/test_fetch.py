"""Packed sets from a real HTTP server, which serves, interrupts, refuses and sends wrong files."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.config import set_conf_env
from fsspec.implementations.memory import MemoryFileSystem
from local_server import LocalServer
from packed_sets import edit_manifest, flip_byte, tiny_source
from s3_server import serve_s3

from mnistm_dist.data import fetch as transfer
from mnistm_dist.data.fetch import fetch_set, is_address, open_shards
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A set of 23 + 7 images in 3 + 1 shards."""
    out = tmp_path_factory.mktemp("packed") / "tiny"
    pack(tiny_source(), out, num_shards=3, val_size=5)
    return out


@pytest.fixture
def served(packed, tmp_path, monkeypatch) -> Iterator[LocalServer]:
    monkeypatch.setattr(transfer, "FIRST_PAUSE", 0.001)
    folder = tmp_path / "served"
    shutil.copytree(packed, folder)
    server = LocalServer(folder)
    yield server
    server.stop()


def same_files(folder: Path, packed: Path) -> bool:
    return all((folder / path.name).read_bytes() == path.read_bytes() for path in packed.iterdir())


def test_a_set_is_fetched_once_and_is_the_one_on_the_server(served, packed, tmp_path):
    seen: list[tuple[int, int]] = []
    shards = open_shards(served.address + "/", cache_dir=tmp_path / "cache", progress=lambda *now: seen.append(now))
    assert same_files(shards.root, packed)
    total = sum(path.stat().st_size for path in packed.iterdir() if path.name != "manifest.json")
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    served.requests.clear()
    again = open_shards(served.address, cache_dir=tmp_path / "cache")
    assert again.root == shards.root
    assert {name for name, _ in served.requests} == {"manifest.json"}


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("length", [True, False], ids=["length", "no length"])
def test_an_interrupted_transfer_continues(served, packed, tmp_path, ranges, length):
    served.ranges, served.length = ranges, length
    served.cut_once = {"train-000000.tar": 5_000, "test-000000.tar": 0, "manifest.json": 100 if length else 0}
    if not length:
        # Without a length, a manifest cut short looks like all of it, and a file cut at its start like an empty one.
        served.cut_once.pop("manifest.json")
        served.cut_once["test-000000.tar"] = 1_000
    folder = fetch_set(served.address, tmp_path / "cache")
    assert same_files(folder, packed)
    assert ("train-000000.tar", "bytes=5000-") in served.requests
    assert not list(folder.glob("*.partial"))


def test_a_later_launch_continues_where_an_earlier_one_was_killed(served, packed, tmp_path):
    folder = fetch_set(served.address, tmp_path / "cache")
    whole = (folder / "train-000001.tar").read_bytes()
    (folder / "train-000001.tar").unlink()
    (folder / "train-000001.tar.partial").write_bytes(whole[:7_000])
    served.requests.clear()
    fetch_set(served.address, tmp_path / "cache")
    assert ("train-000001.tar", "bytes=7000-") in served.requests
    assert same_files(folder, packed)


def test_a_wrong_partial_file_is_fetched_again(served, packed, tmp_path):
    folder = fetch_set(served.address, tmp_path / "cache")
    whole = (folder / "train-000001.tar").read_bytes()
    (folder / "train-000001.tar").unlink()
    (folder / "train-000001.tar.partial").write_bytes(bytes(len(whole)))
    fetch_set(served.address, tmp_path / "cache")
    assert same_files(folder, packed)


def test_a_damaged_file_in_the_cache_is_fetched_again(served, packed, tmp_path):
    folder = fetch_set(served.address, tmp_path / "cache")
    flip_byte(folder / "train-000002.tar", 3_000)
    served.requests.clear()
    fetch_set(served.address, tmp_path / "cache")
    assert same_files(folder, packed)
    assert {name for name, _ in served.requests} == {"manifest.json", "train-000002.tar"}


def test_a_fetched_set_opens_without_its_server(served, packed, tmp_path):
    folder = fetch_set(served.address, tmp_path / "cache")
    served.stop()
    assert fetch_set(served.address, tmp_path / "cache") == folder


def test_a_changed_set_replaces_the_fetched_one(served, tmp_path):
    fetch_set(served.address, tmp_path / "cache")
    shutil.rmtree(served.folder)
    pack(tiny_source(train=31), served.folder, num_shards=3, val_size=5)
    folder = fetch_set(served.address, tmp_path / "cache")
    assert same_files(folder, served.folder)


def test_errors_of_a_busy_server_are_retried(served, packed, tmp_path):
    served.statuses = {"manifest.json": [503, 429], "train-000000.tar": [500, 502]}
    assert same_files(fetch_set(served.address, tmp_path / "cache"), packed)


def in_seconds(seconds: float) -> str:
    """A date as HTTP writes it."""
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize("retry_after", [lambda: "1", lambda: in_seconds(2)], ids=["seconds", "date"])
def test_a_server_that_asks_for_time_is_waited_for_with_a_line(served, packed, tmp_path, retry_after: Callable):
    served.retry_after, served.statuses = retry_after(), {"manifest.json": [503], "train-000000.tar": [429]}
    lines: list[str] = []
    assert same_files(fetch_set(served.address, tmp_path / "cache", say=lines.append), packed)
    assert any("is busy (status 503): waiting " in line for line in lines)
    assert all(line.startswith("127.0.0.1:") for line in lines)


def test_a_server_that_asks_for_too_much_time_is_given_up(served, tmp_path):
    served.retry_after, served.statuses = "9999", {"manifest.json": [503]}
    assert "asks to wait for 9,999 s; try again later" in refusal(served.address, tmp_path / "cache")


def test_a_set_that_the_server_compresses_is_fetched_and_an_interrupted_transfer_continues(served, packed, tmp_path):
    served.encoded = dict.fromkeys((path.name for path in packed.iterdir()), True)
    served.cut_once = {"train-000000.tar": 5_000}
    assert same_files(fetch_set(served.address, tmp_path / "cache"), packed)


def test_a_git_lfs_pointer_is_named_in_a_set_on_a_server_and_in_a_folder(served, packed, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("train-000001.tar", "manifest.json"):
        shutil.copytree(packed, tmp_path / name)
        (tmp_path / name / name).write_bytes(pointer)
        served.lies = {name: pointer}
        folder = tmp_path / name
        messages = [refusal(served.address, tmp_path / f"cache {name}")]
        with pytest.raises(UserError) as caught:
            ShardSet.open(folder).check(["train"], record=None)
        for message in (*messages, str(caught.value)):
            assert f"/{name}: " in message
            assert "a Git LFS pointer in place of the file; fetch it with git lfs pull" in message


def refusal(address: str, cache_dir: Path) -> str:
    with pytest.raises(UserError) as caught:
        fetch_set(address, cache_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("misbehave", "named"),
    [
        (lambda s, data: s.lies.update({"train-000001.tar": data[:-1] + b"x"}), "sha256 is not the expected"),
        (lambda s, data: s.lies.update({"train-000001.tar": data[:-512]}), "it ends after"),
        (lambda s, data: s.lies.update({"train-000001.tar": data + bytes(5_000_000)}), ", the largest accepted size"),
        (lambda s, data: s.lies.update({"train-000001.tar": b""}), "it ends after 0"),
        (lambda s, data: (s.folder / "train-000001.tar").unlink(), "no such file"),
        (lambda s, data: s.statuses.update({"train-000001.tar": [403]}), "denies access (403"),
        (lambda s, data: s.statuses.update({"train-000001.tar": [500] * 9}), "connection failed 5 times in a row (500"),
    ],
)
def test_a_wrong_file_or_a_failing_server_is_named(served, packed, tmp_path, misbehave: Callable, named: str):
    misbehave(served, (packed / "train-000001.tar").read_bytes())
    message = refusal(served.address, tmp_path / "cache")
    assert message.startswith(f"{served.address}/train-000001.tar: ")
    assert named in message
    # Neither the file nor a manifest remains, so nothing looks like a complete set.
    (folder,) = (tmp_path / "cache" / "fetched").iterdir()
    assert not (folder / "train-000001.tar").exists()
    assert not (folder / "manifest.json").exists()


@pytest.mark.parametrize("manifest", [b"<html>Welcome to the hotel</html>", b"{}", b""])
def test_a_web_page_in_place_of_the_manifest_is_refused(served, tmp_path, manifest):
    served.lies = {"manifest.json": manifest}
    assert f"{served.address}/manifest.json" in refusal(served.address, tmp_path / "cache")


def test_a_manifest_with_names_outside_of_its_folder_is_refused(served, tmp_path):
    def climb(value: dict) -> None:
        value["splits"]["train"]["shards"][0]["name"] = "../../../escaped.tar"

    edit_manifest(served.folder, climb)
    refusal(served.address, tmp_path / "cache")
    assert not list(tmp_path.rglob("escaped.tar"))


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("pipe:cat /etc/passwd", "https://, http://, s3://, gs://, hf://"),
        ("ftp://example.org/set", "https://, http://, s3://, gs://, hf://"),
        ("file:///etc", "https://, http://, s3://, gs://, hf://"),
        ("memory://set", "https://, http://, s3://, gs://, hf://"),
        ("https:", "https://, http://, s3://, gs://, hf://"),
        ("https://[not-ipv6/set", "https://, http://, s3://, gs://, hf://"),
        ("https://user:secret@example.org/set", "without password"),
        ("https://example.org/set?token=secret", "without password, query and fragment"),
        ("http://127.0.0.1:1/set", "connection failed 5 times in a row"),
    ],
)
def test_other_addresses_are_refused_in_one_line(address, named, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "FIRST_PAUSE", 0.001)
    assert is_address(address)
    message = refusal(address, tmp_path / "cache")
    assert named in message
    assert "secret" not in message


def test_folders_are_not_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("odd:name").mkdir()
    assert not any(map(is_address, ["shards/sample", "/data/set", "odd:name", "."]))


def test_concurrent_launches_fetch_once(served, packed, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: fetch_set(served.address, tmp_path / "cache"), range(3)))
    assert len(folders) == 1
    assert same_files(folders.pop(), packed)
    names = [name for name, _ in served.requests if name != "manifest.json"]
    assert len(names) == len(set(names))


def test_a_set_on_s3_is_fetched(packed, tmp_path, monkeypatch):
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install 'mnistm-dist[s3]')")
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    stored = Path(shutil.copytree(packed, tmp_path / "s3" / "sets" / "a" / "tiny"))
    with serve_s3(tmp_path / "s3") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        folder = fetch_set("s3://sets/a/tiny", tmp_path / "cache")
        assert same_files(folder, packed)
        flip_byte(stored / "train-000000.tar", 600)
        assert "sha256 is not the expected" in refusal("s3://sets/a/tiny", tmp_path / "other")
        assert "no such file" in refusal("s3://sets/nothing", tmp_path / "other")


@pytest.mark.parametrize(("setting", "header"), [("anon", "Authorization"), ("requester_pays", "x-amz-request-payer")])
def test_a_public_bucket_and_one_whose_reader_pays_are_settings_of_fsspec(
    packed, tmp_path, monkeypatch, setting: str, header: str
):
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install 'mnistm-dist[s3]')")
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    shutil.copytree(packed, tmp_path / "s3" / "sets" / "tiny")
    requests: list[Mapping[str, str]] = []
    with serve_s3(tmp_path / "s3", requests) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        settings: dict[str, dict] = {}
        set_conf_env(settings, {f"FSSPEC_S3_{setting.upper()}": "true"})
        monkeypatch.setitem(fsspec.config.conf, "s3", settings["s3"])
        assert same_files(fetch_set("s3://sets/tiny", tmp_path / "cache"), packed)
    reads = [request for request in requests if "Range" in request]
    assert reads
    assert all((header in request) == (setting == "requester_pays") for request in reads)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("hf", "huggingface_hub")])
def test_a_set_is_fetched_from_any_store_of_fsspec(packed, tmp_path, monkeypatch, scheme: str, package: str):
    pytest.importorskip(package, reason=f"{package} is not installed")

    class Store(MemoryFileSystem):
        protocol = scheme
        store: ClassVar = {}
        pseudo_dirs: ClassVar = [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix(f"{scheme}://").strip("/")

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, scheme, Store)
    address = f"{scheme}://datasets/me/tiny"
    Store().put(str(packed) + "/", address, recursive=True)
    assert same_files(fetch_set(address, tmp_path / "cache"), packed)
    Store().rm(f"{address}/train-000000.tar")
    assert "train-000000.tar: the server has no such file" in refusal(address, tmp_path / "other")


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_of_an_address_is_named(tmp_path, monkeypatch, scheme: str, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    message = refusal(f"{scheme}://bucket/set", tmp_path)
    assert message == f'an address of {scheme}:// needs {package}: pip install "mnistm-dist[{scheme}]"'
