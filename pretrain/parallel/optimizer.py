"""What updates the parameters: AdamW, StableAdamW or Muon, with RoBERTa's decay groups.

Matrices and embedding tables decay; biases, norm gains and single vectors do not. An update is what one
process would make, whatever the layout: what depends on a whole tensor is formed of its parts on all ranks.

All three know two attributes that torch's GradScaler has for fused kernels, so that no word from the device
to the host is needed: gradients are divided by `grad_scale`, and where `found_inf` is 1 nothing changes.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.account import flops
from pretrain.config import Config, OptimizerOptions
from pretrain.config.geometry import BUCKET
from pretrain.model import muon
from pretrain.model.late_mask import LateMaskModel
from pretrain.parallel import tensor_parallel
from pretrain.parallel.gradients import buckets
from pretrain.parallel.topology import Topology

Optimizer = torch.optim.Optimizer


def build_optimizer(model: LateMaskModel, config: Config, topology: Topology) -> Optimizer:
    """Return what updates a model that is divided over the ranks.

    The learning rate is set anew before every step by whoever steps; `lr_scale` of a group is a factor of it.
    """
    if config.optimizer.kind == "muon":
        return Muon(model, config, topology)
    if config.optimizer.kind == "stable-adamw":
        return StableAdamW(_groups(model.parameters(), config.optimizer), topology)
    return adamw(model.parameters(), config.optimizer)


def adamw(parameters: Iterable[nn.Parameter], options: OptimizerOptions) -> torch.optim.AdamW:
    """Return torch's AdamW with its fused kernel."""
    return torch.optim.AdamW(_groups(parameters, options), fused=True)


def _groups(parameters: Iterable[nn.Parameter], options: OptimizerOptions) -> list[dict[str, Any]]:
    """AdamW's two groups: what decays, and what does not."""
    every = list(parameters)
    adam = {"lr": options.lr, "betas": options.betas, "eps": options.eps}
    return [
        {**adam, "params": [p for p in every if p.dim() >= 2], "weight_decay": options.weight_decay},
        {**adam, "params": [p for p in every if p.dim() < 2], "weight_decay": 0.0},
    ]


def new_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return a parameter's moments before the first update, as far as this rank keeps them."""
    if isinstance(optimizer, Muon) and parameter in optimizer.owner:
        mine = optimizer.owner[parameter] == optimizer.topology.data_rank
        return {"exp_avg": torch.zeros_like(parameter)} if mine else {}
    step = torch.zeros((), device=parameter.device)
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def _kept(optimizer: Optimizer) -> Tensor | float:
    """Return by what an update is multiplied: 0 where it is to change nothing, else 1."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return 1.0 if found is None else 1 - found


def _gradient(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    """A parameter's gradient as it is to be used; zeros where the update is to change nothing."""
    assert parameter.grad is not None
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    gradient = parameter.grad if scale is None else parameter.grad / scale
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return gradient if found is None else torch.where(found.bool(), 0.0, gradient)


