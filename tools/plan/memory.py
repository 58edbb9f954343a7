"""Bytes that a rank holds at the fullest moment of a training step, in closed form.

State is counted from the parameters (float32, 4 bytes each: 16 bits are autocast here), what the backward
pass needs from the shapes of `model.py`, and the rest from what torch and DeepSpeed 0.19 do. Tensors
count, as an allocator counts them; a device's context and fragmentation come on top.

    forward      what layers save piles up; the head's chunk of logits and table gradient stand on it
    backward     gradients grow while what was saved goes; with accumulation they are there already

So the fullest moment is at the end of the forward pass, or just after it, and the parts, each at its own
largest, sum to more than the total where gradients take the place of activations.

Fused attention saves no scores, but on a CPU dropout of attention weights has no fused kernel.

Letters: B sequences of a micro-batch, n rows of queries, m rows of keys, D width, F inner width, H heads, N
predicted rows, W rows of the padded word table, T tensor-parallel ranks.
"""

from dataclasses import dataclass, replace

from pretrain.account.recipe import Recipe
from pretrain.config import ModelOptions, geometry
from pretrain.config.geometry import BUCKET, CHUNK_ROWS, REDUCE_BUCKET, Rows

FULL = 4
"""Bytes of a float32: parameters, their gradients and moments, and the stream between layers."""


@dataclass(frozen=True)
class Layout:
    """How a run is divided over ranks, and what it trades for memory."""

    tensor: int = 1
    data: int = 1
    micro_batch: int = 1
    accumulation: int = 1
    engine: str = "torch"
    zero: int = 0
    offload: str = "none"
    recompute: str = "none"
    precision: str = "bf16"
    optimizer: str = "adamw"
    reduce_dtype: str = "fp32"
    gpu: bool = True
    """Attention that drops weights without writing them, dropout remembered in bytes, sums of mixed width
    without a copy: kernels that a CPU has not."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.data

    @property
    def width(self) -> int:
        """Bytes of an element of a matrix product."""
        return FULL if self.precision == "fp32" else 2


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by what they are for, each at its largest, and of the fullest moment."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    buffers: int
    """Gathered parameters, buckets of gradients, 16-bit copies of weights, working gradients."""
    total: int
    host: int
    """Of these, what offloading keeps in the host's memory; not in `total`."""


def local_parameters(model: ModelOptions, vocab_size: int, tensor: int) -> int:
    """Return the parameters of one of `tensor` ranks that share a model: divided matrices, and all the
    vectors."""
    divided = _divided(model, vocab_size)
    return geometry.parameters(model, vocab_size)["total"] - divided + divided // tensor


def _divided(model: ModelOptions, vocab_size: int) -> int:
    """Parameters that tensor parallelism divides; see the table in tensor_parallel.py."""
    D, F, bias = model.hidden_size, model.ffn_size, model.block != "modern"
    layer = 4 * D * D + 2 * F * D + (3 * D + F if bias else F * D)
    crossed = model.decoder_layers if model.decoder == "cross" else 0
    cross = 4 * D * D + (3 * D if bias else 0)
    table = geometry.padded_vocab(vocab_size, model.vocab_multiple)
    return (model.num_layers + model.decoder_layers) * layer + crossed * cross + table * (D + 1)


def per_rank(model: ModelOptions, rows: Rows, vocab_size: int, layout: Layout) -> Memory:
    """Return what a rank holds; the largest micro-batch decides."""
    state = _state(model, vocab_size, layout)
    updates = _muon_updates(model, layout) if layout.optimizer == "muon" else 0
    saved = layout.micro_batch * activations(model, rows, layout)
    again = layout.micro_batch * max(_layers(model, rows, layout)) if layout.recompute == "block" else 0
    table = (
        FULL * geometry.padded_vocab(vocab_size, model.vocab_multiple) * model.hidden_size // layout.tensor
    )
    head = _head(model, rows, vocab_size, layout)
    casts = _casts(model, vocab_size, layout) if layout.width < FULL else 0
    working = _working(model, rows, layout)
    kept = layout.accumulation > 1 or layout.zero == 3
    carried, bucket = (state.gradients, state.bucket) if kept else (0, 0)
    forward = carried + bucket + saved + casts + head
    read = layout.micro_batch * FULL * model.hidden_size * rows.length  # by the head, which is done by then
    # Autograd makes a table of the looked-up words' gradients; the plain engine adds rows.
    dense = table if layout.engine == "deepspeed" else 0
    turn = carried + state.bucket + saved + casts + table + max(dense, again + working - read)
    looked_up = dense * (1 + bool(carried))
    end = state.gradients + state.bucket + max(looked_up, state.joined, updates)
    always = state.parameters + state.optimizer + state.buffers
    return Memory(
        parameters=state.parameters,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=saved + again,
        head=head,
        buffers=state.buffers + state.bucket + max(casts, state.joined, updates),
        total=always + max(forward, turn, end),
        host=state.host,
    )


