"""Recipes, flags and their one-line errors."""

import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mnistm_dist import config as configuration
from mnistm_dist.cli import TrainRequest, parse_train_flags
from mnistm_dist.config import RECIPES, Config, load
from mnistm_dist.errors import UserError, run_cli


def new_run(*flags: str) -> Config:
    return parse_train_flags(list(flags)).config


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads(recipe):
    assert new_run("--recipe", recipe).recipe == recipe


def test_without_a_recipe_it_is_fast():
    assert new_run() == new_run("--recipe", "fast")


def test_baseline_states_the_source_reports_table():
    config = new_run("--recipe", "baseline")
    optim, steps = config.optim, config.steps
    assert (steps.epochs, steps.batch_size, steps.image_size) == (50, 256, (64,))
    assert (optim.optimizer, optim.learning_rate) == ("adam", 0.001)
    assert (optim.lr_schedule, optim.decay) == ("exponential", 0.911)
    assert (optim.momentum, optim.weight_decay, optim.label_smoothing) == (0.95, 0.0005, 0)
    assert config.augment == configuration.AugmentConfig()


def test_a_flag_overrides_the_recipe_and_a_yaml_file_is_a_recipe(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("steps: {epochs: 3, image_size: [32, 48]}\noptim: {learning_rate: 1e-3}\ndata:\n")
    config = new_run("--recipe", str(own), "--epochs", "5")
    assert (config.steps.epochs, config.steps.image_size, config.optim.learning_rate) == (5, (32, 48), 0.001)


def test_a_recipe_inherits_another_over_a_chain(tmp_path):
    (tmp_path / "long.yaml").write_text("recipe: baseline\nsteps: {epochs: 90}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "seeded.yaml").write_text("recipe: ../long.yaml\nsteps: {seed: 4}\n")
    config = new_run("--recipe", str(tmp_path / "sub" / "seeded.yaml"))
    assert (config.steps.epochs, config.steps.seed) == (90, 4)
    assert config.optim == new_run("--recipe", "baseline").optim


def test_a_recipe_that_inherits_from_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("recipe: b.yaml\n")
    (tmp_path / "b.yaml").write_text("recipe: a.yaml\n")
    with pytest.raises(UserError, match=r"b\.yaml: recipe a\.yaml: inherits from itself"):
        new_run("--recipe", str(tmp_path / "a.yaml"))


def test_an_inherited_recipe_that_is_missing_is_named_with_its_heir(tmp_path):
    (tmp_path / "own.yaml").write_text("recipe: fats\n")
    with pytest.raises(UserError, match=r"own\.yaml: recipe fats: .*did you mean fast\?"):
        new_run("--recipe", str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("--image-size 32,48", "image_size", (32, 48)),
        ("--image-size [32,48]", "image_size", (32, 48)),
        ("--image_size=32", "image_size", (32,)),
        ("--compile", "compile", True),
        ("--no-compile", "compile", False),
        ("--compile=True", "compile", True),
        ("--compile=false", "compile", False),
        ("--sync_batchnorm=true", "sync_batchnorm", True),
        ("--no-report", "report", False),
        ("--threads auto", "threads", "auto"),
        ("--threads 3", "threads", 3),
        ("--max-steps none", "max_steps", None),
        ("--max-steps 7 --max-steps none", "max_steps", None),
        ("--seed 1 --seed=2", "seed", 2),
        ("--resume auto --run-dir a --resume runs/b", "resume", "runs/b"),
        ("--run-dir=true", "run_dir", "true"),
        ("--learning-rate 1e-3", "learning_rate", 0.001),
    ],
)
def test_a_flag_is_read_in_every_form(flags, field, value):
    assert configuration.fields_of(new_run(*flags.split()))[field] == value


def help_of_train(columns: int = 80) -> str:
    environment = {"COLUMNS": str(columns), "PATH": ""}
    command = [sys.executable, "-m", "mnistm_dist.train", "--help"]
    root = configuration.Path(configuration.__file__).parents[1]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout


def test_help_explains_every_field_in_80_columns():
    text = help_of_train()
    assert max(map(len, text.splitlines())) <= 80
    for name in configuration.fields_of(Config()):
        # A flag, its values, and the beginning of a sentence.
        assert re.search(rf"^ +--{name.replace('_', '-')}\b.*\n?.* [a-zA-Z$]\w+", text, re.MULTILINE), name


def test_help_breaks_no_word_in_80_columns():
    # A list of choices may go on in the next line.
    narrow, wide = (set(re.findall(r"[^\s,{}-][^\s,{}]*", help_of_train(columns))) for columns in (80, 1000))
    assert narrow <= wide
    assert "32,32,32,32,32,48,48,64,64,64,64)" in help_of_train()


def test_the_docstring_of_every_field_is_one_line_since_help_keeps_its_breaks():
    text = configuration.Path(configuration.__file__).read_text()
    sections = text[text.index("class DataConfig") : text.index("class Config")]
    assert len(re.findall(r'^    """[^"\n]+\."""$', sections, re.MULTILINE)) == len(configuration.SECTION_OF) + 7


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    config = new_run("--recipe", "baseline", "--max-steps", "7", "--compile", "--shuffle-streams", "8")
    path = tmp_path / "config.yaml"
    path.write_text(configuration.dump(config))
    assert load(path) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--recipe quick", "recipe quick: cannot be read .*baseline, fast, best, images, debug or a YAML file"),
        ("--epochs many", "--epochs: found 'many'; should be a valid integer"),
        ("--epochs 0", "--epochs: found '0'; should be greater than 0"),
        ("--epochs 2.5", "--epochs: found '2.5'; should be a valid integer"),
        ("--micro-batch many", "--micro-batch: found 'many'; should be 'auto' or a valid integer"),
        ("--learning-rate nan", "--learning-rate: found 'nan'; should be a finite number"),
        ("--order random", "'random' .*'--order'.*'auto', 'full', 'windowed'"),
        ("--image-size 32,,64", "--image-size: found ''; should be a valid integer"),
        ("--image-size 8", "--image-size: found '8'; should be greater than or equal to 16"),
        ("--invert 2", "--invert: found '2'; should be less than or equal to 1"),
        ("--seed -1", "--seed: found '-1'; should be greater than or equal to 0"),
        ("--shards=", "--shards: found ''; should have at least 1 character"),
        ("--epoch 3", "--epoch, 3; Perhaps you meant: --epochs"),
        ("--check 3", "Unrecognized options: --check"),
        ("--nonsense", "--nonsense"),
        ("--epochs", "'--epochs'"),
        ("--recipe", "'--recipe'"),
        ("stray", "stray"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_train_flags(flags.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("rank", "printed"), [("0", 1), ("1", 0)])
@pytest.mark.parametrize("flags", [["--epochs", "many"], ["--nonsense"], ["--order", "random"]])
def test_of_several_processes_rank_0_alone_prints_a_wrong_flag(rank, printed, flags, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    assert run_cli(lambda argv: bool(parse_train_flags(argv)), flags) == 2
    captured = capsys.readouterr()
    assert (captured.out, len(captured.err.splitlines())) == ("", printed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", r"found \[1, 2\]; should be a mapping"),
        ("steps: {epoch: 3}", r"steps\.epoch: unknown \(did you mean epochs\?\); known: epochs, batch_size"),
        ("step: {epochs: 3}", r"step: unknown \(did you mean steps\?\)"),
        ("steps: {epochs: [3]}", r"steps\.epochs: found \[3\]; should be a valid integer"),
        ("steps: {epochs: -1}", r"steps\.epochs: found -1; should be greater than 0"),
        ("steps: {shards: here}", r"steps\.shards: unknown"),
        ("optim: {optimizer: adamm}", r"optim\.optimizer: found 'adamm'; should be 'adam', 'adamw', 'muon' or 'sgd'"),
        ("steps: 3", "steps: found 3; should be a StepsConfig"),
        ("recipe: 3", "recipe: found 3; should be a valid string"),
        ("a: : b", r"not valid YAML \(line 1: mapping values are not allowed here\)"),
        ("run: {run_dir: 2024-13-45}", "not valid YAML"),
        ("steps: {epochs: !!python/object/apply:os.system [true]}", "not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_file_and_field(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    for read in (configuration.read_recipe, load):
        with pytest.raises(UserError, match=message) as caught:
            read(str(path))
        assert str(caught.value).startswith(f"{path}: ")


documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["data", "steps", "epochs", "shards", "run", "optim"]) | st.text(max_size=6), inner
        )
    ),
    max_leaves=8,
)


@given(document=documents)
@settings(max_examples=50, deadline=None)
def test_any_recipe_is_read_or_refused_in_one_line(document, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(document), errors="surrogatepass")
    try:
        fields, message = configuration.read_recipe(str(path)), "any.yaml"
    except UserError as error:
        fields, message = {}, str(error)
    assert "any.yaml" in message
    assert set(fields) <= set(configuration.SECTION_OF)


def resumed(stored: Config, *flags: str) -> Config:
    request: TrainRequest = parse_train_flags(list(flags))
    return request.resumed(stored)


def test_a_resume_continues_as_the_run_began():
    stored = configuration.replace(new_run("--recipe", "fast", "--epochs", "20"), micro_batch=64, threads=1)
    assert resumed(stored).steps == stored.steps
    same = resumed(stored, "--recipe", "fast", "--epochs", "20", "--micro-batch", "auto", "--threads", "2")
    assert (same.steps, same.machine.threads) == (stored.steps, 2)
    assert resumed(stored, "--micro-batch", "32").steps.micro_batch == 32


def test_a_resume_keeps_max_steps_and_may_repeat_or_change_it():
    flags = ["--max-steps", "7", "--expect-world-size", "2"]
    stored = new_run(*flags)
    assert (resumed(stored).run.max_steps, resumed(stored).run.expect_world_size) == (7, None)
    assert resumed(stored, *flags).run == stored.run
    assert [resumed(stored, "--max-steps", n).run.max_steps for n in ("9", "none")] == [9, None]


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ("--seed 1", "seed was 0, now 1"),
        ("--batch-size 64", "batch_size was 256, now 64"),
        ("--recipe baseline", "optimizer was muon, now adam"),
        ("--image-size 32", "image_size was .*,64,64, now 32"),
        ("--compile", "compile was False, now True"),
    ],
)
def test_a_resume_refuses_another_run_and_shows_the_difference(flags, difference):
    with pytest.raises(UserError, match=difference):
        resumed(new_run("--recipe", "fast"), *flags.split())


def test_a_recipe_does_not_change_the_micro_batch_at_a_resume(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("steps: {micro_batch: 64}")
    stored = configuration.replace(new_run("--recipe", str(own)), micro_batch=32)
    with pytest.raises(UserError, match="micro_batch was 32, now 64"):
        resumed(stored, "--recipe", str(own))
    assert resumed(stored, "--recipe", str(own), "--micro-batch", "32").steps.micro_batch == 32
