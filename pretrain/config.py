"""Every option of a run on one page.

A config is nested, frozen and strict. Values come from three places, the later over the earlier: the
defaults below, a YAML file, and ``section.key=value`` words from the command line. All problems of a
config are found and reported at once, each as one line in the user's words; an unknown key is an error
that names the nearest known one. The resolved config is what a run folder keeps.

The trap: YAML 1.1 guesses. It reads ``1e-4`` as a string, ``1:30`` as 90, ``010`` as 8 and ``yes`` as true,
and pydantic takes true for 1. Here numbers are decimal (1_000, .5 and 1e-4 too), switches are true or false,
and all else is text.
"""

import difflib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)


class UserError(ValueError):
    """Something only the user can put right: what, where and what to do, in a line (exit code 2)."""


def place(text: str) -> str:
    """Return a path with ~ and $NAME as a shell reads them; ValueError where they stand for nothing."""
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"{path.partition('/')[0]} is nobody's home; write ./{path} for a file of that name")
    # A small $name within a name may be a part of it.
    for name in re.findall(r"(?:(?:^|/)\$|\$(?=[A-Z])|\$\{)([A-Za-z_]\w*)", path):
        if not os.environ.get(name):
            raise ValueError(f"${name} is not set; set it, or write the path out")
    return os.path.expandvars(path)


Place = Annotated[str, AfterValidator(place)]
"""A path."""


def _kinds(annotation: Any) -> set[type]:
    """The plain types that a value may have; none for a choice of words."""
    if get_origin(annotation) is Literal:
        return {type(word) for word in get_args(annotation)} - {str}
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    return {annotation}.union(*(_kinds(one) for one in get_args(annotation)))


