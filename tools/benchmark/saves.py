"""For how long a save keeps ranks from training which copy what they have and go on, against one that all
wait for.

Both save the same in turn, each after an update; a time is that of the slowest rank. The model has no more
than `LAYERS` of its size's layers: what a save takes is a matter of bytes.
"""

import tempfile
from functools import partial
from time import perf_counter
from typing import Any

from pretrain import checkpoint
from pretrain.build import build_engine, keep_freed_memory
from pretrain.model.late_mask import Batch
from pretrain.parallel import topology
from pretrain.run_folder import RunFolder
from tools.benchmark.task import LEARNING_RATE, SIZES, BenchmarkTask, take_turns

LAYERS = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2": {"tensor": 2},
    "ZeRO 1": {"zero": 1},
    "ZeRO 3": {"zero": 3},
}
"""Name -> options of `parallel`, for two ranks."""


def stops(layout: str, task: BenchmarkTask, runs: int) -> tuple[list[float], list[float]]:
    """Measure the seconds for which ranks of a layout do not train, for a save beside and for one that they
    wait for."""
    parallel = LAYOUTS[layout]
    place = topology.connect(parallel.get("tensor", 1), needs_group=True)
    keep_freed_memory()
    micro = max(1, task.batch_size // place.data_size)
    shape = {**task.config().model.model_dump(), "num_layers": min(LAYERS, SIZES[task.size]["num_layers"])}
    config = task.config(
        model=shape,
        train={
            "batch_size": micro * place.data_size,
            "engine": "deepspeed" if "zero" in parallel else "torch",
        },
        parallel=parallel,
    )
    built = build_engine(config, task.module(config), place, micro)
    batch = Batch.from_masked(BenchmarkTask(task.size, task.length, micro).masked(), place.device)

    with tempfile.TemporaryDirectory(prefix="latemask-saves-") as name, checkpoint.Writer() as writer:
        folder, step = RunFolder(name), 0
        folder.checkpoints.mkdir()

        def save(beside: bool) -> float:
            """Save, and make an update, which a copy beside has to come before."""
            nonlocal step
            step += 1
            state = checkpoint.State(step, 0, step, config.model_dump(mode="json"), {}, "")
            place.barrier()
            begin = perf_counter()
            checkpoint.save(folder, built, state, 1, place.is_main, writer if beside else None)
            place.barrier()
            stopped = perf_counter() - begin
            built.backward(batch, 1.0)
            begin = perf_counter()
            writer.wait_copied()
            stopped += perf_counter() - begin
            built.step(LEARNING_RATE)
            writer.wait()
            return place.agree([int(1e6 * stopped)])[0] / 1e6

        built.backward(batch, 1.0)
        built.step(LEARNING_RATE)
        sides = {"beside": partial(save, True), "waited for": partial(save, False)}
        for side in sides.values():
            side()  # takes memory that is kept
        found = take_turns(sides, runs)
    place.close()
    return found["beside"], found["waited for"]
