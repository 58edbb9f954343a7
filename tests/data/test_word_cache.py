"""Cached encoders against the libraries they stand in front of, on the sample and on hostile text."""

import gzip
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from pretrain.data import word_cache
from pretrain.data.tokenizer import _PROBE, SPECIALS, Tokenizer, load_tokenizer, train_sentencepiece
from pretrain.errors import UserError
from tools import train_tokenizer
from tools.text import byte_level as byte_level_files

SAMPLE = Path(__file__).parents[2] / "tools" / "sample"
ALPHABET = [
    *"aZ09'.-_ \n\t\r\x0b\x0c\x00\x1c\x1d\x1e\x1f\x7f",
    *("'s", "'ll", "  ", " \n", "<mask>", "</s>", "\r\n", "don't", "  \n\n "),
    *"\x85\xa0\u1680\u180e\u2003\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff\u2581\u0120",
    *"\u00e9e\u0301\u00bd\u2167\u0661\u4e2d\ufb01\u0e01\U0001f600\U0010ffff\u2019",
]


def sample_texts() -> list[str]:
    texts = []
    for name in ("train", "valid"):
        with gzip.open(SAMPLE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    return texts


def hostile_texts() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(ALPHABET, k=draw.randrange(40))) for _ in range(3000)] + [
        "",
        "x" * 5000,
        " " * 5000,
        "=" * 200 + "a" * 65,
        *_PROBE,
    ]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level vocabulary as vocab.json and merges.txt."""
    bpe = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(sample_texts()[:60], 3000, 2, False, list(SPECIALS[:-1]))
    folder = tmp_path_factory.mktemp("byte-level")
    vocabulary = bpe.get_vocab() | {"<mask>": 3000}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    spec = json.loads(bpe.to_str())["model"]
    merges = "".join(f"{left} {right}\n" for left, right in spec["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    train_tokenizer.main(["--import", str(folder), "--output", str(folder / "taken")])
    return folder


def check(ours: Tokenizer, texts: list[str], reference: list[list[int]]) -> None:
    tokens, lengths = ours.encode_flat(texts)
    assert tokens.dtype == np.int32 and lengths.dtype == np.int64
    assert lengths.tolist() == [len(ids) for ids in reference]
    assert tokens.tolist() == [i for ids in reference for i in ids]
    assert [ids.tolist() for ids in ours.encode_batch(texts[:50])] == reference[:50]


@pytest.mark.parametrize("use_fastokens", [True, False])
def test_byte_level_ids_are_the_tokenizers_librarys(byte_level: Path, use_fastokens: bool) -> None:
    if use_fastokens:
        pytest.importorskip("fastokens")
    ours = load_tokenizer(byte_level / "taken", use_fastokens)
    assert (ours._fast is not None) == use_fastokens and (ours._cache is None) == use_fastokens
    texts = sample_texts() + hostile_texts()
    library = tokenizers.Tokenizer.from_file(str(byte_level / "taken" / "tokenizer.json"))
    library.encode_special_tokens = True
    reference = [e.ids for e in library.encode_batch(texts, add_special_tokens=False)]
    check(ours, texts, reference)
    assert not {ours.bos, ours.pad, ours.eos, ours.mask} & set(ours.encode_flat(texts)[0].tolist())


def test_byte_level_ids_are_those_of_an_encoder_by_the_book(byte_level: Path) -> None:
    """Radford et al.'s encoder: its pattern, bytes to letters, the best-ranked pair merged first."""
    import regex

    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    ranks = {pair: i for i, pair in enumerate(byte_level_files.read_merges(byte_level / "merges.txt"))}
    vocabulary = json.loads((byte_level / "vocab.json").read_text())
    letters = word_cache.byte_letters()

    def encode(text: str) -> list[int]:
        ids = []
        for word in pattern.findall(text):
            parts = [letters[byte] for byte in word.encode()]
            while len(parts) > 1:
                pairs = list(zip(parts, parts[1:], strict=False))
                best = min(pairs, key=lambda pair: ranks.get(pair, 1 << 30))
                if best not in ranks:
                    break
                merged, i = [], 0
                while i < len(parts):
                    step = 2 if tuple(parts[i : i + 2]) == best else 1
                    merged.append("".join(parts[i : i + step]))
                    i += step
                parts = merged
            ids += [vocabulary[part] for part in parts]
        return ids

    texts = [text for text in sample_texts()[::25] + hostile_texts()[:1000] if len(text) < 20_000]
    check(load_tokenizer(byte_level / "taken", use_fastokens=False), texts, [encode(text) for text in texts])


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_ids_are_sentencepieces(kind: str, tmp_path: Path) -> None:
    ours = train_sentencepiece(sample_texts()[:60], tmp_path, kind, 2000)
    assert (ours._cache is not None) == (kind == "bpe")
    texts = sample_texts() + hostile_texts()
    check(ours, texts, ours._processor.encode(texts))


