"""The strict config: every problem at once, in the user's words."""

import pytest
import yaml

from pretrain import config
from pretrain.config import UserError
from tests.methods import METHODS, small

MINIMAL = {"run": {"dir": "r"}, "corpus": {"train": "c"}, "budget": {"steps": 1}}


def problems(**sections):
    with pytest.raises(UserError) as caught:
        config.build({**MINIMAL, **sections})
    return str(caught.value).splitlines()


def test_all_problems_are_reported_at_once():
    found = problems(
        run={"dir": "r", "sed": 1},
        model={"block": "modrn", "hidden_size": 100, "num_heads": 3},
        budget={"steps": 3, "tokens": 5},
        trane={},
    )
    assert len(found) == 5
    text = "\n".join(found)
    for part in (
        "unknown section 'trane'; did you mean train?",
        "unknown key run.sed; did you mean run.seed?",
        "model.block = 'modrn': should be 'roberta' or 'modern'",
        "model.hidden_size = 100 is no multiple of model.num_heads = 3",
        "budget has 2 units (steps, tokens); keep exactly one",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"budget": {}}, "budget is missing"),
        ({"budget": {"steps": None}}, "budget is missing"),
        ({"budget": {"steps": 0}}, "budget.steps = 0"),
        ({"run": {}}, "run.dir is missing"),
        ({"corpus": None}, "corpus.train is missing"),
        ({"model": "big"}, "model: expected keys"),
        ({"model": {"mask_from": 3}, "masking": {"rate": 1.5}}, "masking.rate = 1.5"),
        ({"model": {"mask_from": 12}}, "mask_from = 12 with model.decoder_layers = 0"),
        ({"model": {"decoder_layers": 2}}, "mask_from = 0 with model.decoder_layers = 2"),
        ({"model": {"block": "modern", "norm": "post"}}, "pre-LN only"),
        ({"model": {"block": "modern", "hidden_size": 9, "num_heads": 3}}, "even head width"),
        ({"masking": {"corruption": [0.8, 0.1, 0.2]}}, "sum to 1"),
        ({"masking": {"corruption": [0.8, 0.2]}}, "masking.corruption"),
        ({"masking": {"rate": 0.001}}, "predicts nothing"),
        ({"masking": {"views": 200}}, "more than the tokens"),
        ({"masking": {"views": 3, "views_mode": "batch"}}, "no multiple of masking.views"),
        ({"train": {"seq_length": 1024}}, "exceeds model.max_positions"),
        ({"train": {"batch_size": 10, "micro_batch_size": 4}}, "no multiple of train.micro_batch_size"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "must lie in [0, 1)"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr = 'fast'"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr"),
        ({"parallel": {"zero": 1}}, "needs train.engine = deepspeed"),
        ({"parallel": {"tensor": 8}}, "no multiple of parallel.tensor"),
        ({"parallel": {"offload": "all"}, "train": {"engine": "deepspeed"}}, "needs parallel.zero = 3"),
        ({"deepspeed": {"zero_optimization": {}}}, "need train.engine = deepspeed"),
        ({"evaluate": {"seq_length": 9999}}, "evaluate.seq_length = 9999 exceeds model.max_positions"),
        ({"masking": {"corruption": [0.5, 0.5]}}, "masking.corruption = [0.5, 0.5]: Of the predicted"),
    ],
)
def test_one_problem(sections, words):
    found = problems(**sections)
    assert len(found) == 1 and words in found[0]


def test_views_that_cut_the_rate_are_told():
    options = config.build({**MINIMAL, "masking": {"rate": 0.5, "views": 4}})
    assert config.warnings(options) == [
        "masking.rate = 0.5 is 0.25 here: masking.views = 4 masks of a text have no token in common"
    ]


def test_a_leak_is_in_the_name_of_a_method():
    late = {"mask_from": 12, "decoder_layers": 2, "mask_leak": 0.5}
    assert config.method(config.build({**MINIMAL, "model": late})) == "3ml-self+leak"
    assert config.method(config.build({**MINIMAL, "model": {"mask_leak": 0.5}})) == "mlm"


def test_yaml_and_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "optimizer: {lr: 1e-4}\nmodel:\n")
    loaded = config.load(path, ["optimizer.eps=1e-8", "budget.steps=7", "masking.corruption=[1,0,0]"])
    assert loaded.optimizer.lr == 1e-4 and loaded.optimizer.eps == 1e-8
    assert loaded.budget.steps == 7 and loaded.masking.corruption == (1.0, 0.0, 0.0)
    switched = config.load(path, ["budget.steps=null", "budget.flops=1e15"])
    assert switched.budget.flops == 1e15


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: [", "not YAML"),
        ("- a", "expected sections"),
        ("run: {dir: a}\nrun: {dir: b}", "'run' is given twice"),
    ],
)
def test_bad_files(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        config.load(path)
    assert str(path) in str(caught.value)


def test_a_problem_names_the_place_it_comes_from(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "optimizer: {lr: fast}\n")
    with pytest.raises(UserError) as caught:
        config.load(path, ["foo.bar=1", "train.phases=[{until: 0.5, seq_length: 9999}]"])
    assert sorted(line.partition(": ")[0] for line in str(caught.value).splitlines()) == [
        str(path),
        "command line",
        "command line",
    ]
    with pytest.raises(UserError, match="command line: unknown key train.batch_siz"):
        config.load(path, ["train.batch_siz=3", "train.phases=[{until: 0.5}]"])


def test_missing_file_and_bad_override(tmp_path):
    with pytest.raises(UserError, match="cannot read the config"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="section.key=value"):
        config.parse_overrides(["steps"])


def test_dump_reads_back_equal():
    for method in METHODS:
        whole = small(method)
        assert config.build(yaml.safe_load(config.dump(whole))) == whole


@pytest.mark.parametrize(
    ("method", "name"), [(m, m) for m in ("mlm", "3ml-self", "3ml-cross", "3ml-query", "mae-lm")]
)
def test_method_names(method, name):
    assert config.method(small(method)) == name


def test_what_may_change_when_a_run_continues():
    old = small()
    free = {"budget": {"steps": 9}, "parallel": {"tensor": 2}, "checkpoint": {"keep_last": 9}}
    assert config.changed_keys(old, small(**free, train={"micro_batch_size": 1})) == []
    assert config.changed_keys(old, small(optimizer={"lr": 1.0}, masking={"rate": 0.25})) == [
        "masking.rate: 0.5 -> 0.25",
        "optimizer.lr: 0.0005 -> 1.0",
    ]


def test_every_key_has_a_description():
    for name, section in config.SECTIONS.items():
        for key, field in section.model_fields.items():
            assert field.description, f"{name}.{key}"


def test_a_setting_without_effect_is_named():
    assert config.warnings(small("3ml-self")) == []
    assert "model.mask_vector has no effect" in config.warnings(small(model={"mask_vector": "tied"}))[0]
