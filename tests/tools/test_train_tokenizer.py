"""Training a vocabulary: sizes it cannot have, and signals while SentencePiece works."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.data.tokenizer import SMALLEST
from pretrain.errors import UserError
from tests.data.test_tokenizer import byte_level
from tools import train_tokenizer
from tools.encode_corpus.parts import held_out
from tools.text.readers import Document

SAMPLE = Path(__file__).parents[2] / "tools" / "sample"
TEXT = "hello world\n\nanother short text here\n"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(("size", "words"), [(32_000, "at most"), (SMALLEST, "take")])
def test_the_size_that_an_error_names_is_possible(tmp_path: Path, kind: str, size: int, words: str) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    arguments = ["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "t"), "--kind", kind]
    with pytest.raises(UserError, match=rf"--vocab-size {size}: .*{words} \d+") as caught:
        train_tokenizer.main([*arguments, "--vocab-size", str(size)])
    named = int(re.search(rf"{words} (\d+)", str(caught.value))[1])
    assert not (tmp_path / "t").exists()
    beyond = named + 1 if size > named else named - 1
    with pytest.raises(UserError, match=f"{words} {named}"):
        train_tokenizer.main([*arguments, "--vocab-size", str(beyond)])
    assert train_tokenizer.main([*arguments, "--vocab-size", str(named)]) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--vocab-size 3", f"--vocab-size: '3' is not a number of at least {SMALLEST}"),
        ("--max-megabytes 0", "--max-megabytes: '0' is not a number above 0"),
        ("--output /proc/q", "/proc/q: cannot be written"),
    ],
)
def test_mistakes_are_told_before_a_text_is_read(tmp_path: Path, words: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        train_tokenizer.main(
            ["--input", str(tmp_path / "none.txt"), "--output", str(tmp_path / "t"), *words.split()]
        )


@pytest.mark.parametrize("content", [b"", b" \n\n \n"])
def test_there_must_be_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.txt: no text to train on"):
        train_tokenizer.main(["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "t")])


def test_what_is_passed_over_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "a.jsonl", str(tmp_path / "t")
    good = [json.dumps({"text": f"{TEXT} {i}"}) for i in range(9)]
    source.write_text("\n".join(["{bad", *good, json.dumps({"text": "x" * 1000}), '{"no": 1}']))
    words = ["--input", str(source), "--output", output, "--max-document-bytes", "500", "--keep-going"]
    words += ["--vocab-size", "285", "--overwrite"]
    train_tokenizer.main([*words, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["rejected"] == 3
    assert report["bytes"] == sum(len(json.loads(line)["text"]) for line in good)
    train_tokenizer.main(words)
    assert "\n3 rejected lines passed over\n" in capsys.readouterr().out
    source.write_text("{bad\n")
    with pytest.raises(UserError, match="no text to train on, but 1 rejected line passed over"):
        train_tokenizer.main(words)


def test_a_text_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.txt"
    source.write_text(TEXT)
    found = train_tokenizer.held_out

    def touched(utf8: bytes, share: float) -> bool:
        os.utime(source, (1, 1))
        return found(utf8, share)

    monkeypatch.setattr(train_tokenizer, "held_out", touched)
    with pytest.raises(UserError, match=r"a\.txt: was changed or removed while it was read"):
        train_tokenizer.main(["--input", str(source), "--output", str(tmp_path / "t"), "--vocab-size", "280"])
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_only_a_tokenizer_of_ours_is_replaced(tmp_path: Path, name: str) -> None:
    source, output = tmp_path / "a.txt", tmp_path / "t"
    source.write_text(TEXT)
    words = ["--input", str(source), "--output", str(output), "--vocab-size", "276", "--overwrite"]
    for _ in range(2):
        train_tokenizer.main(words)
    other = tmp_path / "model"
    other.mkdir()
    (other / name).write_text("of a model")
    (other / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not made by this program"):
        train_tokenizer.main([*words, "--output", str(other)])
    assert (other / name).read_text() == "of a model"


def test_an_import_never_replaces_what_it_reads(tmp_path: Path) -> None:
    source = tmp_path / "t"
    source.mkdir()
    byte_level(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for folder in (str(source), f"{source}/../t"):
        with pytest.raises(UserError, match="is also what --import reads"):
            train_tokenizer.main(["--import", str(source), "--output", folder, "--overwrite"])
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    for _ in range(2):
        train_tokenizer.main(["--import", str(source), "--output", str(tmp_path / "u"), "--overwrite"])


def test_reserved_characters_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(f"{TEXT}\u2585 {TEXT}\u2585", encoding="utf-8")
    words = ["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "t"), "--vocab-size", "278"]
    train_tokenizer.main(words)
    assert "reserves (U+2585 2 times): lines were cut there" in capsys.readouterr().out
    train_tokenizer.main([*words, "--overwrite", "--json"])
    assert json.loads(capsys.readouterr().out)["reserved"] == {"U+2585": 2}


def test_the_sample_is_no_nearer_to_held_out_documents_than_chance() -> None:
    documents = [Document(text, text.encode(), None) for text in (f"text number {i}" for i in range(20_000))]
    texts, _ = train_tokenizer.sample(documents, 40_000)
    assert 2_000 < len(texts) < 3_000
    for share in (0.02, 0.05, 0.3):
        held = sum(held_out(text.encode(), share) for text in texts)
        error = (len(texts) * share * (1 - share)) ** 0.5
        assert abs(held - share * len(texts)) < 5 * error


def test_an_import_is_without_chance_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError):
        byte_level(tmp_path, specials=("<|endoftext|>",))
    source, output = tmp_path / "tokenizer.json", tmp_path / "t"
    state = json.loads(source.read_text(encoding="utf-8"))
    state["model"]["dropout"] = 0.3
    source.write_text(json.dumps(state), encoding="utf-8")
    train_tokenizer.main(["--import", str(source), "--output", str(output)])
    shown = capsys.readouterr().out
    assert "switched off, which its file had on: truncation, padding, dropout\n" in shown
    assert "no piece <s> <pad> </s> <unk> <mask>: good for datasets, not for pretrain\n" in shown
    state |= {"truncation": None, "padding": None, "model": state["model"] | {"dropout": None}}
    assert json.loads((output / "tokenizer.json").read_text(encoding="utf-8")) == state


def test_a_failed_import_names_the_source_and_leaves_nothing(tmp_path: Path) -> None:
    source, output = tmp_path / "bad", tmp_path / "t"
    source.mkdir()
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=f"^{source}: not a tokenizer.json"):
        train_tokenizer.main(["--import", str(source), "--output", str(output)])
    assert not output.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_training(tmp_path: Path, number: signal.Signals) -> None:
    text = tmp_path / "train.jsonl.gz"
    text.write_bytes((SAMPLE / "train.jsonl.gz").read_bytes() * 4)  # gzip members may follow each other
    arguments = ["--input", str(text), "--output", str(tmp_path / "t"), "--vocab-size", "20000"]
    command = [sys.executable, "-m", "tools.train_tokenizer", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not process.stderr.readline().startswith("training on"):
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait() == -number
    assert not (tmp_path / "t").exists()
