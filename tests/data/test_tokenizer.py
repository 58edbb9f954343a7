"""The tokenizer against sentencepiece itself, its protobuf module and the tokenizers package."""

import gzip
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from pretrain.data import tokenizer as module
from pretrain.data.tokenizer import (
    CONTROL,
    NORMAL,
    SPACES,
    SPECIALS,
    Tokenizer,
    load_tokenizer,
    model_pieces,
    train_sentencepiece,
)
from pretrain.errors import UserError
from pretrain.run_folder import RunFolder
from tools.export.tokenizer import hugging_face_tokenizer

SAMPLE = Path(__file__).parents[2] / "tools" / "sample" / "train.jsonl.gz"
VOCAB_SIZE = 1000
LITERALS = "".join(SPECIALS) + " a <mask> b</s> <s>c <pad> <unk> <0x41>"
NASTY = [
    "",
    " ",
    "\n\n",
    LITERALS,
    "a\u2581b \u2581 c",
    "tab\there\u00a0nbsp\u3000wide\u2028line",
    "\U0001f600 caf\u00e9 e\u0301 \ufeff \u200b",
    "\x00 nul \x7f",
    "x" * 5000,
    "word " * 3000,
]


def sample_texts(number: int) -> list[str]:
    with gzip.open(SAMPLE) as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(number), strict=False)]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    train_sentencepiece(sample_texts(30), folder, request.param, VOCAB_SIZE)
    return folder


