"""The encoder, the place where the [MASK] rows join, the decoder and the head: plain torch, no ranks.

One idea carries all methods. The rows of a sequence are kept in permuted order and bring their position
numbers along:

    [ context rows, not predicted | visible rows that are predicted | [MASK] rows ]
      <--------------- visible: V rows ------------------------->     <-- M rows -->
                                    <---------- predicted: P rows --------------->

Attention does not see the order of rows, so joining the masks is a concatenation, the predictions are
the last P rows, and every shape is static. `mask_from` says before which layer the masks join and
`decoder_layers` how many throw-away layers follow the encoder: (0, 0) is BERT's masked LM (Devlin et al.
2019) as RoBERTa trains it, (num_layers, 2) is 3ML (Liao et al. 2022, arXiv 2211.04898), (num_layers, 4)
with a tied mask vector is MAE-LM (Meng et al. 2023, arXiv 2302.02060). `mask_leak` moves some of the
[MASK] rows over to the visible ones, where they are pieces like others.

Where the masks join between two layers, `join: one_way` lets only them attend to them: what the other rows
become is what they are in a text without [MASK], though the layers above the join are the encoder's own.

Where attention must stay within documents, or some layers are local, the rows of each stage are sorted by
position, those that enter the encoder and, after the join, all: see `Order`.

Letters: B batch, L rows of a sequence, V visible, M late [MASK] rows, P predicted, S rows here, T rows
attended to, K documents of a sequence at most, D width, F inner width, H heads, E head width.

Under tensor parallelism a rank holds some of the heads, so views infer the head count (-1).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import ModelOptions, geometry
from pretrain.config.geometry import late_masks, padded_vocab
from pretrain.data import rng
from pretrain.data.masking import Masked
from pretrain.model.attention import (
    Attention,
    Bounds,
    CrossAttention,
    Local,
    OneWay,
    Order,
    Rotation,
    one_way,
    supports_flex,
    supports_varlen,
    take,
)
from pretrain.model.loss import ChunkedCrossEntropy

Array = npt.NDArray[np.int64]
View = tuple[Rotation, Bounds | OneWay | Local | None]
"""What a layer of the encoder is told of its rows."""


class Batch(NamedTuple):
    """One micro-batch in permuted row order."""

    ids: Tensor
    """[B, L] pieces; the last M columns are the [MASK] rows."""
    positions: Tensor
    """[B, L] place of each row in its sequence, from 0."""
    targets: Tensor
    """[B, P] true pieces of the last P rows."""
    num_masked: int
    """[MASK] rows; without a `mask_leak` this is M."""
    documents: Tensor | None = None
    """[B, L] number of each row's document in its window, where attention is bounded by documents."""
    most_documents: int = 1
    """K: more than any of these numbers; a power of two, so that shapes that depend on it are few."""

    @classmethod
    def of(
        cls,
        ids: Array,
        positions: Array,
        targets: Array,
        num_masked: int,
        documents: Array | None,
        device: torch.device,
    ) -> "Batch":
        """Make one of numpy arrays of the same meaning, moved to `device` without waiting for it."""

        def moved(array: Array) -> Tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            if device.type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        batch = cls(moved(ids), moved(positions), moved(targets), num_masked)
        if documents is None:
            return batch
        most = 1 << int(documents.max()).bit_length()
        return batch._replace(documents=moved(documents), most_documents=most)

    @classmethod
    def from_masked(cls, masked: Masked, device: torch.device) -> "Batch":
        """Make one of what a masker returns, as `of` does."""
        return cls.of(
            masked.ids, masked.positions, masked.targets, masked.num_masked, masked.documents, device
        )


