"""A run that begins where a checkpoint of another ends."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL, SIGTERM

import pytest
import torch

from pretrain import checkpoint
from pretrain.account import ledger
from pretrain.config import build_config, load_config
from pretrain.continuing import _past
from pretrain.data.corpora import open_blend, open_data
from pretrain.files import digest
from pretrain.monitor import read_metrics
from slurm.sizing import settled
from tests.support.runs import Strike, attempt, finish, result
from tools.ledger import __main__ as ledger_program
from tools.plan import __main__ as plan
from tools.plan.estimate import planned_recipe
from tools.report import __main__ as report

ROOT = Path(__file__).parents[2]
Words = Callable[..., list[str]]

EVERY = ("checkpoint.every_steps=1", "checkpoint.keep_last=20")
VARIANTS: dict[str, tuple[tuple[str, ...], int]] = {
    "plain": ((), 1),
    "ranks": (("model.dropout=0.1",), 2),
    "deepspeed": (("train.engine=deepspeed", "parallel.zero=1"), 1),
    "phases": (("train.phases=[{until: 0.3, seq_length: 16}]", "budget.steps=null", "budget.flops=2e8"), 1),
}


def branch(of: Path, step: int | str = 4) -> tuple[str, str]:
    return f"run.branch.of={of}", f"run.branch.step={step}"


@pytest.fixture(scope="module")
def trunk(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight updates that keeps a checkpoint of each."""
    run = tmp_path_factory.mktemp("of") / "trunk"
    finish([str(tiny / "tiny.yaml"), f"run.dir={run}", *EVERY])
    return run


def rates(run: Path) -> dict[int, float]:
    return {line["step"]: line["lr"] for line in read_metrics(run) if "lr" in line}


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_nothing_changed_it_is_the_run_going_on(variant: str, words: Words, tmp_path: Path) -> None:
    options, ranks = VARIANTS[variant]
    finish(words("trunk", *options, *EVERY), ranks)
    finish(words("branch", *options, *branch(tmp_path / "trunk")), ranks)
    whole, own = result(tmp_path / "trunk"), result(tmp_path / "branch")
    whole["losses"] = [line for line in whole["losses"] if line[0] > 4]
    assert own == whole
    ledger_program.check([str(tmp_path / "branch")])


def test_killed_anywhere_it_ends_the_same(words: Words, trunk: Path, tmp_path: Path) -> None:
    """The trunk is gone once the branch has saved; until then it is asked for again, at the same step."""
    parent = tmp_path / "parent"
    shutil.copytree(trunk, parent)
    options = (
        *branch(parent, "latest"),
        "budget.steps=14",
        "schedule.kind=decay",
        "checkpoint.every_steps=3",
    )
    finish(words("whole", *options))
    assert attempt(words("cut", *options), strike=Strike(SIGKILL, 1)).codes == [-SIGKILL]
    shutil.rmtree(parent / "checkpoints" / "step-00000007")
    finish([*words("parent"), "budget.steps=9"])  # the latest now is of step 9
    assert attempt(words("cut", *options), strike=Strike(SIGKILL, 3)).codes == [-SIGKILL]
    shutil.rmtree(parent)
    assert attempt(words("cut", *options), strike=Strike(SIGTERM, 2)).codes == [75]
    finish(words("cut", *options))
    assert result(tmp_path / "cut")["tensors"] == result(tmp_path / "whole")["tensors"]
    assert result(tmp_path / "cut")["spent"] == result(tmp_path / "whole")["spent"]
    ledger_program.check([str(tmp_path / "cut"), str(tmp_path / "whole")])
    assert [line.event for line in ledger.read(tmp_path / "cut")].count("branch") == 1


def test_several_decays_of_a_constant_trunk(words: Words, tmp_path: Path) -> None:
    """Each falls from the peak to the floor over what is its own, in the middle of its updates."""
    finish(words("trunk", "schedule.floor=1", "budget.steps=20", *EVERY))
    assert set(list(rates(tmp_path / "trunk").values())[2:]) == {3e-3}
    for kind, step, total in (("decay", 8, 12), ("decay-linear", 16, 20)):
        own = (*branch(tmp_path / "trunk", step), f"budget.steps={total}", f"schedule.kind={kind}")
        said = finish(words(kind, *own))
        assert f"at step {step}" in said.text and "learning rate 0.003, there 0.003" in said.text
        gone = [(number + 0.5) / 4 for number in range(4)]
        falls = [share if kind == "decay-linear" else share**0.5 for share in gone]
        assert list(rates(tmp_path / kind).values()) == pytest.approx([3e-3 * (1 - fall) for fall in falls])
    runs = [str(tmp_path / name) for name in ("trunk", "decay", "decay-linear")]
    totals = ledger.total(runs)
    assert totals.steps == 20 + 4 + 4 and totals.samples == 8 * totals.steps
    assert ledger.total(runs[1:]).steps == 16 + 4 + 4  # of the trunk what the longer one needs
    assert ledger.total(runs[:2]).steps == 24 and ledger.total(runs[1:2]).steps == 12
    parts = [ledger.total(runs[:1]), *(ledger.total(runs[:1] + [run]) for run in runs[1:])]
    own = [part.flops["total"] - parts[0].flops["total"] for part in parts[1:]]
    assert totals.flops["total"] == parts[0].flops["total"] + sum(own)