class Section(BaseModel):
    """A frozen group of options; unknown keys are errors, docstrings are the fields' descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses a switch or a text for a number, a number for a switch, and a number for a name."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        numeric = bool(kinds & {int, float})
        for part in value if isinstance(value, (list, tuple)) else [value]:
            number = isinstance(part, (int, float)) and not isinstance(part, bool)
            if bool in kinds and not isinstance(part, bool):
                raise ValueError("should be true or false")
            if str in kinds and isinstance(part, (int, float)):
                raise ValueError("put it in quotes if it is a name")
            if numeric and str not in kinds and isinstance(part, (bool, str)):
                raise ValueError("should be a number, in decimal digits")
            if number and not math.isfinite(part):
                raise ValueError("should be a finite number")
        return value


class Run(Section):
    """Where the run lives and what makes it random."""

    dir: Place
    """Folder of the run: config, ledger, metrics, checkpoints. Starting it again continues the run."""
    seed: int = Field(0, ge=0)
    """Seed of the initial weights (and of dropout)."""
    data_seed: int = Field(0, ge=0)
    """Seed of the order of documents and windows, and of the masks."""


class Corpus(Section):
    """What is read."""

    train: str | list[tuple[float, str]]
    """Prefix of the training corpus (PREFIX.bin, .idx, .json), or a blend `[[weight, prefix], ...]`."""
    segment: int = Field(0, ge=0)
    """Raise it by one to continue a run with another blend; without that a changed blend is refused."""
    valid: Place | None = None
    """Prefix of the held-out corpus; without one nothing is evaluated."""
    tokenizer: Place | None = None
    """Tokenizer folder; default: the one that the manifest of `train` names."""
    copies: Place | None = None
    """Folder that may hold a copy of a training corpus, such as a node's own disk (`slurm.stage`): read
    where it is whole, else the original is."""
    documents: Literal["packed", "bounded"] = "packed"
    """Windows run across documents, joined by </s>. `packed`: attention sees the whole window; `bounded`:
    only the rows of the same document. Positions count from the window's beginning in both, and so do FLOPs:
    what a kernel saves between documents is not credited."""

    @field_validator("train", mode="before")
    @classmethod
    def _is_blend(cls, value: Any) -> Any:
        """One message for both forms, where the union would give one for each of its members."""
        if isinstance(value, str):
            return place(value)
        pairs = value if isinstance(value, list) else []
        good = [
            (weight, place(prefix))
            for weight, prefix in (
                pair for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2
            )
            if isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if 0 < weight < math.inf and isinstance(prefix, str)
        ]
        if not good or len(good) < len(pairs):
            raise ValueError("should be a prefix, or [[weight, prefix], ...] with weights above 0")
        if len({prefix for _, prefix in good}) < len(good):
            raise ValueError("names a prefix twice; give it the sum of its weights")
        return good

    @property
    def blend(self) -> list[tuple[float, str]]:
        """(weight, prefix) of each training corpus."""
        return [(1.0, self.train)] if isinstance(self.train, str) else self.train


class Model(Section):
    """The encoder, the place where the [MASK] rows join, and the decoder that is thrown away afterwards."""

    block: Literal["roberta", "modern"] = "roberta"
    """`roberta`: GELU, biases, learned positions. `modern`: GeGLU, no biases, rotary positions."""
    num_layers: int = Field(12, ge=1)
    """Encoder layers; what is exported."""
    hidden_size: int = Field(768, ge=1)
    """Width D."""
    num_heads: int = Field(12, ge=1)
    """Attention heads; the head width is hidden_size / num_heads."""
    ffn_size: int = Field(3072, ge=1)
    """Inner width of the feed-forward layer (of each half, in the GeGLU of the modern block)."""
    max_positions: int = Field(512, ge=4)
    """Positions the model can hold; the longest sequence it can ever see."""
    norm: Literal["post", "pre"] | None = None
    """LayerNorm after (`post`, RoBERTa) or before (`pre`) each sub-layer; the modern block is `pre` only."""
    mask_from: int = Field(0, ge=0)
    """Layer before which the [MASK] rows join: 0 = ordinary MLM, num_layers = they meet the decoder only."""
    decoder_layers: int = Field(0, ge=0)
    """Layers after the encoder that are discarded after pre-training."""
    decoder: Literal["self", "cross", "query"] = "self"
    """`self`: all rows attend to all. `cross`: self-attention, then attention to the encoder output.
    `query`: only the predicted rows are updated, attending to all rows."""
    decoder_positions: Literal["own", "shared"] = "own"
    """Learned positions added to all decoder inputs: own table, or the encoder's (roberta block only)."""
    mask_vector: Literal["learned", "tied"] = "learned"
    """What a late [MASK] row is: a vector of its own (3ML), or the word table's [MASK] row (MAE-LM)."""
    mask_leak: float = Field(0.0, ge=0, le=1)
    """Share of the [MASK] rows that the encoder sees all the same, as the word table's [MASK] (MAE-LM's
    transition): at 1 there are no late masks, and without a decoder that is `mlm`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of hidden states and attention weights (RoBERTa: 0.1)."""
    decoder_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout inside the decoder; default: `dropout`."""
    init_from: Place | None = None
    """Hugging Face folder (safetensors) of a model to start from; what it has not is initialised. Read
    before the first update only."""
    token_type: bool = False
    """A vector added to each token, and two rows kept for padding: what Hugging Face's RoBERTa has
    besides. Set by `init_from` (roberta block)."""
    vocab_size: int | None = Field(None, ge=8)
    """Pieces of the tokenizer; default: read from the tokenizer. Needed only to plan without one."""
    vocab_multiple: int = Field(128, ge=1)
    """The word table is padded to a multiple of this, whatever the tensor-parallel degree."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of every LayerNorm."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies (modern block)."""


class Masking(Section):
    """Which tokens are predicted, and what stands in their place. Counts are exact, the same in every row."""

    rate: float = Field(0.15, gt=0, lt=1)
    """Share of a window's tokens that is predicted."""
    scheme: Literal["uniform", "whole_word", "span"] = "uniform"
    """What is drawn as one: a token, a whole word, or a span of 1 to `span_max` whole words (SpanBERT,
    arXiv 1907.10529). Counts stay exact: the last word or span is cut."""
    span_stop: float = Field(0.2, gt=0, lt=1)
    """Chance that a span ends at a word: lengths are geometric up to `span_max` (mean 3.8 words)."""
    span_max: int = Field(10, ge=1)
    """Longest span in words."""
    corruption: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Of the predicted tokens: share replaced by [MASK], by a random piece, and kept."""
    views: int = Field(1, ge=1)
    """Fully-explored masking: K disjoint masks of one text (arXiv 2010.06040)."""
    views_mode: Literal["epoch", "batch"] = "epoch"
    """`epoch`: visit e of a text uses mask e mod K. `batch`: all K masks of a text in one update."""
    views_partition: Literal["random", "contiguous"] = "random"
    """How the tokens of a text are divided among its K masks: at random, or into K segments of the text
    (from a random place on and round its end), drawn anew every K visits."""


class Phase(Section):
    """What is other than in `train` until a share of the budget is spent."""

    until: float = Field(gt=0, lt=1)
    """Share of the budget at which the phase ends."""
    batch_size: int | None = Field(None, ge=1)
    """As in `train`, whose value it takes if not given."""
    micro_batch_size: int | None = Field(None, ge=1)
    """As in `train`, whose value it takes if not given."""
    seq_length: int | None = Field(None, ge=8)
    """As in `train`, whose value it takes if not given."""


class Train(Section):
    """One update, and how it is computed."""

    batch_size: int = Field(256, ge=1)
    """Sequences per update, over all ranks and micro-batches."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Sequences per forward pass of one data-parallel rank; default: no accumulation."""
    seq_length: int = Field(128, ge=8)
    """Window length L in tokens, <s> and </s> included."""
    phases: list[Phase] = []
    """Short sequences or small batches first: `[{until: 0.9, seq_length: 128}]` trains on 128 tokens until
    90 % of the budget is spent. After the last phase the values above hold. Shares ascend."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Arithmetic of the matrix products, over float32 parameters; default: bf16 where the device has it, else
    fp32. `fp16` is for GPUs without bf16: its loss is scaled, and an update whose gradients overflow is
    skipped (and paid for)."""
    engine: Literal["torch", "deepspeed"] = "torch"
    """`torch`: plain (data-parallel) torch. `deepspeed`: ZeRO 0-3."""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    """torch.compile mode of the layers. The last two replay CUDA graphs on a GPU, where the engine is torch,
    parallel.tensor is 1 and nothing is recomputed; elsewhere `reduce-overhead` is `default`, and
    `max-autotune` only picks the fastest kernels."""
    float8: bool = False
    """Form the layers' products whose widths are multiples of 16 in float8 (`pip install '.[float8]'`; H100
    and its like, bf16 for all else). It pays with `compile` only. MFU stays a share of the bf16 peak."""
    cross_entropy: Literal["own", "torch", "liger"] = "own"
    """Whose kernel forms the loss over the vocabulary in training: ours, torch's `linear_cross_entropy` (from
    2.13) or liger-kernel's (a GPU, `pip install '.[liger]'`). The same loss and gradients, up to rounding."""
    recompute: Literal["none", "block"] = "none"
    """`block`: keep only each layer's input and recompute the rest (less memory, more hardware FLOPs)."""
    deterministic: bool | None = None
    """Bit-exact repetition; default: true on CPU, false on GPU (where it costs speed)."""
    clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0: no clipping."""


class Optimizer(Section):
    """AdamW. Biases, norms and vectors do not decay."""

    lr: float = Field(5e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of the two moments."""
    eps: float = Field(1e-6, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay of matrices and embeddings."""


class Schedule(Section):
    """Learning rate as a function of the spent share of the budget."""

    kind: Literal["linear", "cosine", "trapezoid"] = "linear"
    """Shape after the warm-up; `trapezoid` stays at the peak and falls linearly over the last fifth."""
    warmup: float = Field(0.06, ge=0, lt=1)
    """Share of the budget over which the rate rises linearly from 0."""
    floor: float = Field(0.0, ge=0, le=1)
    """Rate at the end, as a share of the peak."""


class Budget(Section):
    """What the run may spend: exactly one unit, or a share of what another recipe costs. It is also the unit
    of progress."""

    steps: int | None = Field(None, ge=1)
    """Updates."""
    tokens: float | None = Field(None, gt=0)
    """Input slots (rows of input), padding and [MASK] included."""
    flops: float | None = Field(None, gt=0)
    """Model matmul FLOPs of training, head included."""
    flops_without_head: float | None = Field(None, gt=0)
    """Those of encoder and decoder."""
    token_layers: float | None = Field(None, gt=0)
    """Linear FLOPs of all layers, in units of one self-attention layer on one row."""
    device_hours: float | None = Field(None, gt=0)
    """Ranks x hours from process start to exit, over all attempts."""
    kwh: float | None = Field(None, gt=0)
    """Measured energy in kWh, over all attempts. Needs a sensor (NVML or RAPL)."""
    relative_to: Place | None = None
    """Instead of an amount: another CONFIG, whose planned cost is the measure (its own budget must be in
    steps, tokens or FLOPs), or the folder of a RUN, which has spent. The amount is kept in the run's
    config.yaml."""
    fraction: float = Field(1.0, gt=0)
    """Share of that cost that this run may spend."""
    measure: Literal[
        "flops_with_head", "flops_without_head", "token_layers", "tokens", "device_hours", "kwh"
    ] = "flops_with_head"
    """What is compared with `relative_to`."""

    @property
    def amount(self) -> tuple[str, float]:
        """(unit, how much of it); of a config whose `relative_to` is resolved."""
        ((unit, amount),) = ((u, getattr(self, u)) for u in BUDGET_UNITS if getattr(self, u) is not None)
        return unit, amount

    @property
    def measured_unit(self) -> str:
        """The unit of `measure`."""
        return "flops" if self.measure == "flops_with_head" else self.measure


BUDGET_UNITS = ("steps", "tokens", "flops", "flops_without_head", "token_layers", "device_hours", "kwh")


class Parallel(Section):
    """How one model is spread over ranks."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel degree; ranks / tensor is the data-parallel degree."""
    zero: Literal[0, 1, 2, 3] = 0
    """ZeRO stage of the deepspeed engine: what is partitioned over data-parallel ranks."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What the deepspeed engine keeps in host memory: optimizer state, or parameters too."""


class Checkpoint(Section):
    """When the run is saved, and how many saves stay."""

    every_steps: int | None = Field(None, ge=1)
    """Save every so many updates."""
    every_minutes: float | None = Field(30.0, gt=0)
    """Save at least this often."""
    end_margin_minutes: float = Field(5.0, ge=0)
    """In a Slurm job, stop and save so long before its time limit (in a short job, at a fifth of it)."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints kept; the best by held-out loss is kept besides."""


class Evaluate(Section):
    """Held-out loss during training, under the same fixed 15 % mask for every method."""

    every_steps: int | None = Field(None, ge=1)
    """Evaluate every so many updates (and always at the end)."""
    samples: int = Field(512, ge=1)
    """Held-out windows; fewer if the corpus has fewer."""
    seq_length: int | None = Field(None, ge=8)
    """Their length, the same in all phases; default: that of `train`."""


class Monitor(Section):
    """What is written while training."""

    log_every: int = Field(10, ge=1)
    """Updates between two lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard events into the run."""


class Config(Section):
    """All options of a run."""

    run: Run
    corpus: Corpus
    model: Model = Model()
    masking: Masking = Masking()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    budget: Budget = Budget()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    monitor: Monitor = Monitor()
    deepspeed: dict[str, Any] = {}
    """Passed through to DeepSpeed; a key that contradicts an option above is an error."""


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}

