"""Weights that stay at shares of the budget: the ones a checkpoint of that step has, through any kill."""

import shutil
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL, SIGTERM

import pytest
import torch

from pretrain import checkpoint
from pretrain.account import ledger
from pretrain.errors import UserError
from tests.support.runs import DISK, NEVER, Paced, Strike, attempt, finish
from tools import average, evaluate
from tools.export import __main__ as export
from tools.ledger import __main__ as ledger_program
from tools.shared.run_model import load_model

Words = Callable[..., list[str]]

KEEP = ("checkpoint.keep=[0, 0.3, 0.5, 1.0]", "budget.steps=8")
NAMES = {"share-0": 0, "share-0.3": 3, "share-0.5": 4, "share-1": 8}
"""Of eight updates: three are the first to pass 30 %."""


def weights(run: Path, which: str | int) -> dict[str, torch.Tensor]:
    path, stamps = checkpoint.find_verified(run, which)
    return checkpoint.read_tensors(path, stamps=stamps)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("ranks", [1, 2])
def test_milestones_are_the_checkpoints_of_their_steps(ranks: int, words: Words, tmp_path: Path) -> None:
    every = ("checkpoint.every_steps=1", "checkpoint.keep_last=20")
    finish(words("a", *KEEP, *every), ranks)
    run = tmp_path / "a"
    assert checkpoint.named_weights(run) == list(NAMES)
    for name, step in NAMES.items():
        path = checkpoint.find_verified(run, name)[0]
        assert checkpoint.read_state(path).step == step
        assert sorted(file.name for file in path.iterdir()) == [
            "manifest.json",
            "model.safetensors",
            "state.json",
        ]
        if step:
            assert same(weights(run, name), weights(run, step))
    notes = [line for line in ledger.read(run) if line.event == "milestone"]
    assert [(line.details["share"], line.step) for line in notes] == [(0, 0), (0.3, 3), (0.5, 4), (1.0, 8)]
    ledger_program.check([str(run)])


@pytest.mark.parametrize("signal", [SIGKILL, SIGTERM])
def test_kept_through_any_stop(signal: int, words: Words, tmp_path: Path) -> None:
    """Stopped between any two writes; what was gone back from is kept anew, and equal."""
    finish(words("whole", *KEEP))
    last, at = 1, 3
    while last:
        cut = attempt(words("cut", "checkpoint.every_steps=2", *KEEP), strike=Strike(signal, at, DISK))
        last, at = cut.codes[0], at + 9
    for name in NAMES:
        assert same(weights(tmp_path / "cut", name), weights(tmp_path / "whole", name)), name


def test_shares_that_are_past_are_not_made_up_for(words: Words, tmp_path: Path) -> None:
    stopped = attempt(words("a", "budget.steps=8"), strike=Strike(SIGTERM, 6))
    assert stopped.codes == [75]
    outcome = finish(words("a", *KEEP))
    assert "checkpoint.keep: 0, 0.3, 0.5 of the budget are past; nothing is kept of them" in outcome.text
    assert checkpoint.named_weights(tmp_path / "a") == ["share-1"]


def test_shares_are_of_the_budget_that_is_being_spent(words: Words, tmp_path: Path) -> None:
    """Of twice the budget half is another step; until then the name is that of the smaller one."""
    finish(words("a", "checkpoint.keep=[0.5, 1.0]", "budget.steps=4"))
    run = tmp_path / "a"
    assert [checkpoint.read_state(run / "weights" / name).step for name in ("share-0.5", "share-1")] == [2, 4]
    outcome = finish(words("a", "checkpoint.keep=[0.25, 0.5, 1.0]", "budget.steps=8"))
    assert "checkpoint.keep: 0.25 of the budget are past; nothing is kept of them" in outcome.text
    assert [checkpoint.read_state(run / "weights" / name).step for name in ("share-0.5", "share-1")] == [4, 8]
    assert same(weights(run, "share-1"), weights(run, 8))