def test_shared_work_is_known_where_ledgers_are_lost(words: Words, trunk: Path, tmp_path: Path) -> None:
    """That of the trunk, after the branch began, and the branch's own."""
    shutil.copytree(trunk, tmp_path / "parent")
    finish(words("a", *branch(tmp_path / "parent"), "budget.steps=6"))
    for name, steps in (("parent", 9), ("a", 7)):
        (tmp_path / name / "ledger.jsonl").unlink()
        finish(words(name, *(branch(tmp_path / "parent") if name == "a" else ()), f"budget.steps={steps}"))
    runs = [str(tmp_path / name) for name in ("parent", "a")]
    assert ledger.total(runs).steps == 9 + 3
    ledger_program.check(runs)


def test_another_layout_and_engine_go_on(words: Words, trunk: Path, tmp_path: Path) -> None:
    """With the same data and masks: losses are equal to rounding."""
    other = ("train.engine=deepspeed", "parallel.zero=1", "parallel.tensor=2")
    finish(words("a", *branch(trunk), *other), 2)
    whole, own = ({line[0]: line[1] for line in result(run)["losses"]} for run in (trunk, tmp_path / "a"))
    assert own == pytest.approx({step: whole[step] for step in range(5, 9)}, rel=1e-5)


def test_a_branch_of_a_branch_shares_the_trunk_too(words: Words, trunk: Path, tmp_path: Path) -> None:
    finish(words("one", *branch(trunk), "budget.steps=6", *EVERY))
    finish(words("two", *branch(tmp_path / "one", 5), "budget.steps=8"))
    finish(words("other", *branch(trunk, 2), "budget.steps=3"))
    runs = [str(trunk), *(str(tmp_path / name) for name in ("one", "two", "other"))]
    assert ledger.total(runs).steps == 8 + 2 + 3 + 1
    assert ledger.total(runs[2:]).steps == 4 + 1 + 3 + 1
    _, text = ledger_program.total(runs)
    tree = [line.split(":")[0] for line in text.splitlines()[:4]]
    assert tree == [
        runs[0],
        f"  {runs[1]} at step 4",
        f"    {runs[2]} at step 5",
        f"  {runs[3]} at step 2",
    ]
    document = report.gather(runs)
    assert [run.branch and run.branch.run for run in document.runs] == [
        None, "trunk", "one", "trunk",
    ]  # fmt: skip
    assert document.together and document.together.steps == 14
    for page in (report.report_pages.markdown(document), report.report_pages.html(document)):
        assert "two at step 5: 3 updates" in page