# What may differ when a run continues: layout, cadence and budget, nothing that changes the samples, the
# masks or the mathematics.
FREE_TO_CHANGE = (
    "run.dir",
    "corpus.train",
    "corpus.segment",
    "corpus.valid",
    "corpus.tokenizer",
    "corpus.copies",
    "train.micro_batch_size",
    "train.engine",
    "budget",
    "parallel",
    "checkpoint",
    "evaluate",
    "monitor",
    "deepspeed",
)


# ---- reading -------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader of the plain forms below, and of no others; refuses a key given twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        # Not later: merging (<<) puts keys into a mapping that its own keys replace.
        keys = [(key.tag, str(key.value)) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{key[1]!r} is given twice (line {node.start_mark.line + 1})")
        return node


_DIGITS = "[0-9]+(?:_[0-9]+)*"
_PLAIN = {
    "null": "~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": f"[-+]?{_DIGITS}",
    "float": rf"[-+]?(?:{_DIGITS}\.?(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
    "merge": "<<",
}
for _kind, _form in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_form})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Returns the YAML mapping in `path`, UserError if there is none."""
    try:
        value = _Loader(Path(path).read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise UserError(f"{path}: cannot read the config ({error.strerror}); check the path") from None
    except UserError as error:
        raise UserError(f"{path}: {error}; keep one of them") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value or {}, dict):
        raise UserError(f"{path}: expected sections (run:, corpus:, ...), found {type(value).__name__}")
    return value or {}


def parse_overrides(words: list[str]) -> dict[str, dict[str, Any]]:
    """``["train.batch_size=8"]`` -> ``{"train": {"batch_size": 8}}``; deeper keys nest (deepspeed.a.b=1)."""
    tree: dict[str, Any] = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or "." not in path:
            raise UserError(f"{word!r}: an override is written section.key=value")
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"{word!r}: {parent} has a value already; keep one of the two overrides")
        try:
            node[leaf] = _given(path, text)
        except (yaml.YAMLError, ValueError):
            raise UserError(f"{word!r}: the value is not YAML; quote it") from None
    return tree


def _given(path: str, text: str) -> Any:
    """Return the value of an override: YAML if it begins as a list, a mapping or in quotes, else its text."""
    loader = _Loader(text)
    if text.lstrip()[:1] in ("[", "{", "'", '"'):
        node = loader.get_single_node()
        assert node
        if text[node.end_mark.index :].strip():  # which YAML may take for a comment
            raise ValueError(text)
        return loader.construct_document(node)
    tag = loader.resolve(yaml.ScalarNode, text.strip(), (True, False))
    section, _, key = path.partition(".")
    field = SECTIONS[section].model_fields.get(key) if section in SECTIONS else None
    named = field is not None and str in _kinds(field.annotation)
    if tag.endswith(":str") or (named and not tag.endswith(":null")):
        return text
    return loader.construct_document(yaml.ScalarNode(tag, text.strip()))


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merge(old, value)
        merged[key] = value
    return merged


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads, overrides, checks and completes a config; UserError lists every problem, one a line."""
    overrides = overrides or []
    tree = _merge(read_yaml(path), parse_overrides(overrides))
    return build(tree, str(path), [word.partition("=")[0] for word in overrides])


