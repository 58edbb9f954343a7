"""Who am I: rank, ranks, device and groups, from whatever started this process.

`launchers.identify` reads the launcher's variables and nothing else, so it can be tested with a dictionary;
`connect` starts torch.distributed where there is more than one rank and returns a `Topology`, the
one object that the rest is given.

torchrun, deepspeed    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
mpirun                 OMPI_COMM_WORLD_* (Open MPI), PMI_* with MPI_LOCALRANKID (MPICH, Intel MPI)
srun                   SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID
none of these          one process

Variables are inherited. torchrun under srun sees SLURM_PROCID, mpirun in a job starts its
daemons with srun, and a batch shell has SLURM_PROCID=0 and SLURM_NTASKS=8 though it is one process.
So the order above is the order of trust, and only a step (SLURM_STEP_NUM_TASKS) counts as srun.
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.errors import UserError
from pretrain.parallel.launchers import Identity, ask_mpi, identify
from pretrain.provenance import processor

RENDEZVOUS = timedelta(minutes=10)
"""How long the first rank waits for the last one; imports from a slow file system take minutes."""
COLLECTIVE = timedelta(minutes=30)
"""How long a rank waits for the others later on, e.g. while rank 0 reads or writes a checkpoint, where
nobody says otherwise."""
_SAID = "how the run failed is said"


# ---- the ranks, connected ------------------------------------------------------------------------


@dataclass(frozen=True)
class Topology:
    """TP x DP: a tensor group shares one model, a data group the samples of an update.

    A group of one rank is None and its collectives do nothing. `flags` is a gloo group over all
    ranks for small decisions on the CPU (None: one process).
    """

    launcher: str = "python"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    tensor_rank: int = 0
    tensor_size: int = 1
    tensor_group: dist.ProcessGroup | None = None
    data_rank: int = 0
    data_size: int = 1
    data_group: dist.ProcessGroup | None = None
    flags: dist.ProcessGroup | None = None
    saves: dist.ProcessGroup | None = None
    """A gloo group over all ranks too, for the threads that write checkpoints."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes and prints."""
        return self.rank == 0

    def agree(self, values: list[int]) -> list[int]:
        """Return the element-wise maximum over all ranks: a flag raised anywhere is raised everywhere."""
        return self.ask_main(values, lambda ranks: ranks.amax(0).tolist(), len(values))

    def add_up(self, values: list[int]) -> list[int]:
        """Return the element-wise sum over all ranks."""
        return self.ask_main(values, lambda ranks: ranks.sum(0).tolist(), len(values))

    def ask_main(self, values: list[int], answer: Callable[[Tensor], list[int]], size: int) -> list[int]:
        """Return, on every rank, what rank 0 answers to the values [ranks, N] of all, `size` integers.

        To rank 0 and back as a tree: gloo's all-reduce goes twice round a ring, rank by rank.
        """
        mine = torch.tensor(values, dtype=torch.int64)
        if self.flags is None:
            return answer(mine[None])
        ranks = [torch.empty_like(mine) for _ in range(self.world_size)] if self.is_main else None
        dist.gather(mine, ranks, group=self.flags, group_dst=0)
        said = answer(torch.stack(ranks)) if ranks else [0] * size
        tensor = torch.tensor(said, dtype=torch.int64)
        dist.broadcast(tensor, group=self.flags, group_src=0)
        return tensor.tolist()

    def gather_text(self, text: str) -> list[str]:
        """Return the text of every rank, on every rank."""
        if self.flags is None:
            return [text]
        data = text.encode(errors="backslashreplace")
        (size,) = self.agree([len(data)])
        padded = torch.tensor(list(data.ljust(size, b"\0")), dtype=torch.uint8)
        texts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(texts, padded, self.flags)
        return [bytes(given.tolist()).rstrip(b"\0").decode() for given in texts]

    def broadcast_text(self, text: str, source: int = 0) -> str:
        """Return the text of rank `source`, on every rank."""
        if self.flags is None:
            return text
        data = torch.tensor(list(text.encode(errors="backslashreplace")), dtype=torch.uint8)
        (size,) = self.agree([len(data) if self.rank == source else 0])
        if self.rank != source:
            data = torch.empty(size, dtype=torch.uint8)
        dist.broadcast(data, source, self.flags)
        return bytes(data.tolist()).decode()

    def first_text(self, text: str) -> str:
        """Return the text of the lowest rank that has any, on every rank; empty if none has."""
        (turn,) = self.agree([self.world_size - self.rank if text else 0])
        return self.broadcast_text(text, self.world_size - turn) if turn else ""

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Sum in place over the ranks that saw different samples; return `tensor`."""
        if self.data_group is not None:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def sum_over_tensor(self, tensor: Tensor) -> Tensor:
        """Sum in place over the ranks that hold parts of one model; return `tensor`."""
        if self.tensor_group is not None:
            dist.all_reduce(tensor, group=self.tensor_group)
        return tensor

    def barrier(self) -> None:
        """Returns when every rank is here."""
        self.agree([0])

    def main_has_said(self, seconds: float) -> bool:
        """Tell the others, on rank 0, that it has said how the run failed; on others return whether it has,
        or is gone, within so many seconds. A launcher ends all ranks once one has left with an error."""
        if self.world_size == 1 or not dist.is_initialized():
            return True
        store, end = dist.distributed_c10d._get_default_store(), time.monotonic() + seconds
        with suppress(dist.DistError, RuntimeError):  # it is gone, which the watchdog has said
            if self.is_main:
                store.set(_SAID, "")
            while not store.check([_SAID]):
                if time.monotonic() > end:
                    return False
                time.sleep(0.05)
        return True

    def mpu(self) -> "ModelParallelUnit | None":
        """Return the face that DeepSpeed wants; None without tensor parallelism: it makes its own groups."""
        return None if self.tensor_group is None else ModelParallelUnit(self)

    def close(self) -> None:
        """Leaves the groups; nothing collective may follow."""
        if self.tensor_group is not None:
            _parallel_state().destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
            # A gloo worker that drops its last work while Python finalises aborts the process (exit
            # 134, torch 2.13); given a moment it is done before that.
            time.sleep(0.1)


class ModelParallelUnit:
    """megatron-core's parallel_state, and the two names that DeepSpeed 0.19 misses in it."""

    def __init__(self, topology: Topology) -> None:
        self._state = _parallel_state()
        self._topology = topology

    def get_model_parallel_rank(self) -> int:
        """Rank among those that share a model: tensor parallelism is the only kind here."""
        return self._topology.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Return the ranks that share a model."""
        return self._topology.tensor_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def connect(
    tensor: int = 1,
    needs_group: bool = False,
    local_rank: int | None = None,
    patience: timedelta = COLLECTIVE,
) -> Topology:
    """Finds the other ranks and groups them; collective over all of them.

    tensor: tensor-parallel degree. needs_group: start torch.distributed for a single process too
    (DeepSpeed). local_rank: what a launcher's --local_rank said, checked. patience: the time-out of
    collectives. UserError if the ranks cannot be found or divided.
    """
    me = identify(os.environ)
    if local_rank is not None and local_rank != me.local_rank:
        raise UserError(
            f"--local_rank={local_rank}, but {me.launcher} says {me.local_rank}; leave the option out"
        )
    if me.world_size % tensor:
        raise UserError(
            f"parallel.tensor = {tensor} does not divide the {me.world_size} ranks that {me.launcher}"
            f" started; start a multiple of {tensor}"
        )
    device = _pin_device(me.local_rank)
    topology = Topology(me.launcher, me.rank, me.world_size, me.local_rank, device)
    if me.world_size == 1:
        if needs_group and not dist.is_initialized():
            _export(replace(me, address=me.address or "localhost", port=me.port or 29500))
            dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)
        return topology
    if not dist.is_initialized():
        _start(me, device, patience)
    return _grouped(topology, tensor, patience)


def _pin_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # One visible device is this rank's own: Slurm can hide the others from each task.
    if count > 1 and local_rank >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU ({count} visible); start one rank per GPU of a node"
        )
    device = torch.device("cuda", local_rank % count)
    torch.cuda.set_device(device)
    return device


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _start(me: Identity, device: torch.device, patience: timedelta) -> None:
    """Joins the default process group."""
    if me.address is None:
        me = ask_mpi(me)
    _export(me)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=RENDEZVOUS))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {me.rank} of {me.world_size} (by {me.launcher}) did not meet the others at"
            f" {me.address}:{me.port} ({reason}); start all ranks, where they can reach that address"
        ) from None
    dist.init_process_group(_backend(device), store=store, rank=rank, world_size=world_size, timeout=patience)


def _export(me: Identity) -> None:
    """The five variables that torch and DeepSpeed look for, whatever the launcher set."""
    os.environ.update(
        RANK=str(me.rank),
        WORLD_SIZE=str(me.world_size),
        LOCAL_RANK=str(me.local_rank),
        MASTER_ADDR=str(me.address),
        MASTER_PORT=str(me.port),
    )


def _grouped(topology: Topology, tensor: int, patience: timedelta) -> Topology:
    """The topology with its groups; neighbouring ranks share a model, as they share a node."""
    on_cpu = topology.device.type == "cpu"
    flags = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=patience)
    topology = replace(topology, saves=dist.new_group(backend="gloo", timeout=10 * patience))
    if tensor == 1:
        return replace(
            topology,
            data_rank=topology.rank,
            data_size=topology.world_size,
            data_group=dist.group.WORLD,
            flags=flags,
        )
    state = _parallel_state()
    minutes = math.ceil(patience.total_seconds() / 60)
    state.initialize_model_parallel(
        tensor, create_gloo_process_groups=False, distributed_timeout_minutes=minutes
    )
    data_size = topology.world_size // tensor
    return replace(
        topology,
        tensor_rank=state.get_tensor_model_parallel_rank(),
        tensor_size=tensor,
        tensor_group=state.get_tensor_model_parallel_group(),
        data_rank=state.get_data_parallel_rank(),
        data_size=data_size,
        data_group=state.get_data_parallel_group() if data_size > 1 else None,
        flags=flags,
    )


def _parallel_state() -> ModuleType:
    with warnings.catch_warnings():
        # At import it says six times that TransformerEngine and Apex are missing; neither is used.
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
    return parallel_state


def device_name(device: torch.device) -> str:
    """Return what the hardware calls itself: ``NVIDIA H200``, or the model name of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def device_uuid(device: torch.device) -> str:
    """Return what tells a GPU from all others, as NVML spells it; "" for a CPU."""
    if device.type != "cuda":
        return ""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def on_main(topology: Topology, action: Callable[[], str | None]) -> str:
    """Runs `action` on rank 0 and gives its result to all; its UserError is raised everywhere."""
    result = ""
    with raise_on_all_ranks(topology):
        if topology.is_main:
            result = action() or ""
    return topology.broadcast_text(result)


@contextmanager
def raise_on_all_ranks(topology: Topology) -> Iterator[None]:
    """Raise a user's error of one rank on all, which would wait for that rank for ever."""
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error)
    if problem := topology.first_text(problem):
        raise UserError(problem)
