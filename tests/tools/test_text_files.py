"""Reading raw text: pieces tile a file whatever its kind, and every bad document is named."""

import bz2
import gzip
import json
import lzma
import random
import sys
from itertools import product
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from pretrain.errors import UserError
from tools.shared import console
from tools.text import readers as text_files
from tools.text.files import Unit, find_files, missing_parts
from tools.text.readers import Document, Rejected, cut, open_reader

PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def whole(path: Path, unit: Unit = "line", **options) -> list[Document | Rejected]:
    with open_reader(path, unit, **options) as reader:
        return [item for batch in reader.read(None) for item in batch.items]


def by_pieces(path: Path, unit: Unit, step: int) -> list[list]:
    """Items of each piece, every piece read by a reader of its own."""
    pieces, number = [], 0
    while True:
        with open_reader(path, unit) as reader:
            if not reader.seek(number * step):
                return pieces
            items, lines = [], reader.lines_before()
            for batch in reader.read((number + 1) * step):
                moved = (
                    item._replace(line=lines + item.line) if isinstance(item, Rejected) else item
                    for item in batch.items
                )
                items += moved
        pieces.append(items)
        number += 1


def striding(path: Path, unit: Unit, step: int, first: int, stride: int) -> dict[int, list]:
    """Items of pieces first, first + stride, ..., read one after the other."""
    found, number = {}, first
    with open_reader(path, unit) as reader:
        while reader.seek(number * step):
            found[number] = [item for batch in reader.read((number + 1) * step) for item in batch.items]
            number += stride
    return found


def random_text(seed: int, unit: str) -> bytes:
    draw = random.Random(seed)
    lines = []
    for _ in range(draw.randrange(1, 40)):
        kind = draw.random()
        if unit == "json":
            line = json.dumps({"text": "x" * draw.randrange(30)}) if kind < 0.8 else "{bad"
        else:
            line = "word " * draw.randrange(9) if kind < 0.6 else draw.choice(["", " ", "\t ", "\r"])
        lines.append(line)
    return "\n".join(lines).encode() + draw.choice([b"", b"\n", b"\n\n"])


