"""What is written while training: metrics.jsonl, TensorBoard, a tracker, a progress bar.

A speed is the difference of two statements of the ledger, over the seconds of
productive work between them, so that an evaluation or a save in between does not look like slow
training.

`metrics.jsonl` is append-only and the only thing that tables and plots read. A resumed
run logs some steps again, so read it with `read_metrics`, which forgets what the run went back
from.

Only rank 0 has a monitor.
"""

import json
import logging
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pretrain.account.ledger import Totals
from pretrain.errors import UserError
from pretrain.files import named, parse_json, truncate_torn_line
from pretrain.tracker import Tracker

if TYPE_CHECKING:
    from rich.progress import TaskID
    from rich.table import Column
    from torch.utils.tensorboard import SummaryWriter

PLAIN_EVERY = 20.0  # seconds between lines where there is no terminal
WINDOW = 20  # logs over which the time left is estimated
SPIKE_WINDOW, SIGMAS = 100, 6  # logs before a spike, and how far it stands out

Metrics = dict[str, Any]


def speeds(before: Totals, after: Totals, ranks: int, peak: float | None = None) -> dict[str, float]:
    """Return the rates of the updates between two statements of the ledger; none if there was no work.

    Slots are rows of input, [MASK] rows included; real tokens are the text among them. `peak` is
    one device's dense FLOP/s: with it the model FLOPs utilization `mfu` is given, without it never
    guessed.
    """
    device_seconds = after.device_seconds["productive"] - before.device_seconds["productive"]
    steps = after.steps - before.steps
    if device_seconds <= 0 or steps <= 0:
        return {}
    seconds = device_seconds / ranks
    flops = after.flops["total"] - before.flops["total"]
    found = {
        "step_seconds": seconds / steps,
        "samples_per_second": (after.samples - before.samples) / seconds,
        "slots_per_second": (after.tokens_seen - before.tokens_seen) / seconds,
        "real_tokens_per_second": (after.tokens_real - before.tokens_real) / seconds,
        "predictions_per_second": (after.tokens_predicted - before.tokens_predicted) / seconds,
        "model_flops_per_second": flops / seconds,
    }
    return found if peak is None else {**found, "mfu": flops / device_seconds / peak}


def _counts(totals: Totals) -> Metrics:
    return {
        "samples": totals.samples,
        "tokens_seen": totals.tokens_seen,
        "tokens_real": totals.tokens_real,
        "tokens_predicted": totals.tokens_predicted,
        "flops": totals.flops["total"],
        "flops_without_head": totals.flops_without_head,
        "token_layers": totals.token_layers,
        "device_hours": totals.device_hours,
        "lost_hours": totals.device_seconds["lost"] / 3600,
        "kwh": totals.kwh,
        "peak_bytes": totals.peak_bytes,
    }


def read_metrics(run: str | Path) -> list[Metrics]:
    """Return one dict per logged step, ascending; later lines of a step add to or replace the earlier ones.

    When a line's step is below the one before, the run had gone back to a checkpoint: what it had
    logged beyond is forgotten. A last line without an end is left out; any other bad line is a
    UserError.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path}: no such file; check the run's path")
    kept: list[Metrics] = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            line = parse_json(text)
            step = line["step"]
            if type(step) is not int:
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not a line of metrics; delete it") from None
        while kept and kept[-1]["step"] > step:
            kept.pop()
        if kept and kept[-1]["step"] == step:
            line = {**kept.pop(), **line}
        kept.append(line)
    return kept


class Spikes:
    """Counts values that are far above those before: by SIGMAS of their standard deviations."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._number = 0

    def count(self, value: float | None) -> int:
        """Take in a value; return how many spikes there were so far."""
        if value is not None and len(self._last) >= SPIKE_WINDOW // 4:
            most = statistics.fmean(self._last) + SIGMAS * statistics.pstdev(self._last)
            self._number += value > most
            value = min(value, most)  # a spike is no reason to expect the next
        if value is not None:
            self._last.append(value)
        return self._number