class StableAdamW(Optimizer):
    """AdamW that moves a tensor at a lower rate where its gradient g outgrows its second moment v.

    The rate is divided by the root mean square of g / sqrt(v), if that is above 1: algorithm 2 of Wortsman et
    al. 2023, arXiv 2304.13013.
    """

    def __init__(self, groups: list[dict[str, Any]], topology: Topology) -> None:
        super().__init__(groups, {})
        self.topology = topology

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            means = torch.stack([self._follow(p, group) for p in moving])
            # Parts are of equal size, and what is whole is equal on all ranks that share the model.
            means = self.topology.sum_over_tensor(means) / self.topology.tensor_size
            for parameter, excess in zip(moving, means.sqrt().clamp(min=1), strict=True):
                self._move(parameter, group, group["lr"] / excess * _kept(self))

    def _follow(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Moments take in the gradient; returns the mean of g^2 / v."""
        state, (beta, beta_sq), kept = self.state[parameter], group["betas"], _kept(self)
        gradient = _gradient(self, parameter)
        square = gradient.square()
        state["step"] += kept
        state["exp_avg"].lerp_(gradient, (1 - beta) * kept)
        second = state["exp_avg_sq"].lerp_(square, (1 - beta_sq) * kept)
        return (square / (second / _bias(beta_sq, state["step"])).clamp(min=group["eps"] ** 2)).mean()

    def _move(self, parameter: Tensor, group: dict[str, Any], rate: Tensor) -> None:
        state, (beta, beta_sq) = self.state[parameter], group["betas"]
        first = state["exp_avg"] / _bias(beta, state["step"])
        second = state["exp_avg_sq"] / _bias(beta_sq, state["step"])
        parameter.mul_(1 - rate * group["weight_decay"]).sub_(rate * first / (second.sqrt() + group["eps"]))


def _bias(beta: float, step: Tensor) -> Tensor:
    """What a moment is too small by; as at the first update, where there was none yet."""
    return 1 - beta ** step.clamp(min=1)


class Muon(torch.optim.AdamW):
    """Muon for the matrices of the layers, AdamW for all else.

    Each matrix is one data-parallel rank's: that one keeps its momentum, orthogonalises it and sends the
    update to the others (as ZeRO's first stage does with flat pieces). Where the model is divided too, the
    parts are gathered, orthogonalised as a whole, and cut again.
    """

    def __init__(self, model: LateMaskModel, config: Config, topology: Topology) -> None:
        options, self.topology = config.optimizer, topology
        self.matrices = muon.matrices(model)
        self.head_size = model.m.hidden_size // model.m.num_heads
        self.owner = _owners(self.matrices, self.head_size, topology)
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        others = [parameter for parameter in model.parameters() if parameter not in self.owner]
        super().__init__(_groups(others, options), fused=True)
        layers = {"params": list(self.matrices.values()), "lr_scale": options.muon_lr_scale}
        self.add_param_group({**layers, "weight_decay": options.weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        groups = self.param_groups
        self.param_groups, layers = groups[:-1], groups[-1]  # the last one is not AdamW's
        super().step()
        self.param_groups = groups
        lr, kept = layers["lr"], _kept(self)
        for name, update in self._share(self._updates()).items():
            parameter = self.matrices[name]
            parameter.mul_(1 - lr * layers["weight_decay"] * kept).add_(update * kept, alpha=-lr)

    def _updates(self) -> dict[str, Tensor]:
        """This rank's part of the updates of the matrices that are its own."""
        place, found = self.topology, {}
        own = ((name, p) for name, p in self.matrices.items() if self.owner[p] == place.data_rank)
        names: dict[Tensor, str] = {p: name for name, p in own}
        for bucket in buckets(sorted(names, key=lambda p: p.shape), BUCKET):
            ahead = {names[p]: tensor_parallel.gather(names[p], self._follow(p), place) for p in bucket}
            for name, whole in muon.orthogonalize(ahead, self.head_size, self.dtype).items():
                part = tensor_parallel.split(name, whole, place.tensor_size, place.tensor_rank)
                found[name] = part.contiguous()
        return found

    def _follow(self, parameter: Tensor) -> Tensor:
        """The momentum takes in the gradient; returns it as it will be next (Nesterov)."""
        momentum = self.state[parameter]["exp_avg"]
        gradient = _gradient(self, parameter)
        momentum.lerp_(gradient, (1 - muon.MOMENTUM) * _kept(self))
        return gradient.lerp(momentum, muon.MOMENTUM)

    def _share(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """The updates of all matrices, each from the rank whose it is."""
        group, found, pending = self.topology.data_group, {}, []
        if group is None:
            return own
        for name, parameter in self.matrices.items():
            found[name] = own[name] if name in own else torch.empty_like(parameter, dtype=self.dtype)
            source = self.owner[parameter]
            pending.append(dist.broadcast(found[name], group=group, group_src=source, async_op=True))
        for work in pending:
            work.wait()
        return found

    def momentum(self, parameter: Tensor) -> Tensor:
        """Return the momentum of a matrix: the state itself where it is kept, else a copy; collective."""
        found = self.state[parameter].get("exp_avg")
        if found is None:
            found = torch.empty_like(parameter)
        if self.topology.data_group is not None:
            dist.broadcast(found, group=self.topology.data_group, group_src=self.owner[parameter])
        return found


def _owners(matrices: dict[str, nn.Parameter], head_size: int, topology: Topology) -> dict[Tensor, int]:
    """The data-parallel rank of each matrix: the dearest first, to the rank that has least to do."""
    costs = {}
    for name, parameter in matrices.items():
        part = torch.empty_like(parameter, device="meta")
        whole = tensor_parallel.merge(name, [part] * topology.tensor_size)
        K, rows, columns = muon.take_apart(name, whole, head_size).shape
        costs[parameter] = K * flops.newton_schulz(rows, columns)
    work = [0] * topology.data_size
    owner: dict[Tensor, int] = {}
    for parameter, cost in sorted(costs.items(), key=lambda item: -item[1]):
        owner[parameter] = work.index(min(work))
        work[owner[parameter]] += cost
    return owner
