"""Runs as the tree that they are: trunks, and the branches that began with a checkpoint of theirs.

What a run has from its trunk is not its own: the own parts of a trunk and its branches are what they spent
together.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.account import ledger
from pretrain.account.ledger import Totals


@dataclass(frozen=True)
class Branch:
    """What a run's ledger says of the run that it began from."""

    of: str
    step: int
    run: str | None
    """The name of that one, if it is among those that are shown."""
    own: Totals
    """Of its own part."""


def branches(runs: Mapping[str, str]) -> dict[str, Branch]:
    """Return what is known of those that are branches, by name; runs: name -> folder, each begun."""
    lineages = {name: ledger.lineage(run) for name, run in runs.items()}
    named = {lineage[-1][0]: name for name, lineage in lineages.items() if lineage}
    found = {}
    for name, lineage in lineages.items():
        if len(lineage) > 1:
            (begun, before), (_, last) = lineage[-2:]
            own = ledger.as_totals(ledger.since(before, last))
            of = ledger.read(runs[name])[0].details["of"]
            found[name] = Branch(of, before.step, named.get(begun), own)
    return found


def tree(runs: Mapping[str, str]) -> list[str]:
    """Return a line for each run with its own part, branches below their trunk; [] without branches."""
    known = branches(runs)

    def below(trunk: str | None, depth: int) -> list[str]:
        children = [name for name in runs if (known[name].run if name in known else None) == trunk]
        return [line for name in children for line in (_line(name, depth), *below(name, depth + 1))]

    def _line(name: str, depth: int) -> str:
        branch = known.get(name)
        own = branch.own if branch else ledger.total([runs[name]])
        begins = f" of {branch.of}" * (branch.run is None) + f" at step {branch.step}" if branch else ""
        return (
            f"{'  ' * depth}{name}{begins}: {own.steps:,} updates, {own.flops['total']:.3e} FLOPs,"
            f" {own.device_hours:.3g} device-hours"
        )

    return below(None, 0) if known else []
