"""Loss, backward, update and state of one model over plain torch or DeepSpeed, behind one face.

The two engines compute the same numbers, and the plain one is the oracle of the other. In both

    bf16, fp16      are autocast over float32 parameters, which are their own master copy;
    accumulation    is the caller's scale of each micro-batch's loss; gradients add up until `step`;
    data parallel   is the mean over the data ranks, each of which saw as many predictions;
    clipping        goes by one norm over the whole model, whatever the layout;
    not a number    in a gradient leaves model and moments as they are, and shows in the norm;
    loss scaling    (fp16) is ours, in ZeRO too: norms and clipping are of gradients without it.

State leaves and enters as full float32 tensors under the parameters' names (`tensors`,
`load_tensors`), the same for every layout: a checkpoint knows nothing of ranks, stages or engines.

Sums of floats depend on their order. Gradients are summed in buckets that never change
(`gradients`), since DistributedDataParallel builds its buckets anew after the first step, and a resumed run
would not repeat the bits of an undisturbed one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pretrain.config import Config, replays_graphs
from pretrain.model.late_mask import Batch, LateMaskModel
from pretrain.model.loss_scale import LossScale
from pretrain.parallel import tensor_parallel
from pretrain.parallel.gradients import GradientSum, Lookups
from pretrain.parallel.optimizer import Muon, build_optimizer, new_state
from pretrain.parallel.pieces import TensorPiece, join
from pretrain.parallel.topology import Topology

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Type of the matrix products by `train.precision`; fp32 needs no autocast."""
REDUCE = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Type of sums over data-parallel ranks by `parallel.reduce_dtype`."""


def compile_mode(config: Config) -> str:
    """Return torch.compile's word for ours, which names graphs also where there can be none."""
    mode = config.train.compile
    if replays_graphs(config):
        return mode
    return {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}.get(mode, mode)


