"""The training benchmarks: every side does the same work, and every subject gives its rows."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch

from pretrain.errors import UserError
from tools.benchmark import __main__ as benchmark
from tools.benchmark import network, training
from tools.benchmark.head import available, growth, prepared
from tools.benchmark.peers import MODERN, PEERS, hugging_face_model
from tools.benchmark.step import gaps
from tools.benchmark.task import SIZES, BenchmarkTask, in_turns, ours

CPU = torch.device("cpu")
TINY = ["--size", "tiny", "--length", "24", "--batch-size", "2", "--runs", "1", "--threads", "1"]
ON_CPU = [name for name in PEERS if name != "megatron-core"]


CASES = [(name, "fp32") for name in ON_CPU] + [("hugging face", "bf16"), ("fairseq style", "bf16")]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_peer_computes_our_losses(name: str, precision: str) -> None:
    """From equal weights on equal batches, also after updates."""
    task = BenchmarkTask("tiny", 24, 2, precision)
    mine, theirs = ours(task), PEERS[name][0](task)
    first = float(mine())
    assert float(theirs()) == pytest.approx(first, rel=1e-6 if precision == "fp32" else 1e-4)
    for _ in range(3):
        last = float(mine())
        assert float(theirs()) == pytest.approx(last, rel=1e-6 if precision == "fp32" else 1e-4)
    assert last < first * 0.999


@pytest.mark.parametrize("name", MODERN)
def test_modernbert_computes_the_losses_of_our_modern_block(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "ffn_size": 48}
    monkeypatch.setitem(SIZES, "modernbert-tiny", shape)
    task = BenchmarkTask("modernbert-tiny", 24, 2)
    mine, theirs = ours(task), PEERS[name][0](task)
    with torch.compiler.set_stance("force_eager"):  # compiling takes a minute here
        for _ in range(3):
            last = float(mine())
            assert float(theirs()) == pytest.approx(last, rel=1e-6)


def test_gaps_are_told_by_the_kernel_that_ends_them() -> None:
    """Two overlap; one begins inside a longer one."""
    kernels = [
        (30.0, 40.0, "mm"),
        (0.0, 10.0, "mm"),
        (5.0, 20.0, "norm"),
        (6.0, 7.0, "add"),
        (42.0, 50.0, "add"),
    ]
    found = {row.operation: (row.calls, row.seconds, row.share) for row in gaps(kernels)}
    assert found == {
        "no kernel": (2, pytest.approx(12e-6), pytest.approx(0.24)),
        "no kernel, before mm": (1, pytest.approx(10e-6), pytest.approx(0.2)),
        "no kernel, before add": (1, pytest.approx(2e-6), pytest.approx(0.04)),
    }
    assert gaps([]) == gaps(kernels[:1]) == []


def test_the_sides_have_equally_many_parameters() -> None:
    task = BenchmarkTask("tiny")
    count = sum(p.numel() for p in task.module(task.config()).parameters())
    assert sum(p.numel() for p in hugging_face_model(task).parameters()) == count


def test_every_head_gives_the_same_loss() -> None:
    losses = [float(prepared(head, (40, 8, 50), "fp32", CPU)()) for head in available(CPU).values()]
    assert len(losses) >= 3
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


def grown() -> float:
    return growth(lambda: torch.ones(50_000_000))


def test_growth_is_the_memory_that_was_taken() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(grown) == pytest.approx(200, abs=10)


def test_sides_take_turns() -> None:
    order: list[str] = []

    def side(name: str):  # type: ignore[no-untyped-def]
        return lambda: order.append(name)

    seconds = in_turns({"a": side("a"), "b": side("b")}, 3, 1, CPU)
    assert order == [*"ab", *"ab", *"ba", *"ab"]
    assert [len(times) for times in seconds.values()] == [3, 3]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (
            ["step", *TINY, "--dtype", "fp32", "--methods", "3ml-query", "--peers", "hugging face"],
            ["mlm,", "3ml-query,", "3ml-query against mlm", "mlm against hugging face,"],
        ),
        (
            ["head", "--rows", "30", "--width", "8", "--vocab-size", "50", "--runs", "1", "--threads", "1"],
            ["head against logits and cross-entropy", "head against logits and cross-entropy"],
        ),
        (
            ["attention", *TINY, "--dtype", "bf16"],
            ["attention, packed, against hugging face sdpa", "attention, packed, against hugging face eager"],
        ),
        (
            ["optimizer", *TINY, "--dtype", "fp32", "--ranks", "2"],
            [
                "update of the parameters, stable-adamw against adamw",
                "update of the parameters, muon on 2",
                "what muon on 2 ranks adds",
            ],
        ),
        (["memory", *TINY, "--dtype", "fp32", "--methods", "mlm"], ["memory of an update, mlm"]),
        (
            ["scaling", *TINY, "--dtype", "fp32", "--only", "tensor"],
            ["a layer, tensor parallel 2 against 1"],
        ),
        (["scaling", *TINY, "--dtype", "fp32", "--only", "TP 2"], ["a save of 2 ranks, TP 2, tiny 24"]),
    ],
    ids=lambda value: value[0],
)
def test_rows(words: list[str], names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([*words, "--json", "--output", str(tmp_path / "found")]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == json.loads((tmp_path / "found.json").read_text())
    for name, row in zip(names, rows, strict=False):
        assert row["name"].startswith(name)
    assert len(rows) >= len(names)
    assert all(row["command"].startswith(f"python -m tools.benchmark {words[0]}") for row in rows)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_sums_are_timed_on_links_with_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    """And their networks are gone afterwards."""
    if problem := network.missing():
        pytest.skip(problem)
    try:
        with network.limited(1, 1000):
            pass
    except UserError as error:
        pytest.skip(str(error))
    assert benchmark.main(["scaling", *TINY, "--dtype", "fp32", "--only", "exposed sums of 2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["exposed sums of 2 ranks, tiny 24, fp32"]
    about = rows[0]["settings"]
    assert about["mbit"] == 1000 and about["pass_ms"] > 0 and rows[0]["ours"] > 0 < rows[0]["peer"]
    assert 0 < about["planned_ms"] <= about["planned_peer_ms"]
    assert not list(network.NAMES.glob(f"latemask-{os.getpid()}*"))


@pytest.mark.skipif(not shutil.which("ip"), reason="no iproute2 here")
def test_a_network_that_cannot_be_made_is_told() -> None:
    with pytest.raises(UserError, match="ip netns exec no-such-name true: .*; leave `exposed` out"):
        network._ip("netns exec no-such-name true")


def test_a_mistake_in_real_runs_is_told_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="nothing.yaml: cannot read the config"):
        benchmark.main(["training", "--seconds", "1", "--configs", "demo-mlm", "nothing"])
    assert "training on" not in capsys.readouterr().err  # a tokenizer


def test_rows_of_real_runs_are_of_what_was_logged() -> None:
    assert [row.name for row in training._rows("demo", [{"step": 1, "held_out_loss": 2.0}], "CPU")] == [
        "training demo: held_out_loss"
    ]
    assert not list(training._rows("demo", [{"step": 1}], "CPU"))  # without a held-out corpus


def test_a_late_method_carries_its_flop_ratio() -> None:
    """Whole rows and specials that are never predicted move the papers' ratios a little."""
    assert BenchmarkTask("base").flop_ratio("3ml-self") == pytest.approx(0.923, abs=0.006)
    assert BenchmarkTask("large", 512).flop_ratio("3ml-query") == pytest.approx(0.693, abs=0.003)