class FeedForward(nn.Module):
    """GELU layer of RoBERTa, or GeGLU (Shazeer 2020, arXiv 2002.05202) with [activated; linear] halves."""

    def __init__(self, m: ModelOptions) -> None:
        super().__init__()
        self.gated = m.block == "modern"
        if self.gated:
            self.gate_up = nn.Linear(m.hidden_size, 2 * m.ffn_size, bias=False)
        else:
            self.up = nn.Linear(m.hidden_size, m.ffn_size)
        self.down = nn.Linear(m.ffn_size, m.hidden_size, bias=not self.gated)

    def forward(self, x_BSD: Tensor) -> Tensor:
        if self.gated:
            active_BSF, linear_BSF = self.gate_up(x_BSD).chunk(2, -1)
            return self.down(F.gelu(active_BSF) * linear_BSF)
        return self.down(F.gelu(self.up(x_BSD)))


class Layer(nn.Module):
    """Attention and feed-forward with residuals; `kind` says which rows ask and which answer.

    self   rows attend to each other.
    cross  rows attend to each other, then to the context rows.
    query  rows attend to the context rows and to each other; the context stands still. A `bottleneck` is
           made of these, its context the encoder's <s>.

    bounds are those of attention among the rows, across those of attention to the context (`query`: to all).
    Where documents are kept apart, the context of `query` is all rows; `places` [B, S] are x's among them.
    """

    def __init__(self, m: ModelOptions, kind: str, dropout: float, normed_input: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.pre = m.norm == "pre"
        self.dropout = nn.Dropout(dropout)
        # The modern block's first layer follows the embedding norm directly (as in ModernBERT).
        self.attention_norm = nn.Identity() if normed_input else norm(m)
        self.attention = (CrossAttention if kind == "query" else Attention)(m, dropout)
        if kind == "cross":
            self.cross_norm = norm(m)
            self.cross = CrossAttention(m, dropout)
        self.ffn_norm = norm(m)
        self.ffn = FeedForward(m)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        bounds: Bounds | OneWay | Local | None = None,
        context_BTD: Tensor | None = None,
        there: Rotation = None,
        across: Bounds | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        x = x_BSD
        h = self.attention_norm(x) if self.pre else x
        if self.kind == "query":
            assert context_BTD is not None
            still = self.attention_norm(context_BTD) if self.pre else context_BTD
            if places is None:
                rows, there = torch.cat((still, h), 1), _both(there, rotation)
            else:
                rows = _put(still, places, h)
            x = self._add(x, self.attention(h, rows, rotation, there, across), self.attention_norm)
        else:
            x = self._add(x, self.attention(h, rotation, bounds), self.attention_norm)
        if self.kind == "cross":
            h = self.cross_norm(x) if self.pre else x
            x = self._add(x, self.cross(h, context_BTD, rotation, there, across), self.cross_norm)
        h = self.ffn_norm(x) if self.pre else x
        return self._add(x, self.ffn(h), self.ffn_norm)

    def _add(self, x: Tensor, change: Tensor, after: nn.Module) -> Tensor:
        x = x + self.dropout(change)
        return x if self.pre else after(x)


class Decoder(nn.Module):
    """The throw-away layers: all rows meet here, the head reads the last P of what comes out."""

    def __init__(self, m: ModelOptions) -> None:
        super().__init__()
        assert m.decoder_dropout is not None
        self.kind = "query" if m.decoder == "bottleneck" else m.decoder
        learned = m.block != "modern"
        if learned and m.decoder_positions == "own":
            self.positions = nn.Embedding(m.max_positions, m.hidden_size)
        self.input_norm = norm(m) if learned else nn.Identity()
        self.dropout = nn.Dropout(m.decoder_dropout if learned else 0.0)
        self.layers = nn.ModuleList(Layer(m, self.kind, m.decoder_dropout) for _ in range(m.decoder_layers))
        self.final_norm = norm(m) if m.norm == "pre" else nn.Identity()


class Head(nn.Module):
    """dense, GELU, norm; then the word table (tied, so it belongs to the model) with this bias."""

    def __init__(self, m: ModelOptions, rows: int) -> None:
        super().__init__()
        self.dense = nn.Linear(m.hidden_size, m.hidden_size, bias=m.block != "modern")
        self.norm = norm(m)
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, x_NPD: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x_NPD)))


def norm(m: ModelOptions) -> nn.LayerNorm:
    """Return the LayerNorm of this block (the modern block has no biases)."""
    return nn.LayerNorm(m.hidden_size, eps=m.norm_eps, bias=m.block != "modern")