@pytest.mark.parametrize("unit", ["json", "line", "blank-line", "file"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_pieces_tile_the_file(
    unit: Unit, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_BLANK_LINE", 12)  # so that files are entered in the middle
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 64)
    for seed in range(25):
        path = tmp_path / f"{seed}.{'jsonl' if unit == 'json' else 'txt'}{suffix}"
        path.write_bytes(PACK[suffix](random_text(seed, unit)))
        expected = whole(path, unit)
        for step in (1, 7, 64, 301, 10_000):
            pieces = by_pieces(path, unit, step)
            assert [item for piece in pieces for item in piece] == expected
            plain = [[i if isinstance(i, Document) else i.reason for i in piece] for piece in pieces]
            for stride in (1, 3):
                shares = [striding(path, unit, step, first, stride) for first in range(stride)]
                merged = {number: items for share in shares for number, items in share.items()}
                assert sorted(merged) == list(range(len(pieces)))
                for number, items in merged.items():
                    assert [i if isinstance(i, Document) else i.reason for i in items] == plain[number]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("blank-line", ["a\nb", "c\u2028d\x0ce", " f"]),
        ("line", ["a", "b", "c\u2028d\x0ce", " f"]),
        ("file", ["a\nb\n\n\nc\u2028d\x0ce\n  \n f"]),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", PACK)
def test_plain_text_units(
    unit: Unit,
    expected: list[str],
    block_bytes: int,
    newline: str,
    suffix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", block_bytes)
    path = tmp_path / f"t.txt{suffix}"
    path.write_bytes(
        PACK[suffix](b"\xef\xbb\xbf" + "a\nb\n\n\nc\u2028d\x0ce\n  \n f".replace("\n", newline).encode())
    )
    assert [item.text for item in whole(path, unit)] == expected


def test_bad_bytes_in_plain_text_have_a_line(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"\nfine\n\nthis\r\nis \xff not\n\nfine")
    good, bad, last = whole(path, "blank-line")
    assert (good.text, last.text) == ("fine", "fine")
    assert str(bad) == f"{path}:5: not UTF-8"


@pytest.mark.parametrize("mark", ["utf-16", "utf-16-le", "utf-16-be"])
def test_json_lines_of_another_encoding_are_told(mark: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "fine"}\n{"text": "good"}\n'.encode(mark))
    first, *_ = whole(tmp_path / "a.jsonl", text_key="text")
    assert isinstance(first, Rejected) and first.reason.endswith("; UTF-16? save it as UTF-8")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}\n')
    (bad,) = whole(tmp_path / "b.jsonl", text_key="text")
    assert bad.reason == "not UTF-8 (byte 10 of the line)"


@pytest.mark.parametrize("unit", ["json", "line", "blank-line", "file"])
def test_long_documents_are_never_held(unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 1 << 10)
    short = b'{"text": "x"}\n\n'
    path = tmp_path / ("t.jsonl" if unit == "json" else "t.txt")
    path.write_bytes(short + b'{"text": "' + b"y" * 300_000 + b'"}\n\n' + short)
    items = whole(path, unit, max_bytes=5000)
    bad = items if unit == "file" else items[1:2]
    assert len(items) == (1 if unit == "file" else 3)
    assert all(isinstance(item, Document) for item in items if item not in bad)
    assert bad[0].line == (1 if unit == "file" else 3)
    assert bad[0].reason.startswith("longer than 5,000 bytes") and len(bad[0].content) <= 1000


ROWS = [{"text": f"row {i}", "source": "a/b" if i % 2 else None} for i in range(200)]
ROWS[150]["text"] = None


def write_parquet(path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=40)


def write_arrow_stream(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=40)


def write_arrow_file(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=40)


@pytest.mark.parametrize(
    ("name", "write"),
    [("t.parquet", write_parquet), ("t.arrow", write_arrow_stream), ("t.arrow", write_arrow_file)],
)
def test_tables(name: str, write, tmp_path: Path) -> None:
    path = tmp_path / name
    write(path)
    items = whole(path)
    assert [item.text for item in items if isinstance(item, Document)] == [
        r["text"] for r in ROWS if r["text"]
    ]
    assert [item.source for item in items[:2]] == [None, "a/b"]
    assert str(items[150]) == f"{path}:151: 'text' is not a string but NoneType"
    assert cut(path, "line", 1 << 20) == (1, 5)
    assert [item for piece in by_pieces(path, "row", 1) for item in piece] == items
    assert len(by_pieces(path, "row", 2)) == 3
    with pytest.raises(UserError, match=r"no column 'body' \(it has text, source\)"):
        open_reader(path, text_key="body")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{name}: damaged or truncated"):
        open_reader(path)


def test_tables_need_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="need pyarrow: pip install pyarrow"):
        open_reader(tmp_path / "t.parquet")


def test_a_saved_hugging_face_dataset(tmp_path: Path) -> None:
    """The layout of `datasets.Dataset.save_to_disk`: Arrow streams and state.json, which orders them."""
    for name in ("data-00001-of-00002.arrow", "data-00000-of-00002.arrow"):
        write_arrow_stream(tmp_path / name)
    state = {"_data_files": [{"filename": f"data-0000{i}-of-00002.arrow"} for i in (1, 0)]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "dataset_info.json").write_text("{}")
    assert [file.name[9] for file in find_files([str(tmp_path)])] == ["1", "0"]
    (tmp_path / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "i"}]}))
    with pytest.raises(UserError, match="flatten_indices"):
        find_files([str(tmp_path)])


