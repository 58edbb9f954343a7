"""Experiment trackers: what goes to metrics.jsonl, sent to wandb, MLflow, Aim or trackio as well.

A thread sends, and training only puts lines into its queue, so that a server that is slow,
full or dead costs lines of the tracker and nothing else. Nothing leaves the machine unless the tracker's
own environment variable says where to (WANDB_MODE=online, MLFLOW_TRACKING_URI, ...).

All attempts of a run share one id, kept in the run's tracker.json.
"""

import json
import logging
import os
import queue
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.files import parse_json, write_whole

FILE = "tracker.json"
WAITING = 10_000  # lines held for a server that is slow
END_TIMEOUT_S = 30.0  # seconds that the end of a run waits for it

Line = dict[str, Any]
Send = Callable[[int, float, Line], None]
Opened = tuple[str, Send, Callable[[], None]]
"""The run's id at the tracker, what sends a step's time and values, and what ends an attempt."""

log = logging.getLogger(__name__)


class Tracker:
    """Sends lines of metrics from a thread of its own; `add` and `close` never raise."""

    def __init__(self, kind: str, run: Path, settings: Line) -> None:
        """kind: of `TRACKERS`; settings: the run's config. UserError if the package is not installed."""
        if find_spec(kind) is None:
            raise UserError(
                f"monitor.tracker: {kind} is not installed; pip install it, or set monitor.tracker=null"
            )
        self._kind, self._added, self._sent, self._failed = kind, 0, 0, False
        self._lines: queue.Queue[Line | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, args=(run, settings), daemon=True, name=kind)
        self._thread.start()

    def add(self, line: Line) -> None:
        """Send a line of metrics, unless too many wait already."""
        self._added += 1
        with suppress(queue.Full):
            self._lines.put_nowait(line)

    def close(self) -> None:
        """Wait, for `END_TIMEOUT_S` at most, until all is sent; say what was not."""
        with suppress(queue.Full):
            if self._thread.is_alive():
                self._lines.put(None, timeout=END_TIMEOUT_S)
            self._thread.join(END_TIMEOUT_S)
        if (lost := self._added - self._sent) and not self._failed:
            log.warning("warning: %s did not take %d lines; metrics.jsonl has them", self._kind, lost)

    def _work(self, run: Path, settings: Line) -> None:
        try:
            ids = _read_ids(run)
            name, send, end = TRACKERS[self._kind](run, ids.get(self._kind), settings)
            if name != ids.get(self._kind):
                write_whole(run / FILE, (json.dumps({**ids, self._kind: name}) + "\n").encode())
            while (line := self._lines.get()) is not None:
                values = {key: value for key, value in line.items() if isinstance(value, int | float)}
                send(int(values.pop("step")), values.pop("time"), values)
                self._sent += 1
            end()
        except BaseException as error:  # a tracker's fault is never training's
            log.warning(
                "warning: monitor.tracker: %s failed (%s: %s) and gets no more of this attempt;"
                " metrics.jsonl has all",
                self._kind,
                type(error).__name__,
                str(error).split("\n")[0],
            )
            self._failed = True


def _read_ids(run: Path) -> dict[str, str]:
    """Return the id that earlier attempts had at each tracker; none at the first, or in a damaged file."""
    try:
        known = parse_json((run / FILE).read_text(encoding="utf-8"))
        return {kind: str(name) for kind, name in known.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _wandb(run: Path, known: str | None, settings: Line) -> Opened:
    import wandb

    project = os.environ.get("WANDB_PROJECT", "latemask")
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    quiet = wandb.Settings(console="off", silent=True)
    opened = wandb.init(
        project=project,
        id=known,
        name=run.name,
        dir=run,
        mode=mode,
        resume="allow",
        config=settings,
        settings=quiet,
    )
    opened.define_metric("*", step_metric="step")  # a run that went back logs steps again
    return opened.id, lambda step, at, values: opened.log({"step": step, **values}), opened.finish


def _mlflow(run: Path, known: str | None, settings: Line) -> Opened:
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run.absolute() / 'mlflow.db'}"))
    if known is None:
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", "latemask")
        found = client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else client.create_experiment(project)
        known = client.create_run(experiment, run_name=run.name).info.run_id
        client.log_batch(known, params=[Param(key, str(value)[:500]) for key, value in settings.items()])
    else:
        client.update_run(known, "RUNNING")
    name = known

    def send(step: int, at: float, values: Line) -> None:
        client.log_batch(name, [Metric(key, value, int(1000 * at), step) for key, value in values.items()])

    return name, send, lambda: client.set_terminated(name)


def _aim(run: Path, known: str | None, settings: Line) -> Opened:
    import aim

    opened = aim.Run(run_hash=known, repo=os.environ.get("AIM_REPO", str(run)), experiment="latemask")
    opened["config"] = settings
    return opened.hash, lambda step, at, values: opened.track(values, step=step), opened.close


def _trackio(run: Path, known: str | None, settings: Line) -> Opened:
    os.environ.setdefault("TRACKIO_DIR", str(run.absolute() / "trackio"))  # read at the import
    import trackio

    name = known or f"{run.name}-{uuid.uuid4().hex[:8]}"
    opened = trackio.init(project="latemask", name=name, resume="allow", config=settings)
    return name, lambda step, at, values: trackio.log(values, step=step), opened.finish


TRACKERS: dict[str, Callable[[Path, str | None, Line], Opened]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "aim": _aim,
    "trackio": _trackio,
}
