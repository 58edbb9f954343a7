"""From every layout into every other: what a checkpoint that one has written gives the other.

Each layout makes updates and saves, then loads what every layout has saved, and makes two more: the first
loss depends on the weights that were loaded, the second on the moments too. Both are compared with those of
the layout that saved, going on itself. The layouts of one number of ranks share their processes.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from pretrain import checkpoint
from pretrain.build import build_engine, make_module, prepare_torch
from pretrain.checkpoint import State
from pretrain.config import Config, load_config
from pretrain.continuing import run_segments
from pretrain.data.corpora import open_blend
from pretrain.errors import UserError
from pretrain.feed import open_feed
from pretrain.inputs import Inputs, open_inputs
from pretrain.parallel.engine import Engine
from pretrain.parallel.topology import Topology, connect
from pretrain.run_folder import RunFolder
from tests.conftest import encode, sample_texts
from tests.support.ranks import run as on_ranks

UPDATES, LR = 3, 1e-3
TOLERANCE = 1e-6
_DAY = 86400.0
DEGREES = (1, 2, 4)
CONFIG = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "ffn_size": 48, "max_positions": 40},
    "masking": {"rate": 0.5},
    "train": {"seq_length": 24, "batch_size": 8, "precision": "fp32"},
    "budget": {"steps": 100},
}


class Layout(NamedTuple):
    """How a run is spread."""

    engine: str
    zero: int
    offload: str
    tensor: int
    data: int

    @property
    def kind(self) -> str:
        """Return engine, stage and offload in words."""
        if self.engine == "torch" and not self.zero and self.offload == "none":
            return "torch"
        return f"{self.engine} {self.zero}{'' if self.offload == 'none' else f' {self.offload}'}"

    @property
    def name(self) -> str:
        return f"{self.kind} tp{self.tensor} dp{self.data}".replace(" ", "-")

    @property
    def words(self) -> list[str]:
        """Return the overrides of a config."""
        return [
            f"train.engine={self.engine}",
            f"parallel.zero={self.zero}",
            f"parallel.offload={self.offload}",
            f"parallel.tensor={self.tensor}",
        ]


class Difference(NamedTuple):
    """How far the losses of a layout that went on are from those of the one that saved, relatively."""

    source: Layout
    target: Layout
    first: float
    second: float


def kinds() -> Iterator[tuple[str, int, str]]:
    """Yield engine, stage and offload, also those that there are not."""
    yield from product(("torch", "deepspeed"), range(4), ("none", "optimizer", "all"))


def allowed(most: int) -> list[Layout]:
    """Return the layouts that a config may ask for, of so many ranks at most."""
    found = [Layout(*kind, tensor, data) for kind in kinds() for tensor, data in product(DEGREES, DEGREES)]
    return [layout for layout in found if layout.tensor * layout.data <= most and not refusal(layout)]


def refused() -> dict[str, str]:
    """Return why a start is refused, of the kinds of layouts that there are not."""
    reasons = {layout.kind: refusal(layout) for layout in (Layout(*kind, 1, 1) for kind in kinds())}
    return {kind: reason for kind, reason in reasons.items() if reason}


def refusal(layout: Layout) -> str:
    """Return why a start with a layout is refused; "" where it is not."""
    with tempfile.TemporaryDirectory() as name:
        try:
            load_config(_write_config(Path(name)), layout.words)
        except UserError as error:
            return str(error).splitlines()[0].partition(": ")[2]
    return ""


def _write_config(folder: Path) -> Path:
    tree = {"run": {"dir": str(folder / "run")}, "corpus": {"train": str(folder / "train")}, **CONFIG}
    (folder / "toy.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder / "toy.yaml"


def compare(layouts: Sequence[Layout], output: Path) -> list[Difference]:
    """Return the difference of every pair. What a layout has loaded is a line of `output`, and what is there
    already is not compared again."""
    from pretrain.data.tokenizer import train_sentencepiece

    done = read(output)
    left = {b: [a.name for a in layouts if a.name not in done.get(b.name, {})] for b in layouts}
    with tempfile.TemporaryDirectory(prefix="latemask-layouts-") as name:
        folder, texts = Path(name), sample_texts()
        train_sentencepiece(texts, folder / "tokenizer", "unigram", 400)
        encode(texts, folder / "tokenizer", folder / "train")
        _write_config(folder)
        known: dict[str, list[float]] = {}
        for group in _groups(layouts) if any(left.values()) else []:
            known |= on_ranks(group[0].tensor * group[0].data, save, folder, group, seconds=_DAY)[0]
        for group in _groups([target for target in layouts if left[target]]):
            sources = {target: {name: known[name] for name in left[target]} for target in group}
            on_ranks(group[0].tensor * group[0].data, load, folder, sources, output, seconds=_DAY)
    found = read(output)
    return [Difference(a, b, *found[b.name][a.name]) for b, a in product(layouts, repeat=2)]


def read(path: Path) -> dict[str, dict[str, list[float]]]:
    """Return what was compared so far: of each layout that loaded, those that had saved, with both
    differences."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found: dict[str, dict[str, list[float]]] = {}
    for row in map(json.loads, lines):
        found.setdefault(row["to"], {}).update(row["from"])
    return found


