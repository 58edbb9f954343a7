"""Every shipped config makes updates: at a fraction of its size, otherwise as it is written."""

import re
from pathlib import Path
from typing import Any

import pytest

from pretrain import checkpoint
from pretrain.config import BudgetOptions, config_warnings, load_config, method_of
from pretrain.data.masking import counts
from tests.support.runs import finish

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
THROUGH_DEEPSPEED = ("3ml-query-base", "mae-lm-large")
"""The rest of those that name it take plain torch, which computes the same (test_engine.py)."""
SMALL = {"hidden_size": 32, "num_heads": 4, "ffn_size": 48, "max_positions": 40, "num_layers": 2}


def reduced(path: Path, tiny: Path) -> list[str]:
    """Overrides under which a config fits a test; what makes its method stays."""
    config = load_config(path)
    m, micro = config.model, 2 if config.train.micro_batch_size else "null"
    sections: dict[str, dict[str, Any]] = {
        "model": {**SMALL, "mask_from": 2 * m.mask_from // m.num_layers},
        "train": {"seq_length": 24, "batch_size": 4, "micro_batch_size": micro, "phases": "null"},
        "corpus": {name: tiny / name for name in ("train", "valid")},
        "budget": {**dict.fromkeys(BudgetOptions.model_fields, "null"), "steps": 2},
        "evaluate": {"every_steps": 1, "samples": 4},
        "monitor": {"tensorboard": "false"},
    }
    if config.train.phases:
        sections["train"]["phases"] = "[{until: 0.5, seq_length: 16}]"
    if path.stem not in THROUGH_DEEPSPEED:
        sections["train"]["engine"] = "torch"
        sections["parallel"] = {"zero": 0, "offload": "none"}
    return [f"{name}.{key}={value}" for name, keys in sections.items() for key, value in keys.items()]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_makes_updates(path: Path, tiny: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config_warnings(config) == []
    method = method_of(config)
    assert path.stem.startswith((method, "demo-", "latemask-"))
    outcome = finish([str(path), f"run.dir={tmp_path}", *reduced(path, tiny)])
    assert f"method      {method}" in outcome.text
    assert "warning" not in outcome.text.lower()
    assert checkpoint.read_state(checkpoint.find_verified(tmp_path)[0]).step == 2


def test_the_long_branch_that_a_recipe_describes(tiny: Path, tmp_path: Path) -> None:
    """Its own words, lengths and budget reduced: longer windows, another rotation, a rate that falls."""
    path = next(path for path in CONFIGS if path.stem == "3ml-query-modern")
    begin = [*reduced(path, tiny), "model.local_window=8"]
    finish([str(path), f"run.dir={tmp_path}/trunk", *begin])
    comments = path.read_text(encoding="utf-8").partition("run:")[0]
    words = re.findall(r"(?<= )[a-z]+[.][a-z_.]+=[^ \n]+", comments.split("PREFIX corpus.valid=PREFIX")[-1])
    assert "model.rope_theta=160000" in words and "train.seq_length=8192" in words
    sizes = ["seq_length=40", "batch_size=2", "micro_batch_size=2"]
    more = [f"train.{size}" for size in sizes] + [
        "budget.tokens=null",
        "budget.steps=4",
        "evaluate.samples=4",
    ]
    own = [f"run.dir={tmp_path}/long", f"run.branch.of={tmp_path}/trunk"]
    finish([str(path), *begin, *words, *more, *own])
    state = checkpoint.read_state(checkpoint.find_verified(tmp_path / "long")[0])
    assert (state.step, state.config["model"]["rope_theta"], state.config["schedule"]["kind"]) == (
        4,
        160000,
        "decay",
    )


def test_configs_name_a_folder_each() -> None:
    folders = [load_config(path).run.dir for path in CONFIGS]
    assert folders == [f"runs/{path.stem}" for path in CONFIGS]


def test_every_method_has_a_config() -> None:
    methods = {"mlm", "3ml-self", "3ml-cross", "3ml-query", "mae-lm", "shared-depth"}
    for size in ("base", "large"):
        assert {path.stem.removesuffix(f"-{size}") for path in CONFIGS if path.stem.endswith(size)} >= methods


def test_fully_explored_recipes_leave_no_token_out() -> None:
    for path in CONFIGS:
        if path.stem.endswith("-views"):
            k, length = load_config(path).masking, load_config(path).train.seq_length
            assert k.views * counts(k, length).predicted >= 0.97 * (length - 2), path
