"""A ledger that is damaged, cut or gone keeps no run from going on: the gap is noted, all else is equal."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest

from pretrain import checkpoint
from pretrain.account import ledger
from pretrain.errors import UserError
from tests.support.runs import Strike, attempt, finish, result
from tools.ledger import __main__ as program
from tools.report import __main__ as report

Words = Callable[..., list[str]]
Lines = list[bytes]

OPTIONS = (
    "train.phases=[{until: 0.3, seq_length: 16}]",
    "evaluate.seq_length=24",
    "checkpoint.every_steps=2",
)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of the run that nobody disturbed."""
    run = tmp_path_factory.mktemp("whole")
    finish([str(tiny / "tiny.yaml"), f"run.dir={run}", *OPTIONS])
    return result(run)


@pytest.fixture
def cut(words: Words, tmp_path: Path) -> Path:
    """A run that was stopped after the fifth update of eight."""
    assert attempt(words("cut", *OPTIONS), strike=Strike(SIGTERM, 5)).codes == [75]
    return tmp_path / "cut"


def last_save(lines: Lines) -> int:
    return max(number for number, line in enumerate(lines) if json.loads(line)["event"] == "save")


def torn(lines: Lines) -> bytes:
    """In the line of the newest checkpoint."""
    at = last_save(lines)
    return b"".join(lines[:at]) + lines[at][:-30]


def torn_last_word(lines: Lines) -> bytes:
    return b"".join(lines)[:-30]


def shortened(lines: Lines) -> bytes:
    return b"".join(lines[: last_save(lines)])


def emptied(lines: Lines) -> bytes:
    return b""


def flipped(lines: Lines) -> bytes:
    return b"".join([lines[0], lines[1].replace(b'"samples": ', b'"samples": 1'), *lines[2:]])


def miscounted(lines: Lines) -> bytes:
    """The last line, which no other holds."""
    return b"".join([*lines[:-1], lines[-1].replace(b'"total": ', b'"total": 1', 1)])


def misspelt(lines: Lines) -> bytes:
    """A key of the last line, on which the next one builds."""
    return b"".join([*lines[:-1], lines[-1].replace(b'"evaluate"', b'"evaluatd"')])


def rewritten(lines: Lines) -> bytes:
    """By somebody who has written all hashes after it anew."""
    head, text = "", b""
    for number, line in enumerate(map(json.loads, lines)):
        new = json.dumps({**line, "previous": head, "device": "another" if number == 1 else "cpu"}).encode()
        head, text = hashlib.sha256(new).hexdigest(), text + new + b"\n"
    return text


DAMAGES = {
    torn: "was cut off before it",
    torn_last_word: "was cut off, or changed",
    shortened: "was cut off before it",
    emptied: "was cut off before it",
    flipped: "was damaged at line 3: does not follow from the line before",
    miscounted: "was damaged at line",
    misspelt: "was damaged at line",
    rewritten: "was changed: it goes on without it",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_goes_on_where_the_ledger_is_damaged(
    damage: Callable[[Lines], bytes], cut: Path, words: Words, whole: dict[str, Any], tmp_path: Path
) -> None:
    """To the same weights, counts and losses; what is known of the time before stays known."""
    path = cut / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    state = checkpoint.read_state(checkpoint.find_verified(cut)[0])
    path.write_bytes(damage(lines))
    with pytest.raises(
        UserError, match="is missing: .*was c|does not follow from the line|do not add up|have no evaluate"
    ):
        program.check([str(cut)])
    killed = attempt(words("cut", *OPTIONS), strike=Strike(SIGKILL, 1))
    assert killed.codes == [-SIGKILL], killed.text
    assert f"ledger.jsonl {DAMAGES[damage]}" in killed.text
    finish(words("cut", *OPTIONS))
    assert result(cut) == whole
    (gap,) = [line for line in ledger.read(cut) if line.event == "gap"]
    assert gap.details["found"].startswith(DAMAGES[damage]) and gap.step == state.step == 5
    assert (state.ledger_head in gap.stands_for) == (damage not in (torn_last_word, miscounted, misspelt))
    (checked,), text = program.check([str(cut)])
    assert f"notes a gap: the ledger {DAMAGES[damage]}" in " ".join(text.split())
    assert checked.gaps == ledger.gaps(ledger.read(cut))
    assert state.account
    seconds, before = ledger.total([cut]).device_seconds, state.account.device_seconds
    assert seconds["total"] > before["total"] and seconds["productive"] > before["productive"]
    (warning,) = [one for one in report.gather([str(cut)]).warnings if "gap" in one]
    assert DAMAGES[damage] in warning
    assert len(list(cut.glob("ledger-damaged-1.jsonl"))) == (damage in (flipped, miscounted, misspelt))


def test_goes_on_where_the_ledger_is_gone_and_the_newest_checkpoint_too(
    cut: Path, words: Words, whole: dict[str, Any]
) -> None:
    """The line of the older checkpoint is one of those that the first gap stands for."""
    (cut / "ledger.jsonl").unlink()
    assert attempt(words("cut", *OPTIONS), strike=Strike(SIGKILL, 1)).codes == [-SIGKILL]
    program.check([str(cut)])
    os.truncate(cut / "checkpoints" / "step-00000005" / "model.safetensors", 100)
    finish(words("cut", *OPTIONS))
    assert result(cut) == whole
    gaps = [line.details["found"] for line in ledger.read(cut) if line.event == "gap"]
    assert gaps == ["was cut off before it", "has lost it already"]
    program.check([str(cut)])
    assert ledger.total([cut]).lost_flops > 0


def test_a_ledger_without_the_end_of_a_finished_run(words: Words, tmp_path: Path) -> None:
    finish(words("a"))
    path = tmp_path / "a" / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    before = result(tmp_path / "a")["tensors"]
    finish(words("a"))
    assert result(tmp_path / "a")["tensors"] == before and ledger.total([tmp_path / "a"]).steps == 8
    program.check([str(tmp_path / "a")])


def test_checkpoints_of_programs_that_did_not_say_need_their_line(cut: Path, words: Words) -> None:
    for path in (cut / "checkpoints").glob("step-*/state.json"):
        state = json.loads(path.read_text())
        path.write_text(json.dumps({**state, "account": None}))
        manifest = path.with_name("manifest.json")
        files = json.loads(manifest.read_text())
        data = path.read_bytes()
        files["files"]["state.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(files))
    whole = (cut / "ledger.jsonl").read_bytes()
    (cut / "ledger.jsonl").write_bytes(b"")
    refused = attempt(words("cut", *OPTIONS))
    assert refused.codes == [2] and "to which the checkpoint refers; restore the ledger" in refused.text
    (cut / "ledger.jsonl").write_bytes(whole)
    finish(words("cut", *OPTIONS))


def test_a_pointer_that_is_gone_is_written_again(words: Words, tmp_path: Path) -> None:
    finish(words("a"))
    latest = tmp_path / "a" / "checkpoints" / "latest"
    said = latest.read_text()
    latest.unlink()
    finish(words("a"))
    assert latest.read_text() == said
