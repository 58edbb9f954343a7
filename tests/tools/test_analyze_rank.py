"""Effective ranks against numpy's SVD of all rows at once, and the rows against the model's own."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.evaluate import HeldOut
from pretrain.model.late_mask import Batch
from tests.support.runs import finish
from tools.analyze import __main__ as analyze
from tools.analyze import rank as analyze_rank
from tools.analyze.rank import ALL, CLEAN, MASKED, MASKS, Spectrum, effective_ranks
from tools.shared.run_model import load_model

RUNS = {
    "mlm": (),
    "late": ("model.mask_from=2", "model.decoder_layers=2", "model.norm=pre"),
    "query": ("model.mask_from=2", "model.decoder_layers=1", "model.decoder=query", "model.mask_leak=0.4"),
    "shared": ("model.mask_from=1", "model.block=modern"),
}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, words in RUNS.items():
        finish([str(tiny / "tiny.yaml"), f"run.dir={folder / name}", "budget.steps=3", *words])
    return {name: folder / name for name in RUNS}


def by_svd(rows: Tensor) -> dict[str, float]:
    """The six measures, the obvious way."""
    found = {}
    for end, matrix in (("", rows), ("_centred", rows - rows.mean(0))):
        s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        for kind, weights in (("energy_squared", s**2), ("energy_plain", s)):
            k = 1
            while weights[:k].sum() < 0.9 * weights.sum():
                k += 1
            found[kind + end] = k
        p = s / s.sum()
        found["entropy" + end] = float(np.exp(-sum(x * np.log(x) for x in p if x > 0)))
    return found


def test_streamed_equals_svd() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(3, 0.01, 24)
    rows = torch.randn(4000, 24, generator=generator) * spread
    rows += 5 * torch.randn(24, generator=generator)
    spectrum, other = Spectrum(24, torch.device("cpu")), Spectrum(24, torch.device("cpu"))
    for i, part in enumerate(rows.split(300)):
        (spectrum if i % 3 else other).add(part)
    found = effective_ranks(spectrum + other)
    assert found == pytest.approx(by_svd(rows), rel=1e-6)
    assert found["energy_squared"] < found["energy_plain"] < 24
    assert found["energy_squared_centred"] != found["energy_squared"]


def test_closed_forms() -> None:
    """r equal singular values: 0.9 r of them, entropy r; in a space of more dimensions."""
    spectrum = Spectrum(32, torch.device("cpu"))
    spectrum.add(torch.eye(20, 32) * 7)
    found = effective_ranks(spectrum)
    assert found["energy_squared"] == found["energy_plain"] == 18
    assert found["entropy"] == pytest.approx(20)


def rows_of_model(run: Path, corpus: str, windows: int) -> dict[tuple[str, int, str], Tensor]:
    """All hidden states by (part, layer, group), from another reading of the same questions: one
    sequence at a time, clean input in the order of the rows."""
    model, config, tokenizer, _ = load_model(run)
    heldout = HeldOut(corpus, tokenizer, config.train.seq_length, windows)
    seen: dict[tuple[str, int, str], list[Tensor]] = {}
    plain = set(tokenizer.random_ids.tolist())

    def watch(part: str, ids: list[int], groups: tuple[str, str]) -> list[Any]:
        stack = model if part == "encoder" else model.decoder

        def note(layer: int, rows: Tensor) -> None:
            mine = ids[: rows.shape[1]] if part == "encoder" else ids[len(ids) - rows.shape[1] :]
            for row, i in zip(rows[0], mine, strict=True):
                if i in plain or i == tokenizer.mask:
                    group = groups[i == tokenizer.mask]
                    seen.setdefault((part, layer, group), []).append(row)

        if stack is None:
            return []
        hooks = [stack.layers[0].register_forward_pre_hook(lambda _, x: note(0, x[0]))]
        for number, layer in enumerate([*stack.layers[:-1], stack.final_norm], 1):
            hooks.append(layer.register_forward_hook(lambda *a, number=number: note(number, a[2])))
        return hooks

    with torch.no_grad():
        for window in range(heldout.samples):
            q = heldout.questions(window, 1)
            batch = Batch.from_masked(q, torch.device("cpu"))
            true = batch.ids.clone()
            true[:, -batch.targets.shape[1] :] = batch.targets
            hooks = watch("encoder", true[0].tolist(), (CLEAN, "none"))
            model.encode(true, batch.positions)
            for hook in hooks:
                hook.remove()
            ids = batch.ids[0].tolist()
            hooks = watch("encoder", ids, (MASKED, MASKS)) + watch("decoder", ids, (MASKED, MASKS))
            model.predicted_rows(batch)
            for hook in hooks:
                hook.remove()
    return {key: torch.stack(rows) for key, rows in seen.items()}


@pytest.mark.parametrize("name", RUNS)
def test_rows_are_the_models(name: str, runs: dict[str, Path], tiny: Path) -> None:
    corpus = str(tiny / "valid")
    found = {
        (row["part"], row["layer"], row["rows"]): row
        for row in analyze_rank.measure(load_model(runs[name]), corpus, 40 * 22, torch.device("cpu"))
    }
    expected = rows_of_model(runs[name], corpus, 40)
    assert {key for key in found if key[2] != ALL} == expected.keys()
    for key, rows in expected.items():
        assert found[key]["count"] == len(rows) and found[key]["width"] == 32
        for measure, value in by_svd(rows).items():
            assert found[key][measure] == pytest.approx(value, rel=1e-4, abs=1.01 * ("energy" in measure)), (
                key
            )
    for part, layer, group in found:
        if group == ALL:
            both = torch.cat([expected[part, layer, MASKED], expected[part, layer, MASKS]])
            assert found[part, layer, group]["entropy"] == pytest.approx(by_svd(both)["entropy"], rel=1e-4)
    masked_layers = {layer for part, layer, group in found if part == "encoder" and group == MASKS}
    assert masked_layers == {"mlm": {0, 1, 2}, "late": set(), "query": {0, 1, 2}, "shared": {2}}[name]
    assert (("decoder", 1, MASKS) in found) == (name in ("late", "query"))


def test_program(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(runs["mlm"]), str(runs["late"]), "--output", str(tmp_path), "--tokens", "500", "--json"]
    assert analyze.main(["rank", *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "rank.json").read_text())
    with open(tmp_path / "rank.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["entropy"] for row in table] == [str(row["entropy"]) for row in document]
    assert {row["run"] for row in document} == {"mlm", "late"}
    assert (tmp_path / "rank.png").read_bytes().startswith(b"\x89PNG")
    assert analyze.main(["rank", *words[:-1], "--measure", "entropy"]) == 0
    assert "late: real, clean" in capsys.readouterr().out


def test_mistakes_are_told_before_a_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/proc/q: cannot be written"):
        analyze.main(["rank", str(tmp_path), "--output", "/proc/q"])
    with pytest.raises(UserError, match="the same folder as"):
        analyze.main(["rank", str(tmp_path), f"{tmp_path}/", "--output", str(tmp_path)])
