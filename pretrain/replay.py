"""Do the devices compute what they should? The same work on two ranks, and weights that ought to be equal.

What a device miscomputes now and then (silent corruption) shows in nothing but the bits. Every
`monitor.replay_every` updates each rank forms the gradients of its first micro-batch twice, and those of its
neighbour's once. A rank whose own two differ is faulty; where neighbours disagree, it is the rank that
disagrees with both of its own.
"""

from dataclasses import replace

from pretrain.build import Run
from pretrain.errors import UserError
from pretrain.feed import micro_batches
from pretrain.parallel.engine import TorchEngine, checksum

_ADVICE = "its device or memory is faulty: leave that node out, and go on from the newest checkpoint"


def replay(run: Run) -> None:
    """Compare gradients of this update's first micro-batches, before it is made; collective. UserError names
    the rank whose bits are others."""
    if not run.config.train.deterministic:
        raise UserError("monitor.replay_every compares bits, which needs train.deterministic = true here")
    place = run.topology
    neighbour = (place.data_rank + 1) % place.data_size
    own = [_gradients(run, place.data_rank) for _ in range(2)]
    said = (place.tensor_rank, place.data_rank, *own, _gradients(run, neighbour))
    seen = [[int(word) for word in text.split()] for text in place.gather_text(" ".join(map(str, said)))]
    if bad := faulty(seen, place.data_size):
        raise UserError(
            f"step {run.step}: {_named(bad)} forms other bits of a micro-batch than before, or than its"
            f" neighbour; {_ADVICE}"
        )


def faulty(seen: list[list[int]], data_size: int) -> list[int]:
    """Return the ranks that are to blame; seen: of each rank its tensor and data rank, the sums of its own
    micro-batch, twice, and that of the next data rank's micro-batch."""
    twice = [rank for rank, (_, _, once, again, _) in enumerate(seen) if once != again]
    if twice:
        return twice
    ranks = {(tensor, data): rank for rank, (tensor, data, *_) in enumerate(seen)}
    suspects: list[int] = []
    for (tensor, data), rank in ranks.items():
        other = ranks[tensor, (data + 1) % data_size]
        if seen[rank][4] != seen[other][2]:
            suspects += [rank, other]
    both = [rank for rank in suspects if suspects.count(rank) > 1]
    return sorted(set(both if data_size > 2 and both else suspects))


def _gradients(run: Run, data_rank: int) -> int:
    """Return the checksum of what this rank makes of the first micro-batch of a data rank; no gradient
    stays."""
    phase, place = run.recipe.phases[run.phase], replace(run.topology, data_rank=data_rank)
    batch = micro_batches(phase, place, run.data, run.blend)(run.samples)[0]
    run.seed_dropout(0, data_rank)
    assert isinstance(run.engine, TorchEngine)  # the config's checks ask for it
    return run.engine.gradient_checksum(batch)


def compare_weights(run: Run) -> None:
    """Compare the weights of ranks that ought to have the same; collective. UserError names those that have
    others. ZeRO 3 keeps none twice."""
    place = run.topology
    if place.data_size == 1 or run.config.parallel.zero == 3:
        return
    said = f"{place.tensor_rank} {checksum(p.data for p in run.engine.module.parameters())}"
    texts = [text.split() for text in place.gather_text(said)]
    bad = []
    for part in range(place.tensor_size):
        ranks = [rank for rank, (tensor, _) in enumerate(texts) if int(tensor) == part]
        bad += [ranks[at] for at in odd_ones([int(texts[rank][1]) for rank in ranks])]
    if bad:
        raise UserError(
            f"step {run.step}: the weights of {_named(bad)} are not those of the others; {_ADVICE}"
        )


def odd_ones(sums: list[int]) -> list[int]:
    """Return the places of those that differ from most; all where there is no majority."""
    usual = max(sums, key=sums.count)
    places = range(len(sums))
    if len(set(sums)) > 1 and 2 * sums.count(usual) <= len(sums):
        return list(places)
    return [place for place in places if sums[place] != usual]


def _named(ranks: list[int]) -> str:
    return f"rank {' or '.join(map(str, ranks))}"
