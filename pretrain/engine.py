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

The trap: sums of floats depend on their order. Gradients are reduced after the last micro-batch in
buckets that follow the order of the parameters, since DistributedDataParallel builds its buckets anew
after the first step, and a resumed run would not repeat the bits of an undisturbed one.
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import float8, tensor_parallel
from pretrain.config import Config, UserError, replays_graphs
from pretrain.loss import BorrowedCrossEntropy
from pretrain.loss_scale import LossScale
from pretrain.model import Batch, LateMaskModel
from pretrain.optimizer import build_optimizer
from pretrain.topology import Topology

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Type of the matrix products by `train.precision`; fp32 needs no autocast."""

BUCKET = 25_000_000
"""Elements reduced at once (100 MB): enough for the full bandwidth, little for a buffer."""


def build(options: Config, model: LateMaskModel, topology: Topology, micro: int) -> "Engine":
    """Divides an initialised model over the ranks and gives it an optimizer.

    micro: sequences of a micro-batch. UserError if keys of `deepspeed` contradict others, or a kernel is
    not here.
    """
    t, known = options.train, model.cross_entropy.vocab_size
    if t.cross_entropy != "own":
        model.cross_entropy = BorrowedCrossEntropy(known, t.cross_entropy, topology.device)
    tensor_parallel.shard(model, topology)
    model.to(topology.device)
    if t.float8:
        float8.convert(model, topology.device)
    if t.compile != "none":
        for layer in model.all_layers():
            layer.compile(mode=_compile_mode(options), dynamic=False)
    if t.engine == "deepspeed":
        return DeepSpeedEngine(options, model, topology, micro)
    return TorchEngine(options, model, topology)


def _compile_mode(options: Config) -> str:
    """torch.compile's word for ours, which names graphs also where there can be none."""
    mode = options.train.compile
    if replays_graphs(options):
        return mode
    return {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}.get(mode, mode)


