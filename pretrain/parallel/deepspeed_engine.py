"""The engine that trains by DeepSpeed's ZeRO stages."""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.config.geometry import BUCKET
from pretrain.errors import UserError
from pretrain.model.late_mask import Batch, LateMaskModel
from pretrain.parallel.engine import AUTOCAST, Engine
from pretrain.parallel.topology import Topology

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


def deepspeed_config(config: Config, data_size: int, micro: int, pin: bool) -> dict[str, Any]:
    """Return our options in DeepSpeed's words, with the keys of `deepspeed` added or put over our defaults.

    pin: page-lock what is offloaded. UserError names every key that contradicts an option.
    """
    train, parallel = config.train, config.parallel
    homes = {"none": ("none", "none"), "optimizer": ("cpu", "none"), "all": ("cpu", "cpu")}[parallel.offload]
    ours = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": train.batch_size // (micro * data_size),
        "managed_gradient_accumulation": True,
        "gradient_clipping": train.clip,
        # No safe modules: gradients and gathered parameters travel in float32, as in the plain engine.
        "torch_autocast": {
            "enabled": train.precision in AUTOCAST,
            "dtype": "float16" if train.precision == "fp16" else "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": parallel.zero,
            "offload_optimizer": {"device": homes[0], "pin_memory": pin},
            "offload_param": {"device": homes[1], "pin_memory": pin},
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            # In stages 1 and 2 it is a sum on all ranks too, with three more passes over a bucket.
            "reduce_scatter": parallel.zero == 3,
            "overlap_comm": True,
        },
        # torch's fused AdamW runs on the CPU too; DeepSpeed's own has to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
    }
    problems: list[str] = []
    merged = _merge(ours, config.deepspeed, "", problems)
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

    def __init__(self, config: Config, model: LateMaskModel, topology: Topology, micro: int) -> None:
        super().__init__(config, model, topology, micro)
        on_gpu = topology.device.type == "cuda"
        settings = deepspeed_config(config, topology.data_size, micro, pin=on_gpu)
        self.deepspeed_json = json.dumps(settings, indent=2)
        self.stage = config.parallel.zero
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
        self.micro_batches_done += 1
        self.inner.set_gradient_accumulation_boundary(self.micro_batches_done == self.accumulation)
        loss = self.forward(batch)
        share = loss * scale
        if self.loss_scale and not self.stage:
            share = share * self.loss_scale.value
        self.inner.backward(share, scale_wrt_gas=False)
        return loss.detach()

    def set_accumulation(self, micro_batches: int) -> None:
        super().set_accumulation(micro_batches)
        micro = self.inner.train_micro_batch_size_per_gpu()
        self.inner.set_train_batch_size(micro_batches * micro * self.topology.data_size)

    def _update(self) -> Tensor:
        assert self.micro_batches_done == self.accumulation
        self.micro_batches_done = 0
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
        if self.stage < 3 and kind == "param":
            return parameter.data  # float32 as its master, which is divided
        if self.stage < 3 and self.topology.data_size == 1:
            return parameter._hp_mapping.get_hp_fragment(kind).view_as(parameter)  # type: ignore[attr-defined]
        from deepspeed import utils

        if kind == "param":
            return utils.safe_get_full_fp32_param(parameter)
        return utils.safe_get_full_optimizer_state(parameter, kind)

    def _piece(self, kind: str, parameter: nn.Parameter) -> tuple[int, Tensor]:
        if self.stage == 3:
            key = None if kind == "param" else kind
            # Not safe_get_local_fp32_param, which moves what is offloaded to the device.
            share, _ = self.zero._get_fp32_opt_state_partition(parameter, True, key)
            start = share.numel() * self.topology.data_rank
            return start, share[: max(0, parameter.ds_numel - start)]  # type: ignore[attr-defined]
        if self.stage == 0 or kind == "param":
            return super()._piece(kind, parameter)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return 0, parameter.new_empty(0)
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(kind)

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.ds_shape if self.stage == 3 else parameter.shape  # type: ignore[attr-defined]

    def _divided(self) -> bool:
        return self.stage > 0 or super()._divided()

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
