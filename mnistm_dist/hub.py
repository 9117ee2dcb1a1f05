"""A trained model as a folder for the Hugging Face Hub: weights, configuration, results, and a model card.

`mnistm_dist.load_model` reads the folder as it reads a run. It holds no path of this machine.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from mnistm_dist import __version__
from mnistm_dist import config as configuration
from mnistm_dist.errors import UserError, escape_control
from mnistm_dist.inference import TrainedModel
from mnistm_dist.training.checkpoint import MODEL, STATE, TRAINING
from mnistm_dist.training.run_dir import CONFIG_NAME, SUMMARY_NAME, read_summary

CARD = Path(__file__).parent / "reporting" / "templates" / "model_card.md.j2"
TASK = "image-classification"
# The bases are those of every failure of a connection: httpx's, below huggingface_hub 1.0 that of requests.
FAILURES: Any = (*HfHubHTTPError.__bases__, OSError, ValueError)


def write_folder(model: TrainedModel, run_dir: Path, folder: Path) -> None:
    """Write the files of a model of a run to an empty folder. Raises `OSError`."""
    config = configuration.load(run_dir / CONFIG_NAME)
    config = configuration.replace(config, shards=None, cache_dir=None, run_dir=None, init_from=None)
    config = replace(config, recipe=Path(config.recipe).stem)
    state = json.loads((model.checkpoint / STATE).read_bytes())
    # Without it, the folder can be evaluated but not resumed.
    del state["files"][TRAINING]
    state["scalars"].get("learning", {}).pop("init_from", None)
    summary = read_summary(run_dir)
    if summary.get("checkpoint", {}).get("step") != model.step:
        # The results are of another checkpoint.
        summary = {}
    summary = summary | {"recipe": config.recipe, "data": {**summary.get("data", {}), "path": None}}
    shutil.copyfile(model.checkpoint / MODEL, folder / MODEL)
    (folder / STATE).write_text(json.dumps(state, indent=1))
    (folder / CONFIG_NAME).write_text(configuration.dump(config))
    (folder / SUMMARY_NAME).write_text(json.dumps(summary, indent=1))
    name = escape_control(run_dir.resolve().name)
    results = {split: summary[split] for split in ("val", "test") if split in summary}
    data = ModelCardData(
        model_name=name,
        library_name="mnistm_dist",
        pipeline_tag=TASK,
        tags=["pytorch", TASK],
        eval_results=[
            EvalResult(
                task_type=TASK,
                dataset_type=summary["data"]["lineage"],
                dataset_name=summary["data"]["lineage"],
                dataset_split=split,
                metric_type="accuracy",
                metric_value=scores["accuracy"],
            )
            for split, scores in results.items()
        ]
        or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(CARD),
        name=name,
        model=model,
        summary=summary,
        results=results,
        version=__version__,
    )
    card.save(folder / "README.md")


def push(folder: Path, repo: str) -> str:
    """Upload a folder to a repository, which is created if it is missing; return its address. Raises `UserError`."""
    api = HfApi(library_name="mnistm_dist", library_version=__version__)
    try:
        api.create_repo(repo, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder))
    except FAILURES as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--push {repo}: {reason}; {folder} is complete: hf upload {repo} {folder}") from error