def processor(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_special_ids(trained: Path) -> None:
    ours, theirs = load_tokenizer(trained), processor(trained)
    assert [ours.bos, ours.pad, ours.eos, ours.unk, ours.mask] == [0, 1, 2, 3, VOCAB_SIZE - 1]
    assert [theirs.piece_to_id(name) for name in SPECIALS] == [0, 1, 2, 3, VOCAB_SIZE - 1]
    assert ours.vocab_size == theirs.vocab_size() == VOCAB_SIZE
    assert theirs.is_control(VOCAB_SIZE - 1)
    assert ours.kind == trained.name.rstrip("0123456789")


@pytest.mark.parametrize("text", NASTY)
def test_ids_are_sentencepieces_and_never_special(trained: Path, text: str) -> None:
    ours = load_tokenizer(trained)
    ids = ours.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == processor(trained).encode(text)
    assert not set(ids.tolist()) & {ours.bos, ours.pad, ours.eos, ours.unk, ours.mask}


def test_batch_and_documents_equal_their_lines(trained: Path) -> None:
    ours, texts = load_tokenizer(trained), sample_texts(40)[30:]
    batch = ours.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert np.array_equal(ids, ours.encode(text))
        assert np.array_equal(ids, np.concatenate(ours.encode_batch(text.split("\n"))))
        assert ours.decode(ids) == " ".join(text.replace("\u2581", " ").split())


def test_every_space_is_one_space(trained: Path) -> None:
    ours = load_tokenizer(trained)
    assert len(SPACES) == 25
    for point in SPACES:
        assert np.array_equal(ours.encode(f"of{chr(point)}the"), ours.encode("of the")), hex(point)


def test_tables(trained: Path) -> None:
    ours = load_tokenizer(trained)
    special = [ours.bos, ours.pad, ours.eos, ours.unk, ours.mask]
    assert sorted([*special, *ours.random_ids.tolist()]) == list(range(VOCAB_SIZE))
    for i in range(VOCAB_SIZE):
        assert ours.word_starts[i] == (i in special or ours.piece(i).startswith("\u2581"))
    first = ours.encode("extraordinary circumstances")
    assert ours.word_starts[first].sum() == 2


def test_pieces_agree_with_the_protobuf_module(trained: Path) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((trained / "tokenizer.model").read_bytes())
    ours = [
        (piece.text, piece.score, piece.type)
        for piece in model_pieces((trained / "tokenizer.model").read_bytes())
    ]
    assert ours == [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    assert ours[-1] == ("<mask>", 0.0, CONTROL)
    assert model.trainer_spec.vocab_size == VOCAB_SIZE == len(ours)
    assert model.normalizer_spec.normalization_rule_tsv == ""
    assert model.normalizer_spec.add_dummy_prefix and model.normalizer_spec.escape_whitespaces
    if model.trainer_spec.model_type == 1:
        assert all((score * 128).is_integer() for _, score, kind in ours if kind == NORMAL)
    assert module._serialize(module._parse(model.SerializeToString())) == model.SerializeToString()


def test_training_is_deterministic(trained: Path, tmp_path: Path) -> None:
    again = train_sentencepiece(sample_texts(30), tmp_path, load_tokenizer(trained).kind, VOCAB_SIZE)
    assert again.hash == load_tokenizer(trained).hash
    about = json.loads((tmp_path / "provenance.json").read_text())
    assert about["sha256"] == again.hash
    assert about["specials"] == {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": VOCAB_SIZE - 1}


def test_long_lines_are_trained_on(tmp_path: Path) -> None:
    line = " ".join(sample_texts(30)).replace("\n", " ")  # one line, hundreds of kilobytes
    train_sentencepiece([line], tmp_path, "bpe", 500)
    assert "\u2581the" in {piece.text for piece in model_pieces((tmp_path / "tokenizer.model").read_bytes())}


@pytest.mark.parametrize(("texts", "size"), [([], 400), (["too little text"], 4000), (["a b"], 20)])
def test_impossible_training_is_the_users_error(texts: list[str], size: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--vocab-size {size}: "):
        train_sentencepiece(texts, tmp_path / "t", "unigram", size)
    assert not (tmp_path / "t").exists()


def byte_level(folder: Path, specials: tuple[str, ...] = SPECIALS) -> Tokenizer:
    """A small byte-level BPE tokenizer.json with the specials in RoBERTa's order."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(sample_texts(10), trainer)
    bpe.enable_truncation(8)
    bpe.enable_padding(length=8)
    bpe.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def test_byte_level_json(tmp_path: Path) -> None:
    ours = byte_level(tmp_path)
    assert (ours.kind, ours.vocab_size, ours.mask) == ("json", 600, 4)
    assert ours.random_ids.tolist() == list(range(5, 600))
    text = LITERALS + "\nnew line, caf\u00e9 \U0001f600"
    ids = ours.encode(text)
    assert len(ids) > 8 and not set(ids.tolist()) & {0, 1, 2, 3, 4}  # neither cut nor padded nor special
    assert ours.decode(ids) == text
    starts = [i for i in range(5, 600) if ours.word_starts[i]]
    assert starts == [i for i in range(5, 600) if ours.piece(i)[0] in "\u0120\u010a\u010d\u0109"]


def test_wordpiece_json(tmp_path: Path) -> None:
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "the", "[", "mask", "]"]
    wordpiece = tokenizers.models.WordPiece({piece: i for i, piece in enumerate(vocab)}, unk_token="[UNK]")
    bert = tokenizers.Tokenizer(wordpiece)
    bert.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    bert.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    bert.add_special_tokens(vocab[:5])
    bert.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert (ours.bos, ours.pad, ours.eos, ours.unk, ours.mask) == (2, 0, 3, 1, 4)
    assert ours.encode("the unaffable [MASK]").tolist() == [8, 5, 6, 7, 9, 10, 11]
    assert np.flatnonzero(~ours.word_starts).tolist() == [6, 7]


def test_a_mask_that_text_can_write_is_refused(tmp_path: Path) -> None:
    model = (tmp_path / "tokenizer.model").open("wb")
    with model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample_texts(5)),
            model_writer=model,
            vocab_size=400,
            byte_fallback=True,
            pad_id=1,
            bos_id=0,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=["<mask>"],
            minloglevel=2,
        )
    with pytest.raises(UserError, match="the letters <mask> in a text become the special id"):
        load_tokenizer(tmp_path)


def test_missing_and_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer.model or tokenizer.json there"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer.json"):
        load_tokenizer(tmp_path)
    for content in (b"not a model", b""):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.model: not a SentencePiece model"):
            load_tokenizer(tmp_path)


def test_missing_specials_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.json: no piece <mask> in the vocabulary, .* pre-trained"):
        byte_level(tmp_path, specials=SPECIALS[:4])


def test_text_is_encoded_without_the_specials_of_a_masked_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no piece <s> <pad> </s> <unk> <mask> in the vocabulary"):
        byte_level(tmp_path, specials=("<|endoftext|>",))
    gpt = load_tokenizer(tmp_path, need_specials=False)
    assert gpt.missing == list(SPECIALS) and gpt.mask == gpt.unk == -1
    assert gpt.random_ids.tolist() == list(range(1, 600))
    ids = gpt.encode("the end<|endoftext|> of it")
    assert gpt.decode(ids) == "the end<|endoftext|> of it" and 0 not in ids
    assert gpt.end_of_document() == ("<|endoftext|>", 0)
    with pytest.raises(UserError, match="no </s> is a special piece there"):
        gpt.end_of_document("</s>")


def test_a_tokenizer_is_named_by_its_file_too(trained: Path, tmp_path: Path) -> None:
    assert load_tokenizer(trained / "tokenizer.model").hash == load_tokenizer(trained).hash
    ours = byte_level(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "mine.json")
    assert load_tokenizer(tmp_path / "mine.json").hash == ours.hash


@pytest.mark.parametrize("kind", ["trained", "byte-level"])
def test_what_was_read_of_a_vocabulary_is_what_is_used(kind: str, trained: Path, tmp_path: Path) -> None:
    """Whatever is in its place when a run keeps it, or it is exported."""
    text = "a text of some words"
    if kind == "trained":
        shutil.copy(trained / "tokenizer.model", tmp_path)
    else:
        byte_level(tmp_path)
    ours = load_tokenizer(tmp_path)
    expected = hugging_face_tokenizer(ours).encode(text).ids
    ours.path.write_bytes(b"another")
    assert hugging_face_tokenizer(ours).encode(text).ids == expected
    run = RunFolder(tmp_path / "run")
    run.keep_tokenizer(ours.path.with_stem("mine"), ours.content)
    assert load_tokenizer(tmp_path / "run" / "tokenizer").hash == ours.hash


def test_the_protobuf_module_of_sentencepiece_is_left_to_transformers(trained: Path) -> None:
    """Two of that name cannot be loaded; transformers converts other people's tokenizers with its own."""
    code = (
        "import sys; from pretrain.data.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1]);"
        "from transformers.convert_slow_tokenizer import import_protobuf; import_protobuf()"
    )
    subprocess.run([sys.executable, "-c", code, str(trained)], check=True)


def test_no_state_of_a_file_makes_ids_random_or_cut(tmp_path: Path) -> None:
    text, plain = " ".join(sample_texts(2)), byte_level(tmp_path)
    ids = plain.encode(text)
    path = tmp_path / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    assert state["truncation"] and state["padding"]
    state["model"]["dropout"] = 0.3
    path.write_text(json.dumps(state), encoding="utf-8")
    for _ in range(3):
        assert np.array_equal(load_tokenizer(tmp_path).encode(text), ids)
    theirs = hugging_face_tokenizer(load_tokenizer(tmp_path))
    for _ in range(3):
        assert theirs.encode(text).ids == [plain.bos, *ids.tolist(), plain.eos]


def test_an_exported_tokenizer_puts_the_specials_of_training_around_a_text(tmp_path: Path) -> None:
    ours, path = byte_level(tmp_path), tmp_path / "tokenizer.json"
    other = tokenizers.Tokenizer.from_file(str(path))
    other.post_processor = tokenizers.processors.TemplateProcessing(
        "<mask> $A </s> <s>", None, [("<mask>", ours.mask), ("</s>", ours.eos), ("<s>", ours.bos)]
    )
    other.save(str(path))
    wanted = [ours.bos, *ours.encode("a text").tolist(), ours.eos]
    assert hugging_face_tokenizer(load_tokenizer(tmp_path)).encode("a text").ids == wanted


def test_pieces_are_readable(tmp_path: Path) -> None:
    ours = byte_level(tmp_path)
    text = "a dash \u2014 caf\u00e9\nnew"
    shown = "".join(map(ours.readable, ours.encode(text).tolist()))
    assert "\u0120" not in shown and "\u010a" not in shown and "\u00c3" not in shown and "\n" in shown
    by_byte = {ours.readable(i) for i in range(5, 261)}
    assert {"A", "\u2581", "\n", r"\xe2"} <= by_byte
    assert ours.readable(ours.mask) == "<mask>"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_what_the_trainer_reserves_takes_nothing_with_it(kind: str, tmp_path: Path) -> None:
    """It drops lines with U+2585, and takes out the letters of its own pieces."""
    plain = sample_texts(20)
    odd = ["zebrafish \u2585\u2585 zebrafish", "zebrafish<unk>\u2585", "\u2585zebrafish <0x41><mask>"] * 200
    reserved: Counter[str] = Counter()
    ours = train_sentencepiece([*plain, *odd], tmp_path, kind, 600, reserved=reserved)  # type: ignore[arg-type]
    assert reserved == {"U+2585": 800, "<unk>": 200, "<0x41>": 200, "<mask>": 200}
    assert len(ours.encode("zebrafish")) <= 2
    pieces = [ours.piece(i) for i in range(ours.vocab_size)]
    assert {"<", ">"} <= set("".join(pieces[260:-1]))  # letters, not bytes
    assert [piece for piece in pieces if "unk>" in piece or "mask>" in piece] == ["<unk>", "<mask>"]
    assert not {"<0x3C>", "<0x3E>"} & {ours.piece(i) for i in ours.encode("a <unk> b").tolist()}
    about = json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8"))
    assert about["reserved"] == reserved


def test_start_up_imports_no_torch() -> None:
    code = "import tools.encode_corpus.__main__, tools.inspect_corpus.__main__, sys\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
