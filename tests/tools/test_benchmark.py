"""The benchmark's rows: complete, of the right sides, and with the arithmetic that they claim."""

import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UserError
from tools.benchmark import __main__ as benchmark
from tools.benchmark import corpus as benchmark_corpus
from tools.shared import measure

SAMPLE = Path(__file__).parents[2] / "tools" / "sample" / "train.jsonl.gz"

KEYS = {
    *("name", "ours", "peer", "unit", "ratio", "spread", "runs"),
    *("device", "dtype", "versions", "commit"),
}


def test_ratios_are_of_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 4.0, 8.0, 2.0, 1.0, 2.0])  # ours, peer; peer, ours; ours, peer
    order: list[str] = []

    def timed(side: measure.Side) -> float:
        order.append(side())
        return next(seconds)

    monkeypatch.setattr(measure, "cpu_seconds", timed)
    row = measure.compare("n", "MB/s", 8, lambda: "ours", lambda: "peer", 3, ["numpy", "no-such-package"])
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert (row.ours, row.peer) == (8, 2)  # medians of 8, 4, 8 and of 2, 1, 4
    assert (row.ratio, row.spread, row.runs) == (4, [2, 4], 3)
    assert row.versions["no-such-package"] == "absent" and row.versions["numpy"] != "absent"


def test_preparation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def pass_time(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    monkeypatch.setattr(measure.time, "process_time", lambda: clock)

    def side() -> measure.Side:
        pass_time(100)
        return lambda: pass_time(3)

    assert measure.cpu_seconds(side) == 3


@pytest.mark.parametrize("only", ["unigram, text", "fairseq", "start-up", "unseen words, byte"])
def test_rows(only: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["corpus", "--runs", "1", "--max-megabytes", "0.3", "--vocab-size", "500", "--only", only]
    words += ["--unseen-megabytes", "0.5"]
    assert benchmark.main([*words, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert set(row) >= KEYS and only in row["name"]
    assert row["ours"] > 0 and row["runs"] == 1
    assert (row["peer"] is None) == only.startswith(("start-up", "unseen"))


def test_ids_of_every_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of each kind of tokenizer, past the megabytes that are used for speeds."""
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as lines:
        count = sum(1 for _ in lines)
    words = ["--max-megabytes", "0.1", "--vocab-size", "500", "--only", "ids", "--json"]
    assert benchmark.main(["corpus", *words, "--output", str(tmp_path / "ids")]) == 0
    rows = json.loads(capsys.readouterr().out)
    kinds = ["byte-level BPE, plain Python", "byte-level BPE, fastokens"]
    kinds += ["sentencepiece unigram", "sentencepiece bpe"]
    there = [kind for kind in kinds if "fastokens" not in kind or importlib.util.find_spec("fastokens")]
    assert [row["name"] for row in rows] == [f"ids, {kind}" for kind in there]
    for row in rows:
        assert (row["ours"], row["peer"], row["unit"]) == (count, count, measure.SAME)
        inputs = [{"name": SAMPLE.name, "bytes": SAMPLE.stat().st_size}]
        assert row["settings"] == {"inputs": inputs, "vocab_size": 500}
    assert json.loads((tmp_path / "ids.json").read_text()) == rows
    assert not (tmp_path / "ids.png").exists()  # nothing to draw


def test_one_document_with_other_ids_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, texts = benchmark_corpus.reference, benchmark_corpus.read_texts([str(SAMPLE)], 1 << 30)

    def bad(tokenizer: Tokenizer) -> Callable[[list[str]], list[list[int]]]:
        encode = good(tokenizer)
        return lambda some: [ids[text == texts[-1] :] for text, ids in zip(some, encode(some), strict=True)]

    monkeypatch.setattr(benchmark_corpus, "reference", bad)
    words = ["--max-megabytes", "0.1", "--vocab-size", "500", "--only", "ids, sentencepiece bpe"]
    assert benchmark.main(["corpus", *words, "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["ours"], row["peer"]) == (len(texts) - 1, len(texts))
    monkeypatch.setattr(benchmark_corpus, "reference", good)
    assert benchmark.main(["corpus", *words]) == 0
    assert f"{len(texts)}   {len(texts)}  {measure.SAME}" in capsys.readouterr().out


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="--runs: '0' is not a number of at least 1"):
        benchmark.main(["corpus", "--runs", "0"])
    with pytest.raises(UserError, match="invalid choice: 'nothing'"):
        benchmark.main(["nothing"])
    for subject in ("corpus", "head", "scaling"):
        with pytest.raises(UserError, match="--only zzz: in none of the names: .*;"):
            benchmark.main([subject, "--only", "zzz"])
    with pytest.raises(UserError, match="--threads: '-1' is not a number of at least 1"):
        benchmark.main(["step", "--threads", "-1"])
    with pytest.raises(UserError, match="--output: 'out/' is a folder"):
        benchmark.main(["corpus", "--output", "out/"])
