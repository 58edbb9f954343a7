"""The corpus programs: what they write, what they refuse, and with which exit code."""

import bz2
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from pretrain.data import writer
from pretrain.data.indexed import IndexedReader
from pretrain.data.manifest import load_manifest
from pretrain.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from pretrain.data.verify import verify
from pretrain.errors import UserError
from tests.support.ranks import PATIENCE
from tools import import_fairseq, merge_corpus, train_tokenizer
from tools.encode_corpus import __main__ as encode_corpus
from tools.encode_corpus import parts as encode_parts
from tools.encode_corpus.parts import EncodeJob, EncodeTask
from tools.inspect_corpus import __main__ as inspect_corpus
from tools.text import readers as text_files
from tools.text.readers import Document
from tools.verify_corpus import __main__ as verify_corpus

ROOT = Path(__file__).parents[2]
VALID = ROOT / "tools" / "sample" / "valid.jsonl.gz"
GOOD = b'{"text": "a good line", "source": "x/1"}\n'


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    return gzip.decompress(VALID.read_bytes()).splitlines(keepends=True)


@pytest.fixture(scope="module")
def folder(lines: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece([json.loads(line)["text"] for line in lines], path, "unigram", 800)
    return str(path)


def encode(folder: str, output: Path, *inputs: Path, options: str = "--workers 1") -> int:
    files = [str(path) for path in inputs]
    arguments = ["--input", *files, "--tokenizer", folder, "--output", str(output)]
    return encode_corpus.main([*arguments, *options.split()])


def texts(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    reader = IndexedReader(prefix)
    return [tokenizer.decode(reader.document(i)) for i in range(reader.num_documents)]


def program(name: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"tools.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_corpus_is_the_texts_in_order(folder: str, lines: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:5]) + b'\n{"text": "", "id": 3}\n')
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[5:]).removesuffix(b"\n"))
    encode(folder, tmp_path / "c", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    tokenizer, reader = load_tokenizer(folder), IndexedReader(tmp_path / "c")
    records = [json.loads(line) for line in [*lines[:5], b'{"text": ""}', *lines[5:]]]
    assert reader.num_documents == len(records) == reader.num_sequences + 1
    for i, record in enumerate(records):
        assert np.array_equal(reader.document(i), tokenizer.encode(record["text"]))
    manifest = verify(tmp_path / "c")
    sizes = [len(record["text"].encode()) for record in records]
    assert (manifest.text_bytes, manifest.empty_documents) == (sum(sizes), 1)
    assert manifest.tokenizer is not None and manifest.tokenizer.hash == tokenizer.hash
    assert [Path(file.path).name for file in manifest.inputs] == ["a.jsonl", "b.jsonl"]
    for kind, tally in manifest.sources.items():
        mine = [i for i, record in enumerate(records) if record.get("source", "").startswith(f"{kind}/")]
        assert tally.documents == len(mine)
        assert tally.tokens == reader.document_lengths[mine].sum()
        assert tally.text_bytes == sum(sizes[i] for i in mine)
    assert sum(tally.documents for tally in manifest.sources.values()) == len(lines)


def test_workers_do_not_change_a_byte(
    folder: str, lines: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in.jsonl"
    bad = b"{bad\n"
    source.write_bytes(b"".join(lines[:20]) + bad + b"".join(lines[20:]))
    kept = {}
    for name, workers, block in (("one", 1, 4 << 20), ("three", 3, 20_000), ("small", 1, 1)):
        monkeypatch.setattr(text_files, "_BLOCK_BYTES", block)
        monkeypatch.setattr(encode_corpus, "_PIECE_BYTES", (block, block if block > 1 else 9999))
        where = tmp_path / name
        options = f"--workers {workers} --holdout 0.3 --keep-going"
        encode(folder, where / "c", source, options=options)
        kept[name] = {path.name: path.read_bytes() for path in where.iterdir()}
    assert kept["one"] == kept["three"] == kept["small"]
    names = {f"c{side}.{end}" for side in ("", "-valid") for end in ("bin", "idx", "json", "src")}
    assert set(kept["one"]) == names | {"c.rejected.jsonl"}


def test_holdout_is_a_split_by_text(folder: str, lines: list[bytes], tmp_path: Path) -> None:
    for name, order in (("a", lines), ("b", lines[::-1] + lines[:9])):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(order))
        encode(folder, tmp_path / name, tmp_path / f"{name}.jsonl", options="--workers 1 --holdout 0.25")
    tokenizer = load_tokenizer(folder)
    train, valid = (texts(tmp_path / f"a{side}", tokenizer) for side in ("", "-valid"))
    assert len(train) + len(valid) == len(lines) and train and valid
    assert not set(train) & set(valid)
    assert set(texts(tmp_path / "b", tokenizer)) == set(train)
    assert set(texts(tmp_path / "b-valid", tokenizer)) == set(valid)
    assert load_manifest(tmp_path / "a-valid").history["holdout"] == 0.25
    held = sum(encode_parts.held_out(str(i).encode(), 0.25) for i in range(4000))
    assert abs(held - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5


def test_compressed_files_and_patterns(folder: str, lines: list[bytes], tmp_path: Path) -> None:
    data = b"".join(lines)
    half = len(b"".join(lines[:18]))
    zstd = zstandard.ZstdCompressor()
    (tmp_path / "plain.jsonl").write_bytes(data)
    (tmp_path / "gz-1.jsonl.gz").write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))
    (tmp_path / "zst-1.ndjson.zst").write_bytes(zstd.compress(data[:half]) + zstd.compress(data[half:]))
    (tmp_path / "part-1.jsonl").write_bytes(data[:half])
    (tmp_path / "part-2.jsonl").write_bytes(data[half:])
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))
    (tmp_path / "list").write_text(f"{tmp_path}/part-1.jsonl\n{tmp_path}/part-2.jsonl\n")
    patterns = ["plain.jsonl", "gz-*", "zst-*", "part-[12].jsonl", "bom.jsonl"]
    inputs = [str(tmp_path / pattern) for pattern in patterns] + [f"@{tmp_path}/list"]
    prints = set()
    for i, pattern in enumerate(inputs):
        encode(folder, tmp_path / f"c{i}", Path(pattern))
        prints.add(load_manifest(tmp_path / f"c{i}").fingerprint)
    assert len(prints) == 1


