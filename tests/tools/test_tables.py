"""The tables of the pages say what was measured, and nothing else."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.errors import UserError
from tools.benchmark import tables
from tools.benchmark.gpu import GpuReport, StepResult
from tools.shared import typed_json
from tools.shared.measure import BenchmarkRow

PAGES = {str(path.relative_to(tables.ROOT)): path for path in tables.pages()}
TEXT = "before\n<!-- table: memory -->\n{}\n<!-- end -->\nafter\n"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_as_measured(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    assert tables.written(PAGES[name]) == text, "run python -m tools.benchmark table"
    assert text.count("<!-- table: ") == text.count("<!-- end -->")


def test_every_table_stands_in_a_page_and_every_result_is_read() -> None:
    texts = [path.read_text(encoding="utf-8") for path in PAGES.values()]
    for name in tables.TABLES:
        assert sum(f"<!-- table: {name} -->\n" in text for text in texts) == 1, name
    found = {path.stem.removeprefix("benchmark-") for path in tables.RESULTS.glob("*.json")}
    assert found == set(tables.FILES)


def test_a_figure_that_was_written_by_hand_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    page = tmp_path / "README.md"
    page.write_text(TEXT.format("| mlm | 1 MB |"), encoding="utf-8")
    assert tables.main(["--check"]) == 1
    assert "README.md: not as measured" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == TEXT.format("| mlm | 1 MB |")
    assert tables.main([]) == 0
    assert page.read_text(encoding="utf-8") == TEXT.format(tables.TABLES["memory"]())
    assert tables.main(["--check"]) == 0


def test_a_gpus_results_fill_its_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled layers before others; without any the command is named."""
    device, what = "NVIDIA H200", "base 128, bf16"

    def row(name: str, unit: str, ours: float, peer: float | None = None, **more: float) -> BenchmarkRow:
        ratio = ours / peer if peer else None
        about = {"seconds": 0.05, "peak_bytes": 12e9}
        spread = [ratio, ratio] if ratio else []
        return BenchmarkRow(
            name, ours, peer, unit, ratio, spread, 5, device, "bf16", {}, "0123456", settings=about, **more
        )

    rows = (
        row(f"mlm, {what}, compile default", "model TFLOP/s", 400.0),
        row(f"3ml-query against mlm, {what}", "s an update", 0.9, 1.0, flop_ratio=0.862),
        row(f"3ml-query against mlm, {what}, compile default", "s an update", 0.87, 1.0, flop_ratio=0.862),
        row("training mlm-base: data_wait", "of the time", 0.001),
    )
    report = GpuReport("0123456", False, {}, [StepResult("step", "python", "done", rows=rows)])
    shutil.copytree(tables.RESULTS, tmp_path / "results", ignore=lambda *_: ["profile", "gpu"])
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")

    def forget() -> None:
        for function in (tables.results, tables.measured):
            function.cache_clear()

    forget()
    try:
        assert tables.GPU_COMMAND in tables.gpu_updates() and tables.gpu_others() == "Not measured yet."
        forget()
        (tmp_path / "results" / "gpu").mkdir()
        (tmp_path / "results" / "gpu" / "h200.json").write_text(typed_json.to_json(report), encoding="utf-8")
        others = tuple(replace(each, device="NVIDIA A100-SXM4-80GB", ours=1.0) for each in rows)
        report = replace(report, steps=[replace(report.steps[0], rows=others)])
        (tmp_path / "results" / "gpu" / "later.json").write_text(typed_json.to_json(report), encoding="utf-8")
        (found,) = [
            line for line in tables.speeds() if line[0].startswith("`3ml-query` time / own `mlm`, base 128")
        ]
        assert found[-1].startswith("0.870 - 0.862 = +0.008") and found[-2] != found[-1]
        assert (
            "| `mlm`, base 128, bf16, compile default | 50.0 | 400 | 355 | 40 % | 12.0 |"
            in tables.gpu_updates()
        )
        assert "training mlm-base: data_wait" in tables.gpu_others()
    finally:
        forget()


def test_an_unknown_table_is_named(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(TEXT.replace("memory", "mermory"), encoding="utf-8")
    with pytest.raises(UserError, match="no table 'mermory'; take one of demo"):
        tables.written(page)