class Engine(ABC):
    """What training, evaluation and checkpoints need; `kind` is param, exp_avg or exp_avg_sq."""

    deepspeed_json: str | None = None
    """DeepSpeed's configuration, where there is one."""

    def __init__(self, options: Config, model: LateMaskModel, topology: Topology) -> None:
        self.module, self.topology = model, topology
        self.clip = options.train.clip
        self.optimizer = build_optimizer(model, options.optimizer)
        self.loss_scale: LossScale | None = None
        """What float16 gradients are multiplied by."""
        if options.train.precision == "fp16":
            self.loss_scale = LossScale(self._place_of_scale())
            model.cross_entropy.scale = self.loss_scale.value

    @abstractmethod
    def forward(self, batch: Batch, score: bool = False) -> Tensor:
        """What the model gives (see its forward), in the run's precision."""

    @abstractmethod
    def backward(self, batch: Batch, scale: float) -> Tensor:
        """Adds the gradients of scale x loss of a micro-batch; returns the loss on this rank."""

    def step(self, lr: float) -> Tensor:
        """Updates with the gradients since the last step; returns their norm before clipping.

        A norm that is not finite says that the update was skipped.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self._update()
        if self.loss_scale:
            self.loss_scale.update(norm)
        return norm

    @abstractmethod
    def _update(self) -> Tensor:
        """The norm of the gradients, which are used up."""

    def _place_of_scale(self) -> torch.device:
        return self.topology.device

    def accumulate(self, micro_batches: int) -> None:  # noqa: B027 (most need not know)
        """Updates are of so many micro-batches from now on."""

    def tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(name, full float32 CPU tensor) of every parameter; collective, to be read to the end."""
        for name, parameter in self.module.named_parameters():
            part = self._read(kind, parameter)
            full = tensor_parallel.gather(name, part, self.topology)
            yield name, full.detach().to("cpu", torch.float32, copy=True)

    def load_tensors(self, kind: str, get: Callable[[str], Tensor]) -> None:
        """The inverse of `tensors`: ``get(name)`` is the full tensor, on every rank; collective."""
        t = self.topology
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                part = tensor_parallel.split(name, get(name), t.tensor_size, t.tensor_rank)
                self._write(kind, parameter, part.to(t.device))

    @property
    def optimizer_step(self) -> int:
        """Updates that the moments have seen; to be set when they are loaded."""
        return int(next(iter(self.optimizer.state.values()))["step"])

    @optimizer_step.setter
    def optimizer_step(self, step: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(step)

    def _start_moments(self, tensors: Iterable[Tensor]) -> None:
        """Gives AdamW its state before the first update: there is always one to save and to load."""
        self.optimizer.state.clear()
        for tensor in tensors:
            self.optimizer.state[tensor] = {
                "step": torch.zeros((), device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }

    def _read(self, kind: str, parameter: nn.Parameter) -> Tensor:
        """This tensor-parallel rank's part, whole over the data ranks."""
        return parameter.data if kind == "param" else self.optimizer.state[parameter][kind]

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

    The trap: a layer that is replayed as a CUDA graph writes its results where it wrote them last time. The
    loss is formed outside of the graphs; but a gradient that became `.grad` as it is would be overwritten by
    the next micro-batch, so under graphs `.grad` is memory of its own, to which gradients are added.
    """

    def __init__(self, options: Config, model: LateMaskModel, topology: Topology) -> None:
        super().__init__(options, model, topology)
        self.dtype = AUTOCAST.get(options.train.precision or "")
        self.graphs = replays_graphs(options)
        if self.graphs:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        self._start_moments(model.parameters())

    def forward(self, batch: Batch, score: bool = False) -> Tensor:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.topology.device.type, self.dtype, enabled=self.dtype is not None):
            return self.module(batch, score)

    def backward(self, batch: Batch, scale: float) -> Tensor:
        loss = self.forward(batch)
        share = loss * (scale / self.topology.data_size)
        (share * self.loss_scale.value if self.loss_scale else share).backward()
        return loss.detach()

    def _update(self) -> Tensor:
        self._sum_gradients()
        norm = self._norm()
        divisor = (norm / self.clip).clamp(min=1) if self.clip else None
        if self.loss_scale:
            divisor = self.loss_scale.value * (1.0 if divisor is None else divisor)
        # The kernel divides by this as it reads the gradients: clipping costs no pass over them.
        self.optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.graphs)
        return norm

    def _sum_gradients(self) -> None:
        if self.topology.data_group is None:
            return
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        for bucket in buckets(gradients, BUCKET):
            flat = self.topology.sum_over_data(torch.cat([g.flatten() for g in bucket]))
            parts = flat.split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(parts, bucket, strict=True)])


def buckets(tensors: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Runs of neighbours that reach `size` elements, the last one excepted."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= size:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


# ---- DeepSpeed -----------------------------------------------------------------------------------

OWNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": "the loop that accumulates",
    "gradient_clipping": "train.clip",
    "torch_autocast.enabled": "train.precision",
    "torch_autocast.dtype": "train.precision",
    "bf16.enabled": "train.precision (bf16 is torch_autocast here, over float32 parameters)",
    "fp16.enabled": "train.precision (fp16 is torch_autocast here, with a loss scale of our own)",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.offload_optimizer.device": "parallel.offload",
    "zero_optimization.offload_param.device": "parallel.offload",
    "optimizer": "optimizer",
    "scheduler": "schedule",
}
"""DeepSpeed's key -> the option of ours that decides it."""


def deepspeed_config(options: Config, data_size: int, micro: int, pin: bool) -> dict[str, Any]:
    """Our options in DeepSpeed's words, with the keys of `deepspeed` added or put over our defaults.

    pin: page-lock what is offloaded. UserError names every key that contradicts an option.
    """
    t, p = options.train, options.parallel
    homes = {"none": ("none", "none"), "optimizer": ("cpu", "none"), "all": ("cpu", "cpu")}[p.offload]
    ours = {
        "train_batch_size": t.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": t.batch_size // (micro * data_size),
        "managed_gradient_accumulation": True,
        "gradient_clipping": t.clip,
        # No safe modules: gradients and gathered parameters travel in float32, as in the plain engine.
        "torch_autocast": {
            "enabled": t.precision in AUTOCAST,
            "dtype": "float16" if t.precision == "fp16" else "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": p.zero,
            "offload_optimizer": {"device": homes[0], "pin_memory": pin},
            "offload_param": {"device": homes[1], "pin_memory": pin},
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            # In stages 1 and 2 it is a sum on all ranks too, with three more passes over a bucket.
            "reduce_scatter": p.zero == 3,
        },
        # torch's fused AdamW runs on the CPU too; DeepSpeed's own has to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
    }
    problems: list[str] = []
    merged = _merge(ours, options.deepspeed, "", problems)
    if problems:
        raise UserError("\n".join(problems))
    return merged


def _merge(ours: dict[str, Any], theirs: dict[str, Any], path: str, problems: list[str]) -> dict[str, Any]:
    """`theirs` over `ours`, apart from what is owned; "auto" (as Hugging Face writes it) is ours."""
    merged = dict(ours)
    for key, value in theirs.items():
        place, own = f"{path}{key}", ours.get(key)
        if isinstance(own, dict) and isinstance(value, dict):
            merged[key] = _merge(own, value, f"{place}.", problems)
        elif isinstance(own, dict):
            problems.append(f"deepspeed.{place} = {value!r}: expected a mapping of DeepSpeed's keys")
        elif place in OWNED and value not in (own, "auto"):
            problems.append(
                f"deepspeed.{place} = {value!r} contradicts {OWNED[place]}, which makes it {own!r};"
                " leave it out"
            )
        elif value != "auto":
            merged[key] = value
    return merged


class DeepSpeedEngine(Engine):
    """DeepSpeed with ZeRO 0-3 over the same model and the same optimizer."""

    def __init__(self, options: Config, model: LateMaskModel, topology: Topology, micro: int) -> None:
        super().__init__(options, model, topology)
        on_gpu = topology.device.type == "cuda"
        settings = deepspeed_config(options, topology.data_size, micro, pin=on_gpu)
        self.deepspeed_json = json.dumps(settings, indent=2)
        self.stage, self.accumulation = (
            options.parallel.zero,
            settings["gradient_accumulation_steps"],
        )
        self.gathered = 0
        """Micro-batches since the last update."""
        deepspeed = _import_deepspeed(topology)
        try:
            self.inner, *_ = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=settings, mpu=topology.mpu()
            )
        except ValueError as error:  # pydantic's, about a key that we passed through
            reason = " ".join(str(error).split()).partition(" For further information")[0]
            raise UserError(f"deepspeed: {reason}") from None
        self.zero = self.inner.optimizer
        if self.loss_scale:
            self._replace_scaler(self.loss_scale.value)
        self._start_moments(self._masters())
        if self.stage in (1, 2):
            self.zero._lazy_init_hp_params_optimizer_state()

    def forward(self, batch: Batch, score: bool = False) -> Tensor:
        return self.inner(batch, score)

    def backward(self, batch: Batch, scale: float) -> Tensor:
        self.gathered += 1
        self.inner.set_gradient_accumulation_boundary(self.gathered == self.accumulation)
        loss = self.forward(batch)
        share = loss * scale
        if self.loss_scale and not self.stage:
            share = share * self.loss_scale.value
        self.inner.backward(share, scale_wrt_gas=False)
        return loss.detach()

    def accumulate(self, micro_batches: int) -> None:
        assert self.gathered == 0
        self.accumulation = micro_batches
        micro = self.inner.train_micro_batch_size_per_gpu()
        self.inner.set_train_batch_size(micro_batches * micro * self.topology.data_size)

    def _update(self) -> Tensor:
        assert self.gathered == self.accumulation
        self.gathered = 0
        norm = None if self.stage else self._norm()
        if self.loss_scale and not self.stage:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            torch._foreach_div_(gradients, float(self.loss_scale.value))
        self.inner.step()
        return torch.as_tensor(self.inner.get_global_grad_norm() if norm is None else norm)

    def _place_of_scale(self) -> torch.device:
        """DeepSpeed reads norms on the host at every update, and clips there what is offloaded."""
        return torch.device("cpu")

    def _replace_scaler(self, scale: Tensor) -> None:
        """Ours for those that DeepSpeed 0.19.8 makes for float16: their state is in no checkpoint of ours,
        and ZeRO lets its own step once for each group of parameters, without dividing the gradients."""
        if self.stage:
            self.zero.torch_autocast_gradscaler = None
            self.zero.custom_loss_scaler, self.zero.external_loss_scale = True, scale
        else:
            self.inner.torch_autocast_z0_gradscaler = None

    def load_tensors(self, kind: str, get: Callable[[str], Tensor]) -> None:
        super().load_tensors(kind, get)
        if kind == "param" and self.stage:
            self._refresh_model()

    def _masters(self) -> Iterable[Tensor]:
        """The tensors that the optimizer really updates: flat float32 partitions under ZeRO."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        return self.zero.single_partition_of_fp32_groups if self.stage else self.module.parameters()

    def _read(self, kind: str, parameter: nn.Parameter) -> Tensor:
        if self.stage == 0:
            return super()._read(kind, parameter)
        from deepspeed import utils

        if kind == "param":
            return utils.safe_get_full_fp32_param(parameter)
        return utils.safe_get_full_optimizer_state(parameter, kind)

    def _write(self, kind: str, parameter: nn.Parameter, part: Tensor) -> None:
        from deepspeed import utils

        if self.stage == 0:
            super()._write(kind, parameter, part)
        elif self.stage < 3 and kind == "param":
            utils.safe_set_full_fp32_param(parameter, part)
        elif self.stage < 3:
            utils.safe_set_full_optimizer_state(parameter, part, kind)
        elif kind == "param":
            utils.safe_set_local_fp32_param(parameter, self._partition(parameter, part))
        else:
            utils.safe_set_local_optimizer_state(parameter, self._partition(parameter, part), kind)

    def _partition(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """This data rank's share under ZeRO-3. The full setters of 0.19.8 fail where it is padded."""
        share = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = part.new_zeros(share * self.topology.data_size)
        padded[: part.numel()] = part.flatten()
        return padded.narrow(0, share * self.topology.data_rank, share)

    def _refresh_model(self) -> None:
        """The model's parameters from their masters, as at the end of DeepSpeed's own step."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)


def _import_deepspeed(topology: Topology) -> Any:
    """The package, told what it would otherwise guess, print or compile."""
    if topology.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Or it asks numactl for the number of devices, in a new process, at every reduction.
        os.environ.setdefault("LOCAL_SIZE", str(topology.world_size))
    else:
        # It pins the device anew by this variable, also where a rank sees no GPU but its own.
        os.environ["LOCAL_RANK"] = str(topology.device.index)
    import deepspeed

    # A shared-memory all-reduce for CPUs that takes a minute to compile; gloo serves as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