CHANGES = {
    "rate": ("optimizer.lr=1e-3", "masking.rate=0.3", "optimizer.betas=[0.9, 0.95]"),
    "length": ("train.seq_length=32", "evaluate.seq_length=24", "train.batch_size=4"),
    "views": ("masking.views=2", "masking.views_mode=batch", "masking.rate=0.4"),
    "phases": ("train.phases=[{until: 0.8, seq_length: 16}]",),
    "hours": ("budget.steps=null", "budget.tokens=3000"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_keeps_the_weights_shape_may_differ(
    change: str, words: Words, trunk: Path, tmp_path: Path
) -> None:
    options = (*branch(trunk), "budget.steps=10", *CHANGES[change])
    finish(words("a", *options, *EVERY))
    first = checkpoint.read_state(checkpoint.find_verified(tmp_path / "a", 5)[0])
    assert first.samples == 4 * 8 + first.config["train"]["batch_size"] and first.optimizer_step == 5
    ledger_program.check([str(tmp_path / "a")])
    assert attempt(words("a", *options)).codes == [0]


def test_rotary_positions_are_extended(words: Words, tmp_path: Path) -> None:
    finish(words("trunk", "model.block=modern"))
    longer = ("model.max_positions=80", "train.seq_length=60", "model.rope_theta=160000")
    finish(words("a", "model.block=modern", *branch(tmp_path / "trunk", "best"), "budget.steps=10", *longer))
    assert checkpoint.read_state(checkpoint.find_verified(tmp_path / "a")[0]).step == 10


def test_another_corpus_begins_at_its_start(words: Words, trunk: Path, tiny: Path, tmp_path: Path) -> None:
    """As it does in a run of its own; with the same one, the order goes on."""

    finish(words("a", *branch(trunk), f"corpus.train={tiny}/short"))
    state = checkpoint.read_state(checkpoint.find_verified(tmp_path / "a")[0])
    assert [(segment[1], len(state.segments)) for segment in state.segments] == [(32, 1)]
    config = build_config(state.config)
    data = open_data(config.corpus)

    here, alone = open_blend(config, data, _past(state)), open_blend(config, data)
    some = torch.arange(8).numpy()
    assert (here.read(32 + some).tokens == alone.read(some).tokens).all()
    assert checkpoint.read_state(checkpoint.find_verified(trunk)[0]).segments[0][1] == 0


def refusal(words: list[str]) -> str:
    outcome = attempt(words)
    assert outcome.codes == [2] and "Traceback" not in outcome.text, outcome.text
    dry = attempt([*words, "--dry-run"])
    assert dry.codes == [2]
    return outcome.text


def test_what_cannot_be_is_refused(words: Words, trunk: Path, tiny: Path, tmp_path: Path) -> None:
    said = refusal(words("a", *branch(trunk), "model.hidden_size=48", "model.mask_from=1"))
    assert f"error: model.hidden_size: 32 -> 48: a branch has the weights of {trunk}; set it back" in said
    assert "model.mask_from: 0 -> 1" in said and not (tmp_path / "a" / "ledger.jsonl").exists()
    assert "is less than one update costs" in refusal(words("b", *branch(trunk, 8)))
    assert "no such folder" in refusal(words("c", *branch(tmp_path / "none")))
    assert "has no checkpoint 99; take latest" in refusal(words("d", *branch(trunk, 99)))
    assert "should be a step, latest or best" in refusal(words("e", *branch(trunk, "newest")))
    assert "unknown key run.branch.off; did you mean of" in refusal(words("f", f"run.branch.off={trunk}"))
    finish(words("g", *branch(trunk)))
    assert f"is a branch of {trunk} at 4; set it back" in refusal(words("g", *branch(trunk, 5)))
    assert "run.branch:" in refusal(words("g"))


def test_muon_may_follow_adamw_but_not_go_before(words: Words, trunk: Path, tmp_path: Path) -> None:
    finish(words("muon", "optimizer.kind=muon", *branch(trunk)))
    ledger_program.check([str(tmp_path / "muon")])
    own = ledger.total([tmp_path / "muon"]).flops
    assert own["optimizer"] > 0 and own["total"] == sum(own[part] for part in own if part != "total")
    said = refusal(words("a", *branch(tmp_path / "muon", "latest"), "budget.steps=9"))
    assert "optimizer.kind: muon -> adamw, but its matrices have no second moment: a branch has" in said


def test_a_damaged_trunk_is_refused(words: Words, trunk: Path, tmp_path: Path) -> None:
    shutil.copytree(trunk, tmp_path / "parent")
    os.truncate(tmp_path / "parent" / "checkpoints" / "step-00000004" / "exp_avg.safetensors", 100)
    damaged = attempt(words("a", *branch(tmp_path / "parent")))
    assert damaged.codes == [2] and "exp_avg.safetensors has 100 bytes instead of" in damaged.text
    finish(words("a", *branch(tmp_path / "parent", 5)))


def test_a_trunk_of_a_program_that_did_not_say_what_it_had_spent(words: Words, trunk: Path) -> None:
    """Is asked by its ledger."""

    parent = trunk.with_name("old")
    shutil.copytree(trunk, parent)
    path = parent / "checkpoints" / "step-00000004"
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "account": None}))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = digest(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    finish(words("a", *branch(parent)))
    (parent / "ledger.jsonl").unlink()
    assert "neither the checkpoint of step 4 nor the ledger" in refusal(words("b", *branch(parent)))


def test_the_commands_of_the_page(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At reduced width, and for fewer updates."""
    monkeypatch.chdir(tmp_path)
    fewer = {"400": "4", "500": "7", "200": "2"}
    small = ["hidden_size=32", "ffn_size=48", "num_heads=2", "num_layers=2", "mask_from=2"]
    page = (ROOT / "pretrain" / "README.md").read_text(encoding="utf-8")
    *runs, last = re.findall("^python .*runs/trunk.*$", page, re.MULTILINE)
    for line in runs:
        words = [re.sub(r"\d00$", lambda number: fewer[number[0]], word) for word in shlex.split(line)[3:]]
        words[0] = str(ROOT / words[0])
        corpora = [f"corpus.{name}={tiny}/{name}" for name in ("train", "valid")]
        finish([*words, *corpora, *(f"model.{word}" for word in small), "evaluate.samples=8"])
    assert rates(tmp_path / "runs" / "trunk")[4] == 1e-3
    assert list(rates(tmp_path / "runs" / "calm").values())[-1] < 5e-4
    _, text = ledger_program.total(shlex.split(last)[4:])
    assert "  runs/calm at step 2: 5 updates" in text


def test_the_plan_is_of_its_own_part(words: Words, trunk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    plan.main([*words("a", *branch(trunk, "latest"), "budget.steps=20"), "--json"])
    (said,) = json.loads(capsys.readouterr().out)
    assert said["steps"] == 12 and said["flops_total"] * 8 == 12 * ledger.total([trunk]).flops["total"]
    config = load_config(words("a")[0], [*branch(trunk, "latest"), "budget.steps=20"])
    frozen = settled(config, planned_recipe(config)[0]).run.branch  # for a job that waits
    assert frozen and frozen.step == 8 and frozen.inherited["steps"] == 8
    dry = attempt([*words("a", *branch(trunk, "latest"), "budget.steps=20"), "--dry-run"])
    assert dry.codes == [0], dry.text
    assert f"20 steps, 8 of them by {trunk} at step 8 = 12 updates" in " ".join(dry.text.split())
