"""The factor that keeps float16 gradients in range (Micikevicius et al. 2018, arXiv 1710.03740).

Float16 holds nothing below 6e-8, and many gradients are smaller. So the loss is multiplied by a power of
two and the update's gradients are divided by it. A factor that is too large shows as a gradient that is
not finite: that update is skipped, and the factor halved. After INTERVAL updates that went well it is
doubled.

Factor and counters are tensors that change in place, so nobody waits for the device to tell
the host whether an update was skipped.

Ranks must agree. They do, since each decides by the norm of the whole model's gradient.
"""

import torch
from torch import Tensor

FIRST_SCALE, MIN_SCALE, MAX_SCALE = 2.0**16, 1.0, 2.0**24
INTERVAL = 2000
"""Updates without overflow before the factor is doubled (torch's GradScaler waits as long)."""


class LossScale:
    """The factor, and what decides its next value; all of it belongs to a checkpoint."""

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), FIRST_SCALE, device=device)
        """The factor, always a power of two; the same tensor for ever."""
        self.clean = torch.zeros((), device=device)
        """Updates without overflow since the factor changed."""
        self.skipped = torch.zeros((), device=device)
        """Updates of the run that were skipped."""
        self.stuck = torch.zeros((), device=device)
        """1 if the last update overflowed with the smallest factor, else 0."""

    def update(self, norm: Tensor) -> None:
        """Takes the gradient's norm at an update, which was skipped if that is not finite."""
        overflow = ~norm.to(self.value.device).isfinite()
        self.stuck.copy_(overflow & (self.value == MIN_SCALE))
        clean = torch.where(overflow, 0.0, self.clean + 1)
        grow = clean >= INTERVAL
        factor = torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0))
        self.value.mul_(factor).clamp_(MIN_SCALE, MAX_SCALE)
        self.clean.copy_(clean.masked_fill(grow, 0.0))
        self.skipped += overflow

    def state(self) -> dict[str, float]:
        """Return everything, in numbers; wait for the device."""
        return {name: float(getattr(self, name)) for name in ("value", "clean", "skipped", "stuck")}

    def load(self, state: dict[str, float]) -> None:
        """Goes on from what `state` gave."""
        for name, number in state.items():
            getattr(self, name).fill_(number)


def scale_exhausted(state: dict[str, float]) -> bool:
    """Return whether gradients overflow although the factor cannot become smaller."""
    return bool(state["stuck"])
