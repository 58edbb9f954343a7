"""One table says how each module is split over the ranks that share a model, and `shard` does it.

    column      rows of the weight (outputs) are divided: a rank has some heads, some inner units
    row         columns of the weight (inputs) are divided: partial sums are added over the ranks
    vocabulary  rows of the word table are divided; so is the head's bias

A column layer followed by a row layer needs one sum in each direction (Shoeybi et al. 2019, arXiv
1909.08053). The layers are megatron-core's, so who knows Megatron knows these; the model knows
neither, since it infers head counts from shapes. What is not in the table is replicated, with equal
gradients on all ranks.

`gate_up` holds two stacked halves (activated; linear) and each half is divided, so a shard
is not a contiguous piece. Heads need no such care: the model lays q, k and v out head by head.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.late_mask import LateMaskModel
from pretrain.model.loss import Reduce
from pretrain.parallel.topology import Topology


@dataclass(frozen=True)
class Cut:
    """A tensor divided along `axis`, each of its `groups` stacked parts for itself."""

    axis: int
    groups: int = 1


COLUMN = {"weight": Cut(0), "bias": Cut(0)}
ROW = {"weight": Cut(1)}
"""The bias of a row layer is added once, after the sum, and so is replicated."""

TABLE: dict[str, dict[str, Cut]] = {
    "qkv": COLUMN,
    "q": COLUMN,
    "kv": COLUMN,
    "up": COLUMN,
    "gate_up": {"weight": Cut(0, groups=2)},
    "out": ROW,
    "down": ROW,
    "tok": {"weight": Cut(0)},
    "head": {"bias": Cut(0)},
}
"""Last part of a module's name -> its divided parameters."""


def cut(name: str) -> Cut | None:
    """Return how the parameter called `name` is divided; None: replicated."""
    module, _, parameter = name.rpartition(".")
    return TABLE.get(module.rpartition(".")[2], {}).get(parameter)


def split(name: str, tensor: Tensor, size: int, rank: int) -> Tensor:
    """Return the part of a whole tensor that belongs to `rank` of `size`; all of it if replicated."""
    how = cut(name)
    if how is None or size == 1:
        return tensor
    parts = [group.chunk(size, how.axis)[rank] for group in tensor.chunk(how.groups, how.axis)]
    return torch.cat(parts, how.axis)


def merge(name: str, shards: list[Tensor]) -> Tensor:
    """Return the whole tensor of the ranks' parts in rank order: the inverse of `split`."""
    how = cut(name)
    if how is None or len(shards) == 1:
        return shards[0]
    parts = [shard.chunk(how.groups, how.axis) for shard in shards]
    return torch.cat([shard for group in zip(*parts, strict=True) for shard in group], how.axis)


def gather(name: str, local: Tensor, topology: Topology) -> Tensor:
    """Return the whole tensor on every rank that shares the model; collective over them."""
    if topology.tensor_group is None or cut(name) is None:
        return local
    local = local.contiguous()
    shards = [torch.empty_like(local) for _ in range(topology.tensor_size)]
    dist.all_gather(shards, local, group=topology.tensor_group)
    return merge(name, shards)


def square_norm(named: Iterable[tuple[str, Tensor]], topology: Topology) -> Tensor:
    """Sum of squares of the whole tensors, a scalar, equal on all ranks that share the model.

    named: (parameter name, this rank's part). Replicated tensors count once.
    """
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, tensor in named:
        parts[cut(name) is not None].append(tensor)
    total = torch.zeros((), device=topology.device)
    for is_divided, tensors in parts.items():
        if tensors:
            square = torch.stack(torch._foreach_norm(tensors)).square().sum()
            total = total + (topology.sum_over_tensor(square) if is_divided else square)
    return total


# ---- the swap ------------------------------------------------------------------------------------


def shard(model: LateMaskModel, topology: Topology) -> None:
    """Divides the model in place, keeping its values and names; nothing without tensor parallelism.

    The model must have been initialised in full, so that every layout starts from the same numbers.
    """
    group = topology.tensor_group
    if group is None:
        return
    whole = dict(model.named_parameters())
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding) and cut(f"{name}.weight"):
            model.set_submodule(name, _parallel(name, module, group))
    for name, tensor in whole.items():
        owner, _, leaf = name.rpartition(".")
        part = split(name, tensor.data, topology.tensor_size, topology.tensor_rank)
        parameter = nn.Parameter(part.clone())
        # megatron-core's mark, by which DeepSpeed counts a replicated gradient once in the norm.
        parameter.tensor_model_parallel = cut(name) is not None  # type: ignore[attr-defined]
        setattr(model.get_submodule(owner), leaf, parameter)
    model.cross_entropy.first_id = topology.tensor_rank * len(model.tok.weight)
    model.cross_entropy.reduce = _reduction(group)


def _parallel(name: str, whole: nn.Linear | nn.Embedding, group: dist.ProcessGroup) -> nn.Module:
    """megatron-core's layer in place of torch's, its parameters still empty."""
    kinds = _megatron_layers()
    if isinstance(whole, nn.Embedding):
        return kinds["vocabulary"](whole.num_embeddings, whole.embedding_dim, tp_group=group)
    how = TABLE[name.rpartition(".")[2]]
    kind = kinds["row" if how is ROW else "column"]
    return kind(whole.in_features, whole.out_features, bias=whole.bias is not None, tp_group=group)


def _reduction(group: dist.ProcessGroup) -> Reduce:
    operations = {"max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}

    def reduce(tensor: Tensor, operation: str) -> Tensor:
        dist.all_reduce(tensor, operations[operation], group=group)
        return tensor

    return reduce


@cache
def _megatron_layers() -> dict[str, Any]:
    """Kind -> constructor. Thin subclasses, made here since importing megatron-core takes a second.

    Their matrix product is a plain F.linear between megatron-core's two mappings: its own autograd
    function does not follow autocast on the CPU, and torch.compile breaks the graph at it.
    """
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import layers, mappings

    class ColumnParallel(layers.ColumnParallelLinear):
        def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> Tensor:
            # Rounded before it is shared, so that its gradient is summed over the ranks in 16 bits too.
            kind = input.device.type
            if torch.is_autocast_enabled(kind):
                input = input.to(torch.get_autocast_dtype(kind))
            shared = mappings.copy_to_tensor_model_parallel_region(input, group=self.tp_group)
            return F.linear(shared, weight, bias)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    class RowParallel(layers.RowParallelLinear):
        def _forward_impl(self, input: Tensor, weight: Tensor, **_: Any) -> Tensor:
            return F.linear(input, weight)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    # The values come from the whole model; this only makes room for them, on the CPU or anywhere.
    options = {
        "config": ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False),
        "init_method": nn.init.zeros_,
    }
    return {
        "column": partial(ColumnParallel, gather_output=False, **options),
        "row": partial(RowParallel, input_is_parallel=True, skip_bias_add=False, **options),
        "vocabulary": partial(layers.VocabParallelEmbedding, **options),
    }
