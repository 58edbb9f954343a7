"""Speeds against closed forms, the metrics file against kills, and what a terminal or a log shows."""

import io
import json
import math
import re
import sys
from dataclasses import replace

import pytest

from pretrain import monitor
from pretrain.account import ledger
from pretrain.errors import UserError
from pretrain.monitor import Monitor, read_metrics, speeds
from tests.support.terminal import on_terminal


def totals(step, productive=None, total=None):
    """A ledger's statement at `step`: 2 ranks, 0.5 s a step unless told otherwise."""
    productive = step * 1.0 if productive is None else productive
    return replace(
        ledger.total([]),
        steps=step,
        samples=4 * step,
        tokens_seen=512 * step,
        tokens_real=504 * step,
        tokens_predicted=76 * step,
        token_layers=24.5 * step,
        peak_bytes=7,
        flops={"encoder": 3000 * step, "decoder": 600 * step, "head": 90 * step, "total": 3690 * step},
        device_seconds={
            "productive": productive,
            "lost": 36.0,
            "total": productive if total is None else total,
        },
    )


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def opened(run, clock=None, stream=None, step=0, **more):
    return Monitor(
        run, "3ml-self", totals(step), ranks=2, stream=stream or io.StringIO(), clock=clock or Clock(), **more
    )


# ---- figures -------------------------------------------------------------------------------------


def test_speeds_are_per_second_of_work():
    """10 steps in 5 s of work on 2 ranks, with an hour of evaluation in between."""
    before, after = totals(10, 10.0), totals(20, 20.0, 7220.0)
    assert speeds(before, after, 2, peak=1000.0) == {
        "step_seconds": 0.5,
        "samples_per_second": 8.0,
        "slots_per_second": 1024.0,
        "real_tokens_per_second": 1008.0,
        "predictions_per_second": 152.0,
        "model_flops_per_second": 7380.0,
        "mfu": 3.69,  # 7380 / (2 devices x 1000)
    }


def test_there_is_no_mfu_without_a_known_peak_and_no_speed_without_work():
    assert "mfu" not in speeds(totals(1), totals(2), 2)
    assert speeds(totals(2), totals(2), 2) == {}
    assert speeds(totals(2, 2.0), totals(2, 3.0), 2) == {}


def test_a_line_holds_values_costs_and_speeds(tmp_path):
    with opened(tmp_path, peak=1e6) as writer:
        line = writer.log(0.25, totals(10, 10.0, 3600.0), loss=6.5, lr=1e-4, grad_norm=None)
    assert read_metrics(tmp_path) == [line]
    expected = {
        "step": 10,
        "time": 1000.0,
        "progress": 0.25,
        "loss": 6.5,
        "lr": 1e-4,
        "grad_norm": None,
        "samples": 40,
        "tokens_seen": 5120,
        "tokens_real": 5040,
        "tokens_predicted": 760,
        "flops": 36900,
        "flops_without_head": 36000,
        "token_layers": 245.0,
        "device_hours": 1.0,
        "lost_hours": 0.01,
        "kwh": None,
        "peak_bytes": 7,
        **speeds(totals(0), totals(10), 2, 1e6),
    }
    assert line == expected


def test_speeds_are_of_the_updates_since_the_last_log(tmp_path):
    with opened(tmp_path) as writer:
        writer.log(0.1, totals(10, 10.0))
        assert writer.log(0.2, totals(20, 40.0))["step_seconds"] == 1.5


def test_waiting_for_data_is_shown_as_a_share_of_the_updates(tmp_path):
    stream = io.StringIO()
    with opened(tmp_path, stream=stream) as writer:  # 10 steps in 30 s of work on 2 ranks
        line = writer.log(0.2, totals(10, 30.0), data_wait_seconds=0.15)
    assert line["data_wait"] == pytest.approx(0.01)
    assert "data wait 1.0%" in stream.getvalue()


