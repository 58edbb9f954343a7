"""The strict config: every problem at once, in the user's words."""

import pytest
import yaml

from pretrain.config import (
    SECTIONS,
    build_config,
    changed_keys,
    config_warnings,
    dump_config,
    load_config,
    method_of,
    parse_overrides,
)
from pretrain.errors import UserError
from tests.support.methods import METHODS, small

MINIMAL = {"run": {"dir": "r"}, "corpus": {"train": "c"}, "budget": {"steps": 1}}


def problems(**sections):
    with pytest.raises(UserError) as caught:
        build_config({**MINIMAL, **sections})
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
        "model.block = 'modrn': should be 'roberta', 'bert' or 'modern'",
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
        (
            {"parallel": {"reduce_dtype": "bf16"}, "train": {"engine": "deepspeed"}},
            "parallel.reduce_dtype = bf16 needs train.engine = torch",
        ),
        ({"deepspeed": {"zero_optimization": {}}}, "need train.engine = deepspeed"),
        (
            {"optimizer": {"kind": "muon"}, "parallel": {"zero": 1}, "train": {"engine": "deepspeed"}},
            "optimizer.kind = muon works on whole tensors, which parallel.zero = 1 cuts",
        ),
        ({"evaluate": {"seq_length": 9999}}, "evaluate.seq_length = 9999 exceeds model.max_positions"),
        ({"masking": {"corruption": [0.5, 0.5]}}, "masking.corruption = [0.5, 0.5]: Of the predicted"),
    ],
)
def test_one_problem(sections, words):
    found = problems(**sections)
    assert len(found) == 1 and words in found[0]


def test_views_that_cut_the_rate_are_told():
    config = build_config({**MINIMAL, "masking": {"rate": 0.5, "views": 4}})
    assert config_warnings(config) == [
        "masking.rate = 0.5 is 0.25 here: masking.views = 4 masks of a text have no token in common"
    ]


def test_a_leak_is_in_the_name_of_a_method():
    late = {"mask_from": 12, "decoder_layers": 2, "mask_leak": 0.5}
    assert method_of(build_config({**MINIMAL, "model": late})) == "3ml-self+leak"
    assert method_of(build_config({**MINIMAL, "model": {"mask_leak": 0.5}})) == "mlm"


def test_yaml_and_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "optimizer: {lr: 1e-4}\nmodel:\n")
    loaded = load_config(path, ["optimizer.eps=1e-8", "budget.steps=7", "masking.corruption=[1,0,0]"])
    assert loaded.optimizer.lr == 1e-4 and loaded.optimizer.eps == 1e-8
    assert loaded.budget.steps == 7 and loaded.masking.corruption == (1.0, 0.0, 0.0)
    switched = load_config(path, ["budget.steps=null", "budget.flops=1e15"])
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
        load_config(path)
    assert str(path) in str(caught.value)


NUMBERS = {"010": 10, "1_000": 1000, "+7": 7, "1e3": 1000, "20.": 20, "2.0e+01": 20}