def copied(recipe: Recipe, layout: Layout, rank: int) -> int:
    """Return the bytes of the host's memory that a rank takes to write checkpoints while training goes on:
    copies of its own pieces of weights and two moments, in float32, and on rank 0 one kind of them that is
    put together where others have some of it. 0 where training waits."""
    if not recipe.saves_beside_training:
        return 0
    model, vocab_size = recipe.config.model, recipe.vocab_size
    whole, divided = geometry.parameters(model, vocab_size)["total"], _divided(model, vocab_size)
    data_rank, tensor_rank = divmod(rank, layout.tensor)
    part = divided // layout.tensor + (0 if tensor_rank else whole - divided)
    matrices = orthogonalized(model) if layout.optimizer == "muon" else 0
    own = part - matrices // layout.tensor  # of it AdamW's, or what stands in for AdamW
    weights = part / layout.data if layout.zero == 3 else part * (data_rank == 0)
    moments = 2 * own / layout.data if layout.zero else 2 * own * (data_rank == 0)
    momentum = matrices / layout.ranks
    if layout.tensor > 1:
        joined: float = whole if layout.zero and layout.data > 1 else divided
    elif layout.zero == 3:
        joined = whole * (layout.data > 1)
    else:  # what is rank 0's own is there
        joined = (whole if layout.zero else matrices) * (1 - 1 / layout.data)
    return int(FULL * (weights + moments + momentum + (0 if rank else joined)))


# ---- state ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    parameters: int
    gradients: int
    optimizer: int
    buffers: int = 0
    """Gathered parameters."""
    bucket: int = 0
    """Gradients on their way, held from the first backward pass to the update."""
    joined: int = 0
    """Gradients in one piece, to be reduced."""
    host: int = 0


