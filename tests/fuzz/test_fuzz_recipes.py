"""A recipe, and the config.yaml of a run from elsewhere: YAML is read or refused in one line, and runs nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path

import yaml
from bounds import at_door
from hypothesis import strategies as st
from inputs import changed, damaged
from search import Fuzz

from mnistm_dist import config as configuration
from mnistm_dist import plan
from mnistm_dist.config import RECIPES, Config
from mnistm_dist.errors import UserError

pytest_plugins = ["counting"]

COMPLETE = configuration.dump(Config())
BUNDLED = [Path(configuration.__file__).with_name("recipes").joinpath(f"{name}.yaml").read_bytes() for name in RECIPES]
CODE = (
    b"!!python/object/apply:os.system ['touch canary']",
    b"data: !!python/object/new:os.system ['touch canary']",
    b"data: {shards: !!python/name:os.system }",
)


def test_a_damaged_configuration_is_read_or_refused_in_one_line_and_runs_nothing(fuzz: Fuzz) -> None:
    values = changed(yaml.safe_load(COMPLETE)).map(lambda value: yaml.safe_dump(value).encode())
    Path("run").mkdir()

    def attempt(data: bytes) -> None:
        Path("run/config.yaml").write_bytes(data)
        with contextlib.suppress(UserError):
            at_door(plan.main, "run", "--step", "0")
        given = configuration.read_recipe("run/config.yaml")
        config = configuration.build("own.yaml", given)
        Path("again.yaml").write_text(configuration.dump(config))
        assert configuration.load("again.yaml") == config

    attempt(COMPLETE.encode())  # memory for modules that are loaded at the first call does not count for an input
    inputs = damaged(*CODE, *BUNDLED, COMPLETE.encode()) | st.sampled_from(CODE) | values
    fuzz.search("configuration", 0.04, inputs, attempt)
