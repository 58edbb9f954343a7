"""Statistics of the updates since the last log line, for which nobody waits.

They are tensors that change in place on the device, which need not tell the host that an update was skipped.
"""

import torch
from torch import Tensor

from pretrain.parallel.topology import Topology


class UpdateStatistics:
    """Mean loss, largest gradient norm and numbers of skipped updates; equal on all ranks but for the loss,
    which is that of a rank's own samples."""

    def __init__(self, device: torch.device, skipped: float = 0.0, scaled: bool = False) -> None:
        """Begin with the skipped updates of the run so far; scaled: overflow is nothing unusual (fp16)."""
        zeros = torch.zeros(5, device=device).unbind()
        self.loss, self.good, self.norm, self.skipped_in_row, self.skipped = zeros
        self.skipped += skipped
        self._scaled = scaled

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Add an update's loss and the norm of its gradient, which was skipped if that is not finite."""
        good = norm.to(self.loss.device).isfinite()
        self.skipped += ~good
        if not self._scaled:
            self.skipped_in_row.add_(1).masked_fill_(good, 0.0)
        self.good += good
        self.loss += torch.where(good, loss, 0.0)
        self.norm.copy_(torch.maximum(self.norm, torch.where(good, norm.to(self.norm), 0.0)))

    def take(self, topology: Topology) -> tuple[float | None, float]:
        """Return the mean loss over all ranks (None: all updates were skipped) and the largest norm since the
        last call; collective."""
        mean = float(topology.sum_over_data(self.loss / self.good) / topology.data_size)
        found = (mean if self.good else None), float(self.norm)
        for tensor in (self.loss, self.good, self.norm):
            tensor.zero_()
        return found