@pytest.mark.parametrize("text", NUMBERS)
def test_whole_numbers_are_decimal(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(f"run: {{dir: r}}\ncorpus: {{train: c}}\nbudget: {{steps: {text}}}\n")
    assert load_config(path).budget.steps == NUMBERS[text]
    assert load_config(path, [f"train.batch_size={text}"]).train.batch_size == NUMBERS[text]


@pytest.mark.parametrize("text", ["1:30", "yes", "on", "true", "0x10", "0b1", "1__0", ".nan", "-.inf", "inf"])
@pytest.mark.parametrize(
    "key", ["train.batch_size", "optimizer.lr", "parallel.zero", "train.micro_batch_size"]
)
def test_what_is_no_number_is_refused(tmp_path, key, text):
    """In the file as on the command line; YAML 1.1 takes the first three for 90, true and true."""
    section, _, name = key.partition(".")
    path, broken = tmp_path / "c.yaml", tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    broken.write_text(f"{path.read_text()}{section}: {{{name}: {text}}}\n")
    for file, words in ((broken, []), (path, [f"{key}={text}"])):
        with pytest.raises(UserError, match=rf"{key} = .*: should be "):
            load_config(file, words)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.float8=yes", "should be true or false"),
        ("train.float8=1", "should be true or false"),
        ("train.deterministic=on", "should be true or false"),
        ("optimizer.betas=[0.9, yes]", "should be a number"),
        ("optimizer.betas=[true, 0.9]", "should be a number"),
        ("corpus.train=[[true, a], [1, b]]", "should be a prefix"),
        ("train.phases=[{until: .5, batch_size: 1:30}]", "should be a number"),
        ("masking.rate={from: 0.5, to: 0.1}", "masking.rate = .*: should be {from: 0.5, to: 0.15, steps: 8}"),
        ("masking.rate={from: 0.5, to: 0.1, steps: 1}", "should be {from: 0.5, to: 0.15, steps: 8}"),
        ("masking.rate={from: 0.5, to: 0.1, steps: 2.5}", "should be {from: 0.5, to: 0.15, steps: 8}"),
        ("masking.rate={from: 0.5, to: 0.1, steps: .inf}", "should be {from: 0.5, to: 0.15, steps: 8}"),
        ("masking.rate={from: 0.5, to: 0.1, steps: 1000000000}", "should be {from: 0.5, to: 0.15, steps: 8}"),
        ("masking.rate={from: '0.5', to: 0.1, steps: 3}", "should be {from: 0.5, to: 0.15, steps: 8}"),
        ("masking.rate={from: true, to: 0.1, steps: 3}", "should be {from: 0.5, to: 0.15, steps: 8}"),
        ("masking.rate={from: .nan, to: 0.1, steps: 3}", "train.phases.0.rate = nan"),
        ("masking.rate={from: 1.5, to: 0.1, steps: 3}", "train.phases.0.rate = 1.5"),
        ("masking.predict=0.3", "masking.predict = 0.3: a token of a window at least, and no more than"),
        ("train.phases=[{until: .5, predict: .2}]", "train.phases.0: masking.predict = 0.2: a token"),
        ("deepspeed.fp16.enabled=off", "deepspeed.fp16.enabled = 'off': should be true or false"),
        ("optimizer.betas=[0.9, 0.98] # usual", "is not YAML"),
        ("optimizer.lr=1e-4 # usual", "should be a number"),
        ("run.dir=[a", "is not YAML"),
    ],
)
def test_a_value_of_another_kind_is_refused(word, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(UserError, match=message):
        load_config(path, ["train.engine=deepspeed", word])


def test_a_rate_that_falls_is_phases_of_equal_budget(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "masking": {"rate": {"from": 0.5, "to": 0.2, "steps": 4}}}))
    config = load_config(path)
    assert [(one.until, one.rate) for one in config.train.phases] == [(0.25, 0.5), (0.5, 0.4), (0.75, 0.3)]
    assert config.masking.rate == 0.2
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert load_config(path, ["train.phases=[]", "masking.rate=0.3"]).masking.rate == 0.3
    with pytest.raises(UserError, match="train.phases are given too; keep one of them"):
        load_config(path, ["masking.rate={from: 0.5, to: 0.2, steps: 4}"])


def test_a_number_that_is_a_name_is_to_be_quoted(tmp_path):
    path = tmp_path / "c.yaml"
    text = "run: {dir: DIR}\ncorpus: {train: c}\nbudget: {steps: 1}\n"
    for name in ("2026", "1e5", "true"):
        path.write_text(text.replace("DIR", name))
        with pytest.raises(UserError, match="run.dir = .*: put it in quotes if it is a name"):
            load_config(path)
        path.write_text(text.replace("DIR", f'"{name}"'))
        assert load_config(path).run.dir == load_config(path, [f"run.dir={name}"]).run.dir == name
    path.write_text(text.replace("DIR", "2026-11-30"))  # for YAML 1.1 a date
    assert load_config(path).run.dir == "2026-11-30"


@pytest.mark.parametrize("name", ["runs/try #2", "a: b", "- a", "&a", "!a", "x ", "2026", "010", "yes", "%d"])
def test_the_text_of_an_override_is_its_value(name):
    assert parse_overrides([f"run.dir={name}"]) == {"run": {"dir": name}}
    assert parse_overrides([f"run.dir='{name}'"]) == {"run": {"dir": name}}


def test_merge_keys_are_merged(tmp_path):
    path = tmp_path / "c.yaml"
    phases = "[&early {until: 0.2, seq_length: 32}, {<<: *early, until: 0.5}]"
    path.write_text(yaml.safe_dump(MINIMAL) + f"train: {{phases: {phases}}}\n")
    assert [(each.until, each.seq_length) for each in load_config(path).train.phases] == [
        (0.2, 32),
        (0.5, 32),
    ]
    for twice in (
        "[{until: 0.2, until: 0.3}]",
        "[&e {until: 0.2}, {<<: *e, seq_length: 32, seq_length: 64}]",
    ):
        path.write_text(yaml.safe_dump(MINIMAL) + f"train: {{phases: {twice}}}\n")
        with pytest.raises(UserError, match="is given twice"):
            load_config(path)