class Engine(ABC):
    """What training, evaluation and checkpoints need; `kind` is param, exp_avg or exp_avg_sq."""

    deepspeed_json: str | None = None
    """DeepSpeed's configuration, where there is one."""

    def __init__(self, config: Config, model: LateMaskModel, topology: Topology, micro: int) -> None:
        self.module, self.topology = model, topology
        self.clip = config.train.clip
        self.accumulation = config.train.batch_size // (micro * topology.data_size)
        """Micro-batches of an update."""
        self.micro_batches_done = 0
        """Micro-batches since the last update."""
        self.optimizer = build_optimizer(model, config, topology)
        self.muon = self.optimizer if isinstance(self.optimizer, Muon) else None
        self.loss_scale: LossScale | None = None
        """What float16 gradients are multiplied by."""
        if config.train.precision == "fp16":
            self.loss_scale = LossScale(self._place_of_scale())
            model.cross_entropy.scale = self.loss_scale.value

    @abstractmethod
    def forward(self, batch: Batch, score: bool = False) -> Tensor:
        """Return what the model gives (see its forward), in the run's precision."""

    @abstractmethod
    def backward(self, batch: Batch, scale: float) -> Tensor:
        """Adds the gradients of scale x loss of a micro-batch; returns the loss on this rank."""

    def step(self, lr: float) -> Tensor:
        """Update with the gradients since the last step; return their norm before clipping.

        A norm that is not finite says that the update was skipped.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        norm = self._update()
        if self.loss_scale:
            self.loss_scale.update(norm)
        return norm

    @abstractmethod
    def _update(self) -> Tensor:
        """The norm of the gradients, which are used up."""

    def _place_of_scale(self) -> torch.device:
        return self.topology.device

    def set_accumulation(self, micro_batches: int) -> None:
        """Make updates of so many micro-batches from now on."""
        assert self.micro_batches_done == 0
        self.accumulation = micro_batches

    def tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full float32 tensor) of every parameter that has one; collective, to be read to the
        end."""
        for name, parameter in self._having(kind):
            part = self._read(kind, parameter)
            yield name, tensor_parallel.gather(name, part, self.topology).detach().float()

    def pieces(self, kind: str) -> Iterator[TensorPiece]:
        """Yield what this rank alone gives to the same tensors (`join`), as the next update will change it;
        not collective."""
        for name, parameter in self._having(kind):
            start, flat = self._piece(kind, parameter)
            if self.topology.tensor_rank and tensor_parallel.cut(name) is None:
                flat = flat[:0]
            yield TensorPiece(name, self._shape(parameter), start, flat.detach())

    def join(self, pieces: Sequence[TensorPiece]) -> dict[str, Tensor]:
        """Return, on rank 0, the full tensors by name of the pieces of all ranks, which lie in the host's
        memory; collective over those that have any."""
        return join(pieces, self.topology, self._divided())

    def load_tensors(self, kind: str, get: Callable[[str], Tensor]) -> None:
        """Load, the inverse of `tensors`: ``get(name)`` is the full tensor, on every rank; collective."""
        t = self.topology
        with torch.no_grad():
            for name, parameter in self._having(kind):
                part = tensor_parallel.split(name, get(name), t.tensor_size, t.tensor_rank)
                self._write(kind, parameter, part.to(t.device))

    def _having(self, kind: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters by name; Muon's matrices have no second moment."""
        without = self.muon.matrices if self.muon and kind == "exp_avg_sq" else {}
        return ((name, p) for name, p in self.module.named_parameters() if name not in without)

    @property
    def optimizer_step(self) -> int:
        """Updates that the moments have seen; to be set when they are loaded."""
        return int(next(iter(self.optimizer.state.values()))["step"])

    @optimizer_step.setter
    def optimizer_step(self, step: int) -> None:
        for state in self.optimizer.state.values():
            if "step" in state:  # Muon's matrices count none
                state["step"].fill_(step)

    def _start_moments(self, tensors: Iterable[Tensor]) -> None:
        """Gives the optimizer its state before the first update: there is always one to save and to load."""
        self.optimizer.state.clear()
        for tensor in tensors:
            self.optimizer.state[tensor] = new_state(self.optimizer, tensor)

    def _read(self, kind: str, parameter: nn.Parameter) -> Tensor:
        """This tensor-parallel rank's part, whole over the data ranks."""
        if kind == "param":
            return parameter.data
        if self.muon and parameter in self.muon.owner:
            return self.muon.momentum(parameter)
        return self.optimizer.state[parameter][kind]

    def _piece(self, kind: str, parameter: nn.Parameter) -> tuple[int, Tensor]:
        """Where what this data rank alone gives of `_read` begins in that, and what it is, both flat."""
        muon = self.muon if kind == "exp_avg" else None
        owner = muon.owner.get(parameter, 0) if muon else 0
        if owner != self.topology.data_rank:
            return 0, parameter.new_empty(0)
        whole = muon.state[parameter]["exp_avg"] if muon else self._read(kind, parameter)
        return 0, whole.reshape(-1)

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of this tensor-parallel rank's part."""
        return parameter.shape

    def _divided(self) -> bool:
        """True where data ranks have pieces of their own."""
        return self.muon is not None

    def _write(self, kind: str, parameter: nn.Parameter, part: Tensor) -> None:
        self._read(kind, parameter).copy_(part)

    def _norm(self) -> Tensor:
        """Of the whole model's gradient; tells the fused kernel to skip it if it is not finite."""
        named = ((name, p.grad) for name, p in self.module.named_parameters() if p.grad is not None)
        norm = tensor_parallel.square_norm(named, self.topology).sqrt()
        if self.loss_scale:
            norm = norm / self.loss_scale.value
        # The kernel's face for GradScaler: no word from the device to the host is needed.
        self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        return norm


class TorchEngine(Engine):
    """Plain torch.

    A layer that is replayed as a CUDA graph writes its results where it wrote them last time. The
    loss is formed outside of the graphs; but a gradient that became `.grad` as it is would be overwritten by
    the next micro-batch, so under graphs `.grad` is memory of its own, to which gradients are added.
    """

    def __init__(self, config: Config, model: LateMaskModel, topology: Topology, micro: int) -> None:
        super().__init__(config, model, topology, micro)
        self.dtype = AUTOCAST.get(config.train.precision or "")
        self.graphs = replays_graphs(config)
        if self.graphs:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        self.lookups = Lookups(model)
        self.sum: GradientSum | None = None
        if topology.data_group is not None:
            self.sum = GradientSum(model, self.lookups, topology, REDUCE[config.parallel.reduce_dtype])
        self._start_moments(model.parameters())

    def forward(self, batch: Batch, score: bool = False) -> Tensor:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.topology.device.type, self.dtype, enabled=self.dtype is not None):
            return self.module(batch, score)

    def backward(self, batch: Batch, scale: float) -> Tensor:
        self.micro_batches_done += 1
        return self._backward(batch, scale, add_up=self.micro_batches_done == self.accumulation)

    def gradient_checksum(self, batch: Batch) -> int:
        """Return the checksum of this rank's own gradients of a micro-batch, which are then forgotten.

        To be called between two updates.
        """
        assert self.micro_batches_done == 0
        self._backward(batch, 1.0, add_up=False)
        found = checksum(p.grad for p in self.module.parameters() if p.grad is not None)
        self._clear_gradients()
        return found

    def _backward(self, batch: Batch, scale: float, add_up: bool) -> Tensor:
        """Like `backward`; add_up: sum the gradients over the data ranks, as none is still to come."""
        with self.lookups.cut():
            loss = self.forward(batch)
        share = loss * (scale / self.topology.data_size)
        if self.loss_scale:
            share = share * self.loss_scale.value
        if self.sum and add_up:
            self.sum.start()
            share.backward()
            self.sum.finish()
        else:
            share.backward()
            self.lookups.add(*self.lookups.take())
        return loss.detach()

    def _update(self) -> Tensor:
        if self.sum:
            assert self.micro_batches_done == self.accumulation  # or something is not in the sum
            self.sum.wait()
        self.micro_batches_done = 0
        norm = self._norm()
        divisor = (norm / self.clip).clamp(min=1) if self.clip else None
        if self.loss_scale:
            divisor = self.loss_scale.value * (1.0 if divisor is None else divisor)
        # The kernel divides by this as it reads the gradients: clipping costs no pass over them.
        self.optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        self.optimizer.step()
        self._clear_gradients()
        return norm

    def _clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=not self.graphs)


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return the sum of the bits of float32 tensors as integers: the same in any order, another after a
    single flipped bit. Waits for their device."""
    sums = [tensor.detach().view(torch.int32).sum(dtype=torch.int64) for tensor in tensors]
    return int(torch.stack(sums).sum()) if sums else 0