def test_the_line_is_json_whatever_the_loss(tmp_path):
    with opened(tmp_path) as writer:
        writer.log(0.1, totals(1), loss=math.nan, grad_norm=math.inf)
    (line,) = read_metrics(tmp_path)
    assert line["loss"] is None and line["grad_norm"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_time_left_goes_by_the_pace_of_the_last_logs(tmp_path):
    clock = Clock()
    writer = opened(tmp_path, clock)
    assert writer.seconds_left() is None
    writer.log(0.5, totals(1))  # the first update compiled for an hour
    assert writer.seconds_left() is None
    for index in range(1, 25):
        clock.now += 10
        writer.log(0.5 + 0.01 * index, totals(1 + index))
        assert writer.seconds_left() == pytest.approx((0.5 - 0.01 * index) / 0.001)
    for _ in range(monitor.WINDOW):
        clock.now += 40
        writer.log(0.75, totals(50))
    assert writer.seconds_left() is None  # nothing moves: no guess


# ---- the file over restarts ----------------------------------------------------------------------


def steps_and_losses(run):
    return [(line["step"], line.get("loss")) for line in read_metrics(run)]


def test_an_evaluation_joins_the_line_of_its_step(tmp_path):
    with opened(tmp_path) as writer:
        writer.log(0.1, totals(10), loss=6.0)
        writer.log(0.1, totals(10), held_out_loss=5.5)
    (line,) = read_metrics(tmp_path)
    assert (line["loss"], line["held_out_loss"]) == (6.0, 5.5)
    assert line["slots_per_second"] == 1024.0  # the evaluation did not wipe it out


def test_what_the_run_went_back_from_is_forgotten(tmp_path):
    with opened(tmp_path) as writer:
        for step in (10, 20, 30, 40):
            writer.log(step / 100, totals(step), loss=step / 10)
    with opened(tmp_path, step=20) as writer:
        writer.log(0.25, totals(25), loss=7.0)
        assert steps_and_losses(tmp_path) == [(10, 1.0), (20, 2.0), (25, 7.0)]
        writer.log(0.3, totals(30), loss=8.0)
    assert steps_and_losses(tmp_path) == [(10, 1.0), (20, 2.0), (25, 7.0), (30, 8.0)]


def test_a_line_torn_at_any_byte_breaks_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with opened(tmp_path) as writer:
        writer.log(0.1, totals(10), loss=1.0)
        one = path.read_bytes()
        writer.log(0.2, totals(20), loss=2.0)
    both = path.read_bytes()
    for cut in range(len(one), len(both)):
        path.write_bytes(both[:cut])
        assert steps_and_losses(tmp_path) == [(10, 1.0)]
        with opened(tmp_path, step=10) as writer:
            writer.log(0.2, totals(20), loss=3.0)
        assert steps_and_losses(tmp_path) == [(10, 1.0), (20, 3.0)]


@pytest.mark.parametrize("bad", ["{", "[]", "{}", "\x00"])
def test_a_bad_line_inside_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match="jsonl:2: not a line of metrics"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_metrics(tmp_path / "none")


# ---- what one sees -------------------------------------------------------------------------------


def test_a_log_file_gets_the_first_line_one_every_20_seconds_and_the_last(tmp_path):
    clock, stream = Clock(), io.StringIO()
    with opened(tmp_path, clock, stream) as writer:
        for step in range(1, 12):
            clock.now += 5
            writer.log(step / 20, totals(step), loss=step / 8, held_out_loss=None)
    lines = stream.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["1", "5", "9", "11"]
    assert lines[-1] == (
        "3ml-self  step 11  loss 1.3750  55.0% of budget  left 0:00:45"
        "  1.02k slots/s  1.01k tokens/s  152 predicted/s"
    )


def test_nothing_is_shown_twice_in_a_log_file(tmp_path):
    stream = io.StringIO()
    with opened(tmp_path, stream=stream) as writer:
        writer.log(0.5, totals(1))
    assert (
        stream.getvalue()
        == "3ml-self  step 1  50.0% of budget  left -  1.02k slots/s  1.01k tokens/s  152 predicted/s\n"
    )


TRAINING = """
import logging, sys
from pretrain.monitor import Monitor
from tests.run.test_monitor import totals
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
logging.info("method      the plan")
with Monitor(sys.argv[1], "3ml-self", totals(0), ranks=2, peak=1e4) as writer:
    for step in range(10, 60, 10):
        writer.log(step / 100, totals(step), loss=step / 8, data_wait_seconds=0.05)
        if step == 30:
            logging.info("a word in between")
    writer.log(0.5, totals(50), held_out_loss=6.5)
logging.info("the end")
"""


@pytest.mark.parametrize("width", [40, 80, 100, 120])
def test_a_terminal_keeps_the_lines_and_drops_the_bar(tmp_path, width):
    screen = on_terminal([sys.executable, "-c", TRAINING, str(tmp_path)], width)
    first, *logged, last = screen.lines
    assert (first, last) == ("method      the plan", "the end")
    assert logged.pop(3) == "a word in between"
    assert [line.split()[1] for line in logged] == ["10", "20", "30", "40", "50", "50"]
    assert all(len(line) <= width for line in screen.lines)
    if width >= 80:
        left = r"step \d+  (loss|held-out) [\d.]+  \d+\.0% of budget  left (-|[\d:]+)"
        assert all(re.match(left, line) for line in logged)
        assert re.search(r"3ml-self\S* .*━.* 50\.0% of budget  left ", screen.raw)
    known = r"  ((loss|held-out) [\d.]{6}|\S+ (slots|tokens|predicted)/s|MFU \S+%|data wait \S+%|"
    known += r"\S+% of budget|left \S+)$"
    assert all(re.search(known, line) for line in logged)  # the last field is a whole one


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (999, "999"), (18345, "18.3k"), (2.5e6, "2.5M"), (3e9, "3G"), (4.2e13, "42T")],
)
def test_large_numbers_have_letters(value, text):
    assert monitor._number(value) == text


def scalars(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_holds_the_same_and_forgets_the_same(tmp_path):
    with opened(tmp_path, tensorboard=True) as writer:
        for step in (10, 20, 30):
            writer.log(step / 100, totals(step), loss=step / 8, grad_norm=math.nan)
    with opened(tmp_path, step=20, tensorboard=True) as writer:
        writer.log(0.3, totals(30), loss=9.0)
    found = scalars(tmp_path)
    assert found["loss"] == [(10, 1.25), (20, 2.5), (30, 9.0)]
    assert found["slots_per_second"] == [(10, 1024.0), (20, 1024.0), (30, 1024.0)]
    assert not {"step", "time", "grad_norm"} & found.keys()


def test_without_tensorboard_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="set monitor.tensorboard=false"):
        opened(tmp_path, tensorboard=True)


def test_metrics_are_lines_of_json(tmp_path):
    with opened(tmp_path) as writer:
        writer.log(0.1, totals(1), loss=1.0)
        writer.log(0.2, totals(2), loss=2.0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