def _groups(layouts: Sequence[Layout]) -> list[list[Layout]]:
    degrees = {layout[3:]: [other for other in layouts if other[3:] == layout[3:]] for layout in layouts}
    return list(degrees.values())


def _relative(found: float, expected: float) -> float:
    """To two digits."""
    return float(f"{abs(found - expected) / expected:.1e}") if math.isfinite(found) else math.inf


# ---- on each rank --------------------------------------------------------------------------------


class Stage:
    """A layout that can step."""

    def __init__(self, folder: Path, layout: Layout, place: Topology) -> None:
        self.config: Config = load_config(folder / "toy.yaml", layout.words)
        inputs: Inputs = open_inputs(self.config, place.device, place.data_size)
        self.place, phase = place, inputs.recipe.phases[0]
        module = make_module(inputs.recipe.config, inputs.data.tokenizer, fresh=True)
        micro = phase.micro_batch(place.data_size)
        self.engine: Engine = build_engine(phase.config, module, place, micro)
        segments = run_segments(self.config, inputs.data, None)
        self.blend = open_blend(phase.config, inputs.data, segments)
        self.feed = open_feed(phase, place, inputs.data, self.blend)
        self.step = 0

    def update(self) -> float:
        """Return the loss, over all ranks."""
        batches = self.feed.take(8 * self.step)
        loss = torch.stack([self.engine.backward(batch, 1 / len(batches)) for batch in batches]).mean()
        self.engine.step(LR)
        self.step += 1
        return float(self.place.sum_over_data(loss) / self.place.data_size)


def save(folder: Path, layouts: list[Layout]) -> dict[str, list[float]]:
    """Return the losses of the updates after each layout's checkpoint."""
    place, found = _connect(layouts[0]), {}
    for layout in layouts:
        stage = Stage(folder, layout, place)
        for _ in range(UPDATES):
            stage.update()
        run = RunFolder(folder / layout.name)
        if place.is_main:
            run.claim()
        state = State(stage.step, 8 * stage.step, stage.engine.optimizer_step, {}, {}, "")
        checkpoint.save(run, stage.engine, state, 1, place.is_main)
        found[layout.name] = [stage.update(), stage.update()]
        stage.feed.close()
    return found


def load(folder: Path, sources: dict[Layout, dict[str, list[float]]], output: Path) -> None:
    """Load its sources, known by their next losses, into each layout; a line tells how far it is off."""
    place = _connect(next(iter(sources)))
    for target, known in sources.items():
        stage, found = Stage(folder, target, place), {}
        for source, expected in known.items():
            path = checkpoint.locate(folder / source, "latest")
            checkpoint.load(path, stage.engine)
            state = checkpoint.read_state(path)
            stage.engine.optimizer_step, stage.step = state.optimizer_step, state.step
            found[source] = [_relative(stage.update(), loss) for loss in expected]
        stage.feed.close()
        if place.is_main:
            with open(output, "a", encoding="utf-8") as file:
                file.write(json.dumps({"to": target.name, "from": found}) + "\n")
            print(f"{target.name:32} from {len(found)}: {max(map(max, found.values())):.1e}", flush=True)


def _connect(layout: Layout) -> Topology:
    prepare_torch(True)
    return connect(layout.tensor, needs_group=True)