def _state(model: ModelOptions, vocab_size: int, layout: Layout) -> _State:
    """What does not depend on the samples.

    ZeRO over float32 parameters keeps the master copy of a rank's share beside the parameters. Stage 1
    has all gradients at the end of the backward pass, stages 2 and 3 the rank's share and a bucket.
    """
    P = local_parameters(model, vocab_size, layout.tensor)
    share = -(-P // layout.data)
    if layout.zero == 0:
        joined = P if layout.engine == "deepspeed" else min(P, REDUCE_BUCKET + _largest_matrix(model, layout))
        moments = 2 * P
        if layout.optimizer == "muon":  # one of a matrix, on one data-parallel rank
            matrices = orthogonalized(model) // layout.tensor
            moments -= 2 * matrices - matrices // layout.data
        return _State(FULL * P, FULL * P, FULL * moments, joined=FULL * joined if layout.data > 1 else 0)
    whole = layout.zero < 3
    on_device = _State(
        parameters=FULL * (P if whole else share),
        gradients=FULL * (P if layout.zero == 1 else share),
        optimizer=3 * FULL * share,
        buffers=0 if whole else FULL * P,  # gathered once, released in the backward pass
        bucket=FULL * BUCKET * (2 if whole else 1),  # one is filled while the other is sent
    )
    if layout.offload == "none":
        return on_device
    # The optimizer's share of the gradients goes with it.
    away = on_device.optimizer + FULL * share
    if layout.offload == "optimizer":
        return replace(on_device, optimizer=0, host=away)
    return replace(on_device, optimizer=0, parameters=0, host=away + on_device.parameters)


def orthogonalized(model: ModelOptions) -> int:
    """Return the elements of all matrices that are Muon's."""
    return sum(rows * columns * number for (rows, columns), number in geometry.muon_matrices(model).items())


def _muon_updates(model: ModelOptions, layout: Layout) -> int:
    """Bytes of the updates of all matrices; or of those of a rank's own, fused ones twice, with the momentum
    of those that are under way and as much as the iteration holds of them: one shape, of a third to a half of
    all elements, goes through it at once."""
    width, every = 2 if layout.precision == "bf16" else FULL, orthogonalized(model)
    mine = every // layout.data
    under_way = min(mine, BUCKET * layout.tensor)
    return max(width * every // layout.tensor, (FULL + width) * under_way + width * mine * 5 // 4)


def _largest_matrix(model: ModelOptions, layout: Layout) -> int:
    """Elements of the largest parameter of a rank, the word table left out."""
    D = model.hidden_size
    inner = (2 if model.block == "modern" else 1) * model.ffn_size
    return max(3 * D, inner) * D // layout.tensor


# ---- activations ---------------------------------------------------------------------------------


def activations(model: ModelOptions, rows: Rows, layout: Layout) -> int:
    """Return the bytes that the forward pass of one sequence keeps for the backward pass, the head left out.

    Under recomputation these are the inputs of the layers, and what is between layers.
    """
    stream = FULL * model.hidden_size
    inputs = geometry.encoder_rows(rows, model)
    decoder = 0
    if model.decoder_layers:
        # The joined rows with their positions, and (without a rotation) the norm of them.
        joined = max(geometry.decoder_rows(rows, model))
        decoder = stream * joined * (2 if model.block != "modern" else 1)
        decoder += _mask_bytes(layout) * joined * model.hidden_size if model.decoder_dropout else 0
    ends = stream * (inputs[0] + rows.length)  # the embeddings' sum, and what the head reads
    ends += stream * inputs[-1] if model.norm == "pre" else 0
    ends += _mask_bytes(layout) * inputs[0] * model.hidden_size if model.dropout else 0
    if layout.recompute == "block":
        query_rows, _ = geometry.decoder_rows(rows, model)
        return stream * (sum(inputs) + model.decoder_layers * query_rows) + decoder + ends
    return sum(_layers(model, rows, layout)) + decoder + ends


def _layers(model: ModelOptions, rows: Rows, layout: Layout) -> list[int]:
    """Bytes that each layer saves for its backward pass."""
    kinds = map(model.is_local, range(model.num_layers))
    inputs = [
        *zip(geometry.encoder_rows(rows, model), geometry.attended_pairs(rows, model), kinds, strict=True)
    ]
    each = {one: _self_layer(one[0], model, layout, model.dropout, *one[1:]) for one in set(inputs)}
    encoder = [each[one] for one in inputs]
    decoder = [_decoder_layer(rows, model, layout)] if model.decoder_layers else []
    return encoder + decoder * model.decoder_layers


def _self_layer(
    n: int, model: ModelOptions, layout: Layout, dropout: float, pairs: int | None = None, local: bool = False
) -> int:
    """Bytes saved by a layer whose n rows attend to each other, or in so many pairs: then mixed rows are
    saved by the attention, in parts, and by the projection that follows."""
    whole = pairs in (None, n * n) and not local
    again = 0 if whole else layout.width * n * model.hidden_size // layout.tensor
    # Of its keys and values a local layer's blocks, one as large as half a window, have copies.
    copied = 2 * pairs // (model.local_window // 2) if local and pairs and not layout.gpu else 0
    attention = _attention(n, n, copied or 3 * n, model, layout, dropout, pairs, local)
    return attention + again + _inner(n, model, layout, dropout)


def _decoder_layer(rows: Rows, model: ModelOptions, layout: Layout) -> int:
    L, D, dropout = rows.length, model.hidden_size, model.decoder_dropout or 0.0
    n, m = geometry.decoder_rows(rows, model)
    if n < m:  # the joined rows are read by the keys and values
        keys = layout.width * m * D + _attention(n, m, n + 2 * m, model, layout, dropout)
        return keys + _inner(n, model, layout, dropout)
    layer = _self_layer(L, model, layout, dropout)
    if model.decoder == "cross":
        V = geometry.encoded(rows, model)
        layer += _attention(L, V, L + 2 * V, model, layout, dropout) + layout.width * V * D
    return layer


def _attention(
    n: int,
    m: int,
    projected: int,
    model: ModelOptions,
    layout: Layout,
    dropout: float,
    pairs: int | None = None,
    local: bool = False,
) -> int:
    """Rows read, `projected` rows of queries, keys and values, rows mixed, and the norm's input."""
    D, T, b = model.hidden_size, layout.tensor, layout.width
    written = _unfused_attention(layout, dropout)
    rotated = n + m if model.block == "modern" and not (written and b < FULL) else 0
    saved = n * D * (b + FULL) + b * (projected + rotated + n) * D // T
    saved += _mask_bytes(layout) * n * D if dropout else 0
    if not written:
        masks = FULL * (pairs or 0) if local and not layout.gpu else 0
        return saved + masks + FULL * n * model.num_heads // T
    # Probabilities, as wide as the products; with dropout its mask, and the product of both.
    return saved + (3 if dropout else 1) * b * (pairs or n * m) * model.num_heads // T


def _inner(n: int, model: ModelOptions, layout: Layout, dropout: float) -> int:
    """The feed-forward layer: rows read, inner rows before and after the activation, the norm's input."""
    D, inner = model.hidden_size, (4 if model.block == "modern" else 2) * model.ffn_size
    masked = _mask_bytes(layout) * n * D if dropout else 0
    return n * D * (layout.width + FULL) + layout.width * n * inner // layout.tensor + masked


def _mask_bytes(layout: Layout) -> int:
    """Bytes by which an element's dropout is remembered."""
    return 1 if layout.gpu else layout.width


def _working(model: ModelOptions, rows: Rows, layout: Layout) -> int:
    """Gradients of activations that the backward pass of the last layer holds at once: those of the
    feed-forward layer, or those of scores in memory, when what that one saved is gone."""
    n, m = geometry.decoder_rows(rows, model)
    m = geometry.encoded(rows, model) if model.decoder == "cross" else m
    inner = (2 if model.block == "modern" else 1) * model.ffn_size
    dropout = (model.decoder_dropout if model.decoder_layers else model.dropout) or 0.0
    forward = n * (FULL * model.hidden_size + layout.width * inner // layout.tensor)
    # With dropout another matrix of that size goes when each comes.
    gradients = (1 if dropout else 2) if _unfused_attention(layout, dropout) else 0
    scores = gradients * layout.width * n * m * model.num_heads // layout.tensor
    return layout.micro_batch * max(forward, scores - _inner(n, model, layout, dropout))


def _unfused_attention(layout: Layout, dropout: float) -> bool:
    """Return whether scores are in memory: see `attention.attend`; so does torch with dropout on a CPU."""
    return not layout.gpu and (layout.width < FULL or dropout > 0)


def _casts(model: ModelOptions, vocab_size: int, layout: Layout) -> int:
    """Bytes of the matrices that autocast keeps in bf16 until the backward pass, the word table apart."""
    D = model.hidden_size
    table = geometry.padded_vocab(vocab_size, model.vocab_multiple) * (D + 1)
    return layout.width * ((_divided(model, vocab_size) - table) // layout.tensor + D * D)


def _head(model: ModelOptions, rows: Rows, vocab_size: int, layout: Layout) -> int:
    """The head's rows, the table's gradient, and a chunk of logits with its part of that gradient."""
    D, N, b = model.hidden_size, layout.micro_batch * rows.predicted, layout.width
    table = geometry.padded_vocab(vocab_size, model.vocab_multiple) // layout.tensor
    mixed = b if b < FULL else 0  # a second copy of logits and table
    product = mixed + (FULL if mixed and not layout.gpu else 0)
    chunk = min(CHUNK_ROWS["cuda" if layout.gpu else "cpu"], N)
    made = (FULL + mixed) * table * chunk + product * table * D
    if mixed and not layout.gpu:  # where a softmax of mixed width begins with a copy
        made = max(made, (2 * FULL + mixed) * table * chunk)
    return 6 * b * N * D + (FULL + mixed) * table * D + made
