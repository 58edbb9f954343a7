"""Exported folders against the training model and the training tokenizer, loaded by transformers."""

import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from pretrain.account import ledger
from pretrain.config import Config
from pretrain.data.manifest import load_manifest
from pretrain.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from pretrain.errors import UserError
from pretrain.model.late_mask import Batch, LateMaskModel
from tests.support.methods import FORMS, METHODS, small
from tools import evaluate
from tools import fill_mask as fill_mask_program
from tools.export import __main__ as export
from tools.export import sentences
from tools.export import tokenizer as huggingface_tokenizer
from tools.export.__main__ import ExportError, export_folder
from tools.export.model_card import model_card
from tools.export.tokenizer import CHECK_TEXTS, hugging_face_tokenizer, write_tokenizer
from tools.fill_mask import fill_mask
from tools.ledger import __main__ as ledger_program
from tools.report import __main__ as report
from tools.shared import downstream
from tools.shared.downstream import DownstreamScore
from tools.shared.run_model import load_model, mask_logits

SAMPLE = Path(__file__).parents[2] / "tools" / "sample"
KINDS = ("unigram", "bpe")
LATE = [name for name in METHODS if name != "mlm"]
NASTY = (
    *CHECK_TEXTS,
    "</s><s>", "a<mask>b", "<mask> <mask>", " <pad>", "<unk>\u2581", "<0x0A>", "<0x", "<<s>>", "\u2581",
    "\u2581\u2581\u2581", " \u2581 ", "\u3000", "\t\t", "\n", " .", "x\u0301\u0323\u0301", "\u00a0\u0301",
    "\u1100\u1161\u11a8\u1100", "\uff76\uff9e\uff8a\uff9f", "\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "0" * 50, "ab" * 40, "\u00df\u1e9e \u0130i\u0131I", "\u202eright to left\u202c", "\u200d\u200c", "A\x00B",
    "no\u2028line\u2029break", "1 000\u202f000", "\u2018it\u2019s \u201cit\u201d", "\ud7ff\ue000\uffff",
)  # fmt: skip