def build(tree: dict[str, Any], where: str = "config", overridden: Sequence[str] = ()) -> Config:
    """A checked and completed Config from nested dicts; UserError lists every problem, one a line.

    A problem that names an `overridden` key is said to be of the command line, any other of `where`.
    """
    found: list[str] = []
    sections: dict[str, Any] = {}
    for name in tree.keys() - Config.model_fields.keys():
        found.append(f"unknown section {name!r}{_nearest(name, list(Config.model_fields))}")
    for name, kind in SECTIONS.items():
        sections[name] = _section(name, kind, tree.get(name), found)
    if not isinstance(tree.get("deepspeed", {}), dict):
        found.append("deepspeed: expected a mapping of DeepSpeed's own keys")
    found += _doubtful("deepspeed", tree.get("deepspeed"))
    config = Config.model_construct(**sections, deepspeed=tree.get("deepspeed") or {})
    found += _contradictions(config)
    if found:
        raise UserError("\n".join(f"{_origin(problem, where, overridden)}: {problem}" for problem in found))
    return _complete(config)


def _doubtful(path: str, given: Any) -> Iterator[str]:
    """What DeepSpeed would take for true, whatever it says: nobody checks the kinds of its keys."""
    if isinstance(given, dict):
        for key, value in given.items():
            yield from _doubtful(f"{path}.{key}", value)
    elif isinstance(given, str) and given.lower() in ("yes", "no", "on", "off", "y", "n"):
        yield f"{path} = {given!r}: should be true or false"


