"""Is every node fit for the run? Each rank looks round before any of them trains.

    srun python -m slurm.preflight CONFIG --report DIR        every rank: look, and say what is wrong
    python -m slurm.preflight CONFIG --report DIR --judge lm1,lm2 --run RUN --job ID --limit N

A rank checks what it can alone (device, memory, corpus, free space), leaves a note in DIR, and waits there
for the notes of the others; only if all are well do they meet in an all-reduce and compare clocks. So a
broken node cannot make the others hang, and the judge, who reads the notes, names it: a node that says what
is wrong, or says nothing. It prints `again NODES` for the job to go on without them.

A mistake in the config shows on every node too. What all nodes say, where there are several, is
the user's to mend: `stop`.
"""

import contextlib
import json
import math
import os
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from pretrain.account.recipe import make_recipe
from pretrain.config import Config, geometry, load_config
from pretrain.data import indexed as corpus
from pretrain.data.corpora import copy_of, is_copy, mapped
from pretrain.data.document_order import scratch
from pretrain.errors import UserError
from pretrain.files import own_folder, write_atomic
from pretrain.parallel.launchers import Identity, identify
from slurm import attempts
from tools.plan import layouts, memory
from tools.shared import console, journal

NOTE_TIMEOUT_S = 120.0
"""Seconds that a rank waits for the notes of the others; imports from a slow file system take long."""
CLOCK = 30.0
"""Seconds by which a node's clock may differ from the median of the nodes."""
MEMORY_BYTES = 1 << 30
"""Least free memory of a rank's device, or of a node's share for it."""


# ---- a rank looks round --------------------------------------------------------------------------


def check_alone(config: Config, copies: str, gpus: int, me: Identity) -> list[str]:
    """Return what this rank finds wrong without the others."""
    ranks = node_ranks(me, os.environ)
    return [*_device(gpus), *_memory(config, ranks, me.world_size), *_corpus(config), *_space(config, copies)]


def node_ranks(me: Identity, environ: Mapping[str, str]) -> range:
    """Return the ranks of this rank's node, which our sbatch files have one after the other."""
    first, nodes = me.rank - me.local_rank, int(environ.get("SLURM_STEP_NUM_NODES", 1))
    return range(first, min(first + math.ceil(me.world_size / nodes), me.world_size))


