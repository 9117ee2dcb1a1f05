"""Recipes, flags and their one-line refusals."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mnistm_dist import config as configuration
from mnistm_dist.cli import at_resume, field_docs, from_request, parse_flags, train_parser
from mnistm_dist.config import RECIPES, field_types, load
from mnistm_dist.errors import UserError


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads(recipe):
    assert from_request(parse_flags(["--recipe", recipe])).recipe == recipe


def test_without_a_recipe_it_is_fast():
    assert from_request(parse_flags([])) == from_request(parse_flags(["--recipe", "fast"]))


def test_baseline_states_the_source_reports_table():
    config = from_request(parse_flags(["--recipe", "baseline"]))
    optim, schedule = config.optim, config.steps
    assert (schedule.epochs, schedule.batch_size, schedule.image_size) == (50, 256, (64,))
    assert (optim.optimizer, optim.learning_rate, optim.lr_schedule, optim.decay) == (
        "adam",
        0.001,
        "exponential",
        0.911,
    )
    assert (optim.momentum, optim.weight_decay, optim.label_smoothing) == (0.95, 0.0005, 0)
    assert config.augment == configuration.AugmentConfig()


def test_a_flag_beats_the_recipe_and_a_file_of_ones_own_is_a_recipe(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("steps: {epochs: 3, image_size: [32, 48]}\noptim: {learning_rate: 1e-3}\n")
    config = from_request(parse_flags(["--recipe", str(mine), "--epochs", "5"]))
    assert (config.steps.epochs, config.steps.image_size, config.optim.learning_rate) == (5, (32, 48), 0.001)


def test_every_field_has_a_flag_a_docstring_and_one_section():
    help_text = " ".join(train_parser().format_help().split())
    for name, (section, _, _) in field_types().items():
        docs = field_docs(configuration.SECTIONS[section])
        assert docs[name].rstrip().endswith(".")
        assert f"--{name.replace('_', '-')}" in help_text


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    config = from_request(
        parse_flags(["--recipe", "baseline", "--max-steps", "7", "--compile", "--shuffle-streams", "8"])
    )
    path = tmp_path / "config.yaml"
    path.write_text(configuration.dump(config))
    assert load(path) == config


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--recipe", "quick"], "quick"),
        (["--epochs", "many"], "--epochs"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "2.5"], "--epochs"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--order", "random"], "--order"),
        (["--image-size", "32,,64"], "--image-size"),
        (["--invert", "2"], "--invert"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_a_wrong_value_is_refused_by_name(flags, named):
    with pytest.raises(UserError, match=named):
        parse_flags(flags)


@pytest.mark.parametrize("flags", [["--epoch", "3"], ["--nonsense"], ["--epochs"], ["stray"]])
def test_an_unknown_flag_is_refused_in_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_flags(flags)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[1, 2]", "mapping"),
        ("steps: {epoch: 3}", "did you mean epochs"),
        ("step: {epochs: 3}", "did you mean steps"),
        ("steps: {epochs: [3]}", "steps.epochs"),
        ("steps: 3", "steps"),
        ("a: : b", "not YAML"),
        ("steps: {epochs: !!python/object/apply:os.system [true]}", "not YAML"),
    ],
)
def test_a_recipe_that_is_none_is_refused_by_name(tmp_path, text, named):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=named) as refused:
        parse_flags(["--recipe", str(path)])
    assert str(path) in str(refused.value)


@given(
    document=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["data", "steps", "epochs", "shards", "run", "optim"]) | st.text(max_size=6), inner
            )
        ),
        max_leaves=8,
    )
)
def test_any_document_is_taken_or_refused_in_words(document):
    text = yaml.safe_dump(document)
    try:
        fields = configuration.flatten(yaml.safe_load(text), "it.yaml")
    except UserError as refused:
        fields, words = {}, str(refused)
    else:
        words = "it.yaml"
    assert "it.yaml" in words
    assert set(fields) <= set(field_types())


def test_a_resume_goes_on_as_the_run_began():
    stored = configuration.replace(from_request(parse_flags(["--recipe", "fast"])), micro_batch=64, threads=1)
    assert at_resume(stored, parse_flags([])).steps == stored.steps
    same = at_resume(stored, parse_flags(["--recipe", "fast", "--micro-batch", "auto", "--threads", "2"]))
    assert (same.steps.micro_batch, same.machine.threads) == (64, 2)
    assert at_resume(stored, parse_flags(["--micro-batch", "32"])).steps.micro_batch == 32


def test_a_resume_may_ask_for_the_steps_that_the_launch_before_asked_for():
    flags = ["--max-steps", "7", "--expect-world-size", "2"]
    stored = from_request(parse_flags(flags))
    assert (at_resume(stored, parse_flags([])).run.max_steps, at_resume(stored, parse_flags(flags)).run) == (
        None,
        stored.run,
    )


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--seed", "1"], "seed was 0, now 1"),
        (["--batch-size", "64"], "batch_size was 128, now 64"),
        (["--recipe", "baseline"], "optimizer was muon, now adam"),
        (["--image-size", "32"], "image_size was .*, now 32"),
    ],
)
def test_a_resume_refuses_another_run_and_shows_the_difference(flags, difference):
    with pytest.raises(UserError, match=difference):
        at_resume(from_request(parse_flags(["--recipe", "fast"])), parse_flags(flags))