def _origin(problem: str, where: str, overridden: Sequence[str]) -> str:
    sections = [f"unknown section {key.partition('.')[0]!r}" for key in overridden]
    return "command line" if any(word in problem for word in [*overridden, *sections]) else where


def _section(name: str, kind: type[Section], given: Any, found: list[str]) -> Section:
    """Validates one section; notes problems in `found` and goes on with what is good.

    A null is as good as no value: it asks for the default.
    """
    if given is None:
        given = {}
    if not isinstance(given, dict):
        found.append(f"{name}: expected keys ({', '.join(list(kind.model_fields)[:3])}, ...)")
        given = {}
    given = {key: value for key, value in given.items() if value is not None}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        bad = set()
        for item in error.errors():
            bad.add(item["loc"][0])
            found.append(_problem(name, kind, item))
        # Lists may hold sections of their own, which nobody has made of them yet.
        good = {k: value for k, value in given.items() if k not in bad and not isinstance(value, list)}
        return kind.model_construct(_fields_set=set(given), **good)


def _problem(name: str, kind: type[Section], item: Any) -> str:
    key = ".".join([name, *(str(part) for part in item["loc"])])
    inner = len(item["loc"]) > 1
    if item["type"] == "extra_forbidden":
        known, prefix = (list(Phase.model_fields), "") if inner else (list(kind.model_fields), f"{name}.")
        return f"unknown key {key}{_nearest(str(item['loc'][-1]), known, prefix)}"
    if item["type"] == "missing" and not inner:
        return f"{key} is missing; set it ({kind.model_fields[str(item['loc'][0])].description})"
    if item["type"] == "missing" and isinstance(item["loc"][-1], int):  # a list that is too short
        whole = f"{name}.{item['loc'][0]}"
        return f"{whole} = {item['input']!r}: {kind.model_fields[str(item['loc'][0])].description}"
    text = item["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return f"{key} = {item['input']!r}: {text}"


def _nearest(word: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known: {', '.join(known)}"


# ---- checks between keys -------------------------------------------------------------------------


def _contradictions(config: Config) -> list[str]:
    found = [
        problem
        for check in (_check_model, _check_phases, _check_budget, _check_parallel, _check_evaluate)
        for problem in check(config)
    ]
    *early, last = phases(config)
    always = [*_check_masking(last), *_check_train(last)]
    for number, phase in enumerate(early):
        new = [problem for problem in (*_check_masking(phase), *_check_train(phase)) if problem not in always]
        found += [f"train.phases.{number}: {problem}" for problem in new]
    return found + always


def _check_model(config: Config) -> list[str]:
    m, found = config.model, []
    if m.hidden_size % m.num_heads:
        found.append(f"model.hidden_size = {m.hidden_size} is no multiple of model.num_heads = {m.num_heads}")
    elif m.block == "modern" and (m.hidden_size // m.num_heads) % 2:
        found.append(
            f"model.hidden_size / model.num_heads = {m.hidden_size // m.num_heads}: rotary positions"
            " need an even head width"
        )
    if m.block == "modern" and m.norm == "post":
        found.append("model.norm = 'post': the modern block is pre-LN only; leave it out")
    if m.block == "modern" and m.token_type:
        found.append("model.token_type = true: only the roberta block has it; leave it out")
    late = m.mask_from == m.num_layers and m.decoder_layers >= 1
    if not (late or (m.mask_from < m.num_layers and m.decoder_layers == 0)):
        found.append(
            f"model.mask_from = {m.mask_from} with model.decoder_layers = {m.decoder_layers}: allowed are"
            f" 0 <= mask_from < {m.num_layers} without a decoder, or mask_from = {m.num_layers}"
            " (num_layers) with decoder_layers >= 1"
        )
    return found


def _check_masking(config: Config) -> list[str]:
    k, found = config.masking, []
    if min(k.corruption) < 0 or abs(sum(k.corruption) - 1) > 1e-9:
        found.append(
            f"masking.corruption = {list(k.corruption)}: three shares (mask, random, keep) that sum to 1"
        )
    if round(k.rate * (config.train.seq_length - 2)) < 1:
        found.append(
            f"masking.rate = {k.rate} of train.seq_length = {config.train.seq_length} predicts nothing;"
            " raise either"
        )
    elif k.views > 1 and (config.train.seq_length - 2) // k.views < 1:
        found.append(f"masking.views = {k.views} is more than the tokens of a sequence")
    if k.views > 1 and k.views_mode == "batch" and config.train.batch_size % k.views:
        found.append(
            f"train.batch_size = {config.train.batch_size} is no multiple of masking.views = {k.views}"
            " (views_mode batch)"
        )
    return found


def _check_train(config: Config) -> list[str]:
    t, found = config.train, []
    if t.seq_length > config.model.max_positions:
        found.append(
            f"train.seq_length = {t.seq_length} exceeds model.max_positions = {config.model.max_positions}"
        )
    if t.micro_batch_size and t.batch_size % t.micro_batch_size:
        found.append(
            f"train.batch_size = {t.batch_size} is no multiple of train.micro_batch_size ="
            f" {t.micro_batch_size}"
        )
    if t.float8 and t.precision in ("fp32", "fp16"):
        found.append(f"train.float8 = true with train.precision = {t.precision}: all else is bf16; set that")
    if t.float8 and config.model.hidden_size % 16:
        found.append(
            f"train.float8 = true: model.hidden_size = {config.model.hidden_size} is no multiple of 16; leave"
            " float8 out"
        )
    if t.cross_entropy != "own" and t.precision == "fp16":
        found.append(
            f"train.cross_entropy = {t.cross_entropy} forms gradients before the loss is scaled, which"
            " train.precision = fp16 needs; take own"
        )
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        found.append(f"optimizer.betas = {list(config.optimizer.betas)}: both must lie in [0, 1)")
    return found


def _check_evaluate(config: Config) -> list[str]:
    length, most = config.evaluate.seq_length, config.model.max_positions
    if length and length > most:
        return [f"evaluate.seq_length = {length} exceeds model.max_positions = {most}"]
    return []


def _check_phases(config: Config) -> list[str]:
    untils = [phase.until for phase in config.train.phases]
    if untils == sorted(set(untils)):
        return []
    return [f"train.phases: until = {untils}: each must be larger than the one before"]


def _check_budget(config: Config) -> list[str]:
    b = config.budget
    given = [unit for unit in BUDGET_UNITS if unit in b.model_fields_set]
    if b.relative_to is None:
        if not given:
            units = f"{', '.join(BUDGET_UNITS[:-1])} or {BUDGET_UNITS[-1]}"
            return [f"budget is missing; give one of {units}, or relative_to"]
        alone = [name for name in ("fraction", "measure") if name in b.model_fields_set]
        defaults = Budget()
        if any(getattr(b, name) != getattr(defaults, name) for name in alone):
            return [f"budget.{alone[0]} needs budget.relative_to"]
    elif given not in ([], [b.measured_unit]):
        return [f"budget has relative_to and {', '.join(given)}; keep one of them (unit=null unsets)"]
    if len(given) > 1:
        return [f"budget has {len(given)} units ({', '.join(given)}); keep exactly one (unit=null unsets)"]
    return []


def _check_parallel(config: Config) -> list[str]:
    p, m, found = config.parallel, config.model, []
    for name in ("num_heads", "ffn_size", "vocab_multiple"):
        if getattr(m, name) % p.tensor:
            found.append(f"model.{name} = {getattr(m, name)} is no multiple of parallel.tensor = {p.tensor}")
    if config.train.float8 and p.tensor > 1:
        found.append(
            f"train.float8 = true: torchao does not know layers that parallel.tensor = {p.tensor} divides;"
            " leave one of them out"
        )
    if config.train.float8 and p.zero == 3:
        found.append(
            "train.float8 = true keeps every gathered layer until the backward pass, which undoes"
            " parallel.zero = 3; take 2"
        )
    kernel = config.train.cross_entropy
    if kernel != "own" and p.tensor > 1:
        found.append(
            f"train.cross_entropy = {kernel} wants the whole vocabulary on a rank, which parallel.tensor ="
            f" {p.tensor} divides; take own"
        )
    if config.train.engine == "torch":
        if p.zero:
            found.append(f"parallel.zero = {p.zero} needs train.engine = deepspeed")
        if p.offload != "none":
            found.append(f"parallel.offload = {p.offload} needs train.engine = deepspeed")
        if config.deepspeed:
            found.append("deepspeed: these keys need train.engine = deepspeed")
    elif p.offload == "optimizer" and p.zero == 0:
        found.append("parallel.offload = optimizer needs parallel.zero of 1 or more")
    elif p.offload == "all" and p.zero != 3:
        found.append("parallel.offload = all needs parallel.zero = 3")
    return found


def warnings(config: Config) -> list[str]:
    """Settings that have no effect here, or another one than they say, one line each."""
    m, k, found = config.model, config.masking, []
    late, decoder = m.mask_from > 0, m.decoder_layers > 0
    for section, name, used, why in (
        ("model", "decoder", decoder, "there is no decoder"),
        ("model", "decoder_positions", decoder and m.block == "roberta", "no learned decoder positions"),
        ("model", "mask_vector", late, "the [MASK]s are ordinary tokens when mask_from = 0"),
        ("model", "mask_leak", late, "the encoder sees all [MASK]s when mask_from = 0"),
        ("model", "rope_theta", m.block == "modern", "only the modern block rotates"),
        ("masking", "span_stop", k.scheme == "span", "masking.scheme is not span"),
        ("masking", "span_max", k.scheme == "span", "masking.scheme is not span"),
        ("masking", "views_mode", k.views > 1, "masking.views is 1"),
        ("masking", "views_partition", k.views > 1, "masking.views is 1"),
    ):
        default = SECTIONS[section].model_fields[name].default
        if not used and getattr(getattr(config, section), name) != default:
            found.append(f"{section}.{name} has no effect: {why}")
    if k.rate * k.views > 1:
        found.append(
            f"masking.rate = {k.rate:g} is {1 / k.views:.3g} here: masking.views = {k.views} masks of a text"
            " have no token in common"
        )
    if config.train.compile == "reduce-overhead" and not replays_graphs(config):
        found.append(
            "train.compile = reduce-overhead is default here: CUDA graphs need train.engine = torch,"
            " parallel.tensor = 1 and train.recompute = none"
        )
    return found


def _complete(config: Config) -> Config:
    """Fills the defaults that depend on other keys."""
    m = config.model
    model = m.model_copy(
        update={
            "norm": m.norm or ("pre" if m.block == "modern" else "post"),
            "decoder_dropout": m.dropout if m.decoder_dropout is None else m.decoder_dropout,
            "token_type": m.token_type or (m.init_from is not None and m.block == "roberta"),
        }
    )
    return config.model_copy(update={"model": model})


# ---- reading a config as a whole -----------------------------------------------------------------


def method(config: Config) -> str:
    """The name under which the literature knows this combination of settings; +leak: the encoder sees some
    of the [MASK]s all the same."""
    m = config.model
    if m.mask_from == 0:
        return "mlm"
    leak = "+leak" if m.mask_leak else ""
    if m.decoder_layers == 0:
        return f"shared-depth{leak}"
    all_mask = config.masking.corruption[0] == 1.0
    if m.decoder == "self" and m.mask_vector == "tied" and all_mask:
        return f"mae-lm{leak}"
    return f"3ml-{m.decoder}{leak}"


def replays_graphs(config: Config) -> bool:
    """Whether a GPU replays the layers as CUDA graphs: their parameters and gradients must stay where they
    are, which ZeRO does not allow, and no other rank may be waited for in them."""
    t = config.train
    graphs = t.compile in ("reduce-overhead", "max-autotune")
    return graphs and t.engine == "torch" and config.parallel.tensor == 1 and t.recompute == "none"


def phases(config: Config) -> list[Config]:
    """The config of each stretch of the run, in order: `train` has the values that hold there. The last one
    is what holds when all phases are over."""
    stretches = []
    for phase in config.train.phases:
        other = {name: value for name, value in phase if name != "until" and value is not None}
        stretches.append(config.train.model_copy(update={**other, "phases": []}))
    stretches.append(config.train.model_copy(update={"phases": []}))
    return [config.model_copy(update={"train": train}) for train in stretches]


def dump(config: Config) -> str:
    """The config as YAML that `load` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def changed_keys(old: Config, new: Config) -> list[str]:
    """``section.key: old -> new`` for each difference that a continued run must not have."""
    before, after, found = old.model_dump(mode="json"), new.model_dump(mode="json"), []
    for section in before:
        if section in FREE_TO_CHANGE:
            continue
        for key in before[section]:
            old_value, new_value = before[section][key], after[section][key]
            if old_value != new_value and f"{section}.{key}" not in FREE_TO_CHANGE:
                found.append(f"{section}.{key}: {old_value} -> {new_value}")
    return found
