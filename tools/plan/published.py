"""Published pre-training runs whose hardware and rate are known, to hold the plan against.

A rate is in rows of input a second and GPU, padding counted as the source does. What a run did that these
engines do not, and so what the plan cannot know, is told with it.
"""

from dataclasses import dataclass, replace
from typing import Any

from pretrain.account.devices import Device
from pretrain.account.recipe import Phase
from pretrain.config import build_config
from tools.plan import layouts
from tools.plan.estimate import planned_recipe
from tools.plan.memory import Layout

_LARGE = layouts.SIZES["large"]
_BERT_PIECES = 30_522
_MODERN = {"block": "modern", "vocab_size": 50_368, "max_positions": 1024, "local_window": 128}


def _volta(name: str, fp16: float, fp32: float, gigabytes: float, bandwidth: float, link: float) -> Device:
    """A device without bf16, which the table has none of; peaks by its maker's data sheet."""
    peak = {"fp16": fp16 * 1e12, "fp32": fp32 * 1e12}
    source = f"NVIDIA {name} data sheet"
    return Device(name, peak, gigabytes * 2**30, bandwidth * 1e9, link, 12.5e9, 8, 250.0, 12.5e9, source)


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A run, and the rate that was published."""

    name: str
    device: str | Device
    gpus: int
    rate: float
    """Rows of input a second and GPU."""
    model: dict[str, Any]
    masked: float = 0.15
    length: int
    batch_size: int
    micro: int
    precision: str
    source: str
    why: str
    """What it did otherwise."""

    def job(self) -> tuple[Phase, Layout, Device]:
        """Return what was trained, in which layout of the plain engine, on what."""
        tree = {
            "run": {"dir": "-"},
            "corpus": {"train": "-"},
            "model": {"vocab_size": _BERT_PIECES, **self.model},
            "masking": {"rate": self.masked},
            "train": {
                "seq_length": self.length,
                "batch_size": self.batch_size,
                "micro_batch_size": self.micro,
                "precision": self.precision,
            },
            "budget": {"steps": 1},
        }
        device = layouts.named(self.device) if isinstance(self.device, str) else self.device
        recipe, _ = planned_recipe(build_config(tree), device)
        (phase,) = recipe.phases
        return phase, layouts.configured(recipe.config, self.gpus, phase.precision), device

    def planned_rate(self) -> float:
        """Return the rows of input a second and GPU that the plan expects."""
        phase, layout, device = self.job()
        share, _ = layouts.achieved(device, phase.precision)
        return self._rows / layouts.step_seconds(phase, layout, device, share)

    def share(self) -> float:
        """Return the share of the peak in products at which the plan would give the published rate."""
        return layouts.share_of(*self.job(), self._rows / self.rate)

    @property
    def _rows(self) -> float:
        """Of an update, a GPU's."""
        return self.batch_size * self.length / self.gpus


def _whole(rows: float, hours: float, gpus: int) -> float:
    """The rate of a run that took so many hours."""
    return rows / hours / 3600 / gpus


_PAIRS = 1.99895
"""Sequences in a pack of 512 rows, the mean."""
_PHASE_1 = PublishedRun(
    name="NVIDIA BERT-large, phase 1",
    device="A100",
    gpus=8,
    rate=4591 / 8 * 128,
    model=_LARGE | {"dropout": 0.1},
    length=128,
    batch_size=65_536,
    micro=256,
    precision="fp16",
    source="https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/LanguageModeling/BERT",
    why="2020's kernels: attention unfused, dropout and GELU by themselves",
)
_MODERN_BERT = PublishedRun(
    name="ModernBERT-base",
    device="H100",
    gpus=8,
    rate=_whole(1.719e12, 191.1, 8),
    model=_MODERN | {"num_layers": 22, "hidden_size": 768, "num_heads": 12, "ffn_size": 1152},
    masked=0.3,
    length=1024,
    batch_size=4608,
    micro=96,
    precision="bf16",
    source="https://arxiv.org/abs/2412.13663",
    why="compiled; the plan's 0.40 is taken from it and the next",
)
RUNS = (
    PublishedRun(
        name="MLPerf 5.0 BERT-large",
        device="H200",
        gpus=8,
        rate=8159 / 8 / _PAIRS * 512,
        model=_LARGE,
        length=512,
        batch_size=384,
        micro=48,
        precision="bf16",
        source="https://github.com/mlcommons/training_results_v5.0",
        why="float8 products, CUDA graphs, fused kernels of its own; text bounded by sequences of a pack",
    ),
    _PHASE_1,
    replace(_PHASE_1, name="the same", gpus=256, rate=138_294 / 256 * 128, why="as above"),
    PublishedRun(
        name="DeepSpeed BERT-large",
        device=_volta("V100 32GB", 125, 15.7, 32, 900, 150e9),
        gpus=1,
        rate=272 * 128,
        model=_LARGE | {"dropout": 0.1},
        length=128,
        batch_size=64,
        micro=64,
        precision="fp16",
        source="https://github.com/microsoft/DeepSpeed/blob/master/docs/_posts/2020-05-28-fastest-bert-training.md",
        why="a fused transformer kernel; the products of a V100 reach a larger share of a smaller peak",
    ),
    PublishedRun(
        name="24hBERT, BERT-large",
        device=_volta("TITAN V", 110, 14.9, 12, 653, 12.5e9),
        gpus=8,
        rate=_whole(23_000 * 4096 * 128, 24, 8),
        model=_LARGE | {"dropout": 0.1, "norm": "pre"},
        length=128,
        batch_size=4096,
        micro=32,
        precision="fp16",
        source="https://github.com/IntelLabs/academic-budget-bert",
        why="23,000 updates in 24 hours (DinkyTrain's recipe); evaluation and start-up are in the hours",
    ),
    PublishedRun(
        name="Composer, Hugging Face BERT-base",
        device="A100",
        gpus=8,
        rate=_whole(286.72e6 * 128, 11.5, 8),
        model=layouts.SIZES["base"] | {"dropout": 0.1},
        length=128,
        batch_size=4096,
        micro=128,
        precision="bf16",
        source="https://github.com/mosaicml/examples/tree/main/examples/benchmarks/bert",
        why="logits of every row, attention unfused, padding; evaluation is in the hours",
    ),
    PublishedRun(
        name="MosaicBERT-Base, 512",
        device="A100",
        gpus=8,
        rate=_whole(70_000 * 4096 * 512, 30, 8),
        model=layouts.SIZES["base"] | {"block": "modern", "ffn_size": 3072, "dropout": 0.1},
        masked=0.3,
        length=512,
        batch_size=4096,
        micro=128,
        precision="bf16",
        source="https://github.com/mosaicml/examples/issues/442",
        why="counts padding, which it does not compute; hours are its authors' round figure",
    ),
    _MODERN_BERT,
    replace(
        _MODERN_BERT,
        name="ModernBERT-large",
        rate=_whole(1.719e12, 420.4, 8),
        model=_MODERN | {"num_layers": 28, "hidden_size": 1024, "num_heads": 16, "ffn_size": 2624},
        batch_size=4928,
        micro=28,
        why="as above",
    ),
)
"""Cramming published hours and scores, but not how many rows those hours took; of MosaicBERT that is known at
512 tokens only."""
