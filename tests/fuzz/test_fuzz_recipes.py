"""Recipes and a run's config.yaml from anywhere: YAML that is broken, hostile or says something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from bounds import at_door
from hypothesis import strategies as st
from inputs import WORDS, changed, damaged
from search import Fuzz

from mnistm_dist import config as configuration
from mnistm_dist import plan, train
from mnistm_dist.cli import from_request, parse_flags
from mnistm_dist.config import RECIPES, Config
from mnistm_dist.errors import UserError

pytest_plugins = ["counting"]
WHOLE = configuration.dump(configuration.Config())
OWN = tuple(Path(configuration.__file__).with_name("recipes").joinpath(f"{name}.yaml").read_bytes() for name in RECIPES)
HOSTILE = (
    b"!!python/object/apply:os.system ['touch canary']",
    b"data: !!python/object/new:os.system ['touch canary']",
    b"data: {shards: !!python/name:os.system }",
    b"data: {shards: 2024-13-45}",
    b"data: {shards: 2024-01-01T99:99:99}",
    b"data: {window: !!int abc}",
    b"data: {window: !!bool maybe}",
    b"data: {window: !!timestamp never}",
    b"data: {window: !!float x, shards: !!binary '&&&'}",
    b"optim: {learning_rate: 1:99:99:99.5}",
    b"steps: &a {epochs: *a}",
    b"&a [*a, *a]",
    b"steps: {image_size: &a [*a]}",
    b"steps: {epochs: " + b"9" * 5000 + b"}",
    b"? [a, b]\n: c\n? {a: b}\n: d",
    b"steps: {? [a] : 1, 1: 2, null: 3}",
    b"%YAML 9.9\n---\n--- a\n--- b",
    b"data: {shards: " + b"[" * 3000 + b"]" * 3000 + b"}",
    b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 107))
    + b"data: {shards: *j}",
    b"x: &a [x,x,x,x,x,x,x,x,x]\ndata: {shards: [[*a,*a],[*a,*a]]}",
    b"<<: {data: {window: 3}}\ndata: {<<: [{window: 4}, {order: full}]}",
)
"""YAML that runs something, grows without end, or says what no type can hold."""


def read_both(data: bytes) -> None:
    """As a recipe and as a run's configuration, which what it gives must survive being written."""
    Path("own.yaml").write_bytes(data)
    config = from_request(parse_flags(["--recipe", "own.yaml"]))
    Path("again.yaml").write_text(configuration.dump(config))
    assert configuration.load("again.yaml") == config
    configuration.load("own.yaml")


def test_a_damaged_recipe_is_read_or_refused_in_a_line_and_runs_nothing(fuzz: Fuzz) -> None:
    fuzz.search("recipe, bytes", 0.0264, damaged(*HOSTILE, *OWN, WHOLE.encode()), read_both)


def test_hostile_yaml_is_refused_in_a_line(fuzz: Fuzz) -> None:
    fuzz.search("recipe, hostile", 0.0132, st.sampled_from(HOSTILE), read_both)


def test_other_values_in_a_recipe_are_taken_or_refused_in_a_line(fuzz: Fuzz) -> None:
    document = yaml.safe_load(WHOLE)

    def attempt(value: object) -> None:
        read_both(yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass"))

    fuzz.search("recipe, values", 0.0396, changed(document), attempt)


VALUES = st.sampled_from(WORDS) | st.integers().map(str) | st.floats().map(str) | st.text(max_size=6)
FIELDS = st.sampled_from([f"--{name.replace('_', '-')}" for name in configuration.fields_of(Config())])
FLAGS = st.lists(
    st.tuples(FIELDS, VALUES).map(list)
    | st.tuples(FIELDS, VALUES).map(lambda pair: ["=".join(pair)])
    | FIELDS.map(lambda flag: [flag]),
    max_size=5,
).map(lambda parts: [word for part in parts for word in part])


def test_any_flags_of_training_are_taken_or_refused_in_a_line(fuzz: Fuzz) -> None:
    """A set that is not there ends every launch that got so far."""

    def attempt(flags: list[str]) -> None:
        at_door(train.main, *flags, "--shards", "nowhere", "--tracker", "none", "--no-deterministic", "--threads", "1")

    with pytest.raises(UserError):
        attempt([])  # what is loaded at the first call is not an input's
    fuzz.search("flags, train", 0.025, FLAGS, attempt)


def test_the_plan_of_any_configuration_is_told_or_refused_in_a_line(fuzz: Fuzz) -> None:
    document = yaml.safe_load(WHOLE)

    def attempt(value: object) -> None:
        Path("run").mkdir(exist_ok=True)
        Path("run/config.yaml").write_text(yaml.safe_dump(value), encoding="utf-8", errors="surrogatepass")
        at_door(plan.main, "--run", "run", "--step", "0")

    fuzz.search("config.yaml, plan", 0.0132, changed(document), attempt)