def test_a_cache_rests_on_unseen_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_STRETCH", 2000)
    texts, draw = sample_texts()[:60], random.Random(0)
    ours = train_sentencepiece(texts, tmp_path, "bpe", 2000)
    noise = [" ".join("".join(draw.choices("abcdefg", k=9)) for _ in range(300)) for _ in range(30)]
    sizes = []
    for text in [*noise, *texts[:1] * 40]:
        flat, lengths = ours.encode_flat([text])
        assert flat.tolist() == ours._processor.encode(text) and lengths.tolist() == [len(flat)]
        sizes.append(len(ours._cache))
    assert 0 < sizes[29] <= 3 * 300, "of 30 stretches 2 are tried, the others rest"
    assert sizes[-1] > sizes[29], "and it is tried again"


def test_a_foreign_normaliser_is_not_cached(tmp_path: Path) -> None:
    import sentencepiece

    for name, options in (
        ("nfkc", {}),
        ("phrases", {"normalization_rule_name": "identity", "split_by_whitespace": False}),
    ):
        with (tmp_path / f"{name}.model").open("wb") as model:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sample_texts()[:5]), model_writer=model, model_type="bpe",
                vocab_size=900, byte_fallback=True, bos_id=0, pad_id=1, eos_id=2, unk_id=3,
                control_symbols=["<mask>"], minloglevel=2, **options,
            )  # fmt: skip
        (tmp_path / "tokenizer.model").write_bytes((tmp_path / f"{name}.model").read_bytes())
        ours = load_tokenizer(tmp_path)
        assert ours._cache is None
        check(ours, hostile_texts()[:500], ours._processor.encode(hostile_texts()[:500]))


def test_the_cache_is_bounded(byte_level: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "ENTRIES", 50)
    ours = load_tokenizer(byte_level / "taken", use_fastokens=False)
    texts = sample_texts()[:3] + ["y" * 100 + f" {'z' * 90}{i}" for i in range(60)]
    check(ours, texts, ours._reference_ids(texts))
    assert 0 < len(ours._cache) <= 50
    assert max(map(len, ours._cache)) <= 64


def test_only_gpt2s_kind_is_cut_into_words(byte_level: Path) -> None:
    spec = json.loads((byte_level / "taken" / "tokenizer.json").read_text())
    assert word_cache.is_byte_level(spec)
    for part, change in (
        ("normalizer", {"type": "NFC"}),
        ("pre_tokenizer", None),
        ("pre_tokenizer", spec["pre_tokenizer"] | {"add_prefix_space": True}),
        ("pre_tokenizer", spec["pre_tokenizer"] | {"use_regex": False}),
        ("model", spec["model"] | {"dropout": 0.1}),
        ("model", spec["model"] | {"type": "WordPiece"}),
        ("added_tokens", [*spec["added_tokens"], {"content": "a b", "special": False}]),
    ):
        assert not word_cache.is_byte_level(spec | {part: change}), part


