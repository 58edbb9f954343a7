"""What a model costs, in closed form: parameters, FLOPs and token-layers.

Convention: one multiply-add is 2 FLOPs; matrix products only (norms, activations, softmax, biases,
look-ups and AdamW are left out); bidirectional attention in full; the head on predicted rows
only, with the padded vocabulary charged as computed; training = 3 x forward (backward forms the
gradients of both operands), and what Muon multiplies in an update. Recomputation counts in hardware
FLOPs only. Everything is derived from the shapes of `model/late_mask.py` and `model/muon.py`, and tests
hold it equal to torch.utils.flop_counter on forward and backward.

Letters: L rows of a sequence, V visible, P predicted, n rows asking, m rows asked, D width, F inner
width, W rows of the padded word table.
"""

from dataclasses import dataclass, replace

from pretrain.account import devices
from pretrain.config import ModelOptions

NEWTON_SCHULZ_STEPS = 5
"""Of Muon, as its author takes."""


@dataclass(frozen=True)
class Flops:
    """FLOPs by part of the model."""

    encoder: int
    decoder: int
    head: int
    optimizer: int = 0
    """Of an update, however many sequences it is of."""

    @property
    def parts(self) -> dict[str, int]:
        """Return the FLOPs of each part; those of the optimizer where it multiplies matrices."""
        model = {"encoder": self.encoder, "decoder": self.decoder, "head": self.head}
        return {**model, "optimizer": self.optimizer} if self.optimizer else model

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def without_head(self) -> int:
        """Return the FLOPs of all parts but the head."""
        return self.total - self.head

    def __mul__(self, factor: int) -> "Flops":
        return Flops(self.encoder * factor, self.decoder * factor, self.head * factor)


@dataclass(frozen=True)
class Rows:
    """Rows of a sequence: all, those that are no [MASK], those predicted."""

    length: int
    visible: int
    predicted: int


@dataclass(frozen=True)
class StepCost:
    """What one update costs, over all ranks."""

    samples: int
    tokens_seen: int
    """Input slots: samples x L."""
    tokens_real: int
    """Those of them that are text: <s> and </s> at the ends of a window are not."""
    tokens_predicted: int
    flops: Flops
    """Model FLOPs of training, and the optimizer's."""
    hardware_flops: int
    """Those and what recomputation repeats."""
    token_layers: float
    """Linear FLOPs of all layers, in units of one self-attention layer on one row."""


