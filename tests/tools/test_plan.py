"""The plan: its contract, its choices against trying everything, and its arithmetic against runs."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.account import devices, flops
from pretrain.account.ledger import LedgerLine, as_totals
from pretrain.account.recipe import baseline, make_recipe
from pretrain.config import dump_config, load_config, method_of, phase_configs
from pretrain.data import document_order
from pretrain.data.corpora import open_blend, open_data
from pretrain.errors import UserError
from pretrain.model import late_mask as model
from pretrain.parallel.deepspeed_engine import deepspeed_config
from tests.repository.test_readme import commands
from tests.support.methods import METHODS, small
from tools.plan import __main__ as plan
from tools.plan import estimate, layouts, memory, published, traffic
from tools.plan import pages as plan_pages
from tools.report import __main__ as report

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LARGE = str(ROOT / "configs" / "mlm-large.yaml")


def planned(capsys, *words):
    assert plan.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_absurd_budget_is_warned_of(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["budget.steps=900000"], ["budget.steps=null", "budget.device_hours=900", "--device=H100"]):
        assert plan.main([str(tiny / "tiny.yaml"), *words]) == 0
        assert f"warning: {tiny}/tiny.yaml: the budget reads the corpus " in capsys.readouterr().err
    assert plan.main([str(tiny / "tiny.yaml")]) == 0
    assert not capsys.readouterr().err


def test_the_promised_keys(capsys):
    for one in planned(capsys, *map(str, CONFIGS), "--device", "H100", "--gpus", "8", "--fastest"):
        assert set(one["parameters"]) == {"encoder", "decoder", "head", "embeddings", "total"}
        for flop_counts in ("flops_per_sequence", "flops_per_step", "flops_total_by_part"):
            parts = dict(one[flop_counts])
            assert parts.pop("total") == pytest.approx(sum(parts.values()), rel=1e-12)
            assert set(parts) == {"encoder", "decoder", "head", "optimizer"}
        assert one["flops_total_by_part"]["total"] == one["flops_total"]
        assert one["flops_per_step"]["head"] * one["steps"] == pytest.approx(
            one["flops_total_by_part"]["head"], rel=1e-12
        )
        measures = {"token_layers", "flops_without_head", "flops_with_head", "device_time"}
        assert set(one["relative"]) == measures
        parts = {"parameters", "gradients", "optimizer", "activations", "head", "buffers", "total"}
        assert parts <= set(one["memory_bytes_per_rank"])
        assert one["config"] in map(str, CONFIGS) and one["layout"]["gpus"] == 8
        assert one["kwh"] == pytest.approx(one["device_hours"] * 0.7)
        assert one["device_hours"] == pytest.approx(one["steps"] * one["step_seconds"] * 8 / 3600)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_planned_to_the_last_flop_and_parameter(path):
    """Against torch's counters on the whole model, of tensors that have shapes and no values."""
    for config in phase_configs(load_config(path)):
        made = estimate.plan(config)
        pieces = made.vocab_size
        rows = make_recipe(config, pieces).phases[0].rows
        with FakeTensorMode():
            whole = model.LateMaskModel(config.model, pieces, pieces - 1).train()
            ids = torch.zeros(1, rows.length, dtype=torch.long)
            batch = model.Batch(ids, ids, ids[:, -rows.predicted :], rows.length - rows.visible)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                whole(batch).backward()
            assert made.parameters["total"] == sum(one.numel() for one in whole.parameters())
        flops = made.flops_per_sequence  # Muon's products are counted in test_muon.py
        assert flops.total - flops.optimizer == counter.get_total_flops()


def test_what_grows_with_documents_is_counted_once_a_node(tiny, tmp_path, capsys, monkeypatch):
    """As large as the files are."""
    words = [str(tiny / "tiny.yaml"), f"corpus.copies={tmp_path / 'copies'}"]
    (one,) = planned(capsys, *words)
    assert one["mapped_bytes_per_node"] == {"indexes": (tiny / "train.idx").stat().st_size, "orders": 0}
    monkeypatch.setattr(document_order, "MANY", 0)
    (one,) = planned(capsys, *words)
    config = load_config(words[0], words[1:])
    blend = open_blend(config, open_data(config.corpus))
    blend.read(np.array([0, blend.samples_per_epoch]))
    orders = [file.stat().st_size for file in (tmp_path / "copies").iterdir()]
    assert one["mapped_bytes_per_node"]["orders"] == sum(orders) and len(orders) == 2
    assert plan.main(words) == 0
    assert "files in corpus.copies" in capsys.readouterr().out
    (one,) = planned(capsys, LARGE)
    assert one["mapped_bytes_per_node"] is None