class LateMaskModel(nn.Module):
    """Encoder + late [MASK] rows + decoder + head; forward gives the loss.

    vocab_size: pieces of the tokenizer; mask_id: its [MASK]. recompute: keep only layer inputs.
    """

    def __init__(self, m: ModelOptions, vocab_size: int, mask_id: int, recompute: bool = False) -> None:
        super().__init__()
        self.m, self.mask_id, self.recompute = m, mask_id, recompute
        rows = padded_vocab(vocab_size, m.vocab_multiple)
        self.tok = nn.Embedding(rows, m.hidden_size)
        if m.block != "modern":
            self.positions = nn.Embedding(m.max_positions, m.hidden_size)
        if m.token_type:
            self.token_type = nn.Parameter(torch.zeros(m.hidden_size))
            # Never read, so never changed (vectors do not decay): they are kept for the export.
            if m.block == "bert":
                self.second_token_type = nn.Parameter(torch.zeros(m.hidden_size))
            else:
                self.padding_positions = nn.Parameter(torch.zeros(2 * m.hidden_size))
        self.embedding_norm = norm(m)
        self.dropout = nn.Dropout(m.dropout)
        self.layers = nn.ModuleList(
            Layer(m, "self", m.dropout, normed_input=m.block == "modern" and i == 0)
            for i in range(m.num_layers)
        )
        self.final_norm = norm(m) if m.norm == "pre" else nn.Identity()
        if m.mask_from > 0 and m.mask_vector == "learned":
            self.mask_vector = nn.Parameter(torch.zeros(m.hidden_size))
        self.decoder = Decoder(m) if m.decoder_layers else None
        self.head = Head(m, rows)
        self.cross_entropy = ChunkedCrossEntropy(vocab_size)

    def all_layers(self) -> list[nn.Module]:
        """Return the layers of the encoder and of the decoder."""
        return [*self.layers, *(self.decoder.layers if self.decoder else [])]

    # -- training and scoring: everything that touches the word table is inside this one forward

    def forward(self, batch: Batch, score: bool = False) -> Tensor:
        """Return the mean loss over the B * P predicted rows; with `score`, [sum of losses, rows right]
        instead."""
        hidden_BPD = self.head(self.predicted_rows(batch))
        total, right = self.cross_entropy(
            hidden_BPD.flatten(0, 1), self.tok.weight, self.head.bias, batch.targets.flatten()
        )
        return torch.stack((total, right)) if score else total / batch.targets.numel()

    def predicted_rows(self, batch: Batch) -> Tensor:
        """Return what the head reads: [B, P, D]."""
        P, order = batch.targets.shape[1], self._order(batch)
        x_BSD = self.encode(batch.ids, batch.positions, batch.num_masked, order)
        return _last(x_BSD, P, order) if self.decoder is None else self._decode(x_BSD, batch, P, order)

    def encode(
        self, ids: Tensor, positions: Tensor, num_masked: int = 0, order: Order | None = None
    ) -> Tensor:
        """Return the encoder's output of ids and positions [B, L]; V rows when the masks meet only a decoder,
        else L.

        With num_masked = 0 this is the exported encoder on ordinary input. With an `order`, or local layers,
        the rows come out sorted by position.
        """
        B, L = ids.shape
        V, M = self._visible(L, num_masked), late_masks(self.m, num_masked)
        if order is None and self.m.local_window:
            order = self._order(Batch(ids, positions, ids[:, :0], num_masked))
        words, places = ids[:, :V], positions
        if order is not None:
            words, places = words.gather(1, order.visible), positions.gather(1, order.entry)
        views = self._views(places[:, :V], V, order)
        x = self._embed(self.tok(words), places[:, :V])
        for i, layer in enumerate(self.layers):
            if i == self.m.mask_from and V < L:
                # Shared depth: a mask enters the stack as a word would, only later.
                masks = self._embed(self._mask_rows(B, M), places[:, V:])
                x = torch.cat((x, masks), 1)
                if order is not None and self.m.join != "one_way":
                    x, places = take(x, order.join), positions.gather(1, order.rows)
                views = self._views(places, V, order)
            x = self._run(layer, x, *views[self.m.is_local(i)])
        return self.final_norm(x)

    def _views(self, places_BS: Tensor, V: int, order: Order | None) -> tuple[View, View]:
        """Rotation and bounds of global layers, and of local ones; of V rows, or of all when the masks have
        joined."""
        m, rows = self.m, None
        one_sided = m.join == "one_way" and places_BS.shape[1] > V
        bounds: Bounds | OneWay | None = one_way(V, order) if one_sided else None
        if order is not None:
            rows = order.rows if places_BS.shape[1] > V else order.visible
            bounds = bounds or order.bounds(rows, rows)
        whole = self.rotation(places_BS), bounds
        if rows is None or order is None or not m.local_window:
            return whole, whole
        flex = supports_flex(rows.device) and not (self.training and m.dropout)
        local = order.local(rows, m.local_window, flex, one_sided)
        return whole, (self.rotation(places_BS, m.local_rope_theta), local)

    def _visible(self, L: int, num_masked: int) -> int:
        """V: where the masks join before the first layer, all rows."""
        return L - late_masks(self.m, num_masked) if self.m.mask_from else L

    def _order(self, batch: Batch) -> Order | None:
        """None where attention sees the whole window in all layers."""
        m, V = self.m, self._visible(batch.ids.shape[1], batch.num_masked)
        if batch.documents is None and not m.local_window:
            return None
        drops = self.training and bool(m.dropout or m.decoder_dropout)
        varlen = supports_varlen(batch.positions.device) and not drops
        P, K = batch.targets.shape[1], batch.most_documents
        return Order.of(batch.positions, batch.documents, V, P, K, varlen, geometry.one_way(m))

    def _decode(self, encoded_BVD: Tensor, batch: Batch, P: int, order: Order | None = None) -> Tensor:
        """Decoder output of the predicted rows: [B, P, D]."""
        d = self.decoder
        assert d is not None
        (B, L), V = batch.ids.shape, encoded_BVD.shape[1]
        if self.m.decoder == "bottleneck":
            x, positions = self._bottleneck(encoded_BVD, batch.positions, P, order)
            order = None
        else:
            masks_BMD = self._mask_rows(B, L - V)
            x, positions = torch.cat((encoded_BVD, masks_BMD.to(encoded_BVD.dtype)), 1), batch.positions
        if order is not None:
            x, positions = take(x, order.join), positions.gather(1, order.rows)
        if self.m.block != "modern":
            table = d.positions if self.m.decoder_positions == "own" else self.positions
            x = x + table(positions)
        x = d.dropout(d.input_norm(x))
        rotation = self.rotation(positions)
        if d.kind == "query":
            return self._query(x, rotation, P, order)
        bounds, context, there, across = None, None, None, None
        if order is not None:
            bounds = order.bounds(order.rows, order.rows)
        if d.kind == "cross":
            context, there = encoded_BVD, _rows(rotation, 0, V)
            if order is not None:
                there = self.rotation(batch.positions.gather(1, order.visible))
                across = order.bounds(order.rows, order.visible)
        for layer in d.layers:
            x = self._run(layer, x, rotation, bounds, context, there, across)
        return d.final_norm(_last(x, P, order))

    def _bottleneck(
        self, encoded_BVD: Tensor, positions_BL: Tensor, P: int, order: Order | None
    ) -> tuple[Tensor, Tensor]:
        """The first token's row and a [MASK] for each predicted one [B, 1 + P, D], with their positions."""
        B, V = encoded_BVD.shape[:2]
        places = positions_BL[:, :V] if order is None else positions_BL.gather(1, order.visible)
        first = places.argmin(1, keepdim=True)
        masks_BPD = self._mask_rows(B, P).to(encoded_BVD.dtype)
        rows = torch.cat((take(encoded_BVD, first), masks_BPD), 1)
        return rows, torch.cat((places.gather(1, first), positions_BL[:, -P:]), 1)

    def _query(self, x_BLD: Tensor, rotation: Rotation, P: int, order: Order | None) -> Tensor:
        """The decoder that updates the predicted rows only: [B, P, D]."""
        d, C = self.decoder, x_BLD.shape[1] - P
        assert d is not None
        context, there, across, places = x_BLD[:, :C], _rows(rotation, 0, C), None, None
        x, rotation_P = x_BLD[:, C:], _rows(rotation, C, C + P)
        if order is not None:
            places, back = order.predicted.sort(1)  # by position, as all rows are
            across = order.bounds(order.rows.gather(1, places), order.rows)
            context, there, x = x_BLD, rotation, take(x_BLD, places)
            rotation_P = rotation and (take(rotation[0], places), take(rotation[1], places))
        for layer in d.layers:
            x = self._run(layer, x, rotation_P, None, context, there, across, places)
        return d.final_norm(x if order is None else take(x, back.argsort(1)))

    def _run(self, layer: nn.Module, *inputs: Tensor | Rotation | Bounds | OneWay | Local) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def _embed(self, words_BSD: Tensor, positions_BS: Tensor) -> Tensor:
        if self.m.token_type:
            words_BSD = words_BSD + self.token_type
        if self.m.block != "modern":
            words_BSD = words_BSD + self.positions(positions_BS)
        return self.dropout(self.embedding_norm(words_BSD))

    def _mask_rows(self, B: int, M: int) -> Tensor:
        """[B, M, D]: the vector that stands for a token whose place is known and whose piece is not."""
        if self.m.mask_vector == "tied":
            return self.tok(torch.full((B, M), self.mask_id, device=self.tok.weight.device))
        return self.mask_vector.expand(B, M, -1)

    def rotation(self, positions_BS: Tensor, theta: float | None = None) -> Rotation:
        """Return cos and sin of position x frequency, in float32 (as Hugging Face computes them).

        The first half of a head turns the other way than the second.
        """
        if self.m.block != "modern":
            return None
        E = self.m.hidden_size // self.m.num_heads
        even = torch.arange(0, E, 2, device=positions_BS.device, dtype=torch.int64).float()
        frequency = 1.0 / ((theta or self.m.rope_theta) ** (even / E))
        with torch.autocast(positions_BS.device.type, enabled=False):
            angle = positions_BS.float()[:, :, None, None] * frequency
            angle = torch.cat((-angle, angle), -1)
            return angle.cos(), angle.sin()