class Monitor:
    """Writes metrics and shows progress; use as a context manager."""

    def __init__(
        self,
        run: str | Path,
        method: str,
        totals: Totals,
        ranks: int = 1,
        peak: float | None = None,
        tensorboard: bool = False,
        tracker: Tracker | None = None,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`totals` is the ledger's statement now; `peak` one device's dense FLOP/s, if it is known."""
        self._path = Path(run) / "metrics.jsonl"
        self._ranks, self._peak, self._clock = ranks, peak, clock
        self._before = totals
        self._spikes = {name: Spikes() for name in ("loss", "grad_norm_max")}
        truncate_torn_line(self._path)
        self._tracker = tracker
        self._boards = _tensorboard(Path(run), totals.steps) if tensorboard else None
        stream = stream or sys.stderr
        self._face = _Bar(method, stream) if stream.isatty() else _Plain(method, stream, clock)
        self._past: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # (time, progress)

    def log(self, progress: float, totals: Totals, **values: float | None) -> Metrics:
        """Records `values` (loss, lr, ...) at the step of `totals`, with what was spent and how fast.

        Returns the line. Values that are no finite number are written as null.
        """
        at = self._clock()
        line: Metrics = {
            "step": totals.steps,
            "time": round(at, 3),
            "progress": progress,
            **values,
            **_counts(totals),
            **speeds(self._before, totals, self._ranks, self._peak),
        }
        if line.get("data_wait_seconds") is not None and "step_seconds" in line:
            seconds = line["step_seconds"] * (totals.steps - self._before.steps)
            line["data_wait"] = line["data_wait_seconds"] / seconds
        self._before = totals
        line = {name: _finite(value) for name, value in line.items()}
        if line.get("loss") is not None:
            spikes = sum(known.count(line.get(name)) for name, known in self._spikes.items())
            line |= {"spikes": spikes} if spikes else {}
        with named(self._path), open(self._path, "a", encoding="ascii") as file:
            file.write(json.dumps(line) + "\n")
        self._write_boards(line)
        if self._tracker is not None:
            self._tracker.add(line)
        self._past.append((at, progress))
        self._face.show(line, self.seconds_left())
        return line

    def seconds_left(self) -> float | None:
        """Return those until the budget is spent, at the pace of the last logs; None before the second
        log."""
        if len(self._past) < 2:
            return None
        (begin, before), (end, after) = self._past[0], self._past[-1]
        return (1 - after) * (end - begin) / (after - before) if after > before else None

    def _write_boards(self, line: Metrics) -> None:
        if self._boards is None:
            return
        for name, value in line.items():
            if name not in ("step", "time") and value is not None:
                self._boards.add_scalar(name, value, line["step"], walltime=line["time"])

    def close(self) -> None:
        """Ends the bar, the TensorBoard file and the tracker."""
        self._face.close()
        if self._tracker is not None:
            self._tracker.close()
        if self._boards is not None:
            self._boards.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(run: Path, step: int) -> "SummaryWriter":
    try:
        from torch.utils.tensorboard import SummaryWriter  # a second of start-up
    except ImportError:
        raise UserError(
            "monitor.tensorboard: tensorboard is not installed; pip install it,"
            " or set monitor.tensorboard=false"
        ) from None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1, flush_secs=30)


# ---- faces ---------------------------------------------------------------------------------------


def _number(value: float) -> str:
    """Three significant digits with a thousands' letter: 18345 -> 18.3k."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _left(seconds: float | None) -> str:
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))


def _fields(line: Metrics, seconds_left: float | None) -> list[str]:
    """Return what a line says, the most wanted first: the last ones give way where a terminal is narrow."""
    parts = [f"step {line['step']}"]
    if line.get("loss") is not None:
        parts.append(f"loss {line['loss']:.4f}")
    if line.get("held_out_loss") is not None:
        parts.append(f"held-out {line['held_out_loss']:.4f}")
    parts += [f"{line['progress']:.1%} of budget", f"left {_left(seconds_left)}"]
    for name, what in (("slots", "slots"), ("real_tokens", "tokens"), ("predictions", "predicted")):
        if (rate := line.get(f"{name}_per_second")) is not None:
            parts.append(f"{_number(rate)} {what}/s")
    if line.get("mfu") is not None:
        parts.append(f"MFU {line['mfu']:.1%}")
    if line.get("skipped_updates"):
        parts.append(f"skipped {line['skipped_updates']:.0f}")
    if line.get("spikes"):
        parts.append(f"spikes {line['spikes']}")
    if line.get("slowest_rank") is not None:
        parts.append(f"slowest rank {line['slowest_rank']} {line['slowest_excess']:+.1%}")
    if line.get("data_wait") is not None:
        parts.append(f"data wait {line['data_wait']:.1%}")
    return parts


def _fitting(fields: list[str], width: int) -> str:
    """Return as many of the first fields, whole, as a line holds; one at least."""
    while len(fields) > 1 and len("  ".join(fields)) > width:
        fields = fields[:-1]
    return "  ".join(fields)


class _Plain:
    """A line now and then, for logs that are files: the first one, then one every 20 s, and the last one."""

    def __init__(self, method: str, stream: IO[str], clock: Callable[[], float]) -> None:
        self._method, self._stream, self._clock = method, stream, clock
        self._due = -math.inf
        self._unshown = ""

    def show(self, line: Metrics, seconds_left: float | None) -> None:
        self._unshown = "  ".join([self._method, *_fields(line, seconds_left)])
        if self._clock() >= self._due:
            self._print()
            self._due = self._clock() + PLAIN_EVERY

    def _print(self) -> None:
        print(self._unshown, file=self._stream, flush=True)
        self._unshown = ""

    def close(self) -> None:
        if self._unshown:
            self._print()


class _Bar:
    """Lines that scroll and stay, with a bar below them for as long as the run trains."""

    def __init__(self, method: str, stream: IO[str]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("[bold]{task.description}", table_column=_whole()),
            BarColumn(None),
            TextColumn("{task.percentage:.1f}% of budget  left {task.fields[left]}", table_column=_whole()),
            console=Console(file=stream),
            transient=True,
            expand=True,
            redirect_stdout=False,
            redirect_stderr=stream is sys.stderr,
        )
        self._task: TaskID = self._bar.add_task(method, total=1.0, left="-")
        self._stream = stream
        self._handlers: list[logging.StreamHandler[Any]] = []

    def show(self, line: Metrics, seconds_left: float | None) -> None:
        self._bar.update(self._task, completed=line["progress"], left=_left(seconds_left))
        self._start()
        console = self._bar.console
        text = _fitting(_fields(line, seconds_left), console.width)
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _start(self) -> None:
        """Draw the bar, with the first line: what is said before it must not be glued to it."""
        if self._bar.live.is_started:
            return
        self._bar.start()
        self._handlers = [
            handler
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is self._stream
        ]
        for handler in self._handlers:  # rich puts above the bar what goes to the sys.stderr of now
            handler.setStream(sys.stderr)

    def close(self) -> None:
        self._bar.stop()
        for handler in self._handlers:
            handler.setStream(self._stream)
        self._handlers = []


def _whole() -> "Column":
    """Return a column of the bar that is never broken."""
    from rich.table import Column

    return Column(no_wrap=True)
