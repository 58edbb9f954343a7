"""Every option of a run, with its default and its meaning: the one page of reference."""

import math
import os
import re
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)


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


def kinds_of(annotation: Any) -> set[type]:
    """Return the plain types that a value may have; none for a choice of words."""
    if get_origin(annotation) is Literal:
        return {type(word) for word in get_args(annotation)} - {str}
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0])
    return {annotation}.union(*(kinds_of(one) for one in get_args(annotation)))


def words_of(annotation: Any) -> set[str]:
    """Return the words that a value may be."""
    if get_origin(annotation) is Literal:
        return {word for word in get_args(annotation) if isinstance(word, str)}
    return set().union(*(words_of(one) for one in get_args(annotation)))


class Section(BaseModel):
    """A frozen group of options; unknown keys are errors, docstrings are the fields' descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses a switch or a text for a number, a number for a switch, and a number for a name."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds, words = kinds_of(annotation), words_of(annotation)
        numeric = bool(kinds & {int, float})
        for part in value if isinstance(value, (list, tuple)) else [value]:
            number = isinstance(part, (int, float)) and not isinstance(part, bool)
            if bool in kinds and not isinstance(part, bool):
                raise ValueError("should be true or false")
            if str in kinds and isinstance(part, (int, float)):
                raise ValueError("put it in quotes if it is a name")
            if numeric and str not in kinds and isinstance(part, (bool, str)) and part not in words:
                raise ValueError("should be a number, in decimal digits")
            if number and not math.isfinite(part):
                raise ValueError("should be a finite number")
        return value


def _step(value: Any) -> Any:
    if value in ("latest", "best") or (type(value) is int and value >= 0):
        return value
    raise ValueError("should be a step, latest or best")


class BranchOptions(Section):
    """The checkpoint of another run that a run takes weights, moments, place in the data and account from."""

    of: Place
    """Folder of that run. It is read when the branch begins, and not again once that has saved."""
    step: Annotated[Any, AfterValidator(_step)] = "latest"
    """Of the checkpoint: a number, `latest` or `best`. The number is kept in the run's config.yaml."""
    inherited: dict[str, float] = {}
    """What that run had spent by then, in each unit of budget; found out when the branch begins."""


class RunOptions(Section):
    """Where the run lives and what makes it random."""

    dir: Place
    """Folder of the run: config, ledger, metrics, checkpoints. Starting it again continues the run."""
    seed: int = Field(0, ge=0)
    """Seed of the initial weights (and of dropout)."""
    data_seed: int = Field(0, ge=0)
    """Seed of the order of documents and windows, and of the masks."""
    branch: BranchOptions | None = None
    """`{of: RUN, step: N}` begins where a checkpoint of RUN ends. Everything may be other than there but what
    gives the weights their shape; the budget includes what RUN had spent. Another corpus, `data_seed` or
    number of views begins its order at the start."""

    def inherited(self, unit: str) -> float:
        """Return what the run has from its trunk, in a unit of budget."""
        return self.branch.inherited.get(unit, 0.0) if self.branch else 0.0


class CorpusOptions(Section):
    """What is read."""

    train: str | list[tuple[float, str]]
    """Prefix of the training corpus (PREFIX.bin, .idx, .json), or a blend `[[weight, prefix], ...]`."""
    alpha: float = Field(1.0, gt=0, le=1)
    """Shares of a blend are its weights to this power: with the tokens of each language as weights, 0.3 is
    XLM-R's sampling of languages (arXiv 1911.02116), a temperature of 1 / 0.3."""
    segment: int = Field(0, ge=0)
    """Raise it by one to continue a run with another blend; without that a changed blend is refused."""
    valid: Place | None = None
    """Prefix of the held-out corpus; without one nothing is evaluated."""
    tokenizer: Place | None = None
    """Tokenizer folder; default: the one that the manifest of `train` names."""
    copies: Place | None = None
    """Folder of a node's own disk. It may hold a copy of a training corpus (`slurm.stage`): read where it is
    whole, else the original is. The order of a million documents and more is kept there, once a node, 16
    bytes a document and epoch; default for that: one of your own in the temporary folder."""
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
        """(weight, prefix) of each training corpus; weights say its share."""
        if isinstance(self.train, str):
            return [(1.0, self.train)]
        return [(weight**self.alpha, prefix) for weight, prefix in self.train]