def _rows(rotation: Rotation, start: int, stop: int) -> Rotation:
    return rotation and (rotation[0][:, start:stop], rotation[1][:, start:stop])


def _last(x_BLD: Tensor, P: int, order: Order | None) -> Tensor:
    """The predicted rows [B, P, D] of all."""
    return x_BLD[:, -P:] if order is None else take(x_BLD, order.predicted)


def _put(x_BSD: Tensor, rows_BT: Tensor, new_BTD: Tensor) -> Tensor:
    """x with other values in the given rows of each sequence."""
    return x_BSD.scatter(1, rows_BT[..., None].expand_as(new_BTD), new_BTD.to(x_BSD.dtype))


def _both(first: Rotation, second: Rotation) -> Rotation:
    if first is None or second is None:
        return None
    return torch.cat((first[0], second[0]), 1), torch.cat((first[1], second[1]), 1)


@torch.no_grad()
def init_weights(model: LateMaskModel, seed: int) -> None:
    """Set every initial value, here and nowhere else. Each parameter is seeded by its own name.

    matrices, embeddings, vectors       N(0, init_std)
    norm gains                          1
    biases, what is kept for an export  0
    padded rows of the word table       0 (they are never trained)
    """
    generator = torch.Generator()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name in ("padding_positions", "second_token_type"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            generator.manual_seed(rng.name_seed(seed, name))
            values = torch.empty(parameter.shape).normal_(0.0, model.m.init_std, generator=generator)
            parameter.copy_(values)
    model.tok.weight[model.cross_entropy.vocab_size :] = 0.0