def test_fastokens_is_left_alone_where_it_differs(byte_level: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        @staticmethod
        def from_json_str(text: str) -> "Wrong":
            return Wrong()

        def encode_batch_flat(self, texts: list[str]) -> tuple[bytes, bytes]:
            return bytes(4), bytes(8 * (len(texts) + 1))

    module = type(sys)("fastokens")
    module.Tokenizer = Wrong
    monkeypatch.setitem(sys.modules, "fastokens", module)
    assert load_tokenizer(byte_level / "taken")._fast is None
    monkeypatch.setitem(sys.modules, "fastokens", None)  # not installed
    assert load_tokenizer(byte_level / "taken")._fast is None


# ---- taking over vocabulary files ----------------------------------------------------------------


def gpt2_files(byte_level: Path, folder: Path) -> Path:
    """The same vocabulary as encoder.json, vocab.bpe and a dict.txt in another order."""
    merges = byte_level_files.read_merges(byte_level / "merges.txt")
    pieces = byte_level_files.gpt2_pieces(merges)
    order = random.Random(1).sample(range(len(pieces)), len(pieces))
    folder.mkdir()
    (folder / "encoder.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "vocab.bpe").write_text(
        (byte_level / "merges.txt").read_text(encoding="utf-8"), encoding="utf-8"
    )
    (folder / "dict.txt").write_text("".join(f"{i} {9}\n" for i in order) + "madeupword0000 0\n")
    return folder


def test_gpt2_files_get_fairseqs_ids(byte_level: Path, tmp_path: Path) -> None:
    folder = gpt2_files(byte_level, tmp_path / "gpt2")
    train_tokenizer.main(["--import", str(folder), "--output", str(tmp_path / "taken")])
    ours, plain = load_tokenizer(tmp_path / "taken"), load_tokenizer(byte_level / "taken")
    assert [ours.bos, ours.pad, ours.eos, ours.unk] == [0, 1, 2, 3] and ours.mask == ours.vocab_size - 1
    gpt2 = json.loads((folder / "encoder.json").read_text())
    line = {
        int(row.split()[0]): n for n, row in enumerate((folder / "dict.txt").read_text().splitlines()[:-1])
    }
    text = "The same text, in <mask> other ids."
    pieces = [plain.piece(i) for i in plain.encode(text)]
    assert ours.encode(text).tolist() == [4 + line[gpt2[piece]] for piece in pieces]
    assert ours.decode(ours.encode(text)) == text


BAD_FILES = {
    "no files": ({"vocab.json": None}, "neither tokenizer.json, nor vocab.json"),
    "no merges": ({"merges.txt": None}, "merges.txt: missing"),
    "not JSON": ({"vocab.json": "{"}, "vocab.json: not JSON"),
    "too deep": ({"vocab.json": "[" * 100_000}, "vocab.json: not JSON"),
    "not a table": ({"vocab.json": "[1]"}, "vocab.json: not a table of pieces"),
    "not a merge": ({"merges.txt": "#version\na b c\n"}, "merges.txt:2: not a merge of two pieces"),
    "foreign merge": ({"merges.txt": "zzz qqq\n"}, "the merge zzz qqq is not of this vocabulary"),
    "no specials": ({"vocab.json": '{"a": 0}'}, "no piece <s> <pad> </s> <unk> <mask>"),
    "a gap": ({"vocab.json": json.dumps(dict.fromkeys(SPECIALS, 7))}, "the ids are not 0 to 4, each once"),
    "not UTF-8": ({"merges.txt": b"\xff \xfe"}, "merges.txt: not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_vocabulary_files_are_named(name: str, byte_level: Path, tmp_path: Path) -> None:
    files, message = BAD_FILES[name]
    for file in ("vocab.json", "merges.txt"):
        content = files.get(file, (byte_level / file).read_bytes())
        if content is not None:
            (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        train_tokenizer.main(["--import", str(tmp_path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_unconverted_files_get_the_command(byte_level: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--import .* --output DIR"):
        load_tokenizer(byte_level)
    folder = gpt2_files(byte_level, tmp_path / "gpt2")
    (folder / "dict.txt").write_text("99999 1\n")
    with pytest.raises(UserError, match="dict.txt: 99999 is no id of encoder.json"):
        train_tokenizer.main(["--import", str(folder), "--output", str(tmp_path / "t")])
    (folder / "dict.txt").write_text("99999\n")
    with pytest.raises(UserError, match="dict.txt:1: not a symbol and a count"):
        train_tokenizer.main(["--import", str(folder), "--output", str(tmp_path / "t")])
    with pytest.raises(UserError, match="give either --input to train on, or --import"):
        train_tokenizer.main(["--output", str(tmp_path / "t")])


def test_fertility_is_measured_on_unseen_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", str(SAMPLE / "train.jsonl.gz"), "--output", str(tmp_path), "--json"]
    train_tokenizer.main([*arguments, "--vocab-size", "900"])
    report = json.loads(capsys.readouterr().out)
    with gzip.open(SAMPLE / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    held = [text for text in texts if train_tokenizer.held_out(text.encode(), 0.01)]
    assert held and report["documents"] == len(texts) - len(held)
    tokens = load_tokenizer(tmp_path)._processor.encode(" ".join(held))
    measured = report["held_out"]
    assert measured["documents"] == len(held)
    assert abs(measured["tokens_per_word"] - len(tokens) / len(" ".join(held).split())) < 0.01
    assert measured["unknown_rate"] == 0
    pieces = load_tokenizer(tmp_path)._processor.id_to_piece(tokens)
    spelt = sum(piece.startswith("<0x") for piece in pieces) / len(pieces)
    assert abs(measured["byte_rate"] - spelt) < 1e-3