def documents(name: str) -> list[str]:
    with gzip.open(SAMPLE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


@pytest.fixture(scope="session", params=KINDS)
def any_tokenizer_dir(request: pytest.FixtureRequest, tokenizer_dirs: dict[str, Path]) -> Path:
    return tokenizer_dirs[request.param]


@pytest.fixture(scope="session")
def tokenizer_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    texts = documents("train")[::4]
    for kind, folder in folders.items():
        train_sentencepiece(texts, folder, kind, 700)  # type: ignore[arg-type]
    return folders


@pytest.fixture(scope="session")
def tokenizer_dir(tokenizer_dirs: dict[str, Path]) -> Path:
    return tokenizer_dirs["unigram"]


def options_of(method: str, block: str) -> Config:
    return small(method, block, model={"max_positions": 100, "init_std": 0.1})


def make_model(config: Config, tokenizer_dir: Path) -> LateMaskModel:
    tokenizer = load_tokenizer(tokenizer_dir)
    model = LateMaskModel(config.model, tokenizer.vocab_size, tokenizer.mask)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty(parameter.shape).normal_(0.0, 0.1, generator=generator)
            parameter.copy_(noise + ("norm" in name and name.endswith("weight")))
    return model.eval()


def exported(
    tmp_path: Path, tokenizer_dir: Path, method: str = "mlm", block: str = "post", **more: Any
) -> tuple[LateMaskModel, Path, dict[str, Any]]:
    config = options_of(method, block)
    model = make_model(config, tokenizer_dir)
    output = tmp_path / "model"
    tokenizer = load_tokenizer(tokenizer_dir)
    return model, output, export_folder(model, config, tokenizer, output, "# card\n", **more)


# ---- the tokenizer -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def auto_tokenizer(any_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What AutoTokenizer makes of the written files beside a roberta config."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("written")
    write_tokenizer(load_tokenizer(any_tokenizer_dir), folder, 100)
    (folder / "config.json").write_text('{"model_type": "roberta"}')
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_ids_equal_the_training_tokenizers(any_tokenizer_dir: Path, auto_tokenizer: Any) -> None:
    """Whole held-out documents and strings chosen to hurt: identical ids, literal specials as text."""
    tokenizer = load_tokenizer(any_tokenizer_dir)
    texts = [*documents("valid"), *NASTY]
    for text, expected in zip(texts, tokenizer.encode_batch(texts), strict=True):
        found = auto_tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        assert found == expected.tolist(), text[:200]
        assert auto_tokenizer.decode(found) == tokenizer.decode(expected)


def test_random_strings(any_tokenizer_dir: Path) -> None:
    """Strings over the letters of special names, spaces, marks and known words."""
    import random

    rules = random.Random(0)
    letters = [
        "<",
        ">",
        "/",
        "0x",
        "s",
        "mask",
        "<mask>",
        "<s>",
        "<0x41>",
        " ",
        "  ",
        "\n",
        "\u2581",
        "\u00a0",
    ]
    letters += [
        "the",
        " of",
        "ing",
        "A",
        "e",
        "\u0301",
        "\u0323",
        "\u00e9",
        "\u65e5",
        "\U0001f600",
        ".",
        "00",
    ]
    texts = ["".join(rules.choices(letters, k=rules.randint(1, 24))) for _ in range(5000)]
    theirs = hugging_face_tokenizer(load_tokenizer(any_tokenizer_dir))
    theirs.encode_special_tokens = True
    ours = load_tokenizer(any_tokenizer_dir).encode_batch(texts)
    for text, one, other in zip(
        texts, ours, theirs.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        assert one.tolist() == other.ids, repr(text)


def test_specials(any_tokenizer_dir: Path, auto_tokenizer: Any) -> None:
    tokenizer = load_tokenizer(any_tokenizer_dir)
    t = auto_tokenizer
    assert len(t) == tokenizer.vocab_size
    found = (t.bos_token_id, t.cls_token_id, t.pad_token_id, t.eos_token_id, t.sep_token_id, t.unk_token_id)
    assert found == (0, 0, 1, 2, 2, 3)
    assert t.mask_token_id == tokenizer.mask == tokenizer.vocab_size - 1
    assert t.model_max_length == 100
    the = tokenizer.encode("the").tolist()
    assert t("the")["input_ids"] == [0, *the, 2]
    assert t("the", "the")["input_ids"] == [0, *the, 2, 2, *the, 2]
    assert set(t("the", "the")) == {"input_ids", "attention_mask"}


def test_mask_takes_the_space_before_it(any_tokenizer_dir: Path, auto_tokenizer: Any) -> None:
    """Ids with <mask> are the ids of the sentence with one of them replaced."""
    tokenizer = load_tokenizer(any_tokenizer_dir)
    single = [w for w in ("the", "of", "and", "to", "in") if len(tokenizer.encode(f"a {w}, b")) == 4]
    assert len(single) >= 3
    for word in single:
        for frame in ("He said {} thing.", "{} end", "up {}", "one {}, two"):
            whole = tokenizer.encode(frame.format(word)).tolist()
            place = whole.index(tokenizer.encode(word)[0])
            whole[place] = tokenizer.mask
            assert auto_tokenizer(frame.format("<mask>"), add_special_tokens=False)["input_ids"] == whole


def test_export_of_a_json_tokenizer(tmp_path: Path) -> None:
    """A byte-level tokenizer.json keeps its ids, and gets the sequence specials that it lacks."""
    from tokenizers import Tokenizer as JsonTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    source = tmp_path / "source"
    source.mkdir()
    made = JsonTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(documents("valid")[:5], trainer)
    made.save(str(source / "tokenizer.json"))
    model, output, _ = exported(tmp_path, source, block="modern")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(output, local_files_only=True)
    ours = load_tokenizer(source)
    for text in NASTY:
        found = theirs(text, split_special_tokens=True)["input_ids"]
        assert found == [ours.bos, *ours.encode(text).tolist(), ours.eos]


def test_tokenizer_without_equivalent_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    """A SentencePiece model with another normalisation is the user's to change, in one line."""
    import io

    import sentencepiece

    folder, buffer = tmp_path / "foreign", io.BytesIO()
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents("valid")[0].split("\n") * 3),
        model_writer=buffer,
        vocab_size=400,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        control_symbols=["<mask>"],
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="no exact equivalent"):
        exported(tmp_path, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign"]


# ---- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", FORMS)
def test_mlm_folder(block: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    """The masked-LM class gives our logits on text; keys and config survive transformers' own save."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model, output, report = exported(tmp_path, tokenizer_dir, "mlm", block)
    theirs = AutoModelForMaskedLM.from_pretrained(output, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(output, local_files_only=True)
    assert report["class"] == type(theirs).__name__
    assert report["parameters_left_out"] == 0
    assert report["largest_difference"] < 1e-5

    inputs = tokenizer(documents("valid")[0], truncation=True, max_length=100, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 100)
    with torch.no_grad():
        found = theirs(**inputs).logits
        hidden = model.head(model.encode(inputs["input_ids"], torch.arange(100)[None]))
        expected = hidden @ model.tok.weight.T + model.head.bias
    assert found.shape[-1] == len(tokenizer) < expected.shape[-1]  # padding stays behind
    expected = expected[..., : len(tokenizer)]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    theirs.save_pretrained(tmp_path / "again")
    assert keys(tmp_path / "again") == keys(output)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    written = json.loads((output / "config.json").read_text())
    ignored = {"global_rope_theta", "local_rope_theta", "reference_compile"}  # for transformers 4
    for name, value in written.items():
        assert name in ignored or again[name] == value, name


@pytest.mark.parametrize("block", FORMS)
@pytest.mark.parametrize("method", LATE)
def test_late_folder(method: str, block: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    """The encoder alone, all tokens visible; the report says how much was left out."""
    from transformers import AutoModel

    model, output, report = exported(tmp_path, tokenizer_dir, method, block)
    theirs = AutoModel.from_pretrained(output, local_files_only=True).eval()
    assert report["class"] == type(theirs).__name__
    ids = torch.randint(4, 699, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = theirs(input_ids=ids).last_hidden_state
        expected = model.encode(ids, torch.arange(100).expand(2, -1))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    parameters = dict(model.named_parameters())
    kept = ("tok.", "positions.", "embedding_norm", "layers.", "final_norm")
    gone = sum(p.numel() for name, p in parameters.items() if not name.startswith(kept))
    assert report["parameters_left_out"] == gone > 0
    assert not any("head" in key or "decoder" in key for key in keys(output))


@pytest.mark.parametrize("block", FORMS)
@pytest.mark.parametrize("method", [*LATE, "leaking"])
def test_late_folder_with_decoder(method: str, block: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    """The whole model: the logits of the masks, in padded batches with other numbers of masks."""
    from transformers import AutoModelForMaskedLM

    more = {}
    if method == "leaking":
        method, more = "3ml-cross", {"mask_leak": 0.4, "token_type": block not in ("modern", "local")}
    config = small(method, block, model={"max_positions": 100, "init_std": 0.1, **more})
    model, output = make_model(config, tokenizer_dir), tmp_path / "model"
    tokenizer = load_tokenizer(tokenizer_dir)
    report = export_folder(model, config, tokenizer, output, "# card\n", with_decoder=True)
    assert report["class"] == "LateMaskForMaskedLM" and report["parameters_left_out"] == 0
    theirs = AutoModelForMaskedLM.from_pretrained(output, trust_remote_code=True).eval()
    ids = torch.randint(4, 699, (3, 60), generator=torch.Generator().manual_seed(1))
    ids[0, 5:40:3] = ids[1, [2, 50]] = ids[2, 1] = model.mask_id
    attention = torch.ones_like(ids)
    attention[1, 55:] = attention[2, 20:] = 0
    with torch.no_grad():
        found = theirs(input_ids=torch.where(attention.bool(), ids, 1), attention_mask=attention).logits
        for row, n in enumerate((60, 55, 20)):
            expected = mask_logits(model, ids[row : row + 1, :n])[0]
            mine = found[row, :n][ids[row, :n] == model.mask_id]
            assert mine.shape == expected.shape
            assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()
    labels = torch.where(ids == model.mask_id, 7, -100)
    loss = theirs(input_ids=ids, labels=labels).loss
    logits = torch.cat([mask_logits(model, ids[i : i + 1])[0] for i in range(3)])
    expected = torch.nn.functional.cross_entropy(logits, torch.full((len(logits),), 7))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert theirs.config.get_text_config() is theirs.config  # its key is not taken for another model's


def test_mlm_has_no_decoder_to_export(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(UserError, match="no late masks"):
        exported(tmp_path, tokenizer_dir, "mlm", with_decoder=True)


def keys(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        return set(file.keys())


@pytest.mark.parametrize(
    ("method", "block"), [("mlm", "post"), ("3ml-self", "bert"), ("3ml-query", "modern")]
)
def test_sentence_transformers_loads_it(method: str, block: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    """Embeddings are the means of the training model's rows; the folder is an export in every file."""
    from sentence_transformers import SentenceTransformer

    model, output, report = exported(tmp_path, tokenizer_dir, method, block, sentences=True)
    assert report["embeddings_difference"] < 1e-5
    tokenizer = load_tokenizer(tokenizer_dir)
    text = "One small step."
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]])
    with torch.no_grad():
        expected = model.encode(ids, torch.arange(ids.shape[1])[None])[0].mean(0)
    theirs = SentenceTransformer(str(output), device="cpu", local_files_only=True)
    found = theirs.encode([text, "the " * 200], convert_to_tensor=True)  # the second one is cut
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    _, _, plain = exported(tmp_path, tokenizer_dir, method, block, overwrite=True)
    assert plain["embeddings_difference"] is None and not (output / "1_Pooling").exists()
    exported(tmp_path, tokenizer_dir, method, block, overwrite=True, sentences=True)
    (output / "1_Pooling" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="has 1_Pooling/notes.txt, which no export writes"):
        exported(tmp_path, tokenizer_dir, method, block, overwrite=True)


