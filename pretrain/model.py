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

Letters: B batch, L rows of a sequence, V visible, M late [MASK] rows, P predicted, S rows here, T rows
attended to, D width, F inner width, H heads, E head width.

The trap: under tensor parallelism a rank holds some of the heads, so views infer the head count (-1).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain import config, rng
from pretrain.flops import late_masks, padded_vocab
from pretrain.loss import ChunkedCrossEntropy

Array = npt.NDArray[np.int64]

Rotation = tuple[Tensor, Tensor] | None
"""cos and sin, each [B, S, 1, E], of the rows' positions; None where positions are learned."""


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

    @classmethod
    def of(
        cls, ids: Array, positions: Array, targets: Array, num_masked: int, device: torch.device
    ) -> "Batch":
        """From numpy arrays of the same meaning, moved to `device` without waiting for it."""

        def moved(array: Array) -> Tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            if device.type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        return cls(moved(ids), moved(positions), moved(targets), num_masked)


class Attention(nn.Module):
    """Multi-head self-attention over all given rows; the fused projection is laid out head by head."""

    def __init__(self, m: config.Model, dropout: float) -> None:
        super().__init__()
        bias = m.block == "roberta"
        self.head_size = m.hidden_size // m.num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(m.hidden_size, 3 * m.hidden_size, bias=bias)
        self.out = nn.Linear(m.hidden_size, m.hidden_size, bias=bias)

    def forward(self, x_BSD: Tensor, rotation: Rotation) -> Tensor:
        q, k, v = self.qkv(x_BSD).unflatten(-1, (-1, 3, self.head_size)).unbind(-2)
        q, k = rotate(q, rotation), rotate(k, rotation)
        return self.out(attend(q, k, v, self.dropout if self.training else 0.0))


class CrossAttention(nn.Module):
    """Multi-head attention of some rows (x) to others (memory)."""

    def __init__(self, m: config.Model, dropout: float) -> None:
        super().__init__()
        bias = m.block == "roberta"
        self.head_size = m.hidden_size // m.num_heads
        self.dropout = dropout
        self.q = nn.Linear(m.hidden_size, m.hidden_size, bias=bias)
        self.kv = nn.Linear(m.hidden_size, 2 * m.hidden_size, bias=bias)
        self.out = nn.Linear(m.hidden_size, m.hidden_size, bias=bias)

    def forward(self, x_BSD: Tensor, memory_BTD: Tensor, rotation: Rotation, there: Rotation) -> Tensor:
        q = self.q(x_BSD).unflatten(-1, (-1, self.head_size))
        k, v = self.kv(memory_BTD).unflatten(-1, (-1, 2, self.head_size)).unbind(-2)
        q, k = rotate(q, rotation), rotate(k, there)
        return self.out(attend(q, k, v, self.dropout if self.training else 0.0))


def attend(q_BSHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor, dropout: float) -> Tensor:
    """Softmax attention, every query row to every key row -> [B, S, H * E]."""
    q, k, v = q_BSHE.transpose(1, 2), k_BTHE.transpose(1, 2), v_BTHE.transpose(1, 2)
    mixed_BHSE = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return mixed_BHSE.transpose(1, 2).flatten(-2)


def rotate(x_BSHE: Tensor, rotation: Rotation) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) in the half-split layout, in float32."""
    if rotation is None:
        return x_BSHE
    cos, sin = rotation
    first, second = x_BSHE.chunk(2, -1)
    return (x_BSHE * cos + torch.cat((-second, first), -1) * sin).to(x_BSHE.dtype)


class FeedForward(nn.Module):
    """GELU layer of RoBERTa, or GeGLU (Shazeer 2020, arXiv 2002.05202) with [activated; linear] halves."""

    def __init__(self, m: config.Model) -> None:
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
    query  rows attend to the context rows and to each other; the context stands still.
    """

    def __init__(self, m: config.Model, kind: str, dropout: float, normed_input: bool = False) -> None:
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
        self, x_BSD: Tensor, rotation: Rotation, context_BTD: Tensor | None = None, there: Rotation = None
    ) -> Tensor:
        x = x_BSD
        h = self.attention_norm(x) if self.pre else x
        if self.kind == "query":
            assert context_BTD is not None
            still = self.attention_norm(context_BTD) if self.pre else context_BTD
            rows = torch.cat((still, h), 1)
            x = self._add(x, self.attention(h, rows, rotation, _both(there, rotation)), self.attention_norm)
        else:
            x = self._add(x, self.attention(h, rotation), self.attention_norm)
        if self.kind == "cross":
            h = self.cross_norm(x) if self.pre else x
            x = self._add(x, self.cross(h, context_BTD, rotation, there), self.cross_norm)
        h = self.ffn_norm(x) if self.pre else x
        return self._add(x, self.ffn(h), self.ffn_norm)

    def _add(self, x: Tensor, change: Tensor, after: nn.Module) -> Tensor:
        x = x + self.dropout(change)
        return x if self.pre else after(x)