def test_a_start_up_passes_no_share_of_a_budget_of_hours(
    words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has been spent says more than how far the updates are, where a run was started twice."""
    hours = ("budget.steps=null", f"budget.device_hours={3 / 3600}", "checkpoint.keep=[0.5, 1.0]")
    stopped = attempt(words("a", *hours), strike=Paced(SIGTERM, 8))
    assert stopped.codes == [75], stopped.text
    ended = attempt(words("a", *hours), strike=Paced(SIGTERM, NEVER))
    assert ended.codes == [0], ended.text
    assert "are past" not in ended.text
    assert checkpoint.named_weights(tmp_path / "a") == ["share-0.5", "share-1"]


def test_damaged_weights_keep_no_run_from_going_on(words: Words, tmp_path: Path) -> None:
    stopped = attempt(words("a", *KEEP), strike=Strike(SIGTERM, 6))
    assert stopped.codes == [75]
    state = tmp_path / "a" / "weights" / "share-0.3" / "state.json"
    state.write_text("{")
    finish(words("a", *KEEP), 2)
    assert checkpoint.named_weights(tmp_path / "a") == list(NAMES)
    with pytest.raises(UserError, match="share-0.3: state.json has 1 bytes instead of"):
        checkpoint.find_verified(tmp_path / "a", "share-0.3")[0]


def test_weights_are_used_where_checkpoints_are_gone(words: Words, tmp_path: Path) -> None:
    finish(words("a", *KEEP))
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-00000008")
    assert checkpoint.read_state(checkpoint.find_verified(tmp_path / "a", "share-1")[0]).step == 8
    with pytest.raises(UserError, match="step-00000008: is gone"):
        checkpoint.find_verified(tmp_path / "a")[0]


def test_weights_are_damaged_or_unknown_by_name(words: Words, tmp_path: Path) -> None:
    finish(words("a", *KEEP))
    with pytest.raises(UserError, match="has no checkpoint 'share-0.7'; take latest, or one of 8, share-0, "):
        checkpoint.find_verified(tmp_path / "a", "share-0.7")[0]
    file = tmp_path / "a" / "weights" / "share-1" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"share-1: model.safetensors has \d+ bytes instead of"):
        checkpoint.find_verified(tmp_path / "a", "share-1")[0]


def test_what_takes_a_checkpoint_takes_kept_weights(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(words("a", *KEEP))
    run = str(tmp_path / "a")
    average.main([run, "--checkpoints", "share-0.3", "share-0.5", "8", "--name", "three"])
    told = "mean of share-0.3 (33.3%), share-0.5 (33.3%), step-00000008 (33.3%)"
    assert told in capsys.readouterr().out
    three = [weights(tmp_path / "a", which) for which in ("share-0.3", "share-0.5", "8")]
    for name, mean in weights(tmp_path / "a", "three").items():
        assert torch.allclose(mean, (sum(one[name].double() for one in three) / 3).float(), rtol=0, atol=1e-7)
    state = checkpoint.read_state(checkpoint.find_verified(tmp_path / "a", "three")[0])
    assert state.averaged == pytest.approx(dict.fromkeys(("share-0.3", "share-0.5", "step-00000008"), 1 / 3))
    assert state.step == 8 and state.loss is None
    ledger_program.check([run])
    evaluate.main([run, "--checkpoint", "three", "--json"])
    assert export.main([run, "--milestones", "--output", str(tmp_path / "out"), "--json"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(NAMES)
    assert same(load_model(run, "three").model.state_dict(), weights(tmp_path / "a", "three"))
    capsys.readouterr()
    with pytest.raises(UserError, match="three: there already; add --overwrite"):
        average.main([run, "--last", "1", "--name", "three"])
    with pytest.raises(UserError, match="has no 2 checkpoints; its checkpoints are of 8"):
        average.main([run, "--last", "2"])


def test_a_decaying_average_weighs_the_newest_most(words: Words, tmp_path: Path) -> None:
    finish(words("a", *KEEP))
    average.main([str(tmp_path / "a"), "--checkpoints", "8", "share-0.3", "--weights", "0.5"])  # by age
    first, last = weights(tmp_path / "a", "share-0.3"), weights(tmp_path / "a", "8")
    for name, mean in weights(tmp_path / "a", "average").items():
        assert torch.allclose(mean, first[name] / 3 + 2 * last[name] / 3, rtol=0, atol=1e-6)
    state = checkpoint.read_state(checkpoint.find_verified(tmp_path / "a", "average")[0])
    assert state.averaged == pytest.approx({"share-0.3": 1 / 3, "step-00000008": 2 / 3})


def test_averages_that_are_refused(words: Words, tmp_path: Path) -> None:
    finish(words("a", *KEEP))
    run = str(tmp_path / "a")
    with pytest.raises(UserError, match="8, latest: one checkpoint is named twice"):
        average.main([run, "--checkpoints", "8", "latest"])
    for name in ("latest", "7", "share-2", "../x"):
        with pytest.raises(UserError, match=f"argument --name: {name!r}: take letters, digits"):
            average.main([run, "--last", "1", "--name", name])
    (tmp_path / "a" / "weights" / "mine").mkdir()
    with pytest.raises(UserError, match="weights/mine: there already, and no average; take another --name"):
        average.main([run, "--last", "1", "--name", "mine", "--overwrite"])