@pytest.mark.parametrize(
    ("change", "bytes_each"),
    [("budget.steps=8", 12), ("checkpoint.background=false", 0), ("budget.device_hours=1", 0)],
)
def test_what_a_save_in_the_background_copies_is_told(change: str, bytes_each: int, capsys) -> None:
    words = [LARGE, change, *(["budget.steps=null"] if "hours" in change else [])]
    (one,) = planned(capsys, *words)
    assert one["copied_bytes_on_rank_0"] == bytes_each * one["parameters"]["total"]
    assert plan.main(words) == 0
    assert ("more of its host's memory" in capsys.readouterr().out) == bool(bytes_each)


def test_without_a_device_there_are_no_times(capsys):
    (one,) = planned(capsys, LARGE)
    assert one["step_seconds"] is one["kwh"] is one["relative"]["device_time"] is None
    assert one["steps"] == 125_000 and one["memory_bytes_per_rank"]["total"] > 0
    assert one["tokens_total"] == 125_000 * 2048 * 512
    assert plan.main([LARGE]) == 0
    assert re.search(r"mlm-large +125,000 +1\.31e11 +2\.64e20 +2\.57e20 +0", capsys.readouterr().out)


def test_a_plan_takes_no_torch_and_little_time():
    code = (
        "import sys; from tools.plan.__main__ import main; main(sys.argv[1:]);"
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    words = [*map(str, CONFIGS), "--device", "H100", "--gpus", "8"]
    subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_what_does_not_fit_names_what_does():
    words = [LARGE, "--device", "RTX 4090", "--gpus", "1", "train.micro_batch_size=2048"]
    with pytest.raises(UserError, match=r"needs \d+.* GiB a rank on 1 x RTX 4090, which has 24") as error:
        plan.main(words)
    advice = str(error.value).partition("the smallest layout that fits: ")[2]
    gpus, _, rest = advice.partition(" x RTX 4090, ")
    assert plan.main([*words, *rest.split(), "--gpus", gpus]) == 0


def test_nothing_fits():
    words = [LARGE, "--device", "RTX 4090", "--gpus", "1", "--fastest", "model.hidden_size=65536"]
    with pytest.raises(UserError, match="nothing fits 1 x RTX 4090; no layout on up to 4,096 of them fits"):
        plan.main([*words, "model.ffn_size=262144"])


@pytest.mark.parametrize(
    ("gpus", "near"), [(3, "2, 4"), (24, "16, 32"), (10_000, "8,192, 16,384"), (20_000, "16,384")]
)
def test_what_does_not_divide_is_not_said_not_to_fit(gpus, near):
    problem = f"2048 sequences cannot be divided among {gpus:,} ranks; nearest: {near}$"
    with pytest.raises(UserError, match=problem):
        plan.main([LARGE, "--device", "H100", "--gpus", str(gpus), "--fastest"])


def test_the_page_says_what_it_assumes(capsys):
    one, two = (planned(capsys, LARGE, "--device", "H100", *words)[0] for words in ((), ("--price", "2")))
    assert (one["price"], one["watts"], two["price"]) == (3.0, 700.0, 2.0)
    assert plan.main([LARGE, "--device", "H100", "--gpus", "8", "--fastest"]) == 0
    assert "kWh at 700 W a device without hosts; $ at 3 a device-hour" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plan.main(["--help"])
    assert "H100 3," in " ".join(capsys.readouterr().out.split())


def test_counts_that_scaling_leaves_out_are_named(capsys):
    words = [LARGE, "--device", "RTX 4090", "--scaling", "train.batch_size=6", "train.micro_batch_size=6"]
    words += ["model.hidden_size=4096", "model.ffn_size=16384"]
    (one,) = planned(capsys, *words)
    missing = {row["gpus"]: row["why"] for row in one["scaling_missing"]}
    counts = [row["gpus"] for row in one["scaling"]]
    assert counts and sorted([*missing, *counts]) == [2**n for n in range(13)]
    assert missing[1] == "nothing fits" and missing[32] == "6 sequences cannot be so divided"
    assert one["layout"]["gpus"] == counts[0]
    plan.main(words)
    page = capsys.readouterr().out
    assert "Not on 1" in page and max(map(len, page.splitlines())) <= 80


def test_scaling_needs_not_the_configs_own_layout(capsys):
    """On an A100 a whole batch is no micro-batch; the fastest layout of one A100 has its own."""
    words = [LARGE, "--device", "A100", "train.micro_batch_size=null"]
    with pytest.raises(UserError, match="needs"):
        plan.main(words)
    (one,) = planned(capsys, *words, "--scaling")
    assert one["layout"] == one["scaling"][0]["layout"] and one["layout"]["micro_batch"] < 2048


def test_a_share_of_ones_own_goes_before_what_is_known(capsys):
    words = [LARGE, "--device", "H100"]
    (assumed,), (given,), (whole,) = (
        planned(capsys, *words, *more) for more in ([], ["--achieved", "0.4"], ["--achieved", "1"])
    )
    assert given["step_seconds"] == assumed["step_seconds"] > whole["step_seconds"]
    assert (whole["achieved"], whole["achieved_from"]) == (1, "given")
    assert plan.main(["--methods", "128", "--device", "H100", "--achieved", "0.5"]) == 0


@pytest.mark.parametrize(("unit", "amount"), [("tokens", 1e6), ("flops", 1e9), ("device_hours", 1e-5)])
def test_a_budget_below_one_update_is_refused(unit, amount):
    words = [LARGE, "--device", "H100", "budget.steps=null", f"budget.{unit}={amount}"]
    with pytest.raises(UserError, match=rf"mlm-large.yaml: budget.{unit} = .*; raise it"):
        plan.main(words)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "no CONFIG"),
        ([LARGE, "--device", ""], "--device '': not in the table"),
        ([LARGE, "--price", "5"], "--price: need --device"),
        ([LARGE, "--achieved", "0.5"], "--achieved: need --device"),
        (["--methods", "128", "--achieved", "0.5"], "--achieved: need --device"),
        ([LARGE, "--device", "H100", "--achieved", "1.01"], "'1.01' is not a number above 0 and up to 1"),
        ([LARGE, "--device", "H100", "--achieved", "0"], "'0' is not a number above 0 and up to 1"),
        ([LARGE, "--methods", "128", "--gpus", "8", "--fastest"], "leave out --fastest, --gpus, "),
        ([LARGE, "--fastest"], "need --device"),
        ([LARGE, "--device", "abacus"], "'abacus': not in the table .*H100"),
        ([LARGE, "--gpus", "0"], "at least 1"),
        ([LARGE, "--gpus", "3"], "batch_size = 2048 is no multiple"),
        ([LARGE, "--gpus", "3", "parallel.tensor=2"], "no multiple of parallel.tensor"),
        (["configs/nothing.yaml"], "cannot read"),
        ([LARGE, "--price", "-3"], "--price: '-3' is not a number above 0"),
        ([LARGE, "--watts", "nan"], "--watts: 'nan' is not a number above 0"),
    ],
)
def test_bad_words(words, problem):
    with pytest.raises(UserError, match=problem):
        plan.main(words)