class Decoder(nn.Module):
    """The throw-away layers: all rows meet here, the head reads the last P of what comes out."""

    def __init__(self, m: config.Model) -> None:
        super().__init__()
        assert m.decoder_dropout is not None
        self.kind = m.decoder
        learned = m.block == "roberta"
        if learned and m.decoder_positions == "own":
            self.positions = nn.Embedding(m.max_positions, m.hidden_size)
        self.input_norm = norm(m) if learned else nn.Identity()
        self.dropout = nn.Dropout(m.decoder_dropout if learned else 0.0)
        self.layers = nn.ModuleList(Layer(m, m.decoder, m.decoder_dropout) for _ in range(m.decoder_layers))
        self.final_norm = norm(m) if m.norm == "pre" else nn.Identity()


class Head(nn.Module):
    """dense, GELU, norm; then the word table (tied, so it belongs to the model) with this bias."""

    def __init__(self, m: config.Model, rows: int) -> None:
        super().__init__()
        self.dense = nn.Linear(m.hidden_size, m.hidden_size, bias=m.block == "roberta")
        self.norm = norm(m)
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, x_NPD: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x_NPD)))


def norm(m: config.Model) -> nn.LayerNorm:
    """The LayerNorm of this block (the modern block has no biases)."""
    return nn.LayerNorm(m.hidden_size, eps=m.norm_eps, bias=m.block == "roberta")