PLACES = [
    *("run.dir", "corpus.train", "corpus.valid", "corpus.tokenizer", "corpus.copies"),
    *("model.init_from", "budget.relative_to"),
]


@pytest.mark.parametrize("key", PLACES)
def test_paths_are_expanded_as_by_a_shell(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)
    section, _, name = key.partition(".")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    more = ["budget.steps=null"] if section == "budget" else []

    def read(text):
        return getattr(getattr(load_config(path, [*more, f"{key}={text}"]), section), name)

    assert [read("~/x"), read("$SCRATCH/x"), read("${SCRATCH}x")] == ["/home/me/x", "/scratch/x", "/scratchx"]
    assert read("a~/$1") == "a~/$1" and read("a $run") == "a $run"
    for text in ("$NOWHERE/x", "a-$NOWHERE", "${NOWHERE}", "${nowhere}", "a/$nowhere", "~nobody-at-all/x"):
        with pytest.raises(UserError, match=rf"{key} = .*(is not set|is nobody's home)"):
            read(text)
    assert load_config(path, ["corpus.train=[[1, ~/a], [2, $SCRATCH/b]]"]).corpus.train == [
        (1, "/home/me/a"),
        (2, "/scratch/b"),
    ]


def test_a_problem_names_the_place_it_comes_from(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "optimizer: {lr: fast}\n")
    with pytest.raises(UserError) as caught:
        load_config(path, ["foo.bar=1", "train.phases=[{until: 0.5, seq_length: 9999}]"])
    assert sorted(line.partition(": ")[0] for line in str(caught.value).splitlines()) == [
        str(path),
        "command line",
        "command line",
    ]
    with pytest.raises(UserError, match="command line: unknown key train.batch_siz"):
        load_config(path, ["train.batch_siz=3", "train.phases=[{until: 0.5}]"])


def test_missing_file_and_bad_override(tmp_path):
    with pytest.raises(UserError, match="cannot read the config"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="section.key=value"):
        parse_overrides(["steps"])


def test_dump_reads_back_equal():
    for method in METHODS:
        whole = small(method)
        assert build_config(yaml.safe_load(dump_config(whole))) == whole


@pytest.mark.parametrize(("method", "name"), [(m, m) for m in METHODS])
def test_method_names(method, name):
    assert method_of(small(method)) == name


def test_a_bottleneck_needs_one_text_a_window():
    with pytest.raises(UserError, match="a window has one <s>, which sees its own document only"):
        small("retromae", corpus={"documents": "bounded"})


def test_local_layers_are_of_the_modern_block_and_even():
    with pytest.raises(UserError, match="model.local_window = 6: the modern block alone has local layers"):
        small(model={"local_window": 6})
    with pytest.raises(UserError, match="model.local_window = 7: half of it is on either side"):
        small("mlm", "modern", model={"local_window": 7})
    assert "model.global_every has no effect" in config_warnings(small(model={"global_every": 2}))[0]


def test_what_may_change_when_a_run_continues():
    old = small()
    free = {"budget": {"steps": 9}, "parallel": {"tensor": 2}, "checkpoint": {"keep_last": 9}}
    computed = {"micro_batch_size": 1, "recompute": "block", "deterministic": False, "compile": "default"}
    assert changed_keys(old, small(**free, train=computed)) == []
    assert changed_keys(old, small(train={"cross_entropy": "torch"})) == []
    assert changed_keys(old, small(optimizer={"lr": 1.0, "kind": "muon"}, masking={"rate": 0.25})) == [
        "masking.rate: 0.5 -> 0.25",
        "optimizer.kind: adamw -> muon",
        "optimizer.lr: 0.0005 -> 1.0",
    ]


def test_every_key_has_a_description():
    for name, section in SECTIONS.items():
        for key, field in section.model_fields.items():
            assert field.description, f"{name}.{key}"


def test_a_setting_without_effect_is_named():
    assert config_warnings(small("3ml-self")) == []
    assert "model.mask_vector has no effect" in config_warnings(small(model={"mask_vector": "tied"}))[0]
    for method in METHODS:
        found = config_warnings(small(method, model={"join": "one_way"}))
        assert any("model.join has no effect" in line for line in found) == (
            small(method).model.mask_from != 1
        )
