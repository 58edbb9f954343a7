"""Letters of special pieces in texts, and the end of documents for other programs' training."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from pretrain.config import CorpusOptions
from pretrain.data.corpora import open_data
from pretrain.data.indexed import IndexedReader
from pretrain.data.manifest import load_manifest
from pretrain.data.tokenizer import load_tokenizer
from pretrain.errors import UserError
from pretrain.evaluate import HeldOut
from tests.data.test_tokenizer import byte_level, sample_texts
from tools import merge_corpus
from tools.encode_corpus import __main__ as encode_corpus
from tools.export.tokenizer import hugging_face_tokenizer
from tools.inspect_corpus import __main__ as inspect_corpus
from tools.verify_corpus import __main__ as verify_corpus

TEXTS = ["A <unk> lobster <unk> , </s> it", "<unk>", "", "<unk><unk> is", "plain", "a <unk>", "<pad>"]


def encode(tokenizer: Path, output: Path, *options: str, texts: list[str] = TEXTS) -> None:
    source = output.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    words = ["--input", source, "--tokenizer", tokenizer, "--output", output, "--workers", "1", *options]
    assert encode_corpus.main([str(word) for word in words]) == 0


def documents(prefix: Path) -> list[list[int]]:
    reader = IndexedReader(prefix)
    return [reader.document(i).tolist() for i in range(reader.num_documents)]


@pytest.fixture(params=["json", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Path:
    if request.param == "sentencepiece":
        return tiny / "tokenizer"
    (tmp_path / "bytes").mkdir()
    byte_level(tmp_path / "bytes")
    return tmp_path / "bytes"


def test_letters_of_special_pieces_are_counted(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(tokenizer, tmp_path / "c")
    assert "encoded as text: </s> 1, <pad> 1, <unk> 6 times" in capsys.readouterr().out
    found = {"</s>": 1, "<pad>": 1, "<unk>": 6}
    assert load_manifest(tmp_path / "c").history["literals"] == found
    ours = load_tokenizer(tokenizer)
    assert documents(tmp_path / "c") == [ours.encode(text).tolist() for text in TEXTS]
    inspect_corpus.main([str(tmp_path / "c")])
    assert "encoded as text: </s> 1, <pad> 1, <unk> 6 times" in capsys.readouterr().out
    encode(tokenizer, tmp_path / "c", "--overwrite", "--json", "--holdout", "0.4")
    assert json.loads(capsys.readouterr().out)["literals"] == found


def test_mapped_letters_become_the_ids_of_hugging_face(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(tokenizer, tmp_path / "c", "--map-literal", "<unk>", "--map-literal", "</s>")
    assert "mapped to their ids: </s> 1, <unk> 6 times" in capsys.readouterr().out
    theirs = hugging_face_tokenizer(load_tokenizer(tokenizer))
    wanted = [theirs.encode(text, add_special_tokens=False).ids for text in TEXTS[:-1]]
    assert documents(tmp_path / "c")[:-1] == wanted
    assert documents(tmp_path / "c")[-1] == load_tokenizer(tokenizer).encode("<pad>").tolist()
    assert load_manifest(tmp_path / "c").history["map_literal"] == ["<unk>", "</s>"]
    verify_corpus.main([str(tmp_path / "c")])


def test_letters_may_be_spelled_otherwise(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(tiny / "tokenizer", tmp_path / "c", "--map-literal", "[UNK]=<unk>", texts=["a [UNK] b <unk>"])
    assert documents(tmp_path / "c")[0].count(3) == 1
    assert load_manifest(tmp_path / "c").history["literals"] == {"<unk>": 1, "[UNK]": 1}
    capsys.readouterr()
    encode(tiny / "tokenizer", tmp_path / "none", "--map-literal", "[UNK]=<unk>", texts=["a <UNK> b"])
    assert "mapped to their ids: [UNK] 0 times" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "told"),
    [("<mask>", "<mask> is no part of a text"), ("[UNK]", "no special piece"), ("x=y", "no special piece y")],
)
def test_what_cannot_be_mapped_is_told(tiny: Path, tmp_path: Path, argument: str, told: str) -> None:
    with pytest.raises(UserError, match=told.replace("[", r"\[")):
        encode(tiny / "tokenizer", tmp_path / "c", "--map-literal", argument)
    assert not (tmp_path / "c.bin").exists() and not (tmp_path / "c.parts").exists()


def test_an_appended_end_is_megatrons_and_not_trained_on(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = load_tokenizer(tokenizer)
    texts = [*TEXTS, *sample_texts(3)]
    encode(tokenizer, tmp_path / "c", "--append-eod", texts=texts)
    encoded = [ours.encode(text).tolist() for text in texts]
    assert documents(tmp_path / "c") == [ids + [ours.eos] if ids else [] for ids in encoded]
    capsys.readouterr()
    inspect_corpus.main([str(tmp_path / "c")])
    shown = capsys.readouterr().out
    assert f"</s> (id {ours.eos}) stands after each document" in shown
    verify_corpus.main([str(tmp_path / "c")])
    encode(tokenizer, tmp_path / "d", texts=texts)
    merged = str(tmp_path / "m")
    with pytest.raises(UserError, match="differs from .* in the piece after each document"):
        merge_corpus.main([str(tmp_path / "c"), str(tmp_path / "d"), "--output", merged])
    encode(tokenizer, tmp_path / "e", "--append-eod", texts=texts[::-1])
    merge_corpus.main([str(tmp_path / "c"), str(tmp_path / "e"), "--output", merged])
    for prefix in (tmp_path / "c", merged):
        options = CorpusOptions(train=str(prefix), valid=None)
        with pytest.raises(UserError, match="encode it again without --append-eod"):
            open_data(options)
        with pytest.raises(UserError, match="encode it again without --append-eod"):
            HeldOut(str(prefix), ours, 24, 8)


def test_a_causal_models_tokenizer_makes_a_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of GPT's kind: no piece of a masked model, and none is needed for text."""
    folder, prefix = tmp_path / "gpt", tmp_path / "c"
    folder.mkdir()
    with pytest.raises(UserError):
        byte_level(folder, specials=("<|endoftext|>",))
    texts = [*sample_texts(2), "the <|endoftext|>"]
    encode(folder / "tokenizer.json", prefix, "--append-eod", texts=texts)
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    reference.encode_special_tokens = True
    assert documents(prefix) == [[*reference.encode(text).ids, 0] for text in texts]
    assert "<|endoftext|> 1 times" in capsys.readouterr().out
    inspect_corpus.main([str(prefix)])
    assert "<|endoftext|> (id 0) stands after each document" in capsys.readouterr().out
    verify_corpus.main([str(prefix)])
    with pytest.raises(UserError, match="no piece <s> .* <mask> in the vocabulary, without which no model"):
        open_data(CorpusOptions(train=str(prefix), valid=None))