class ModelOptions(Section):
    """The encoder, the place where the [MASK] rows join, and the decoder that is thrown away afterwards."""

    block: Literal["roberta", "bert", "modern"] = "roberta"
    """`roberta`: GELU, biases, learned positions. `bert`: the same layers, in and out as Hugging Face's BERT.
    `modern`: GeGLU, no biases, rotary positions."""
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
    """LayerNorm after (`post`, RoBERTa) or before (`pre`) each sub-layer; the modern block is `pre` only,
    bert `post` only."""
    mask_from: int = Field(0, ge=0)
    """Layer before which the [MASK] rows join: 0 = ordinary MLM, num_layers = they meet the decoder only."""
    join: Literal["two_way", "one_way"] = "two_way"
    """Who attends to [MASK] rows that join between two layers of the encoder: all rows, or the [MASK] rows
    alone (`one_way`): the encoder stays free of [MASK], and its upper layers serve the masks as well."""
    decoder_layers: int = Field(0, ge=0)
    """Layers after the encoder that are discarded after pre-training."""
    decoder: Literal["self", "cross", "query", "bottleneck"] = "self"
    """`self`: all rows attend to all. `cross`: self-attention, then attention to the encoder output.
    `query`: only the predicted rows are updated, attending to all rows. `bottleneck`: they are [MASK]s that
    attend to each other and to the encoder's <s> alone, which has to say what the text is (RetroMAE)."""
    decoder_positions: Literal["own", "shared"] = "own"
    """Learned positions added to all decoder inputs: own table, or the encoder's (learned positions only)."""
    mask_vector: Literal["learned", "tied"] = "learned"
    """What a late [MASK] row is: a vector of its own (3ML), or the word table's [MASK] row (MAE-LM)."""
    mask_leak: float = Field(0.0, ge=0, le=1)
    """Share of the [MASK] rows that the encoder sees all the same, as the word table's [MASK] (MAE-LM's
    transition): at 1 there are no late masks, and without a decoder that is `mlm`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of hidden states and attention weights (RoBERTa: 0.1). It is drawn for each micro-batch of each
    data-parallel rank: another layout, micro-batch, `compile` or kind of device drops other elements."""
    decoder_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout inside the decoder; default: `dropout`."""
    init_from: Place | None = None
    """Hugging Face folder (safetensors) of a model to start from; what it has not is initialised. Read
    before the first update only."""
    token_type: bool = False
    """A vector added to each token, and what is kept for an export (RoBERTa's two rows of positions for
    padding, BERT's second token type). Set by `init_from` (blocks roberta and bert)."""
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
    local_window: int = Field(0, ge=0)
    """Local layers of the encoder see the tokens up to half of this away on either side (ModernBERT: 128);
    0: all layers are global (modern block only). The decoder is global. FLOPs are those of blocks of half a
    window, each with its neighbours."""
    global_every: int = Field(3, ge=1)
    """Where there are local layers, the first is global, and from it on one in so many (ModernBERT: 3)."""
    local_rope_theta: float | None = Field(None, gt=0)
    """Base of the rotary frequencies in local layers; default: `rope_theta`."""

    def is_local(self, layer: int) -> bool:
        """Return whether a layer of the encoder, from 0, is local."""
        return self.local_window > 0 and layer % self.global_every > 0


class MaskingOptions(Section):
    """Which tokens are predicted, and what stands in their place. Counts are exact, the same in every row."""

    rate: float = Field(0.15, gt=0, lt=1)
    """Share of a window's tokens that is hidden, and predicted. `{from: 0.5, to: 0.15, steps: 8}` is short
    for so many `train.phases` of equal budget."""
    predict: float | None = Field(None, gt=0, lt=1)
    """Share of a window's tokens that is predicted, where it is less than `rate`: the other hidden tokens
    are in no layer and no head (partial prediction, CrossMAE, arXiv 2401.14391)."""
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
    views_partition: Literal["random", "contiguous", "counts"] = "random"
    """How the tokens of a text are divided among its K masks: at random, or into K segments of the text
    (from a random place on and round its end), drawn anew every K visits. `counts` divides softly (GPT-BERT,
    arXiv 2410.24159): at any `rate`, those that the views before have hidden less often come first."""


class PhaseOptions(Section):
    """What is other than in `train` and `masking` until a share of the budget is spent."""

    until: float = Field(gt=0, lt=1)
    """Share of the budget at which the phase ends."""
    batch_size: int | None = Field(None, ge=1)
    """As in `train`, whose value it takes if not given."""
    micro_batch_size: int | None = Field(None, ge=1)
    """As in `train`, whose value it takes if not given."""
    seq_length: int | None = Field(None, ge=8)
    """As in `train`, whose value it takes if not given."""
    rate: float | None = Field(None, gt=0, lt=1)
    """As in `masking`, whose value it takes if not given."""
    predict: float | None = Field(None, gt=0, lt=1)
    """As in `masking`, whose value it takes if not given."""


class TrainOptions(Section):
    """One update, and how it is computed."""

    batch_size: int = Field(256, ge=1)
    """Sequences per update, over all ranks and micro-batches."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Sequences per forward pass of one data-parallel rank; default: no accumulation. Without dropout it
    changes nothing but memory, speed and rounding."""
    seq_length: int = Field(128, ge=8)
    """Window length L in tokens, <s> and </s> included."""
    phases: list[PhaseOptions] = []
    """Short sequences, small batches or high masking rates first: `[{until: 0.9, seq_length: 128}]` trains on
    128 tokens until 90 % of the budget is spent. After the last phase the values above and those of `masking`
    hold. Shares ascend."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Arithmetic of the matrix products, over float32 parameters; default: bf16 where the device has it, else
    fp32. `fp16` is for GPUs without bf16: its loss is scaled, and an update whose gradients overflow is
    skipped (and paid for)."""
    engine: Literal["torch", "deepspeed"] = "torch"
    """`torch`: plain (data-parallel) torch. `deepspeed`: ZeRO 0-3."""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    """Experimental, until a GPU has shown a gain: torch.compile mode of the layers, and of what the head does
    with its logits in 16 bits. The last two replay CUDA graphs on a GPU, where the engine is torch,
    parallel.tensor is 1 and nothing is recomputed; elsewhere `reduce-overhead` is `default`, and
    `max-autotune` only picks the fastest kernels."""
    float8: bool = False
    """Experimental, until a GPU has shown a gain: form the layers' products whose widths are multiples of 16
    in float8 (`pip install '.[float8]'`; H100 and its like, bf16 for all else). It pays with `compile` only.
    MFU stays a share of the bf16 peak."""
    cross_entropy: Literal["own", "torch", "liger"] = "own"
    """Whose kernel forms the loss over the vocabulary in training: ours or, experimental until a GPU shows
    a gain, torch's `linear_cross_entropy` (from 2.13) or liger-kernel's (a GPU, `pip install '.[liger]'`).
    The same loss and gradients, up to rounding."""
    recompute: Literal["none", "block"] = "none"
    """`block`: keep only each layer's input and recompute the rest (less memory, more hardware FLOPs)."""
    deterministic: bool | None = None
    """Bit-exact repetition; default: true on CPU, false on GPU (where it costs speed)."""
    clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0: no clipping."""
    max_skipped: int = Field(10, ge=0)
    """An update whose gradient is not finite is skipped, counted and paid for; after more than so many in a
    row the run ends, and says from where to go on (looked at with each log; fp16 ends by its loss scale)."""


class OptimizerOptions(Section):
    """What updates the parameters. Biases, norms and vectors do not decay."""

    kind: Literal["adamw", "stable-adamw", "muon"] = "adamw"
    """`adamw`: arXiv 1711.05101. `stable-adamw`: AdamW at a lower rate for a tensor whose gradients outgrow
    its second moment (arXiv 2304.13013). `muon`: the layers' matrices follow their orthogonalised momentum,
    as far as AdamW would move them (arXiv 2502.16982), all else AdamW; its FLOPs count. Both of these need
    `parallel.zero` 0. A run keeps its kind; a branch does not (but Muon's, which has no second moments)."""
    muon_lr_scale: float = Field(5.0, gt=0)
    """Learning rate of Muon's matrices in units of `lr`. At 1 an update is as large as one of AdamW; at 5 it
    is, for base, what Muon's author takes for a model of that size."""
    lr: float = Field(5e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of the two moments."""
    eps: float = Field(1e-6, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay of matrices and embeddings."""


class ScheduleOptions(Section):
    """Learning rate as a function of the spent share of the budget."""

    kind: Literal["linear", "cosine", "trapezoid", "decay", "decay-linear"] = "linear"
    """Shape after the warm-up; `trapezoid` stays at the peak and falls linearly over the last fifth. `decay`
    falls as 1 - sqrt from where `run.branch` begins, `decay-linear` linearly. A `floor` of 1 is constant."""
    warmup: float = Field(0.06, ge=0, lt=1)
    """Share of the budget over which the rate rises linearly from 0."""
    floor: float = Field(0.0, ge=0, le=1)
    """Rate at the end, as a share of the peak."""


class BudgetOptions(Section):
    """What the run may spend: exactly one unit, or a share of what another recipe costs. It is also the unit
    of progress."""

    steps: int | None = Field(None, ge=1)
    """Updates."""
    tokens: float | None = Field(None, gt=0)
    """Rows of input, those of <s>, </s> and [MASK] included."""
    flops: float | None = Field(None, gt=0)
    """Model matmul FLOPs of training, those of head and optimizer included."""
    flops_without_head: float | None = Field(None, gt=0)
    """The same without the head's."""
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


class ParallelOptions(Section):
    """How one model is spread over ranks."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel degree; ranks / tensor is the data-parallel degree."""
    zero: Literal[0, 1, 2, 3] = 0
    """ZeRO stage of the deepspeed engine: what is partitioned over data-parallel ranks."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What the deepspeed engine keeps in host memory: optimizer state, or parameters too."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which the torch engine adds up gradients over data-parallel ranks: `bf16` sends half as much,
    and rounds."""


class CheckpointOptions(Section):
    """When the run is saved, and how many saves stay."""

    every_steps: int | None = Field(None, ge=1)
    """Save every so many updates."""
    every_minutes: Annotated[float, Field(gt=0)] | Literal["auto"] | None = 30.0
    """Save at least this often; `auto`: as often as loses least, by what a save costs here and how often this
    run has failed (Young's and Daly's interval)."""
    mtbf_hours: float = Field(24.0, gt=0)
    """Mean time between two failures that `auto` expects; it weighs as much as one of the run's own."""
    end_margin_minutes: float = Field(5.0, ge=0)
    """In a Slurm job, stop and save so long before its time limit (in a short job, at a fifth of it)."""
    background: bool = True
    """Write on a thread of its own while training goes on, from copies of 12 bytes a parameter in the host's
    memory, of which each rank keeps what it alone has; budgets of hours and kWh wait all the same."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints kept; the best by held-out loss is kept besides."""
    keep: list[Annotated[float, Field(ge=0, le=1)]] = []
    """Shares of the budget at which the weights stay, as milestones: `[0, 0.1, 1.0]` keeps the untrained
    model, that of a tenth, and the last. `--checkpoint share-0.1` of other programs takes them."""


class EvaluateOptions(Section):
    """Held-out loss during training, under the same fixed 15 % mask for every method."""

    every_steps: int | None = Field(None, ge=1)
    """Evaluate every so many updates (and always at the end)."""
    samples: int = Field(512, ge=1)
    """Held-out windows; fewer if the corpus has fewer."""
    seq_length: int | None = Field(None, ge=8)
    """Their length, the same in all phases; default: that of `train`."""


class MonitorOptions(Section):
    """What is written while training."""

    log_every: int = Field(10, ge=1)
    """Updates between two lines of metrics.jsonl."""
    stall_seconds: float = Field(120.0, ge=0)
    """A rank that is dead, stopped or stuck is named within this time, and the job ends (75, or 1 where a
    rank is dead) so that a queue starts it again; a start, a first update, the first batch of an evaluation
    and what a save writes may take ten times as long. NCCL and gloo wait twelve times as long, ten minutes at
    least. 0: nobody watches."""
    replay_every: int | None = Field(None, ge=1)
    """Every so many updates, form the gradients of a micro-batch twice, and once on the neighbour rank: a
    differing bit (a faulty device) names the rank. Needs engine torch and `train.deterministic`."""
    tensorboard: bool = True
    """Write TensorBoard events into the run."""
    tracker: Literal["wandb", "mlflow", "aim", "trackio"] | None = None
    """Send the metrics to this tracker as well (a package of that name; into the run's folder, unless
    WANDB_MODE, MLFLOW_TRACKING_URI, AIM_REPO or TRACKIO_DIR says where to)."""


class Config(Section):
    """All options of a run."""

    run: RunOptions
    corpus: CorpusOptions
    model: ModelOptions = ModelOptions()
    masking: MaskingOptions = MaskingOptions()
    train: TrainOptions = TrainOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    budget: BudgetOptions = BudgetOptions()
    parallel: ParallelOptions = ParallelOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    evaluate: EvaluateOptions = EvaluateOptions()
    monitor: MonitorOptions = MonitorOptions()
    deepspeed: dict[str, Any] = {}
    """Passed through to DeepSpeed; a key that contradicts an option above is an error."""


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def method_of(config: Config) -> str:
    """Return the name under which the literature knows this combination of settings; +leak: the encoder sees
    some of the [MASK]s all the same."""
    model = config.model
    if model.mask_from == 0:
        return "mlm"
    leak = "+leak" if model.mask_leak else ""
    if model.decoder_layers == 0:
        return f"{'one-way' if model.join == 'one_way' else 'shared-depth'}{leak}"
    all_mask = config.masking.corruption[0] == 1.0
    if model.decoder == "self" and model.mask_vector == "tied" and all_mask:
        return f"mae-lm{leak}"
    return f"retromae{leak}" if model.decoder == "bottleneck" else f"3ml-{model.decoder}{leak}"


def replays_graphs(config: Config) -> bool:
    """Return whether a GPU replays the layers as CUDA graphs: their parameters and gradients must stay where
    they are, which ZeRO does not allow, and no other rank may be waited for in them."""
    train = config.train
    graphs = train.compile in ("reduce-overhead", "max-autotune")
    return graphs and train.engine == "torch" and config.parallel.tensor == 1 and train.recompute == "none"


def phase_configs(config: Config) -> list[Config]:
    """Return the config of each stretch of the run, in order: `train` and `masking` have the values that hold
    there. The last one is what holds when all phases are over."""
    configs = []
    for phase in [*config.train.phases, None]:
        given = {name: value for name, value in phase or () if name != "until" and value is not None}
        masked: dict[str, Any] = {name: given.pop(name) for name in ("rate", "predict") if name in given}
        train = config.train.model_copy(update={**given, "phases": []})
        masking = config.masking.model_copy(update=masked)
        configs.append(config.model_copy(update={"train": train, "masking": masking}))
    return configs