def padded_vocab(vocab_size: int, multiple: int) -> int:
    """Return the rows of the word table: the vocabulary rounded up, whatever the parallel layout."""
    return -(-vocab_size // multiple) * multiple


def late_masks(model: ModelOptions, masked: int) -> int:
    """Return how many of M [MASK] rows join late; the encoder sees the rest, `mask_leak` of them, halves
    up."""
    return masked - int(model.mask_leak * masked + 0.5 + 1e-9)


def encoded(rows: Rows, model: ModelOptions) -> int:
    """Return V, the rows that the encoder's first layers see."""
    return rows.length - late_masks(model, rows.length - rows.visible)


def _attention(pairs: int, D: int) -> int:
    return 4 * pairs * D  # scores and mixing, 2 D each


def _ffn(n: int, model: ModelOptions) -> int:
    products = 3 if model.block == "modern" else 2  # GeGLU has two products in, one out
    return 2 * products * n * model.hidden_size * model.ffn_size


def _self_layer(n: int, model: ModelOptions, attended: int | None = None) -> int:
    """`attended`: pairs of rows; default: all attend to all."""
    D = model.hidden_size
    return 8 * n * D * D + _attention(n * n if attended is None else attended, D) + _ffn(n, model)


def decoder_rows(rows: Rows, model: ModelOptions) -> tuple[int, int]:
    """Return the rows that a decoder layer updates, and those that their self-attention reads."""
    L, P = rows.length, rows.predicted
    return {"query": (P, L), "bottleneck": (P, P + 1)}.get(model.decoder, (L, L))


def _decoder_layer(rows: Rows, model: ModelOptions) -> int:
    D, L, V = model.hidden_size, rows.length, encoded(rows, model)
    n, m = decoder_rows(rows, model)
    if n < m:  # queries and outputs of the rows that are updated, keys and values of all
        return 4 * n * D * D + 4 * m * D * D + _attention(n * m, D) + _ffn(n, model)
    layer = _self_layer(L, model)
    if model.decoder == "cross":
        layer += 4 * L * D * D + 4 * V * D * D + _attention(L * V, D)
    return layer


def encoder_rows(rows: Rows, model: ModelOptions) -> list[int]:
    """Return the rows that each encoder layer works on."""
    late = min(model.mask_from, model.num_layers)
    return [encoded(rows, model)] * late + [rows.length] * (model.num_layers - late)


def attended_pairs(rows: Rows, model: ModelOptions) -> list[int]:
    """Return how many pairs of rows attend in each encoder layer."""
    V, L = encoded(rows, model), rows.length
    joined = V * V + (L - V) * L if one_way(model) else L * L
    return [
        local_pairs(n, model) if model.is_local(i) else joined if i >= model.mask_from else V * V
        for i, n in enumerate(encoder_rows(rows, model))
    ]


def local_pairs(rows: int, model: ModelOptions) -> int:
    """Return how many pairs of rows a local layer works on."""
    return sum((b - a) * (d - c) for a, b, c, d in local_blocks(rows, model.local_window))


def local_blocks(rows: int, window: int) -> list[tuple[int, int, int, int]]:
    """Return, of each block of rows in a local layer, its first row, the one after its last, and both of the
    rows that it attends to.

    Rows stand in the order of their positions, of which no two are equal: within a window of positions lie
    rows within a window of rows only.
    """
    side = window // 2
    return [(i, min(i + side, rows), max(0, i - side), min(i + 2 * side, rows)) for i in range(0, rows, side)]


def one_way(model: ModelOptions) -> bool:
    """Return whether [MASK] rows join inside the encoder and its other rows do not attend to them."""
    return model.join == "one_way" and 0 < model.mask_from < model.num_layers


def forward(model: ModelOptions, rows: Rows, vocab_size: int) -> Flops:
    """Return FLOPs of one sequence's forward pass."""
    D = model.hidden_size
    table = padded_vocab(vocab_size, model.vocab_multiple)
    return Flops(
        encoder=sum(
            _self_layer(n, model, pairs)
            for n, pairs in zip(encoder_rows(rows, model), attended_pairs(rows, model), strict=True)
        ),
        decoder=model.decoder_layers * _decoder_layer(rows, model),
        head=rows.predicted * (2 * D * D + 2 * D * table),
    )


def training(model: ModelOptions, rows: Rows, vocab_size: int) -> Flops:
    """Return FLOPs of one sequence's forward and backward pass."""
    return forward(model, rows, vocab_size) * 3


def step_cost(
    model: ModelOptions,
    rows: Rows,
    vocab_size: int,
    batch_size: int,
    recompute: str,
    optimizer: str = "adamw",
) -> StepCost:
    """Return the cost of one update of `batch_size` sequences."""
    once = forward(model, rows, vocab_size)
    again = _recomputed(model, rows, once) if recompute == "block" else 0
    own = muon(model) if optimizer == "muon" else 0
    return StepCost(
        samples=batch_size,
        tokens_seen=batch_size * rows.length,
        tokens_real=batch_size * (rows.length - 2),
        tokens_predicted=batch_size * rows.predicted,
        flops=replace(once * (3 * batch_size), optimizer=own),
        hardware_flops=batch_size * (3 * once.total + again) + own,
        token_layers=batch_size * token_layers(model, rows),
    )


def muon(model: ModelOptions) -> int:
    """Return FLOPs by which Muon orthogonalises the matrices of all layers, in an update."""
    return sum(newton_schulz(*shape) * number for shape, number in muon_matrices(model).items())


def muon_matrices(model: ModelOptions) -> dict[tuple[int, int], int]:
    """Return how many matrices of (rows, columns) Muon orthogonalises; fused ones are taken apart."""
    D, layers = model.hidden_size, model.num_layers + model.decoder_layers
    crossed = model.decoder_layers if model.decoder == "cross" else 0
    found = {(D, D): 4 * (layers + crossed)}  # queries, keys, values, outputs
    inner = (model.ffn_size, D)
    found[inner] = found.get(inner, 0) + (3 if model.block == "modern" else 2) * layers
    return found


def newton_schulz(rows: int, columns: int) -> int:
    """Return FLOPs of orthogonalising a matrix: products with its transpose, of that with itself, of both."""
    n, m = sorted((rows, columns))
    return NEWTON_SCHULZ_STEPS * (4 * n * n * m + 2 * n**3)


def _recomputed(model: ModelOptions, rows: Rows, once: Flops) -> int:
    """Forward FLOPs that a backward pass with block recomputation repeats.

    The last product (F x D) of a layer that `recomputes_all` says no of is not repeated.
    """
    last = 2 * model.ffn_size * model.hidden_size
    query_rows, _ = decoder_rows(rows, model)
    encoder = 0 if recomputes_all(model, model.dropout) else sum(encoder_rows(rows, model))
    decoder = 0 if recomputes_all(model, model.decoder_dropout) else model.decoder_layers * query_rows
    return once.encoder + once.decoder - last * (encoder + decoder)


def recomputes_all(model: ModelOptions, dropout: float | None) -> bool:
    """Return whether block recomputation repeats a layer to its end.

    It stops when nothing more is needed, and a pre-LN layer without dropout ends in a sum, which needs
    neither of its terms.
    """
    return model.norm != "pre" or bool(dropout)


def token_layers(model: ModelOptions, rows: Rows) -> float:
    """Return the linear FLOPs of all layers of one sequence, in units of one self-attention layer on one
    row."""
    D = model.hidden_size
    unit = 8 * D * D + _ffn(1, model)
    linear = unit * sum(encoder_rows(rows, model))
    if model.decoder_layers:
        # Cost without its attention terms, which are what is left of n x m products.
        n, m = decoder_rows(rows, model)
        attention = _attention(n * (m + (encoded(rows, model) if model.decoder == "cross" else 0)), D)
        linear += model.decoder_layers * (_decoder_layer(rows, model) - attention)
    return linear / unit


def parameters(model: ModelOptions, vocab_size: int) -> dict[str, int]:
    """Return the numbers of parameters: encoder layers, decoder, head, embeddings (padded word table),
    total."""
    D, learned = model.hidden_size, model.block != "modern"
    norm = 2 * D if learned else D
    decoder = 0
    if model.decoder_layers:
        layer = _layer_parameters(model)
        if model.decoder == "cross":
            layer += norm + _linear(D, 4 * D, learned)
        own = learned and model.decoder_positions == "own"
        decoder = model.decoder_layers * layer + (model.max_positions * D if own else 0)
        decoder += (norm if learned else 0) + (norm if model.norm == "pre" else 0)
    if model.mask_from and model.mask_vector == "learned":
        decoder += D
    encoder = model.num_layers * _layer_parameters(model) + (norm if model.norm == "pre" else 0)
    encoder -= 0 if learned else norm  # the modern block's first layer has no attention norm
    table = padded_vocab(vocab_size, model.vocab_multiple)
    # The token type, and what is kept for an export: two rows of positions, or BERT's second type.
    kept = (2 if model.block == "bert" else 3) * D if model.token_type else 0
    parts = {
        "encoder": encoder,
        "decoder": decoder,
        "head": _linear(D, D, learned) + norm + table,
        "embeddings": table * D + norm + (model.max_positions * D if learned else 0) + kept,
    }
    return {**parts, "total": sum(parts.values())}


def _linear(inputs: int, outputs: int, bias: bool) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _layer_parameters(model: ModelOptions) -> int:
    D, F, bias = model.hidden_size, model.ffn_size, model.block != "modern"
    up = _linear(D, F, True) if bias else _linear(D, 2 * F, False)
    norms = 2 * (2 * D if bias else D)
    return _linear(D, 4 * D, bias) + up + _linear(F, D, bias) + norms


def peak(device: str, precision: str) -> float | None:
    """Return the dense peak in FLOP/s of the device so named, None when the table does not know it."""
    found = devices.find(device)
    return found.peak.get(precision) if found else None
