"""What came of the updates since the last log, and bits that ought to be equal.

Counters are tensors that change in place, so nobody waits for a device to tell the host that an update was
skipped. Checksums are sums of bits as integers: the same in any order, other after a single flipped bit.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from pretrain.parallel.topology import Topology


class Updates:
    """Losses and norms; equal on all ranks but for the loss, which is that of a rank's own samples."""

    def __init__(self, device: torch.device, skipped: float = 0.0, scaled: bool = False) -> None:
        """skipped: updates of the run so far; scaled: overflow is nothing unusual (fp16)."""
        self.loss, self.good, self.norm, self.in_row, self.skipped = torch.zeros(5, device=device).unbind()
        self.skipped += skipped
        self._scaled = scaled

    def note(self, loss: Tensor, norm: Tensor) -> None:
        """Take in an update's loss and the norm of its gradient, which was skipped if that is not finite."""
        good = norm.to(self.loss.device).isfinite()
        self.skipped += ~good
        if not self._scaled:
            self.in_row.add_(1).masked_fill_(good, 0.0)
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


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return the sum of the bits of float32 tensors; waits for their device."""
    sums = [tensor.detach().view(torch.int32).sum(dtype=torch.int64) for tensor in tensors]
    return int(torch.stack(sums).sum()) if sums else 0


def odd_ones(sums: list[int]) -> list[int]:
    """Return the places of those that differ from most; all where there is no majority."""
    usual = max(sums, key=sums.count)
    places = range(len(sums))
    if len(set(sums)) > 1 and 2 * sums.count(usual) <= len(sums):
        return list(places)
    return [place for place in places if sums[place] != usual]