def test_folders_are_searched(tmp_path: Path) -> None:
    for name in ("b.jsonl.xz", "a/x.txt", "a/y.txt.bz2", "a/README.md", "z.parquet", "a/notes.json.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(file.relative_to(tmp_path)) for file in find_files([str(tmp_path)])]
    assert found == ["a/notes.json.gz", "a/x.txt", "a/y.txt.bz2", "b.jsonl.xz", "z.parquet"]
    with pytest.raises(UserError, match="unknown kind of file"):
        find_files([str(tmp_path / "a" / "README.md")])
    with pytest.raises(UserError, match="x.txt: the same file as"):
        find_files([str(tmp_path / "a"), str(tmp_path / "a" / "x.*")])


@pytest.mark.parametrize("other", ["./a.txt", "../here/a.txt", "link.txt", "linked/a.txt"])
def test_one_file_under_two_names_is_named_twice(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "a.txt").touch()
    (here / "link.txt").symlink_to("a.txt")
    (here / "linked").symlink_to(here)
    for names in ([str(here / "a.txt"), other], [other, other]):
        with pytest.raises(UserError, match="the same file as"):
            find_files(names)


@pytest.mark.parametrize(
    ("numbers", "count", "missing"),
    [
        ("0 1 3", "5", "2, 4"),
        ("1 2 4", "4", "3"),  # counted from 1
        ("0 1 2 3 4", "5", None),
        ("1 2 3", "3", None),
        ("7", "20", None),  # one alone was meant
        ("0 1", "100000000000", "2, 3, 4, 5, 6, ..."),
    ],
)
def test_missing_parts_are_told(numbers: str, count: str, missing: str | None, tmp_path: Path) -> None:
    """Absence is not the end: a download may have been cut short."""
    for number in numbers.split():
        (tmp_path / f"train-{number:0>5}-of-{count:0>5}.jsonl").touch()
    (tmp_path / "other-00009-of-00002").with_suffix(".txt").touch()
    held = f"{len(numbers.split())} of {count} parts"
    told = [f"{tmp_path}/train-*-of-{count:0>5}.jsonl: {held}; missing: {missing}"] if missing else []
    assert missing_parts(find_files([str(tmp_path)])) == told


def test_a_folder_is_searched_for_text_alone(tmp_path: Path) -> None:
    """Not for what lies there when the output of a job or a tokenizer is in it."""
    others = ["c.json", "c.rejected.jsonl", "c.parts/stdin.jsonl", "c.parts.done/x.txt", "t/tokenizer.json"]
    for name in ("a.txt", "d.parts.txt", *others, ".cache/x.txt", ".b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in find_files([str(tmp_path)])] == ["a.txt", "d.parts.txt"]
    for name in others:
        assert find_files([str(tmp_path / name)]) == [tmp_path / name]
    with pytest.raises(UserError, match="json: by name or pattern"):
        find_files([str(tmp_path / "t")])


def test_a_split_of_a_saved_dataset_must_be_named(tmp_path: Path) -> None:
    """The layout of `datasets.DatasetDict.save_to_disk`."""
    for split in ("train", "test"):
        (tmp_path / "d" / split).mkdir(parents=True)
        write_arrow_stream(tmp_path / "d" / split / "data-00000-of-00001.arrow")
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (tmp_path / "d" / split / "state.json").write_text(json.dumps(state))
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for name in ("d", "."):
        with pytest.raises(
            UserError, match=f"several splits; name one: {tmp_path}/d/train, {tmp_path}/d/test"
        ):
            find_files([str(tmp_path / name)])
    assert len(find_files([str(tmp_path / "d" / "test")])) == 1
    for file, text in product(("test/state.json", "dataset_dict.json"), ("{", "[]", "{}", "[" * 100_000)):
        (tmp_path / "d" / file).write_text(text)
        with pytest.raises(UserError, match=f"{file}: not as `datasets` writes it"):
            find_files([str(tmp_path / "d" / file.rpartition("/")[0])])


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_current_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="an empty name"):
        find_files(["a.txt", name])


def test_a_name_that_exists_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wiki[1].jsonl", "wiki1.jsonl", "g[1]/a.jsonl", "g1/a.jsonl", "@a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for base in ("", f"{tmp_path}/"):
        for name in ("wiki[1].jsonl", "g[1]", "g[1]/*.jsonl", "g[1]/**/a.jsonl"):
            found = find_files([base + name])
            assert [str(file).partition("[")[1] for file in found] == ["["]
        assert len(find_files([f"{base}wiki*.jsonl"])) == 2
        assert find_files([f"{base}wiki[12].jsonl"]) == [Path(f"{base}wiki1.jsonl")]
    parser = console.parser("test", "")
    parser.add_argument("names", nargs="+")
    assert parser.parse_args(["@a.txt", f"@{tmp_path}/@a.txt"]).names == ["@a.txt"]


def write_table(table: pyarrow.Table, path: Path) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=70)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)