def _device(gpus: int) -> list[str]:
    import torch

    if not gpus:
        return []
    if not torch.cuda.is_available():
        return ["no GPU answers"]
    try:
        free, total = torch.cuda.mem_get_info()
        if free < max(MEMORY_BYTES, total // 2):
            return [f"{free / 1e9:.1f} of {total / 1e9:.0f} GB of GPU memory free: something else runs there"]
        ones = torch.ones(1024, 1024, device="cuda")
        return [] if float((ones @ ones).sum()) == 1024.0**3 else ["the GPU computes wrongly"]
    except RuntimeError as error:
        return [f"the GPU fails: {str(error).splitlines()[0]}"]


def _memory(config: Config, ranks: Sequence[int], world_size: int) -> list[str]:
    """The host's: what each of a node's ranks needs at least, and takes for its part of a checkpoint, and
    what grows with the documents, once."""
    free, wanted = psutil.virtual_memory().available, len(ranks) * MEMORY_BYTES  # what is cached is free
    with contextlib.suppress(UserError):  # a corpus that is not there is said of it
        wanted += mapped(config.corpus).total
    with contextlib.suppress(UserError):  # nor a budget that cannot be known yet
        recipe = make_recipe(config)
        layout = layouts.configured(config, world_size, "")
        wanted += sum(memory.copied(recipe, layout, rank) for rank in ranks)
    return [] if free >= wanted else [f"{free / 1e9:.1f} GB of memory free, {wanted / 1e9:.1f} needed"]


def _corpus(config: Config) -> list[str]:
    """Opens every corpus (which checks its index against its size) and reads its last token."""
    prefixes = [prefix for _, prefix in config.corpus.blend]
    prefixes += [config.corpus.valid] if config.corpus.valid else []
    found = []
    for prefix in prefixes:
        try:
            corpus.IndexedReader(prefix).tokens[-1:].max()
        except (UserError, OSError, ValueError) as error:
            found.append(str(error))
    return found


def _space(config: Config, copies: str) -> list[str]:
    """Room for two checkpoints and the milestones where the run lives, and on the node's disk for a copy of
    the corpus and for the orders of many documents."""
    model, run = config.model, Path(config.run.dir)
    size = geometry.parameters(model, model.vocab_size or 65536)
    kept = 2 * 12 + 4 * len(config.checkpoint.keep)  # bytes a parameter
    found = _room(run, kept * size["total"])
    place = scratch(copies or config.corpus.copies)
    try:
        orders = mapped(config.corpus).orders
        if copies or orders:
            there = sum(file.stat().st_size for file in own_folder(place).glob("*.order"))
            wanted = max(orders - there, 0) + (_to_copy(config, place) if copies else 0)
            found += _room(place, wanted)
    except UserError as error:
        found.append(str(error))
    except OSError as error:
        found.append(f"{error.filename}: {error.strerror}")
    return found


def _to_copy(config: Config, copies: Path) -> int:
    """Bytes of the training corpora of which the node has no copy yet."""
    total = 0
    for _, prefix in config.corpus.blend:
        source = corpus.corpus_file(prefix, "bin")
        if source.exists() and not is_copy(prefix, copy_of(prefix, copies)):
            total += source.stat().st_size
    return total


def _room(folder: Path, wanted: int) -> list[str]:
    """What is wrong with a folder in which `wanted` bytes are to be written."""
    probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return [f"{folder}: {error.strerror}"]
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    few = f"{folder}: {free / 1e6:,.1f} MB free, {wanted / 1e6:,.1f} needed"
    return [] if free >= wanted else [few]


def check_together(config: Config) -> list[str]:
    """Return what shows only together: an all-reduce with a known answer, and the clocks."""
    import torch
    import torch.distributed as dist

    from pretrain.parallel.topology import connect

    topology = connect(config.parallel.tensor)
    if topology.world_size == 1:
        return []
    found = []
    ones = torch.ones(1 << 20, device=topology.device)
    begin = time.perf_counter()
    dist.all_reduce(ones)
    wrong = int((ones != topology.world_size).sum())
    if wrong:
        found.append(f"the all-reduce got {wrong} of {len(ones)} sums wrong")
    if topology.is_main:
        print(f"preflight: all-reduce of {ones.nbytes / 1e6:.0f} MB in {time.perf_counter() - begin:.3f} s")
    topology.barrier()
    clocks = [said.split() for said in topology.gather_text(f"{_node()} {time.time()}")]
    skew = off({node: float(clock) for node, clock in clocks}, _node())
    if abs(skew) > CLOCK:
        found.append(f"its clock is {skew:+.0f} s off the median of the nodes")
    topology.close()
    return found


def off(clocks: Mapping[str, float], node: str) -> float:
    """Return the seconds by which a node's clock differs from the median of the nodes; of two, both are as
    far off."""
    return clocks[node] - statistics.median(clocks.values())


def report(config: Config, folder: Path, copies: str, gpus: int) -> int:
    """Return one rank's part; exit code 1 if any rank found something."""
    me = identify(os.environ)
    folder.mkdir(parents=True, exist_ok=True)
    _note(folder, me.rank, check_alone(config, copies, gpus, me))
    end = time.monotonic() + NOTE_TIMEOUT_S
    while len(_said(folder)) < me.world_size and time.monotonic() < end:
        time.sleep(0.2)
    others = notes(folder)
    if len(others) < me.world_size or any(note["problems"] for note in others):
        return 1
    with console.signals_kill():
        problems = check_together(config)
    if problems:
        _note(folder, me.rank, problems)
    return 1 if problems else 0


def _note(folder: Path, rank: int, problems: list[str]) -> None:
    write_atomic(folder / f"{rank}.json", json.dumps({"node": _node(), "problems": problems}))


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def notes(folder: Path) -> list[dict[str, Any]]:
    """Return what the ranks have said so far."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in _said(folder)]


def _said(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.json"))


# ---- somebody judges -----------------------------------------------------------------------------


def bad_nodes(nodes: list[str], said: list[dict[str, Any]]) -> dict[str, str]:
    """Return what is wrong with each node, by its name."""
    found = dict.fromkeys((node for node in nodes if all(note["node"] != node for note in said)), "no answer")
    for note in said:
        if note["problems"]:
            found[note["node"]] = "; ".join(note["problems"])
    return found


def verdict_on_nodes(run: Path, job: str, nodes: list[str], folder: Path, limit: int) -> str:
    """Return `again NODES` (none: nobody knows whose fault it is) or `stop`, noted with its reason."""
    bad = bad_nodes(nodes, notes(folder))
    everywhere = len(nodes) > 1 and len(bad) == len(nodes)
    words = [f"{node}: {problem}" for node, problem in bad.items()]
    words = words or ["all are well, but failed together; see the log"]
    reason = "pre-flight: " + (
        "on every node: " + next(iter(bad.values())) if everywhere else ", ".join(words)
    )
    tried = attempts.failed_attempts(journal.read(run), "train", attempts.progress(run, "train"))
    stop = everywhere or tried >= limit
    verdict = attempts.STOP if stop else f"{attempts.AGAIN} {','.join(bad)}".strip()
    journal.note(run, "end", "train", job, verdict=verdict.split()[0], reason=reason)
    print(f"{reason}: {verdict}", file=sys.stderr)
    return verdict


def main() -> int:
    parser = console.parser("preflight", __doc__.partition("\n")[0], package="slurm")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument(
        "--report", type=Path, required=True, metavar="DIR", help="folder of the ranks' notes"
    )
    parser.add_argument(
        "--copies", default="", metavar="DIR", help="folder of slurm.stage on the node's disk"
    )
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="of a node; 0: ranks run on the CPU")
    parser.add_argument(
        "--judge", dest="nodes", metavar="NODES", help="read the notes of these nodes, and decide"
    )
    parser.add_argument("--run", type=Path)
    parser.add_argument("--job", default="")
    parser.add_argument("--limit", type=int, default=3, help="attempts without progress")
    args = parser.parse_args()
    if args.nodes and not args.run:
        parser.error("--judge needs --run RUN")
    config = load_config(args.config)  # also for the judge: what nobody can read is no node's fault
    if args.nodes:
        print(verdict_on_nodes(args.run, args.job, args.nodes.split(","), args.report, args.limit))
        return 0
    return report(config, args.report, args.copies, args.gpus)


if __name__ == "__main__":
    console.run(main)