BAD_LINES = {
    "not JSON": (b"{oops}\n", "not JSON"),
    "cut line": (b'{"text": "x\n', "not JSON"),
    "deep": (b"[" * 100_000 + b"\n", "not JSON"),
    "not UTF-8": (b'{"text": "\xff\xfe"}\n', "not UTF-8 .byte 10"),
    "array": (b'["text"]\n', "not a JSON object"),
    "no key": (b'{"body": "x", "id": 3}\n', "no key 'text' .it has body, id"),
    "null": (b'{"text": null}\n', "'text' is not a string but NoneType"),
    "number": (b'{"text": 3}\n', "'text' is not a string but int"),
    "surrogate": (b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
    "digits": (b'{"text": ' + b"9" * 5000 + b"}\n", "not JSON"),
    "long": (b'{"text": "' + b"x" * 20_000 + b'"}\n', "longer than 15,000 bytes"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_are_errors_or_set_aside(name: str, folder: str, tmp_path: Path) -> None:
    line, message = BAD_LINES[name]
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD + b"\n" + GOOD + line + GOOD)
    some = "--workers 1 --max-document-bytes 15000" if name == "long" else "--workers 1"
    with pytest.raises(UserError, match=rf"in\.jsonl:4: {message}"):
        encode(folder, tmp_path / "out" / "c", source, options=some)
    assert not list((tmp_path / "out").iterdir())
    limit = "15000" if name == "long" else "500000"
    training = ["--input", str(source), "--output", str(tmp_path / "t"), "--max-document-bytes", limit]
    with pytest.raises(UserError, match=rf"in\.jsonl:4: {message}.*--keep-going"):
        train_tokenizer.main(training)
    with pytest.raises(UserError, match=r"--vocab-size 32000: .* at most"):  # it got as far as that
        train_tokenizer.main([*training, "--keep-going"])
    encode(folder, tmp_path / "c", source, options=f"{some} --keep-going")
    assert load_manifest(tmp_path / "c").documents == 3
    assert load_manifest(tmp_path / "c").history["rejected"] == 1
    (rejected,) = map(json.loads, (tmp_path / "c.rejected.jsonl").read_text().splitlines())
    assert (rejected["path"], rejected["line"]) == (str(source), 4)
    content = line.rstrip(b"\n").decode(errors="backslashreplace")
    assert content.startswith(rejected["content"][:1000]) or name == "surrogate"


def test_line_numbers_run_through_blocks(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(encode_corpus, "_PIECE_BYTES", (300, 300))
    (tmp_path / "in.jsonl").write_bytes(GOOD * 50 + b"{\n" + GOOD)
    with pytest.raises(UserError, match=r"in\.jsonl:51: not JSON"):
        encode(folder, tmp_path / "c", tmp_path / "in.jsonl", options="--workers 2")


PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("damage", ["cut", "garbage", "other kind"])
def test_damaged_compression_is_named(
    suffix: str, damage: str, folder: str, lines: list[bytes], tmp_path: Path
) -> None:
    data = b"".join(lines)
    packed = PACK[suffix](data)
    middle = len(packed) // 2
    content = {
        "cut": packed[:-9],
        "garbage": packed[:middle] + bytes(64) + packed[middle + 64 :],
        "other kind": data,
    }[damage]
    source = tmp_path / f"in.jsonl{suffix}"
    source.write_bytes(content)
    with pytest.raises(UserError, match=r"in\.jsonl\.[a-z0-9]+: damaged or truncated"):
        encode(folder, tmp_path / "c", source)
    assert {path.name for path in tmp_path.iterdir()} == {source.name}


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["none.jsonl"], "", "none.jsonl: no such file"),
        (["*.parquet"], "", "no such file"),
        (["empty"], "", "empty: no .jsonl, .txt, .parquet or .arrow files"),
        (["in.jsonl"], "--max-document-bytes 0", "--max-document-bytes: '0' is not a number of at least 1"),
        (["in.csv"], "", "unknown kind of file"),
        (["in.jsonl", "in.jsonl"], "", "the same file as"),
        (["in.jsonl"], "--workers 0", "--workers: '0' is not a number of at least 1"),
        (["in.jsonl"], "--holdout 1.5", "--holdout 1.5: a share"),
        (["in.jsonl"], "--text-key body", "in.jsonl:1: no key 'body'"),
        (["blank.jsonl"], "", "no documents"),
    ],
)
def test_bad_arguments(inputs: list[str], options: str, message: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    (tmp_path / "blank.jsonl").write_bytes(b"\n \n")
    (tmp_path / "in.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        encode(
            folder, tmp_path / "c", *(tmp_path / name for name in inputs), options=f"--workers 1 {options}"
        )
    assert not list(tmp_path.glob("c.*"))


@pytest.mark.parametrize("program", [encode_corpus, merge_corpus, import_fairseq])
@pytest.mark.parametrize("output", ["out/", "."])
def test_a_corpus_needs_a_name(
    program: Any, output: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    words = {
        encode_corpus: ["--input", "in.jsonl", "--tokenizer", folder],
        merge_corpus: ["a", "b"],
        import_fairseq: ["a", "--tokenizer", folder],
    }
    with pytest.raises(UserError, match=f"--output: '{output}' is a folder"):
        program.main([*words[program], "--output", output])
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("program", [merge_corpus, import_fairseq])
def test_a_place_that_cannot_be_written_is_named(program: Any, folder: str, tmp_path: Path) -> None:
    words = {merge_corpus: [], import_fairseq: ["--tokenizer", folder]}[program]
    with pytest.raises(UserError, match="^/proc: cannot be written"):
        program.main([str(tmp_path / "a"), *words, "--output", "/proc/q"])


def test_overwrite_must_be_asked_for(folder: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD + b"{\n")
    encode(folder, tmp_path / "c", source, options="--workers 1 --keep-going")
    source.write_bytes(GOOD * 2)
    with pytest.raises(UserError, match="c.json: exists already"):
        encode(folder, tmp_path / "c", source)
    with pytest.raises(UserError, match="exists already"):
        train_tokenizer.main(["--input", str(source), "--output", folder])
    assert (tmp_path / "c.rejected.jsonl").exists()
    encode(folder, tmp_path / "c", source, options="--workers 1 --overwrite")
    assert load_manifest(tmp_path / "c").documents == 2
    assert not (tmp_path / "c.rejected.jsonl").exists()


def test_many_sources_stay_a_short_manifest(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(writer, "MAX_SOURCES", 256)
    rows = [json.dumps({"text": "word", "source": f"http-{i}"}) for i in range(400)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    encode(folder, tmp_path / "c", tmp_path / "in.jsonl")
    sources = load_manifest(tmp_path / "c").sources
    assert len(sources) == 257 and sources["other"].documents == 400 - 256


def test_tokenizer_sample_depends_on_the_texts_alone() -> None:
    documents = [Document(text, text.encode(), None) for text in (f"text {i} " * 9 for i in range(500))]
    some, total = train_tokenizer.sample(documents, 10_000)
    assert total == sum(len(document.utf8) for document in documents)
    assert 9_000 < sum(map(len, some)) <= 10_000
    assert train_tokenizer.sample(documents[::-1], 10_000)[0] == some
    everything, _ = train_tokenizer.sample(documents, total)
    assert sorted(everything) == sorted(document.text for document in documents)


def test_merge_and_inspect(
    folder: str, lines: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, part in (("a", lines[:20]), ("b", lines[20:]), ("all", lines)):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(part))
        encode(folder, tmp_path / name, tmp_path / f"{name}.jsonl")
    parts = [str(tmp_path / name) for name in "ab"]
    merge_corpus.main([*parts, "--output", str(tmp_path / "joined")])
    assert load_manifest(tmp_path / "joined").fingerprint == load_manifest(tmp_path / "all").fingerprint
    capsys.readouterr()
    inspect_corpus.main([str(tmp_path / "joined"), "--json", "--top", "7"])
    report = json.loads(capsys.readouterr().out)
    reader, tokenizer = IndexedReader(tmp_path / "all"), load_tokenizer(folder)
    counts = np.bincount(reader.tokens, minlength=800)
    assert [entry["count"] for entry in report["frequent"]] == sorted(counts, reverse=True)[:7]
    assert all(entry["piece"] == tokenizer.piece(entry["id"]) for entry in report["frequent"])
    assert report["lengths"]["max"] == reader.document_lengths.max()
    assert report["specials_inside"] == report["unknown"] == 0
    for option in ("--samples", "--top"):
        with pytest.raises(UserError, match=f"{option}: '-1' is not a number of at least 0"):
            inspect_corpus.main([str(tmp_path / "joined"), option, "-1"])
    assert report["samples"][0]["text"] == tokenizer.decode(reader.document(0)[:48])
    assert sum(bin["documents"] for bin in report["histogram"]) == len(lines)
    lengths = reader.document_lengths
    for bin in report["histogram"]:
        assert bin["documents"] == ((lengths >= bin["from"]) & (lengths <= bin["to"])).sum()
    inspect_corpus.main([str(tmp_path / "joined")])
    assert "a window as the model sees it" in capsys.readouterr().out


def test_a_corpus_is_merged_once(folder: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    encode(folder, tmp_path / "a", tmp_path / "in.jsonl")
    prefix, output = str(tmp_path / "a"), str(tmp_path / "out")
    for other in (prefix, f"{tmp_path}/../{tmp_path.name}/a"):
        with pytest.raises(UserError, match=f"{other}: the same corpus as {prefix}"):
            merge_corpus.main([prefix, other, "--output", output])
    assert not list(tmp_path.glob("out*"))


def test_a_window_is_shown_as_each_method_sees_it(
    folder: str, lines: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines) + b'{"text": "<b>&amp;", "source": "a&b/1"}\n')
    encode(folder, tmp_path / "c", tmp_path / "in.jsonl")
    capsys.readouterr()
    page = tmp_path / "c.html"
    inspect_corpus.main(
        [str(tmp_path / "c"), "--json", "--rate", "0.3", "--html", str(page), "--samples", "99"]
    )
    report = json.loads(capsys.readouterr().out)
    found = {}
    for window in report["windows"]:
        pieces = window["pieces"]
        assert len(pieces) == 96 and pieces[0][1] == "<s>" and pieces[-1][1] == "</s>"
        states = [state for state, _, _ in pieces]
        found[window["method"]] = [states.count(state) for state in ("masked", "random", "kept")]
        assert all((true == shown) == (state in ("context", "kept")) for state, true, shown in pieces)
    assert found == {  # of 94 tokens: 15 % are 14, 30 % are 28, 50 % are 47
        "mlm, 15 %, uniform": [11, 2, 1],
        "mlm, 15 %, whole words": [11, 2, 1],
        "mlm, 15 %, spans": [11, 2, 1],
        "3ml, 50 %, uniform": [38, 5, 4],
        "mae-lm, 15 %, all [MASK]": [14, 0, 0],
        "mlm, 30 %, uniform": [22, 3, 3],
    }
    text = page.read_text(encoding="utf-8")
    assert text.count('<span class="masked">') == sum(counts[0] for counts in found.values()) + 1
    assert "&lt;b&gt;&amp;amp;" in text and "a&amp;b" in text and "<b>" not in text
    assert inspect_corpus.mark("random", "\u2581a", "\u2581b") == "{ a> b}"
    HTMLParser().feed(text)


def test_foreign_corpora_are_adopted(
    folder: str, lines: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines))
    encode(folder, tmp_path / "c", tmp_path / "in.jsonl")
    prefix, known = str(tmp_path / "c"), load_manifest(tmp_path / "c")
    adopting = [prefix, "--write-manifest", "--tokenizer", folder]
    with pytest.raises(UserError, match="exists already"):
        verify_corpus.main(adopting)
    (tmp_path / "c.json").unlink()
    inspect_corpus.main([prefix])  # works, without text
    assert "no manifest" in capsys.readouterr().out
    with pytest.raises(UserError, match="no manifest; .* --write-manifest --tokenizer DIR"):
        verify_corpus.main([prefix])
    with pytest.raises(UserError, match="belong together"):
        verify_corpus.main([prefix, "--write-manifest"])
    verify_corpus.main(adopting)
    assert load_manifest(prefix).fingerprint == known.fingerprint
    capsys.readouterr()
    verify_corpus.main([prefix, "--json"])
    (report,) = json.loads(capsys.readouterr().out)
    assert report["good"] and report["tokens"] == known.tokens


def test_programs_from_sample_to_corpus(tmp_path: Path) -> None:
    tokenizer, prefix = str(tmp_path / "t"), str(tmp_path / "c")
    training = ["--input", str(VALID), "--output", tokenizer, "--vocab-size", "700", "--kind", "bpe"]
    done = program("train_tokenizer", *training, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["vocab_size"] == 700
    encoding = ["--input", str(VALID), "--tokenizer", tokenizer, "--output", prefix]
    done = program("encode_corpus", *encoding, "--workers", "2", "--json")
    assert done.returncode == 0, done.stderr
    (corpus,) = json.loads(done.stdout)["corpora"]
    assert corpus["documents"] == 36 and corpus["tokens"] == IndexedReader(prefix).num_tokens
    done = program("encode_corpus", *encoding)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    data = bytearray((tmp_path / "c.bin").read_bytes())
    data[5] ^= 1
    (tmp_path / "c.bin").write_bytes(data)
    done = program("verify_corpus", prefix)
    assert done.returncode == 2 and "c.bin: bytes 0 to" in done.stderr


@pytest.mark.parametrize(
    "name", ["train_tokenizer", "encode_corpus", "merge_corpus", "inspect_corpus", "verify_corpus"]
)
def test_version(name: str) -> None:
    done = program(name, "--version")
    assert done.returncode == 0 and done.stdout.startswith("LateMask ")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_signal_leaves_nothing_half_written(
    number: signal.Signals, code: int, workers: str, folder: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    # Caught in the middle of the work, whenever the signal comes: the text has no end.
    (tmp_path / "slow.py").write_text(
        "import time; from tools.shared import console; from tools.text import readers as text_files\n"
        "from tools.encode_corpus import __main__ as encode_corpus\n"
        "read = text_files._TextReader.read\n"
        "def slow(self, stop):\n"
        "    for batch in read(self, stop):\n"
        "        while True:\n"
        "            yield batch; time.sleep(0.05)\n"
        "text_files._TextReader.read = slow\n"
        "if __name__ == '__main__': console.run(encode_corpus.main)\n"
    )
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer", folder, "--output", str(output / "c")]
    command = [sys.executable, str(tmp_path / "slow.py"), *arguments, "--workers", workers]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    while not list(tmp_path.glob("out/c.parts/*.partial")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert not list(output.iterdir())


def test_the_split_is_for_ever() -> None:
    """Those who encode again, with a later version too, hold out the same documents."""
    assert encode_parts.held_out(b"a good line", 0.212958)
    assert not encode_parts.held_out(b"a good line", 0.212957)


def test_a_dead_worker_is_an_error_and_no_hang(folder: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    # Its start fails, as a killed one's work does.
    job = EncodeJob(str(tmp_path), f"{folder}/none", "", "text", "line", 1000, 0.0, False, False)
    tasks = [EncodeTask(0, str(tmp_path / "in.jsonl"), 10, 3, i, 3, (len(GOOD), 0)) for i in range(3)]
    with pytest.raises(UserError, match="a worker process was killed"):
        encode_corpus.run_tasks(tasks, job, 2, lambda done: None)