def unchecked(values: list[bytes | None]) -> pyarrow.Array:
    """Strings that may be no UTF-8, as another writer leaves them."""
    return pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_bad_rows_are_told_like_bad_lines(name: str, tmp_path: Path) -> None:
    texts: list[bytes | None] = [b"good"] * 200
    sources: list[bytes | None] = [b"a/b"] * 200
    texts[3], texts[100], sources[101] = b"caf\xe9", None, b"\xff/x"
    table = pyarrow.table({"text": unchecked(texts), "source": unchecked(sources)})
    write_table(table, tmp_path / name)
    items = whole(tmp_path / name)
    bad = [item for item in items if isinstance(item, Rejected)]
    assert len(items) == 200
    assert [str(item).removeprefix(f"{tmp_path}/{name}") for item in bad] == [
        ":4: 'text' is not UTF-8 (byte 3)",
        ":101: 'text' is not a string but NoneType",
        ":102: 'source' is not UTF-8 (byte 0)",
    ]
    assert [item.content for item in bad] == [r"caf\xe9", "None", "good"]
    assert [item for piece in by_pieces(tmp_path / name, "row", 1) for item in piece] == items


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
@pytest.mark.parametrize("column", [pyarrow.array([5, None]), pyarrow.array([b"x", b"y"]), pyarrow.nulls(2)])
def test_a_column_of_another_type(name: str, column: pyarrow.Array, tmp_path: Path) -> None:
    write_table(pyarrow.table({"text": column}), tmp_path / name)
    assert [item.line for item in whole(tmp_path / name) if isinstance(item, Rejected)] == [1, 2]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), "dictionary"])
@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_all_kinds_of_strings(name: str, kind, tmp_path: Path) -> None:
    column = pyarrow.array(["a", "b", "a"])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    write_table(pyarrow.table({"text": column}), tmp_path / name)
    assert [item.text for item in whole(tmp_path / name)] == ["a", "b", "a"]


@pytest.mark.parametrize("checked", [True, False])
def test_a_damaged_page_names_its_file(checked: bool, tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"row {i} " * 50 for i in range(300)]})
    path = tmp_path / "t.parquet"
    compression = "none" if checked else "snappy"
    parquet.write_table(
        table, path, compression=compression, write_page_checksum=checked, use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    for i in range(2000, 2040):
        data[i] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"t.parquet: damaged or truncated .*; copy it again"):
        whole(path)


def test_an_arrow_stream_must_end(tmp_path: Path) -> None:
    """And nothing may come after it, for that would not be read."""
    path = tmp_path / "t.arrow"
    write_arrow_stream(path)
    data = path.read_bytes()
    for bad in (data[:-8], data + data):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"t.arrow: damaged or truncated .*stream"):
            whole(path)


def test_offsets_beyond_the_text_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "t.arrow"
    write_table(pyarrow.table({"text": ["some", "words", "here"]}), path)
    data = path.read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 4, 9, 13))
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, offsets[:4] + (1 << 30).to_bytes(4, "little") + offsets[8:]))
    with pytest.raises(UserError, match=r"t.arrow: damaged or truncated"):
        whole(path)


def test_half_of_a_pair_in_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good", "source": "\\ud800"}\n')
    (bad,) = whole(tmp_path / "a.jsonl")
    assert isinstance(bad, Rejected) and bad.reason == "half of a surrogate pair in 'source'"
