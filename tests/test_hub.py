"""``export --to hub``: a folder with a model card that `load_model` reads, and its upload to a local server."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, error_of, output_of
from huggingface_hub import ModelCard

from mnistm_dist import evaluate, load_model, plan, train
from mnistm_dist.export import main


@pytest.fixture(scope="module")
def folder(trained_run, tmp_path_factory) -> Path:
    """The folder of the run's model."""
    out = tmp_path_factory.mktemp("hub") / "digits"
    assert main([str(trained_run), "--to", "hub", "--out", str(out)]) == 0
    return out


def test_the_folder_gives_the_probabilities_of_the_run_also_where_it_is_moved(
    folder, trained_run, val_images, tmp_path
):
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    model, original = load_model(moved), load_model(trained_run)
    assert np.array_equal(model.predict(val_images), original.predict(val_images))
    assert (model.classes, model.step) == (original.classes, original.step)


@pytest.mark.parametrize("checkpoint", ["best", "last", "chosen"])
def test_the_folder_has_one_checkpoint_whichever_is_asked_for(folder, trained_run, checkpoint):
    assert load_model(folder, checkpoint).step == load_model(trained_run).step


def test_the_card_parses_and_has_the_results_of_the_run(folder, trained_run):
    card = ModelCard.load(folder / "README.md")
    summary = json.loads((trained_run / "summary.json").read_text())
    assert card.data.library_name == "mnistm_dist"
    assert card.data.model_name == trained_run.name
    results = {result.dataset_split: result.metric_value for result in card.data.eval_results}
    assert results == {split: summary[split]["accuracy"] for split in ("val", "test")}
    for split in ("val", "test"):
        assert f"| {split} | {summary[split]['correct']} of {summary[split]['total']} |" in card.text
    assert f"`{summary['data']['identity']}`" in card.text


def test_no_file_holds_a_path_or_the_name_of_this_machine(folder, trained_run, small_set):
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.yaml", "model.safetensors", "state.json", "summary.json")
    }
    named = (str(trained_run.parent), str(small_set), str(ROOT), str(Path.home()), f"{socket.gethostname()}\n")
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not [name for name in named if name.encode() in content and name != "/"], path.name


def test_the_results_of_another_checkpoint_are_left_out(trained_run, run_main, tmp_path):
    summary = json.loads((trained_run / "summary.json").read_text())
    chosen = summary["checkpoint"]["step"]
    other = next(path for path in sorted((trained_run / "checkpoints").iterdir()) if path.name != f"step-{chosen:08d}")
    output_of(run_main(main, trained_run, "--to", "hub", "--out", "other", "--checkpoint", other))
    assert ModelCard.load(tmp_path / "other" / "README.md").data.eval_results is None
    assert load_model(tmp_path / "other").step == load_model(trained_run, checkpoint=other).step


def test_the_folder_is_evaluated_like_a_run(folder, small_set, run_main, trained_run, tmp_path):
    done = run_main(evaluate.main, folder, "--shards", small_set, "--split", "val", "--out", tmp_path / "results")
    output_of(done)
    both = [(place / "predictions_val.csv").read_bytes() for place in (tmp_path / "results", trained_run)]
    assert both[0] == both[1]


def test_the_folder_cannot_be_resumed_and_stays_as_it_is(folder, small_set, run_main):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    advice = f"start a new run with --init-from {folder}"
    assert advice in error_of(run_main(train.main, "--resume", folder, "--shards", small_set))
    assert advice in error_of(run_main(train.main, "--run-dir", folder, "--resume", "auto", "--shards", small_set))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_plan_of_the_folder_needs_a_set(folder, small_set, run_main):
    assert "its config.yaml names no packed set; name it with --shards" in error_of(
        run_main(plan.main, folder, "--step", 1)
    )
    output_of(run_main(plan.main, folder, "--step", 1, "--shards", small_set))


def test_changed_weights_are_refused(folder, tmp_path):
    changed = shutil.copytree(folder, tmp_path / "changed")
    with (changed / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(ValueError, match=r"model.safetensors is torn or was changed"):
        load_model(changed)


@pytest.fixture
def hub(monkeypatch):
    """A server that takes a commit as the Hub does; yields the files by name once they are there."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            result: dict[str, object] = {"errors": [], "warnings": []}
            if self.path.endswith("/repos/create"):
                result = {"url": f"{address}/me/digits"}
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                result = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                result = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/me/digits/commit/main"}
            self.send_response(200 if self.headers["Authorization"] == "Bearer right" else 401)
            self.end_headers()
            self.wfile.write(json.dumps(result).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "right")
    yield files
    server.shutdown()
    server.server_close()


def test_a_push_uploads_every_file(hub, trained_run, run_main, tmp_path):
    out = output_of(run_main(main, trained_run, "--to", "hub", "--out", "digits", "--push", "me/digits"))
    assert "/me/digits" in out
    assert hub == {path.name: path.read_bytes() for path in (tmp_path / "digits").iterdir()}


def test_a_push_that_fails_is_one_line_and_keeps_the_folder(hub, trained_run, run_main, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    error = error_of(run_main(main, trained_run, "--to", "hub", "--out", "digits", "--push", "me/digits"))
    assert "--push me/digits" in error
    assert "hf upload me/digits digits" in error
    assert load_model(tmp_path / "digits").classes
    assert not hub


def test_what_cannot_be_pushed_is_refused_before_anything_is_written(trained_run, run_main, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    flags = (trained_run, "--out", "digits", "--push", "me/digits", "--to")
    assert "HF_TOKEN" in error_of(run_main(main, *flags, "hub"))
    assert "needs --to hub, found --to torch" in error_of(run_main(main, *flags, "torch"))
    (tmp_path / "digits").mkdir()
    assert "already exists" in error_of(run_main(main, *flags[:3], "--to", "hub"))
    assert not list((tmp_path / "digits").iterdir())
