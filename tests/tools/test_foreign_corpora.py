"""Data that other programs made: fairseq's data-bin, datatrove's Megatron files; and shared text."""

import gzip
import json
import shutil
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pretrain.__main__ import main
from pretrain.data.indexed import IndexedReader
from pretrain.data.tokenizer import load_tokenizer, train_sentencepiece
from pretrain.data.verify import verify
from pretrain.errors import UserError
from tools import import_fairseq
from tools.encode_corpus import __main__ as encode_corpus
from tools.verify_corpus import __main__ as verify_corpus
from tools.verify_corpus import overlap

SAMPLE = Path(__file__).parents[2] / "tools" / "sample"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    with gzip.open(SAMPLE / "valid.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(texts, path, "bpe", 700)
    return str(path)


# ---- fairseq -------------------------------------------------------------------------------------


def write_data_bin(folder: Path, items: list[list[int]], symbols: list[str], code: int, dtype: str) -> str:
    """train.bin and train.idx as fairseq's MMapIndexedDatasetBuilder writes them, and dict.txt."""
    folder.mkdir()
    sizes = np.array([len(item) for item in items], "<i4")
    pointers = (np.cumsum(sizes, dtype="<i8") - sizes) * np.dtype(dtype).itemsize
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, code, len(items))
    (folder / "train.idx").write_bytes(head + sizes.tobytes() + pointers.astype("<i8").tobytes())
    (folder / "train.bin").write_bytes(np.concatenate([np.array(item, dtype) for item in items]).tobytes())
    (folder / "dict.txt").write_text("".join(f"{symbol} 9\n" for symbol in symbols), encoding="utf-8")
    return str(folder / "train")


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
@pytest.mark.parametrize("blank_lines", [True, False])
def test_a_data_bin_becomes_a_corpus(
    code: int, dtype: str, blank_lines: bool, texts: list[str], folder: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(folder)
    symbols = [tokenizer.piece(i) for i in tokenizer.random_ids[::-1]]  # fairseq orders them its own way
    fairseq_ids = {symbol: 4 + n for n, symbol in enumerate(symbols)}
    items, expected = [], []
    for text in texts[:6]:
        sequences = [tokenizer.encode(line).tolist() for line in text[:300].split("\n") if line.strip()]
        items += [[fairseq_ids[tokenizer.piece(i)] for i in ids] + [2] for ids in sequences]
        items += [[2]] if blank_lines else []
        expected += [sum(sequences, [])] if blank_lines else sequences
    prefix = write_data_bin(tmp_path / "data-bin", items, symbols, code, dtype)
    import_fairseq.main([prefix, "--tokenizer", folder, "--output", str(tmp_path / "c")])
    reader = IndexedReader(tmp_path / "c")
    assert [reader.document(i).tolist() for i in range(reader.num_documents)] == expected
    manifest = verify(tmp_path / "c")
    assert manifest.tokenizer.hash == tokenizer.hash and manifest.seal


@pytest.mark.parametrize("chunk", [1, 7, 20, 1 << 20])
@pytest.mark.parametrize("blanks", [0, 0.3])
def test_stretches_of_a_data_bin(chunk: int, blanks: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With items of no tokens at all, of no </s>, with more than one, and blank ones at either end."""
    monkeypatch.setattr(import_fairseq, "_CHUNK", chunk)
    draw = np.random.default_rng(3)
    items = [
        [*draw.integers(4, 50, draw.integers(1, 6)).tolist(), *[2] * draw.integers(0, 3)] for _ in range(60)
    ]
    if blanks:
        items = [[[], [2]][draw.integers(2)] if draw.random() < blanks else item for item in items]
        items = [[2], [], *items, [2], [2]]
    expected: list[list[list[int]]] = [[]]
    for item in items:
        content = item[:-1] if item[-1:] == [2] else item
        if content:
            expected[-1].append([1000 + i for i in content])
        if not content or not blanks:
            expected.append([])
    tokens = np.array([i for item in items for i in item], np.uint16)
    sizes = np.array([len(item) for item in items], np.int32)
    found, given = [], 0
    for some, lengths, ends in import_fairseq.documents(tokens, sizes, 1000 + np.arange(50), "x"):
        sequences = [part.tolist() for part in np.split(some, np.cumsum(lengths))][:-1]
        found += [sequences[a:b] for a, b in pairwise([0, *ends.tolist()])]
        given += 1
    assert found == [document for document in expected if document]
    assert (given > 3) == (chunk < 50)


def test_gpt2_numbers_are_renamed(texts: list[str], tmp_path: Path) -> None:
    import tokenizers

    from pretrain.data.tokenizer import SPECIALS
    from tools.text.byte_level import build, gpt2_pieces

    bpe = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(texts, 600, 2, False, list(SPECIALS[:-1]))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    (tmp_path / "t").mkdir()
    spec = build(bpe.get_vocab() | {"<mask>": 600}, merges, tmp_path)
    (tmp_path / "t" / "tokenizer.json").write_text(spec, encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "t")
    numbers = {piece: n for n, piece in enumerate(gpt2_pieces(merges)[:-1])}
    ids = tokenizer.encode(texts[0][:500])
    items = [[4 + numbers[tokenizer.piece(i)] for i in ids] + [2]]
    prefix = write_data_bin(tmp_path / "bin", items, [str(n) for n in range(len(numbers))], 8, "<u2")
    import_fairseq.main([prefix, "--tokenizer", str(tmp_path / "t"), "--output", str(tmp_path / "c")])
    assert IndexedReader(tmp_path / "c").tokens.tolist() == ids.tolist()


def test_bad_data_bins_are_named(folder: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    symbols = [tokenizer.piece(i) for i in tokenizer.random_ids]
    prefix = Path(write_data_bin(tmp_path / "d", [[5, 6, 2], [7, 2]], symbols, 8, "<u2"))
    index, tokens = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
    good = {path: path.read_bytes() for path in (index, tokens)}
    cases = [
        (index, None, "train.idx: no such file"),
        (index, b"TNTIDX\0\0" + bytes(40), "train.idx: TNTIDX, fairseq's lazy format"),
        (index, b"nonsense" * 9, "train.idx: not an index"),
        (index, good[index] + bytes(8), "train.idx: not fairseq's .Megatron's own files need no import"),
        (tokens, None, "train.bin: missing, truncated or too long"),
        (tokens, good[tokens][:-2], "train.bin: missing, truncated or too long"),
        (tokens, b"\xff\xff" + good[tokens][2:], "train.bin: id 65535 is outside dict.txt"),
    ]
    arguments = [str(prefix), "--tokenizer", folder, "--output", str(tmp_path / "c")]
    for path, content, message in cases:
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            import_fairseq.main(arguments)
        for each, data in good.items():
            each.write_bytes(data)
    (prefix.with_name("dict.txt")).write_text("".join(f"zz{i} 1\n" for i in range(9)))
    with pytest.raises(UserError, match="the tokenizer has no piece for id"):
        import_fairseq.main(arguments)
    assert not list(tmp_path.glob("c.*"))


@pytest.mark.parametrize("output", ["train", "valid"])
def test_a_data_bin_is_never_replaced(folder: str, tmp_path: Path, output: str) -> None:
    """Neither the one that is read nor another, though its index begins as Megatron's does."""
    tokenizer = load_tokenizer(folder)
    symbols = [tokenizer.piece(i) for i in tokenizer.random_ids]
    prefix = write_data_bin(tmp_path / "d", [[5, 6, 2], [7, 2]], symbols, 8, "<u2")
    for end in ("bin", "idx"):
        (tmp_path / "d" / f"valid.{end}").write_bytes((tmp_path / "d" / f"train.{end}").read_bytes())
    before = {path: path.read_bytes() for path in (tmp_path / "d").iterdir()}
    words = [prefix, "--tokenizer", folder, "--output", str(tmp_path / "d" / output), "--overwrite"]
    with pytest.raises(UserError, match="choose another --output"):
        import_fairseq.main(words)
    assert {path: path.read_bytes() for path in (tmp_path / "d").iterdir()} == before


# ---- datatrove -----------------------------------------------------------------------------------


@pytest.fixture
def datatrove(tmp_path: Path) -> Path:
    """A copy of what datatrove 0.10.1 wrote of `texts.json`:

    MegatronDocumentTokenizer(folder, tokenizer_name_or_path=".../tokenizer.json", eos_token=None), from
    the tokenizer here without its post-processor, which would put specials into the text.
    """
    return shutil.copytree(Path(__file__).parents[1] / "fixtures" / "datatrove", tmp_path / "datatrove")


def test_datatroves_megatron_files_are_adopted(datatrove: Path, tmp_path: Path) -> None:
    prefix, texts = datatrove / "00000_tokens", json.loads((datatrove / "texts.json").read_text())
    tokenizer, reader = load_tokenizer(datatrove), IndexedReader(prefix)
    assert [tokenizer.decode(reader.document(i)) for i in range(reader.num_documents)] == texts
    verify_corpus.main([str(prefix), "--write-manifest", "--tokenizer", str(datatrove)])
    assert verify(prefix).seal
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "in.jsonl").write_text(lines)
    command = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer", str(datatrove)]
    encode_corpus.main([*command, "--output", str(tmp_path / "c"), "--workers", "1"])
    ours = IndexedReader(tmp_path / "c")
    assert reader.tokens.tolist() == ours.tokens.tolist()
    assert reader.document_lengths.tolist() == ours.document_lengths.tolist()


def test_datatroves_megatron_files_train(datatrove: Path, words: Callable[..., list[str]]) -> None:
    prefix = datatrove / "00000_tokens"
    overrides = [f"corpus.train={prefix}", f"corpus.valid={prefix}", "budget.steps=2"]
    assert main(words("a", *overrides)) == 2  # no manifest yet
    verify_corpus.main([str(prefix), "--write-manifest", "--tokenizer", str(datatrove)])
    assert main(words("a", *overrides)) == 0


# ---- overlap -------------------------------------------------------------------------------------


def test_overlap_against_sets_of_words(texts: list[str], folder: str, tmp_path: Path, capsys) -> None:
    train = texts[:20] + ["Short.", "Only -- a few words!", "A longer text with few words in it"]
    held = [
        texts[25],
        " ".join(texts[3].split()[:300]).upper(),
        "Never, " + " ".join(texts[30].split()[:12]),
        "few words",
        "only a few words",
        "",
    ]
    for name, some in (("train", train), ("held", held)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in some)
        (tmp_path / f"{name}.jsonl").write_text(lines)
        words = ["--input", str(tmp_path / f"{name}.jsonl"), "--tokenizer", folder]
        encode_corpus.main([*words, "--output", str(tmp_path / name), "--workers", "1"])
    capsys.readouterr()
    command = [str(tmp_path / "held"), "--check-overlap", str(tmp_path / "train"), "--json"]
    verify_corpus.main(command)
    (report,) = json.loads(capsys.readouterr().out)

    def grams(text: str) -> set[tuple[str, ...]]:
        words = overlap._WORDS(load_tokenizer(folder).decode(load_tokenizer(folder).encode(text)).casefold())
        return {tuple(words[i : i + 13]) for i in range(max(1, len(words) - 12))} - {()}

    known = set().union(*map(grams, train))
    mine = [grams(text) for text in held]
    everything = set().union(*mine)
    assert report["runs"] == len(everything)
    assert report["shared_runs"] == len(everything & known) > 100
    assert report["documents_with_overlap"] == sum(bool(some & known) for some in mine)
    assert report["worst"][0] == {"document": 1, "share": pytest.approx(len(mine[1] & known) / len(mine[1]))}
    assert report["worst"][0]["share"] == 1
    assert {"document": 4, "share": 1.0} in report["worst"]  # short, and there as a whole
    verify_corpus.main(command[:-1])
    assert "runs of 13 words are in" in capsys.readouterr().out