class LateMaskModel(nn.Module):
    """Encoder + late [MASK] rows + decoder + head; forward gives the loss.

    vocab_size: pieces of the tokenizer; mask_id: its [MASK]. recompute: keep only layer inputs.
    """

    def __init__(self, m: config.Model, vocab_size: int, mask_id: int, recompute: bool = False) -> None:
        super().__init__()
        self.m, self.mask_id, self.recompute = m, mask_id, recompute
        rows = padded_vocab(vocab_size, m.vocab_multiple)
        self.tok = nn.Embedding(rows, m.hidden_size)
        if m.block == "roberta":
            self.positions = nn.Embedding(m.max_positions, m.hidden_size)
        if m.token_type:
            self.token_type = nn.Parameter(torch.zeros(m.hidden_size))
            # Never read, so never changed (vectors do not decay): they are kept for the export.
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
        """Layers of the encoder and of the decoder."""
        return [*self.layers, *(self.decoder.layers if self.decoder else [])]

    # -- training and scoring: everything that touches the word table is inside this one forward

    def forward(self, batch: Batch, score: bool = False) -> Tensor:
        """Mean loss over the B * P predicted rows; with `score`, [sum of losses, rows right] instead."""
        hidden_BPD = self.head(self.predicted_rows(batch))
        total, right = self.cross_entropy(
            hidden_BPD.flatten(0, 1), self.tok.weight, self.head.bias, batch.targets.flatten()
        )
        return torch.stack((total, right)) if score else total / batch.targets.numel()

    def predicted_rows(self, batch: Batch) -> Tensor:
        """What the head reads: [B, P, D]."""
        P = batch.targets.shape[1]
        x_BSD = self.encode(batch.ids, batch.positions, batch.num_masked)
        if self.decoder is not None:
            x_BSD = self._decode(x_BSD, batch, P)
        return x_BSD[:, -P:]

    def encode(self, ids: Tensor, positions: Tensor, num_masked: int = 0) -> Tensor:
        """ids, positions [B, L] -> encoder output; V rows when the masks meet only a decoder, else L.

        With num_masked = 0 this is the exported encoder on ordinary input.
        """
        B, L = ids.shape
        M = late_masks(self.m, num_masked)
        V = L - M if self.m.mask_from else L
        rotation = self.rotation(positions)
        x = self._embed(self.tok(ids[:, :V]), positions[:, :V])
        for i, layer in enumerate(self.layers):
            if i == self.m.mask_from and V < L:
                # Shared depth: a mask enters the stack as a word would, only later.
                masks = self._embed(self._mask_rows(B, M), positions[:, V:])
                x = torch.cat((x, masks), 1)
            x = self._run(layer, x, _rows(rotation, 0, x.shape[1]))
        return self.final_norm(x)

    def _decode(self, encoded_BVD: Tensor, batch: Batch, P: int) -> Tensor:
        d = self.decoder
        assert d is not None
        B, L = batch.ids.shape
        masks_BMD = self._mask_rows(B, L - encoded_BVD.shape[1])
        x = torch.cat((encoded_BVD, masks_BMD.to(encoded_BVD.dtype)), 1)
        if self.m.block == "roberta":
            table = d.positions if self.m.decoder_positions == "own" else self.positions
            x = x + table(batch.positions)
        x = d.dropout(d.input_norm(x))
        rotation = self.rotation(batch.positions)
        context, there = None, None
        if d.kind == "query":
            C = L - P
            context, there = x[:, :C], _rows(rotation, 0, C)
            x, rotation = x[:, C:], _rows(rotation, C, L)
        elif d.kind == "cross":
            context, there = encoded_BVD, _rows(rotation, 0, encoded_BVD.shape[1])
        for layer in d.layers:
            x = self._run(layer, x, rotation, context, there)
        return d.final_norm(x)

    def _run(self, layer: nn.Module, *inputs: Tensor | Rotation) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def _embed(self, words_BSD: Tensor, positions_BS: Tensor) -> Tensor:
        if self.m.token_type:
            words_BSD = words_BSD + self.token_type
        if self.m.block == "roberta":
            words_BSD = words_BSD + self.positions(positions_BS)
        return self.dropout(self.embedding_norm(words_BSD))

    def _mask_rows(self, B: int, M: int) -> Tensor:
        """[B, M, D]: the vector that stands for a token whose place is known and whose piece is not."""
        if self.m.mask_vector == "tied":
            return self.tok(torch.full((B, M), self.mask_id, device=self.tok.weight.device))
        return self.mask_vector.expand(B, M, -1)

    def rotation(self, positions_BS: Tensor) -> Rotation:
        """cos and sin of position x frequency, in float32 (as Hugging Face computes them)."""
        if self.m.block == "roberta":
            return None
        E = self.m.hidden_size // self.m.num_heads
        even = torch.arange(0, E, 2, device=positions_BS.device, dtype=torch.int64).float()
        frequency = 1.0 / (self.m.rope_theta ** (even / E))
        with torch.autocast(positions_BS.device.type, enabled=False):
            angle = positions_BS.float()[:, :, None, None] * frequency
            angle = torch.cat((angle, angle), -1)
            return angle.cos(), angle.sin()


def _rows(rotation: Rotation, start: int, stop: int) -> Rotation:
    return rotation and (rotation[0][:, start:stop], rotation[1][:, start:stop])


def _both(first: Rotation, second: Rotation) -> Rotation:
    if first is None or second is None:
        return None
    return torch.cat((first[0], second[0]), 1), torch.cat((first[1], second[1]), 1)


@torch.no_grad()
def init_weights(model: LateMaskModel, seed: int) -> None:
    """Every initial value, here and nowhere else. Each parameter is seeded by its own name.

    matrices, embeddings, vectors       N(0, init_std)
    norm gains                          1
    biases, positions of padding        0
    padded rows of the word table       0 (they are never trained)
    """
    generator = torch.Generator()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name == "padding_positions":
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            generator.manual_seed(rng.name_seed(seed, name))
            values = torch.empty(parameter.shape).normal_(0.0, model.m.init_std, generator=generator)
            parameter.copy_(values)
    model.tok.weight[model.cross_entropy.vocab_size :] = 0.0
