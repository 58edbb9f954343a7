"""Encoders of runs against the folders exported from them, and folders that are refused."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from pretrain.data.tokenizer import SPECIALS
from pretrain.errors import UserError
from tests.conftest import SAMPLE, encode
from tests.support.runs import finish
from tools.export import __main__ as export
from tools.shared.encoders import Encoder, by_shape, open_encoder

MODELS = {
    "mlm": (),
    "modern": ("model.block=modern",),
    "late": ("model.mask_from=2", "model.decoder_layers=2", "model.norm=pre"),
    "query": ("model.mask_from=2", "model.decoder_layers=1", "model.decoder=query"),
}
TEXT = "It was a dark and stormy night; <mask>, </s> and so on."
PLAIN = "the people of the state had not seen it, and they went to the house."


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, words in MODELS.items():
        finish([str(tiny / "tiny.yaml"), f"run.dir={folder / name}", "budget.steps=3", *words])
        export.main([str(folder / name), "--output", str(folder / name / "export")])
    return {name: folder / name for name in MODELS}


def rows(encoder: Encoder, text: str = TEXT) -> torch.Tensor:
    return torch.tensor([encoder.tokens(text).ids])


@pytest.mark.parametrize("name", MODELS)
def test_states_are_those_of_the_exported_encoder(runs: dict[str, Path], name: str) -> None:
    ours, theirs = open_encoder(str(runs[name])), open_encoder(str(runs[name] / "export"))
    assert ours.tokens(TEXT).ids == theirs.tokens(TEXT).ids
    assert ours.tokens(PLAIN) == theirs.tokens(PLAIN)
    assert (ours.step, theirs.step, ours.max_length, theirs.max_length) == (3, None, 24, 24)
    ids = rows(ours).expand(2, -1)[:, :24]
    for found, expected in zip(ours.states(ids), theirs.states(ids), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert len(ours.states(ids)) == 3


def test_words_of_byte_level_tokenizers_end_before_punctuation(tiny: Path, tmp_path: Path) -> None:
    with gzip.open(SAMPLE / "valid.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"][:2000] for line in file]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(SPECIALS), initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    encode(texts, tmp_path / "tokenizer", tmp_path / "corpus")
    corpus = [f"corpus.{part}={tmp_path / 'corpus'}" for part in ("train", "valid")]
    finish([str(tiny / "tiny.yaml"), f"run.dir={tmp_path / 'run'}", "budget.steps=2", *corpus])
    export.main([str(tmp_path / "run"), "--output", str(tmp_path / "export")])
    ours, theirs = (open_encoder(str(tmp_path / name)).tokens(TEXT) for name in ("run", "export"))
    assert ours == theirs
    assert len(set(ours.words)) > len(TEXT.split()) + 5


@pytest.mark.parametrize("name", ["mlm", "modern"])
def test_masks_are_answered_as_by_the_exported_model(runs: dict[str, Path], name: str) -> None:
    ours = open_encoder(str(runs[name]), head=True)
    theirs = open_encoder(str(runs[name] / "export"), head=True)
    ids = rows(ours).repeat(2, 1)[:, :24]
    ids[0, [3, 4]] = ids[1, [2, 5]] = ours.mask_id
    torch.testing.assert_close(ours.mask_logits(ids), theirs.mask_logits(ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("which", ["mlm", "mlm/export", "query"])
def test_random_weights_are_drawn_by_their_seed(runs: dict[str, Path], which: str) -> None:
    encoder = open_encoder(str(runs["mlm"].parent / which))
    ids = rows(encoder)[:, :24]
    first, again, other = (encoder.untrained(seed).states(ids)[-1] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.allclose(first, encoder.states(ids)[-1])


def test_a_fingerprint_is_of_weights_and_tokenizer(runs: dict[str, Path], tmp_path: Path) -> None:
    for path in (runs["late"], runs["mlm"] / "export"):
        encoder = open_encoder(str(path))
        copy = shutil.copytree(path, tmp_path / path.name / "copy")
        assert open_encoder(str(copy)).fingerprint == encoder.fingerprint
        random = [encoder.untrained(seed).fingerprint for seed in (1, 1, 2)]
        assert random[0] == random[1] and len({*random, encoder.fingerprint}) == 3
    settings = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    settings["normalizer"] = {"type": "Lowercase"}
    (copy / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    assert open_encoder(str(copy)).fingerprint != encoder.fingerprint


def test_texts_are_cut_before_their_end(runs: dict[str, Path]) -> None:
    encoder = open_encoder(str(runs["mlm"]))
    tokens = encoder.tokens(" ".join([TEXT] * 3))
    cut = encoder.cut(tokens)
    assert cut.ids == [*tokens.ids[:23], tokens.ids[-1]] and len(cut.words) == 24
    assert encoder.cut(cut) == cut


def test_batches_hold_items_of_one_shape() -> None:
    shapes = [(3, 1), (5, 1), (3, 1), (3, 2), (3, 1), (9, 1)]
    assert list(by_shape(shapes, 6)) == [[5], [1], [3], [0, 2], [4]]


def test_what_is_no_model_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run .* nor a Hugging Face folder"):
        open_encoder(str(tmp_path))
    with pytest.raises(UserError, match="late/export: no masked LM, it has no weights for"):
        open_encoder(str(runs["late"] / "export"), head=True)
    with pytest.raises(UserError, match="leave out --checkpoint best"):
        open_encoder(str(runs["mlm"] / "export"), "best")
    for name, cause in (("config.json", "{}"), ("tokenizer.json", "{"), ("model.safetensors", "")):
        broken = tmp_path / name
        shutil.copytree(runs["mlm"] / "export", broken)
        (broken / name).write_text(cause, encoding="utf-8")
        with pytest.raises(UserError, match="transformers cannot load it"):
            open_encoder(str(broken))


def test_a_tokenizer_that_knows_no_words_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "slow"
    shutil.copytree(runs["mlm"] / "export", folder, ignore=shutil.ignore_patterns("tokenizer*"))
    transformers.CanineTokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match="slow: its tokenizer does not tell words apart"):
        open_encoder(str(folder))


def test_a_tokenizer_that_is_made_up_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    """transformers gives a folder without one the special pieces alone, by which every word is unknown."""
    folder = tmp_path / "without"
    shutil.copytree(runs["mlm"] / "export", folder, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(UserError, match="without: (has no tokenizer|transformers cannot load it)"):
        open_encoder(str(folder))
    bert = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    transformers.BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"bert: has no tokenizer \(tokenizer.json, vocab.txt\)"):
        open_encoder(str(tmp_path / "bert"), head=True)
    for file in (runs["mlm"] / "export").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "bert")
    with pytest.raises(UserError, match="bert: its tokenizer has more pieces than the model"):
        open_encoder(str(tmp_path / "bert"), head=True)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", "[]", "transformers cannot load it"),
        ("config.json", '{"model_type": "bert", "hidden_size": "x"}', "transformers cannot load it"),
        ("config.json", '{"model_type": "bert", "num_attention_heads": 0}', "transformers cannot load it"),
        ("tokenizer.json", '{"model": {"type": "Newer"}}', "transformers cannot load it"),
    ],
)
def test_folders_that_others_broke_are_told_in_one_line(
    file: str, content: str, reason: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(runs["mlm"] / "export", folder)
    (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"broken: {reason}") as caught:
        open_encoder(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_with_a_decoder_of_its_own_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=500, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    transformers.T5Model(config).save_pretrained(tmp_path / "t5")
    for file in (runs["mlm"] / "export").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "t5")
    with pytest.raises(UserError, match="t5: a model of an encoder and a decoder; give an encoder"):
        open_encoder(str(tmp_path / "t5"))


def test_code_of_a_folder_is_not_run(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    shutil.copytree(runs["mlm"] / "export", folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    with pytest.raises(UserError, match="transformers cannot load it"):
        open_encoder(str(folder))
    assert not (tmp_path / "ran").exists()
