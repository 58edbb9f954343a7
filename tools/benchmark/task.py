"""One training task for all sides of a speed comparison: same shapes, weights, tokens and masks.

The vocabulary is RoBERTa's 50,265 pieces, padded to 50,304 rows for every side, and our model keeps the
token type and the padding positions of Hugging Face's, so the sides have equally many parameters and can
start from equal ones. Tokens are random: no side's speed depends on them.

A GPU works on after a function has returned, so a clock is read only when it is done.
"""

import argparse
import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.account.recipe import make_recipe
from pretrain.build import build_engine, keep_freed_memory
from pretrain.config import Config, build_config, geometry
from pretrain.data.masking import Masked, Masker
from pretrain.errors import UserError
from pretrain.model.late_mask import Batch, LateMaskModel, init_weights
from pretrain.parallel import topology
from pretrain.train import peak_bytes
from tools.plan import layouts
from tools.shared import console
from tools.shared.measure import Done, no_progress
from tools.shared.run_model import default_device

VOCAB = geometry.padded_vocab(layouts.ROBERTA_PIECES, 128)
MASK_ID = 50_264
SIZES = {
    "tiny": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "ffn_size": 64},
    **layouts.SIZES,
    "modernbert-base": {"num_layers": 22, "hidden_size": 768, "num_heads": 12, "ffn_size": 1152},
}
"""Widths and depths; `modernbert-base` is of the modern block, whose layers here all attend to all rows."""
RATE = {"mlm": 0.15, "3ml-self": 0.5, "3ml-cross": 0.5, "3ml-query": 0.5, "mae-lm": 0.15}
LATE = [method for method in RATE if method != "mlm"]
LEARNING_RATE = 1e-4

Update = Callable[[], Tensor]
"""One whole update (forward, backward, clipping, AdamW); returns its loss, which nobody waits for."""


@dataclass(frozen=True)
class BenchmarkTask:
    """What is trained, on what."""

    size: str = "base"
    length: int = 128
    batch_size: int = 8
    precision: str = "fp32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def config(self, method: str = "mlm", **sections: Any) -> Config:
        """Return the config of a method; `sections` add to its own."""
        shape: dict[str, Any] = {**SIZES[self.size], "vocab_size": VOCAB, "token_type": not self.modern}
        if self.modern:
            shape["block"] = "modern"
        shape |= layouts.late(method, shape["num_layers"])
        all_mask = {"corruption": (1.0, 0.0, 0.0)} if method == "mae-lm" else {}
        tree: dict[str, Any] = {
            "run": {"dir": "benchmark"},
            "corpus": {"train": "benchmark"},
            "model": shape,
            "masking": {"rate": RATE[method], **all_mask},
            "train": {
                "seq_length": self.length,
                "batch_size": self.batch_size,
                "precision": self.precision,
            },
            "optimizer": {"lr": LEARNING_RATE},
            "budget": {"steps": 1},
        }
        for name, section in sections.items():
            tree[name] = {**tree.get(name, {}), **section}
        return build_config(tree)

    @property
    def modern(self) -> bool:
        """Tell whether the model is of the modern block."""
        return self.size.startswith("modernbert")

    @property
    def slots(self) -> int:
        """Rows of input in an update."""
        return self.batch_size * self.length

    @cached_property
    def tokens(self) -> np.ndarray:
        """[B, L] in natural order."""
        return np.random.default_rng(0).integers(5, MASK_ID, (self.batch_size, self.length))

    def masked(self, method: str = "mlm") -> Masked:
        """Return the tokens under a method's masks."""
        pool, special = np.arange(5, MASK_ID), np.array([0, 1, 2, 3, MASK_ID])
        mask = Masker(self.config(method).masking, self.length, MASK_ID, pool, special)
        keys = np.arange(self.batch_size, dtype=np.uint64)
        return mask(self.tokens, keys, np.zeros(self.batch_size, np.int64))

    def module(self, config: Config) -> LateMaskModel:
        """Return our model with its first weights."""
        model = LateMaskModel(config.model, VOCAB, MASK_ID, config.train.recompute == "block")
        init_weights(model, 0)
        return model

    def flop_ratio(self, method: str) -> float:
        """Return FLOPs of a method's update over those of `mlm`'s, head included."""
        return self.flops(method) / self.flops("mlm")

    def flops(self, method: str) -> int:
        """Return the model FLOPs of one update."""
        (phase,) = make_recipe(self.config(method), VOCAB).phases
        return phase.cost.flops.total

    def settings(self) -> dict[str, Any]:
        """Return what a row says of this."""
        return {
            "size": self.size,
            "length": self.length,
            "batch_size": self.batch_size,
            "threads": torch.get_num_threads(),
        }


