"""The shapes of a model, which follow from its options: rows of each layer, attended pairs, parameters.

They are those of `model/late_mask.py`, without torch: FLOPs, the planner and the model itself count with
them.

Letters: L rows of a sequence, V that the encoder's first layers see, P predicted, D width, F inner width.
"""

from dataclasses import dataclass

from pretrain.config.options import ModelOptions

# How much is computed or sent at once.
CHUNK_ROWS = {"cpu": 512, "cuda": 4096}
"""Predicted rows whose logits exist at once, by kind of device."""
REDUCE_BUCKET = 6_553_600
"""Elements of gradients that the plain engine sums at once (25 MiB, as DistributedDataParallel's), but for
the word table, which is a bucket of its own: the last bucket has no computation left to hide behind."""
BUCKET = 25_000_000
"""Elements that DeepSpeed reduces, and Muon orthogonalises, at once (100 MB): enough for the full
bandwidth."""


@dataclass(frozen=True)
class Rows:
    """Rows of a sequence: all, those that are no [MASK], those predicted."""

    length: int
    visible: int
    predicted: int


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


def encoder_rows(rows: Rows, model: ModelOptions) -> list[int]:
    """Return the rows that each encoder layer works on."""
    late = min(model.mask_from, model.num_layers)
    return [encoded(rows, model)] * late + [rows.length] * (model.num_layers - late)


def decoder_rows(rows: Rows, model: ModelOptions) -> tuple[int, int]:
    """Return the rows that a decoder layer updates, and those that their self-attention reads."""
    L, P = rows.length, rows.predicted
    return {"query": (P, L), "bottleneck": (P, P + 1)}.get(model.decoder, (L, L))


def one_way(model: ModelOptions) -> bool:
    """Return whether [MASK] rows join inside the encoder and its other rows do not attend to them."""
    return model.join == "one_way" and 0 < model.mask_from < model.num_layers


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


def recomputes_all(model: ModelOptions, dropout: float | None) -> bool:
    """Return whether block recomputation repeats a layer to its end.

    It stops when nothing more is needed, and a pre-LN layer without dropout ends in a sum, which needs
    neither of its terms.
    """
    return model.norm != "pre" or bool(dropout)


def muon_matrices(model: ModelOptions) -> dict[tuple[int, int], int]:
    """Return how many matrices of (rows, columns) Muon orthogonalises; fused ones are taken apart."""
    D, layers = model.hidden_size, model.num_layers + model.decoder_layers
    crossed = model.decoder_layers if model.decoder == "cross" else 0
    found = {(D, D): 4 * (layers + crossed)}  # queries, keys, values, outputs
    inner = (model.ffn_size, D)
    found[inner] = found.get(inner, 0) + (3 if model.block == "modern" else 2) * layers
    return found


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


def _layer_parameters(model: ModelOptions) -> int:
    D, F, bias = model.hidden_size, model.ffn_size, model.block != "modern"
    up = _linear(D, F, True) if bias else _linear(D, 2 * F, False)
    norms = 2 * (2 * D if bias else D)
    return _linear(D, 4 * D, bias) + up + _linear(F, D, bias) + norms


def _linear(inputs: int, outputs: int, bias: bool) -> int:
    return inputs * outputs + (outputs if bias else 0)