def test_embeddings_that_differ_are_refused(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pooling that takes the first token, where the mean was meant."""
    write = export.write_sentence_modules

    def other(folder: Path, *arguments: int) -> None:
        write(folder, *arguments)
        path = folder / "1_Pooling" / "config.json"
        swapped = path.read_text().replace("mean_tokens", "other").replace("cls_token", "mean_tokens")
        path.write_text(swapped.replace("other", "cls_token"))

    monkeypatch.setattr(export, "write_sentence_modules", other)
    with pytest.raises(ExportError, match="embeddings differ by"):
        exported(tmp_path, tokenizer_dir, "3ml-self", "post", sentences=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("block", FORMS)
@pytest.mark.parametrize("method", ["mlm", "3ml-self"])
def test_fine_tuning_starts_from_the_encoder(
    method: str, block: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    """A task model finds every weight of the encoder; only its own head is new."""
    from transformers import AutoModelForSequenceClassification

    model, output, _ = exported(tmp_path, tokenizer_dir, method, block)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        output, local_files_only=True, output_loading_info=True
    )
    assert all(name.startswith(("classifier.", "head.", "bert.pooler.")) for name in info["missing_keys"])
    ids = torch.randint(4, 699, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = theirs.eval().base_model(input_ids=ids)[0]
        expected = model.encode(ids, torch.arange(100)[None])
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("method", ["mlm", "3ml-query"])
def test_fill_mask_pipeline_equals_ours(method: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    from transformers import pipeline

    late = method != "mlm"
    model, output, _ = exported(tmp_path, tokenizer_dir, method, "modern", with_decoder=late)
    text = "The President said that <mask>, of all things, was the law."
    theirs = pipeline("fill-mask", model=str(output), top_k=7, trust_remote_code=late)(text)
    (ours,) = fill_mask(model, hugging_face_tokenizer(load_tokenizer(tokenizer_dir)), text, 7)
    assert [a["token"] for a in ours] == [a["token"] for a in theirs]
    assert [a["score"] for a in ours] == pytest.approx([a["score"] for a in theirs], rel=1e-4)
    assert [a["sequence"] for a in ours] == [a["sequence"] for a in theirs]


@pytest.mark.parametrize("method", METHODS)
def test_fill_mask_joins_the_masks_as_training_does(method: str, tokenizer_dir: Path) -> None:
    """Two masks: the score of each answer is the loss of the training forward on that answer."""
    model = make_model(options_of(method, "modern"), tokenizer_dir)
    tokenizer = hugging_face_tokenizer(load_tokenizer(tokenizer_dir))
    text = "<mask> people of the <mask> are here"
    answers = fill_mask(model, tokenizer, text, 3)
    assert [len(group) for group in answers] == [3, 3]
    ids = tokenizer.encode(text).ids
    places = [i for i, token in enumerate(ids) if token == model.mask_id]
    order = [i for i in range(len(ids)) if i not in places] + places
    for first in answers[0]:
        for second in answers[1]:
            targets = torch.tensor([[first["token"], second["token"]]])
            batch = Batch(torch.tensor([[ids[i] for i in order]]), torch.tensor([order]), targets, 2)
            with torch.no_grad():
                probability = torch.exp(-2 * model(batch)).item()
            assert probability == pytest.approx(first["score"] * second["score"], rel=1e-4)


def test_fill_mask_refuses_what_it_cannot_do(tokenizer_dir: Path) -> None:
    model = make_model(options_of("mlm", "post"), tokenizer_dir)
    tokenizer = hugging_face_tokenizer(load_tokenizer(tokenizer_dir))
    with pytest.raises(UserError, match="has no <mask>"):
        fill_mask(model, tokenizer, "nothing here")
    with pytest.raises(UserError, match="100 positions"):
        fill_mask(model, tokenizer, "<mask>" + " people" * 200)


@pytest.mark.parametrize("method", ["mlm", "3ml-self"])
def test_example_of_the_card_runs(
    method: str, tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, output, _ = exported(tmp_path, tokenizer_dir, method)
    card = model_card("name", options_of(method, "post"), "<mask>", left_out=7)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(output)), names)
    if method == "mlm":
        assert "token_str" in capsys.readouterr().out
    else:
        assert names["hidden"].shape[-1] == 32


# ---- nothing wrong is ever published -------------------------------------------------------------


@pytest.mark.parametrize("method", ["mlm", "3ml-self"])
@pytest.mark.parametrize("block", FORMS)
def test_a_wrong_weight_is_refused(
    block: str, method: str, tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def perturbed(*arguments: Any) -> dict[str, Tensor]:
        state = export_state(*arguments)
        name = next(name for name in reversed(state) if "1.mlp.Wo" in name or "1.output.dense.w" in name)
        state[name] = state[name].clone()
        state[name][3, 5] += 0.05
        return state

    export_state = export.hugging_face_state
    monkeypatch.setattr(export, "hugging_face_state", perturbed)
    with pytest.raises(ExportError, match="nothing was written"):
        exported(tmp_path, tokenizer_dir, method, block)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "block, key, value",
    [
        ("modern", "layer_types", ["full_attention", "sliding_attention"]),  # right up to 65 tokens
        ("modern", "norm_eps", 1e-2),
        ("post", "layer_norm_eps", 1e-2),
        ("pre", "hidden_act", "relu"),
    ],
)
def test_a_wrong_config_is_refused(
    block: str, key: str, value: Any, tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = export.hugging_face_config
    monkeypatch.setattr(export, "hugging_face_config", lambda *a: settings(*a) | {key: value})
    with pytest.raises(ExportError):
        exported(tmp_path, tokenizer_dir, "mlm", block)
    assert not list(tmp_path.iterdir())


def test_a_missing_weight_is_refused(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export.hugging_face_state

    def lacking(*arguments: Any) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in whole(*arguments).items() if "LayerNorm" not in name}

    monkeypatch.setattr(export, "hugging_face_state", lacking)
    with pytest.raises(ExportError, match="does not take the weights"):
        exported(tmp_path, tokenizer_dir)
    assert not list(tmp_path.iterdir())


def test_wrong_ids_are_refused(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this step the literal <mask> becomes the special id: no piece has a < in this sample."""
    monkeypatch.setattr(huggingface_tokenizer, "_letters_without_a_piece", lambda pieces: "")
    with pytest.raises(UserError, match="no exact equivalent"):
        exported(tmp_path, tokenizer_dir)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_what_changes_while_it_is_checked_is_refused(
    name: str, tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = export.check_tokenizer

    def change(folder: Path, tokenizer: Tokenizer) -> None:
        check(folder, tokenizer)
        with (folder / name).open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"x")

    monkeypatch.setattr(export, "check_tokenizer", change)
    with pytest.raises(UserError, match="something else writes there; nothing was exported"):
        exported(tmp_path, tokenizer_dir)
    assert not list(tmp_path.iterdir())


def test_overwrite(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, output, _ = exported(tmp_path, tokenizer_dir)
    (output / "mine.txt").write_text("old")
    with pytest.raises(UserError, match="--overwrite"):
        exported(tmp_path, tokenizer_dir)
    assert (output / "mine.txt").exists()

    with pytest.raises(UserError, match="has mine.txt, which no export writes"):
        exported(tmp_path, tokenizer_dir, block="modern", overwrite=True)
    assert (output / "mine.txt").read_text() == "old"
    (output / "mine.txt").unlink()
    before = (output / "config.json").read_text()
    with monkeypatch.context() as patch:  # a failed export leaves the old one alone
        patch.setattr(export, "TOLERANCE", -1.0)
        with pytest.raises(ExportError):
            exported(tmp_path, tokenizer_dir, overwrite=True)
    assert (output / "config.json").read_text() == before

    exported(tmp_path, tokenizer_dir, block="modern", overwrite=True)
    assert json.loads((output / "config.json").read_text())["model_type"] == "modernbert"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_no_export_is_never_replaced(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "model").mkdir()
    exported(tmp_path, tokenizer_dir)  # empty: fine
    (tmp_path / "other" / "model").mkdir(parents=True)
    thesis = tmp_path / "other" / "model" / "thesis.tex"
    thesis.write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="no exported model"):
            exported(tmp_path / "other", tokenizer_dir, overwrite=overwrite)
    assert thesis.read_text() == "years of work"


def test_an_unrelated_config_is_no_export(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no exported model"):
        exported(tmp_path, tokenizer_dir, overwrite=True)
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


def test_another_model_of_the_same_kind_is_no_export(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Such as one that was fine-tuned from an export and saved under its name."""
    import transformers

    _, output, _ = exported(tmp_path, tokenizer_dir)
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(output)
    shutil.rmtree(output)
    tuned.save_pretrained(output)
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists and is no exported model"):
        exported(tmp_path, tokenizer_dir, overwrite=True)
    assert (output / "model.safetensors").read_bytes() == before


def test_an_export_of_before_the_mark_can_be_replaced(tmp_path: Path, tokenizer_dir: Path) -> None:
    _, output, _ = exported(tmp_path, tokenizer_dir)
    for _ in range(2):
        settings = json.loads((output / "config.json").read_text())
        del settings[export.MARK]
        (output / "config.json").write_text(json.dumps(settings))
        exported(tmp_path, tokenizer_dir, overwrite=True)
    settings = json.loads((output / "config.json").read_text())
    del settings[export.MARK]
    (output / "config.json").write_text(json.dumps(settings))
    (output / "README.md").unlink()
    with pytest.raises(UserError, match="exists and is no exported model"):
        exported(tmp_path, tokenizer_dir, overwrite=True)


def test_a_link_is_followed(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "scratch" / "real").mkdir(parents=True)
    (tmp_path / "model").symlink_to(tmp_path / "scratch" / "real")
    for _ in range(3):
        exported(tmp_path, tokenizer_dir, overwrite=True)
        assert (tmp_path / "model").is_symlink()
        assert (tmp_path / "scratch" / "real" / "config.json").is_file()
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["real"]


@pytest.mark.parametrize("kept", ["old", "both"])
def test_what_a_kill_left_is_mended(kept: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    _, output, _ = exported(tmp_path, tokenizer_dir)
    if kept == "both":
        shutil.copytree(output, tmp_path / ".old-model")
    else:  # between the two renames: the old one lies aside, and is protected as before
        output.rename(tmp_path / ".old-model")
    with pytest.raises(UserError, match="holds a model already"):
        exported(tmp_path, tokenizer_dir)
    exported(tmp_path, tokenizer_dir, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("aside", [".partial-model", ".old-model"])
@pytest.mark.parametrize("kind", ["folder", "file", "link", "names of an export"])
def test_what_no_export_left_is_not_removed(
    aside: str, kind: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    (tmp_path / "real").mkdir()
    place = tmp_path / aside
    if kind == "file":
        place.write_text("years of work")
    elif kind == "link":
        place.symlink_to(tmp_path / "real")
    else:
        place.mkdir()
        name = "thesis.tex" if kind == "folder" else "config.json"
        (place / name).write_text("years of work")
    with pytest.raises(UserError, match=f"^{place}: in the way, and not left by an export; move it away$"):
        exported(tmp_path, tokenizer_dir, overwrite=True)
    assert os.path.lexists(place) and {path.name for path in tmp_path.iterdir()} == {"real", aside}


def test_an_unfinished_export_is_removed_unless_it_goes_on(tmp_path: Path, tokenizer_dir: Path) -> None:
    left = tmp_path / ".partial-model"
    left.mkdir()
    (left / "config.json").write_text("{")
    with (left / export.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another export"):
            exported(tmp_path, tokenizer_dir)
    assert (left / "config.json").exists()
    _, output, _ = exported(tmp_path, tokenizer_dir)
    assert not left.exists() and not (output / export.LOCK).exists()


def test_home_need_not_be_writable(tmp_path: Path, tokenizer_dir: Path) -> None:
    """The check of a folder's own code needs a place for it."""
    gone = ("HF_HOME", "HF_MODULES_CACHE", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in gone}
    code = (
        "from pathlib import Path; import sys; from tests.tools.test_export import exported;"
        "exported(Path(sys.argv[1]), Path(sys.argv[2]), '3ml-self', with_decoder=True)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(tokenizer_dir)],
        env=environment | {"HOME": "/proc/nohome"},
        check=True,
    )
    assert (tmp_path / "model" / "modeling_latemask.py").is_file()


def test_names_in_the_card_are_no_markup() -> None:
    card = model_card("<img src=x>\n[a](b) | c", options_of("mlm", "post"), "<mask>", 0, licence="<b>")
    assert "# \\<img src=x\\> \\[a\\](b) \\| c\n" in card
    assert "\n\\<b\\>.\n" in card


def test_files_are_readable_by_others(tmp_path: Path, tokenizer_dir: Path) -> None:
    _, output, _ = exported(tmp_path, tokenizer_dir)
    modes = {path.name: path.stat().st_mode for path in output.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
    assert set(modes) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


# ---- from a run ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished_run(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of four updates, saved at each."""
    folder = tmp_path_factory.mktemp("finished")
    corpus = ["--output", str(folder / "corpus"), "--tokenizer", str(tokenizer_dir), "--workers", "1"]
    program("tools.encode_corpus", "--input", str(SAMPLE / "valid.jsonl.gz"), *corpus)
    tree = options_of("3ml-self", "modern").model_dump(mode="json")
    tree["run"]["dir"] = str(folder / "run")
    tree["corpus"] = {"train": str(folder / "corpus"), "valid": str(folder / "corpus")}
    tree |= {"budget": {"steps": 4}, "checkpoint": {"every_steps": 1, "keep_last": 4}}
    tree["evaluate"] = {"samples": 8}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    program("pretrain", str(folder / "config.yaml"))
    return folder / "run"


def program(module: str, *words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", module, *words], check=True, capture_output=True, cwd=SAMPLE.parent.parent
    )


def test_program(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json says what was written; the card says what was read, spent and left out."""
    output = tmp_path / "encoder"
    words = [str(finished_run), "--output", str(output), "--json", "--license", "cc0-1.0"]
    assert export.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["checkpoint"], report["class"]) == (4, "ModernBertModel")
    assert report["path"] == str(output)
    card = (output / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc0-1.0" and "3ml-self" in front["tags"]
    tokens = f"{4 * 8 * 24:,}"
    for fact in (f"{report['parameters_left_out']:,}", "| updates | 4 |", tokens, "36 documents", "novels"):
        assert fact in card, fact
    assert str(finished_run.parent) not in card  # no path of this machine


def test_the_card_has_the_scores_of_its_checkpoint(finished_run: Path, tmp_path: Path) -> None:
    """With what loads the folder as a sentence encoder, which runs."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    scores = [
        DownstreamScore(4, "STS-B", "spearman", score, i, 20, "probe") for i, score in enumerate((0.5, 0.7))
    ]
    downstream.record(run, [*scores, DownstreamScore(2, "CoLA", "matthews", 0.9)])
    output = tmp_path / "encoder"
    assert export.main([str(run), "--output", str(output), "--sentence-transformers"]) == 0
    card = (output / "README.md").read_text()
    assert "| STS-B | spearman | probe | 0.600 | 0.500 to 0.700 | 2 |" in card and "CoLA" not in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "sentence-transformers"
    example = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(output))
    subprocess.run([sys.executable, "-c", example], check=True, capture_output=True)
    with pytest.raises(UserError, match="takes the encoder alone"):
        export.main([str(run), "--output", str(output), "--sentence-transformers", "--with-decoder"])


def test_embeddings_that_were_not_compared_are_told(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(finished_run), "--output", str(tmp_path / "encoder"), "--overwrite"]
    assert export.main([*words, "--sentence-transformers"]) == 0
    assert "sentence-transformers to " in capsys.readouterr().out
    monkeypatch.setattr(sentences, "find_spec", lambda name: None)
    assert export.main([*words, "--sentence-transformers"]) == 0
    assert "is not installed, so its embeddings were not compared" in capsys.readouterr().out
    assert export.main(words) == 0
    assert "sentence-transformers" not in capsys.readouterr().out


def test_the_ledgers_head_can_be_compared(finished_run: Path, tmp_path: Path) -> None:
    """By who has a model card or a report alone: a chain that was made anew is another one."""
    export.main([str(finished_run), "--output", str(tmp_path / "m")])
    (head,) = re.findall("`([0-9a-f]{64})`, which stands for", (tmp_path / "m" / "README.md").read_text())
    run = shutil.copytree(finished_run, tmp_path / "run")
    report.main([str(run), "--output", str(tmp_path / "report")])
    for page in ("report.md", "report.html"):
        assert head[:16] in (tmp_path / "report" / page).read_text(encoding="utf-8")
    said, text = ledger_program.check([str(run)], head[:16])
    assert said[0].head == head and text.endswith(f"; head {head}")
    first, *others = ledger.chain(run).values()
    (run / "ledger.jsonl").unlink()
    before = ""
    for line in (replace(first, time=first.time - 60), *others):
        text = json.dumps(replace(line, previous=before).to_dict()).encode()
        with (run / "ledger.jsonl").open("ab") as file:
            file.write(text + b"\n")
        before = hashlib.sha256(text).hexdigest()
    shutil.rmtree(run / "checkpoints")
    (run / "status.json").unlink()
    ledger_program.check([str(run)])
    with pytest.raises(UserError, match=f"^{run}: no line {head} in its ledger"):
        ledger_program.check([str(run)], head)


def test_the_code_of_a_decoder_is_not_asked_about(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(finished_run), "--output", str(tmp_path / "m"), "--with-decoder", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["class"] == "LateMaskForMaskedLM"


def test_checkpoints_of_a_run(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each step is another model, and the weights are those of its checkpoint."""
    words = []
    for step in (2, 4):
        output = tmp_path / str(step)
        export.main([str(finished_run), "--output", str(output), "--checkpoint", str(step)])
        with safe_open(output / "model.safetensors", framework="pt") as file:
            words.append(file.get_tensor("embeddings.tok_embeddings.weight"))
        saved = finished_run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
        with safe_open(saved, framework="pt") as file:
            assert torch.equal(words[-1], file.get_tensor("tok.weight")[: len(words[-1])])
        assert f"of step {step}, " in capsys.readouterr().out
    assert not torch.equal(*words)
    with pytest.raises(UserError, match="no checkpoint '7'"):
        export.main([str(finished_run), "--output", str(tmp_path / "7"), "--checkpoint", "7"])


def test_evaluate_prints_each_source(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(finished_run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"loss", "accuracy", "predicted_tokens", "mask_rate", "checkpoint", "sources"} <= set(report)
    known = load_manifest(finished_run.parent / "corpus").sources
    assert set(report["sources"]) <= set(known) and len(report["sources"]) > 1
    parts = [(each["loss"], each["predicted_tokens"]) for each in report["sources"].values()]
    assert sum(n for _, n in parts) == report["predicted_tokens"]
    assert sum(x * n for x, n in parts) / report["predicted_tokens"] == pytest.approx(report["loss"])
    assert evaluate.main([str(finished_run)]) == 0
    assert capsys.readouterr().out.count("bits per byte") == 1 + len(parts)


def test_evaluate_says_relative_to_what(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"here/valid: no corpus there, seen from {tmp_path}"):
        evaluate.main([str(finished_run), "--corpus", "here/valid"])


def test_fill_mask_program(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(finished_run), "The <mask> of the <mask>.", "--top", "3"]
    fill_mask_program.main([*words, "--json"])
    answers = json.loads(capsys.readouterr().out)
    assert [len(group) for group in answers] == [3, 3]
    assert set(answers[0][0]) == {"score", "token", "token_str", "sequence"}
    fill_mask_program.main(words)
    assert answers[1][2]["sequence"] in capsys.readouterr().out
    for few in ("-1", "0"):
        with pytest.raises(UserError, match=f"--top: '{few}' is not a number of at least 1"):
            fill_mask_program.main([*words[:-1], few])
    fill_mask_program.main([*words[:-1], "100000", "--json"])  # as many as there are
    assert [len(group) for group in json.loads(capsys.readouterr().out)] == [700, 700]


def test_another_tokenizer_is_refused(
    finished_run: Path, tokenizer_dirs: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("tokenizer"))
    shutil.copytree(tokenizer_dirs["bpe"], run / "tokenizer")
    with pytest.raises(UserError, match="not the tokenizer that"):
        load_model(run)