def ours(
    task: BenchmarkTask, method: str = "mlm", place: topology.Topology | None = None, **sections: Any
) -> Update:
    """Return our engine's update; `sections` add to those of the config."""
    config = task.config(method, **sections)
    place = place or topology.Topology(device=task.device)
    micro = max(1, task.batch_size // place.data_size)
    built = build_engine(config, task.module(config), place, micro)
    batch = Batch.from_masked(replace(task, batch_size=micro).masked(method), task.device)

    def update() -> Tensor:
        loss = built.backward(batch, 1.0)
        built.step(LEARNING_RATE)
        return loss

    return update


# ---- measuring -----------------------------------------------------------------------------------


def in_turns(
    updates: Mapping[str, Update],
    runs: int,
    repeat: int,
    device: torch.device,
    wall: bool = False,
    done: Done = no_progress,
) -> dict[str, list[float]]:
    """Return the seconds of an update of each side, `runs` times, in turn; each time the mean of `repeat`
    updates.

    The order is reversed every other round, and a first update of each (which compiles) is not timed. On a
    CPU these are CPU seconds of a thread, which another process on the machine disturbs less than those of
    the wall clock; `wall` asks for the latter, as ranks that wait for each other need. All sides keep freed
    memory, as `python -m pretrain` does.
    """
    if device.type == "cpu":
        keep_freed_memory()
    for update in updates.values():
        update()
        done(1)
    clock = time.perf_counter if wall else clock_of(device)
    sides = {name: partial(timed, update, repeat, device, clock) for name, update in updates.items()}
    return take_turns(sides, runs, done)


def take_turns(
    sides: Mapping[str, Callable[[], float]], runs: int, done: Done = no_progress
) -> dict[str, list[float]]:
    """Return what each side returns, `runs` times, the order reversed every other round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(runs):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            seconds[name].append(sides[name]())
            done(1)
    return seconds


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return what tells the seconds of work on a device; of a CPU those of a thread."""
    return time.perf_counter if device.type == "cuda" else _thread_seconds


def _thread_seconds() -> float:
    return time.process_time() / torch.get_num_threads()


def timed(work: Callable[[], object], repeat: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Return the seconds of some work, such as an update, the mean of some."""
    gc.collect()
    finish(device)
    begin = clock()
    for _ in range(repeat):
        work()
    finish(device)
    return (clock() - begin) / repeat


Job = Callable[[Update], Any]
"""What a side's process does with its update; it travels there, so it is no lambda."""


@contextmanager
def apart(
    makers: Mapping[str, Callable[[], Update]], task: "BenchmarkTask", done: Done
) -> Iterator[dict[str, Callable[[Job], Any]]]:
    """Yield the sides, each in a process of its own with its own settings and memory, which has made an
    update: a function that has a job done there and returns what comes of it.

    makers: what makes each side's update; they travel to the processes, so they are no lambdas.
    """
    context, workers = multiprocessing.get_context("spawn"), []
    try:
        for make in makers.values():
            ours, theirs = context.Pipe()
            places = (make, torch.get_num_threads(), theirs)
            workers.append((context.Process(target=_serve, args=places, daemon=True), ours))
            workers[-1][0].start()
            theirs.close()
            if task.device.type == "cpu":  # where compilers would use the core that others are timed on
                _answer(ours)
        for _, pipe in workers:
            if task.device.type != "cpu":
                _answer(pipe)
            done(1)
        yield {name: partial(_ask, pipe) for name, (_, pipe) in zip(makers, workers, strict=True)}
    finally:
        for process, _ in workers:
            process.kill()
            process.join()


def _serve(make: Callable[[], Update], threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    try:
        update = make()
        update()
        pipe.send(None)
        while job := pipe.recv():
            pipe.send(job(update))
    except Exception as error:
        pipe.send(Failure(f"{type(error).__name__}: {error}"))


@dataclass(frozen=True)
class Failure:
    """What a side's process died of."""

    reason: str


def _ask(pipe: Any, job: Job) -> Any:
    pipe.send(job)
    return _answer(pipe)


def _answer(pipe: Any) -> Any:
    try:
        answer = pipe.recv()
    except EOFError:
        answer = Failure("it died without a word (of too little memory?)")
    if isinstance(answer, Failure):
        raise UserError(f"a side of the benchmark failed: {' '.join(answer.reason.split())}")
    return answer


def held_bytes(update: Update, device: torch.device) -> int:
    """Return the most that this process has held: of the GPU's memory, or of the host's."""
    return peak_bytes(device)


def finish(device: torch.device) -> None:
    """Waits for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- arguments -----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what several subjects ask."""
    parser.add_argument("--size", choices=SIZES, default="base", help="of the model (%(default)s)")
    parser.add_argument(
        "--length", type=console.whole(8, 512), default=128, help="rows of a sequence (%(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=console.whole(1), default=8, help="sequences of an update (%(default)s)"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="precisions (both)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    add_threads(parser)


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add ``--threads``."""
    parser.add_argument(
        "--threads", type=console.whole(1), help="of torch on the CPU (all cores that this process has)"
    )


def tasks(args: argparse.Namespace) -> list[BenchmarkTask]:
    """Return one for each precision; sets the threads."""
    torch.set_num_threads(args.threads or console.available_cores())
    device = chosen_device(args.device)
    return [BenchmarkTask(args.size, args.length, args.batch_size, dtype, device) for dtype in args.dtype]


def chosen_device(name: str | None) -> torch.device:
    """Return the device so named, or the best there is; UserError without a GPU where one was asked for."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that torch can use; leave it out")
    return torch.device(name) if name else default_device()