@pytest.mark.parametrize("method", METHODS)
def test_relative_costs_are_against_mlm_at_15_percent(method):
    o = small(method, model={"vocab_size": 500})
    made = estimate.plan(o).relative
    (mine,) = make_recipe(o).phases
    plain = baseline(mine)
    assert (plain.rows.predicted, method_of(plain.config)) == (3, "mlm")
    whole = flops.training(plain.config.model, plain.rows, 500).total
    own = flops.training(o.model, mine.rows, 500).total
    assert made.flops_with_head == own / whole


@pytest.mark.parametrize(
    ("budget", "steps"),
    [({"tokens": 24 * 8 * 5 + 100}, 5), ({"flops": 1e9}, None), ({"device_hours": 1}, None)],
)
def test_steps_that_a_budget_pays_for(budget, steps):
    o = small(budget=budget, model={"vocab_size": 500})
    made = estimate.plan(o, device="H100")
    if "flops" in budget:
        steps = int(1e9 // (8 * made.flops_per_sequence.total))
    if "device_hours" in budget:
        steps = int(3600 // made.step_seconds)
        assert estimate.plan(o).steps is None
    assert made.steps == steps > 0
    assert made.flops_total == steps * 8 * made.flops_per_sequence.total


def test_phases_are_counted_apart():
    phases = [{"until": 0.5, "seq_length": 12, "batch_size": 16}]
    o = small(model={"vocab_size": 500}, train={"phases": phases}, budget={"tokens": 24 * 8 * 100})
    made, (short, long) = estimate.plan(o, device="H100"), phase_configs(o)
    first, second = make_recipe(o).budget.updates()
    assert first * 12 * 16 == pytest.approx(24 * 8 * 50, rel=0.02) and second > 0
    work = [make_recipe(one).phases[0].cost.flops.total for one in (short, long)]
    assert made.steps == first + second
    assert made.flops_total == first * work[0] + second * work[1]
    alone = [estimate.plan(one, device="H100").step_seconds for one in (short, long)]
    seconds = first * alone[0] + second * alone[1]
    assert made.hours * 3600 == pytest.approx(seconds)
    assert made.step_seconds == pytest.approx(seconds / (first + second))


def test_costs_of_phases_are_those_of_the_report():
    """Of a run that did what was planned."""
    phases = [{"until": 0.5, "seq_length": 12, "batch_size": 16}]
    o = small("3ml-query", model={"vocab_size": 500}, train={"phases": phases}, budget={"steps": 10})
    made = estimate.plan(o)
    steps = make_recipe(o).budget.updates()
    border, samples = steps[0] * 16, steps[0] * 16 + steps[1] * o.train.batch_size
    spent = {"device_seconds": {"productive": 1.0}}
    lines = [
        LedgerLine(event="phase-change", details={"phase": 1}, samples=border, **spent),
        LedgerLine(event="finish", samples=samples, **spent),
    ]
    totals = as_totals(lines[-1])
    run = report.ReportedRun("", "", make_recipe(o), {}, totals, lines, None, [], [])
    expected = report._relative(run)
    assert {name: getattr(made.relative, name) for name in expected} == pytest.approx(expected)
    of_last = estimate.plan(phase_configs(o)[-1]).relative
    assert made.relative.flops_with_head != pytest.approx(of_last.flops_with_head, rel=1e-3)
    sequence = made.flops_total / samples
    assert made.flops_per_sequence.total == pytest.approx(sequence)


def test_a_page_says_what_figures_of_phases_are_of(capsys):
    """Of a budget of time without a device, nobody knows how many updates each phase has."""
    path = str(ROOT / "configs" / "3ml-query-base-phases.yaml")
    assert plan.main([path]) == 0
    assert "means over all their sequences" in capsys.readouterr().out
    words = ["budget.relative_to=null", "budget.fraction=null", "budget.device_hours=5"]
    assert plan.main([path, *words]) == 0
    assert "of the last phase: 3ml-query-base-phases" in capsys.readouterr().out


def test_a_share_of_another_recipe_is_planned(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(dump_config(small("mlm", model={"vocab_size": 500}, budget={"steps": 1000})))
    share = {"relative_to": str(other), "fraction": 0.68}
    made = estimate.plan(small("3ml-query", model={"vocab_size": 500}, budget=share))
    whole = estimate.plan(load_config(other))
    assert made.flops_total <= 0.68 * whole.flops_total
    assert made.flops_total == pytest.approx(0.68 * whole.flops_total, rel=0.01)


@pytest.mark.parametrize("gpus", [1, 8, 64])
@pytest.mark.parametrize("name", ["RTX 4090", "H100"])
def test_the_fastest_layout_is_that_of_trying_all(name, gpus):
    """Over every micro-batch, not the largest that fits; by the margins that stages have."""
    device = devices.find(name)
    phase = make_recipe(load_config(LARGE), 50265).phases[0]
    share, _ = layouts.achieved(device, phase.precision)
    (chosen,) = layouts.fastest([phase], gpus, device, share)
    best = float("inf")
    for tensor in (1, 2, 4, 8):
        for zero, offload in layouts.SAVINGS:
            for recompute in ("none", "block"):
                for micro in layouts.divisors(max(1, 2048 * tensor // gpus)):
                    if gpus % tensor:
                        continue
                    data = gpus // tensor
                    one = memory.Layout(
                        tensor=tensor,
                        data=data,
                        micro_batch=micro,
                        accumulation=2048 // data // micro,
                        engine="deepspeed" if zero else "torch",
                        zero=zero,
                        offload=offload,
                        recompute=recompute,
                        precision="bf16",
                    )
                    if layouts.needs(layouts.memory_of(phase, one)) <= device.memory:
                        best = min(best, layouts.with_margin(phase, one, device, share))
    assert layouts.with_margin(phase, chosen, device, share) <= best * (1 + layouts.TOLERANCE)
    assert layouts.needs(layouts.memory_of(phase, chosen)) <= device.memory


@pytest.mark.parametrize("gpus", [2**n for n in range(13)])
def test_zero_is_not_preferred_for_less_than_its_margin(gpus):
    """Memory does not ask for it here: what is chosen is plain, or faster by more than what is doubted."""
    device = devices.find("H100")
    phases = [make_recipe(load_config(LARGE), 50265).phases[0]]
    (chosen,) = layouts.fastest(phases, gpus, device, 0.4)
    plain = [one for (one,) in layouts.candidates(phases, gpus, device) if one.zero == 0]
    seconds = min(layouts.step_seconds(phases[0], one, device, 0.4) for one in plain)
    margin = 1 + layouts.MARGIN[chosen.zero]
    assert chosen.zero == 0 or layouts.step_seconds(phases[0], chosen, device, 0.4) * margin < seconds


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_hides_is_what_deepspeed_overlaps(stage):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    o = load_config(LARGE, [f"parallel.zero={stage}"])
    ours = deepspeed_config(o, 8, 16, pin=False)["zero_optimization"]
    layout = memory.Layout(data=8, micro_batch=16, accumulation=16, engine="deepspeed", zero=stage)
    calls = traffic.step(o.model, make_recipe(o, 50265).phases[0].rows, 50265, layout)
    assert DeepSpeedZeroConfig(**ours).overlap_comm
    waits = {call.kind for call in calls if not call.beside}
    assert waits == (set() if stage == 3 else {"all-gather"})  # of updated parameters


def test_collectives_of_zero_3_hide_behind_a_part_of_their_pass():
    """On a link so slow that all but that part shows."""
    device = replace(devices.find("H100"), link=1e9)
    phase = make_recipe(load_config(LARGE), 50265).phases[0]
    layout = memory.Layout(data=8, micro_batch=32, accumulation=8, engine="deepspeed", zero=3)
    computing = 8 * layouts.micro_seconds(phase, layout, device, 0.4)
    calls = traffic.step(phase.config.model, phase.rows, phase.vocab_size, layout)
    lasting = sum(traffic.seconds(call, layout, device) for call in calls)
    whole = layouts.step_seconds(phase, layout, device, 0.4) - layouts.update_seconds(phase, layout, device)
    assert whole == pytest.approx(computing * (1 - layouts.OVERLAP_SHARE) + lasting)


def test_overrides_make_the_layout():
    o = load_config(LARGE)
    made = estimate.plan(o, 8, "H100", fastest=True)
    words = made.layout.overrides.split()
    assert words
    again = estimate.plan(load_config(LARGE, words), 8, "H100")
    assert again.layout == replace(made.layout, overrides="")
    assert again.step_seconds == made.step_seconds


def test_scaling_stops_paying(capsys):
    (one,) = planned(capsys, LARGE, "--device", "H100", "--scaling")
    rows = one["scaling"]
    assert [row["gpus"] for row in rows] == [2**n for n in range(13)]
    assert rows[1]["gain"] == pytest.approx(2, abs=0.1) and rows[-1]["gain"] < 1.5
    assert rows[-1]["efficiency"] < 0.2


def test_all_methods_at_all_rates(capsys):
    assert plan.main(["--methods", "512", "--json"]) == 0
    found = {
        (row["method"], row["rate"], row["all_mask"], row["size"]): row["relative"]["flops_with_head"]
        for row in json.loads(capsys.readouterr().out)
    }
    assert found["mlm", 0.15, False, "base"] == 1
    # methods.md's table, whose rows have fractions: within a thousandth.
    for key, expected in {
        ("3ml-self", 0.5, False, "base"): 0.895,
        ("3ml-self", 0.5, False, "large"): 0.728,
        ("3ml-cross", 0.5, False, "large"): 0.751,
        ("mae-lm", 0.15, True, "base"): 1.161,
        ("mlm", 0.4, False, "base"): 1.098,
    }.items():
        assert found[key] == pytest.approx(expected, abs=0.0025), key


def test_pages_fit_a_terminal(capsys):
    plan.main([*map(str, CONFIGS), "--device", "H100", "--gpus", "8", "--fastest", "--scaling"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("Doubling pays") for line in lines) == len(CONFIGS)
    short = [str(path) for path in CONFIGS if len(path.stem) <= 15]
    plan.main([*short, "--device", "H100", "--gpus", "8"])
    plan.main(["--methods", "512", "--device", "H100"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_long_names_are_told_apart():
    names = [f"an-experiment-with-a-long-name-{n:02d}" for n in range(20)]
    shown = {plan_pages._name(SimpleNamespace(config=f"configs/{name}.yaml")) for name in names}
    assert len(shown) == 20 and max(map(len, shown)) == plan_pages.NAME


def test_the_readmes_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    lines = [
        line for line in commands("The plan: what a run will cost, need and take") if "tools.plan" in line
    ]
    assert len(lines) == 3
    for line in lines:
        assert plan.main(shlex.split(line)[3:]) == 0
    assert "Doubling pays" in capsys.readouterr().out and (tmp_path / "scaling.png").exists()


def test_the_picture_is_there(tmp_path):
    plan.main([LARGE, "--device", "H100", "--plot", str(tmp_path / "scaling.png")])
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [tmp_path / "scaling.png"]


def test_a_picture_that_cannot_be_written_is_named():
    with pytest.raises(UserError, match="/proc: cannot be written"):
        plan.main([LARGE, "--device", "H100", "--plot", "/proc/q.png"])


def test_where_doubling_stops_to_pay():
    rows = [SimpleNamespace(gpus=2**n, gain=gain) for n, gain in enumerate([None, 1.9, 1.5, 1.4, 1.6])]
    assert plan_pages.pays_up_to(rows) == 4


def test_a_calibrated_machine_is_a_device(tmp_path, monkeypatch, capsys):
    device = {**vars(devices.find("L40S")), "name": "abacus", "gpu": False, "watts": 0.0, "price": 0.0}
    document = {"device": device, "achieved": {"bf16": 0.7}}
    (tmp_path / "plan-abacus.json").write_text(json.dumps(document))
    monkeypatch.setattr(layouts, "RESULTS", tmp_path)
    layouts.measured.cache_clear()
    try:
        (one,) = planned(capsys, LARGE, "--device", "abacus", "train.micro_batch_size=1")
        assert (one["achieved"], one["achieved_from"], one["kwh"]) == (0.7, "measured", None)
    finally:
        layouts.measured.cache_clear()


@pytest.mark.parametrize("run", published.RUNS, ids=lambda run: f"{run.name}, {run.gpus}")
def test_a_published_run_is_planned(run):
    """At the share that is told the plan has the published rate."""
    phase, layout, device = run.job()
    seconds = layouts.step_seconds(phase, layout, device, run.share())
    assert run.batch_size * run.length / seconds / run.gpus == pytest.approx(run.rate)
    assert layout.ranks == run.gpus and 0.1 < run.share() < 0.9 and run.source.startswith("https://")
    assert layouts.needs(layouts.memory_of(phase, layout)) < device.memory


def test_modernberts_hours_are_what_the_assumed_share_is_from():
    modern = [run for run in published.RUNS if run.name.startswith("ModernBERT")]
    assert [run.planned_rate() / run.rate for run in modern] == pytest.approx([1, 1], abs=0.1)