def test_adopting_tells_what_is_no_text(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(tiny / "tokenizer", tmp_path / "c", "--append-eod", "--map-literal", "<unk>")
    (tmp_path / "c.json").unlink()
    capsys.readouterr()
    adopting = [str(tmp_path / "c"), "--write-manifest", "--tokenizer", str(tiny / "tokenizer")]
    verify_corpus.main(adopting)
    shown = capsys.readouterr().out
    assert "special pieces inside, which training takes for text: </s> 6, <unk> 6 times" in shown
    assert "6 documents end in </s>; training puts an end of its own after each" in shown
    (tmp_path / "c.json").unlink()
    verify_corpus.main([*adopting, "--json"])
    (report,) = json.loads(capsys.readouterr().out)
    assert report["specials"] == {"</s>": 6, "<unk>": 6} and report["last"] == {"</s>": 6}


def test_nothing_of_a_text_reaches_the_terminal_as_a_command(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bytes"
    folder.mkdir()
    byte_level(folder)
    texts = ["\x1b[31mred\x1b]0;title\x07 \x9b1m \u202e caf\u00e9 \u2014 the\r\nend " * 9]
    encode(folder, tmp_path / "c", texts=texts)
    capsys.readouterr()
    inspect_corpus.main([str(tmp_path / "c"), "--html", str(tmp_path / "c.html"), "--top", "99"])
    shown = capsys.readouterr().out
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\r", "\u202e"}
    assert r"\x1b[31m" in shown
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    for made in (shown, page):  # letters of bytes are read
        assert not set(made) & {"\u0120", "\u010a", "\u00e2", "\u00c3", "\u0122"}
    assert '<meta name="viewport" content="width=device-width' in page
    widths = [float(text.partition("%")[0]) for text in page.split('style="width:')[1:]]
    assert widths and max(widths) == 100 and np.all(np.array(widths) > 0)