def test_a_profile_is_a_trace_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dtype", "fp32", "--methods", "--peers", "--profile", str(tmp_path)]
    benchmark.main(["step", *TINY, *words])
    assert (tmp_path / "mlm-tiny-24-fp32.json.gz").exists()
    operations = json.loads((tmp_path / "mlm-tiny-24-fp32-operations.json").read_text())
    shares = {row["operation"]: row["share"] for row in operations}
    assert sum(shares.values()) == pytest.approx(1) and shares["aten::addmm"] > 0
    told = capsys.readouterr()
    assert "aten::addmm" in told.err
    heads, first, *_ = told.out.splitlines()
    assert heads.split()[:3] == ["measure", "ours", "peer"] and first.startswith("mlm, tiny 24, fp32 ")


def test_what_cannot_be_measured_here_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--peers megatron-core: its BertModel needs a CUDA device"):
        benchmark.main(["step", *TINY, "--peers", "megatron-core"])
    with pytest.raises(
        UserError, match="--peers 'fairseq style': has no model like modernbert-base; take hugging face"
    ):
        benchmark.main(["step", "--size", "modernbert-base", "--peers", "fairseq style"])
    with pytest.raises(UserError, match="--device cuda: this machine has no CUDA device"):
        benchmark.main(["step", *TINY, "--device", "cuda"])
