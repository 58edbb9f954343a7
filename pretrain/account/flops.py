"""What a model costs, in closed form: FLOPs and token-layers.

Convention: one multiply-add is 2 FLOPs; matrix products only (norms, activations, softmax, biases,
look-ups and AdamW are left out); bidirectional attention in full; the head on predicted rows
only, with the padded vocabulary charged as computed; training = 3 x forward (backward forms the
gradients of both operands), and what Muon multiplies in an update. Recomputation counts in hardware
FLOPs only. Everything is derived from the shapes of `config/geometry.py` and `model/muon.py`, and tests
hold it equal to torch.utils.flop_counter on forward and backward.

Letters: L rows of a sequence, V visible, P predicted, n rows of queries, m rows of keys, D width, F inner
width, W rows of the padded word table.
"""

from dataclasses import dataclass, replace

from pretrain.config import ModelOptions
from pretrain.config.geometry import (
    Rows,
    attended_pairs,
    decoder_rows,
    encoded,
    encoder_rows,
    muon_matrices,
    padded_vocab,
    recomputes_all,
)

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


def _attention(pairs: int, D: int) -> int:
    return 4 * pairs * D  # scores and mixing, 2 D each


def _ffn(n: int, model: ModelOptions) -> int:
    products = 3 if model.block == "modern" else 2  # GeGLU has two products in, one out
    return 2 * products * n * model.hidden_size * model.ffn_size


def _self_layer(n: int, model: ModelOptions, attended: int | None = None) -> int:
    """`attended`: pairs of rows; default: all attend to all."""
    D = model.hidden_size
    return 8 * n * D * D + _attention(n * n if attended is None else attended, D) + _ffn(n, model)


def _decoder_layer(rows: Rows, model: ModelOptions) -> int:
    D, L, V = model.hidden_size, rows.length, encoded(rows, model)
    n, m = decoder_rows(rows, model)
    if n < m:  # queries and outputs of the rows that are updated, keys and values of all
        return 4 * n * D * D + 4 * m * D * D + _attention(n * m, D) + _ffn(n, model)
    layer = _self_layer(L, model)
    if model.decoder == "cross":
        layer += 4 * L * D * D + 4 * V * D * D + _attention(L * V, D)
    return layer


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
