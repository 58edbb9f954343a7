"""Attention over permuted rows: whole, within documents where they are kept apart, or local.

A local layer bounds the difference of two rows' positions. Its rows stand in the order of these, so that a
block of rows finds what it may attend to in the rows beside it: `geometry.local_blocks` says which.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from pretrain.config import ModelOptions
from pretrain.config.geometry import local_blocks

Rotation = tuple[Tensor, Tensor] | None
"""cos and sin, each [B, S, 1, E], of the rows' positions, sin negative in a head's first half; None where
positions are learned."""


class Bounds(NamedTuple):
    """Which rows attend to which where documents are kept apart. Both sides are sorted by document."""

    mask_B1ST: Tensor | None
    """True where the two rows are of one document; None where a kernel takes stretches of rows instead."""
    query_starts: Tensor
    """[B * K + 1] int32: where each document begins among the B * S rows that ask."""
    key_starts: Tensor
    """[B * K + 1] int32: the same of the B * T rows that answer."""


class OneWay(NamedTuple):
    """Bounds of [visible rows; masks]: visible rows attend to visible rows only, masks to all."""

    V: int
    among: Bounds | None
    """Of the visible rows."""
    masks: Bounds | None
    """Of the masks, to all rows."""
    join: Tensor | None
    """[B, L] which of the rows stands where among those that masks attend to; None: as they are."""


class Local(NamedTuple):
    """Bounds of a local layer, whose rows stand in the order of their positions."""

    window: int
    masks: list[Tensor]
    """[B, 1, rows, rows attended to] of each block: True where a row sees another; none with a kernel."""
    flex: BlockMask | None
    """The same for the kernel that takes it."""
    join: Tensor | None
    """[B, S] which of the rows stands where in that order; None: they stand in it already."""


class Order(NamedTuple):
    """Rows sorted by position, and so by document: first those that enter the encoder, then all, when the
    masks have joined."""

    entry: Tensor
    """[B, L] which row of the batch stands where before the join: V visible ones, then the masks."""
    join: Tensor
    """[B, L] which of these stands where after the join."""
    rows: Tensor
    """[B, L] which row of the batch that is."""
    visible: Tensor
    """[B, V] the first of `entry`: the rows in the encoder."""
    predicted: Tensor
    """[B, P] where the batch's last rows stand after the join; after a one-way join, in `entry`."""
    positions: Tensor
    """[B, L] of the batch's rows."""
    documents: Tensor | None
    """[B, L] of the batch's rows, where they are kept apart."""
    most_documents: int
    """K."""
    varlen: bool
    """Attention by a kernel that takes stretches of rows, not a mask."""

    @classmethod
    def of(
        cls,
        positions_BL: Tensor,
        documents_BL: Tensor | None,
        V: int,
        P: int,
        K: int,
        varlen: bool,
        one_way: bool = False,
    ) -> "Order":
        visible, masks = (part.argsort(dim=1) for part in positions_BL.tensor_split([V], 1))
        entry = torch.cat((visible, V + masks), 1)
        join = positions_BL.gather(1, entry).argsort(dim=1)
        rows = entry.gather(1, join)
        predicted = (entry if one_way else rows).argsort(1)[:, positions_BL.shape[1] - P :]
        return cls(entry, join, rows, visible, predicted, positions_BL, documents_BL, K, varlen)

    def bounds(self, queries_BS: Tensor, keys_BT: Tensor) -> Bounds | None:
        """Return those between rows of the batch, given by their numbers; None where none are kept apart."""
        if self.documents is None:
            return None
        queries, keys = self.documents.gather(1, queries_BS), self.documents.gather(1, keys_BT)
        same = None if self.varlen else (queries[:, :, None] == keys[:, None, :])[:, None]
        return Bounds(
            same, _document_starts(queries, self.most_documents), _document_starts(keys, self.most_documents)
        )

    def local(self, rows_BS: Tensor, window: int, flex: bool, one_way: bool) -> Local:
        """Return the bounds of a local layer among rows of the batch, given by their numbers in the order of
        positions; one_way: all rows, which stand as they do in `entry`, and only masks see masks."""
        rows = self.positions.gather(1, rows_BS)
        apart = torch.zeros_like(rows) if self.documents is None else self.documents.gather(1, rows_BS)
        late = rows_BS >= self.visible.shape[1] if one_way else torch.zeros_like(rows, dtype=torch.bool)
        traits, join = (rows, apart, late), self.join if one_way else None
        if flex:
            return Local(window, [], _flex_mask(traits, window // 2), join)
        masks = [
            _sees([x[:, a:b, None] for x in traits], [x[:, None, c:d] for x in traits], window // 2)[:, None]
            for a, b, c, d in local_blocks(rows.shape[1], window)
        ]
        return Local(window, masks, None, join)


def _sees(query: list[Tensor], key: list[Tensor], side: int) -> Tensor:
    """Whether rows with these positions, documents and marks of late masks see others in a local layer."""
    (place, document, late), (other_place, other_document, hidden) = query, key
    return ((place - other_place).abs() <= side) & (document == other_document) & (late | ~hidden)


def _flex_mask(traits: tuple[Tensor, ...], side: int) -> BlockMask:
    """What `flex_attention` may skip: of 128 rows all but those and the blocks beside them."""
    S, size = traits[0].shape[1], 128
    block = torch.arange(-(-S // size), device=traits[0].device, dtype=torch.int32)
    reach = -(-side // size)
    first, last = (block - reach).clamp(min=0), (block + reach).clamp(max=len(block) - 1)
    indices = (first[:, None] + block).clamp(max=len(block) - 1)

    def sees(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _sees([x[b, q] for x in traits], [x[b, k] for x in traits], side)

    return BlockMask.from_kv_blocks(
        (last - first + 1)[None, None],
        indices[None, None],
        BLOCK_SIZE=size,
        mask_mod=sees,
        seq_lengths=(S, S),
    )


def one_way(V: int, order: Order | None) -> OneWay:
    """Return the bounds of a one-way join of V rows and masks, documents kept apart where there is an
    order."""
    if order is None:
        return OneWay(V, None, None, None)
    masks = order.entry[:, V:]
    return OneWay(V, order.bounds(order.visible, order.visible), order.bounds(masks, order.rows), order.join)


def _document_starts(documents_BS: Tensor, K: int) -> Tensor:
    """[B * K + 1]: where document k of sequence b begins among all rows; empty ones begin where the next
    does, so that the shape does not depend on the text."""
    B, device = len(documents_BS), documents_BS.device
    number = documents_BS + K * torch.arange(B, device=device)[:, None]
    every = torch.arange(B * K + 1, device=device)
    return torch.searchsorted(number.flatten(), every).to(torch.int32)


class Attention(nn.Module):
    """Multi-head self-attention over all given rows; the fused projection is laid out head by head."""

    def __init__(self, m: ModelOptions, dropout: float) -> None:
        super().__init__()
        bias = m.block != "modern"
        self.head_size = m.hidden_size // m.num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(m.hidden_size, 3 * m.hidden_size, bias=bias)
        self.out = nn.Linear(m.hidden_size, m.hidden_size, bias=bias)

    def forward(
        self, x_BSD: Tensor, rotation: Rotation, bounds: Bounds | OneWay | Local | None = None
    ) -> Tensor:
        q, k, v = self.qkv(x_BSD).unflatten(-1, (-1, 3, self.head_size)).unbind(-2)
        q, k = rotate(q, rotation), rotate(k, rotation)
        dropout = self.dropout if self.training else 0.0
        if isinstance(bounds, OneWay):
            return self.out(attend_one_way(q, k, v, dropout, bounds))
        if isinstance(bounds, Local):
            return self.out(attend_locally(q, k, v, dropout, bounds))
        return self.out(attend(q, k, v, dropout, bounds))


class CrossAttention(nn.Module):
    """Multi-head attention of some rows (x) to others (memory)."""

    def __init__(self, m: ModelOptions, dropout: float) -> None:
        super().__init__()
        bias = m.block != "modern"
        self.head_size = m.hidden_size // m.num_heads
        self.dropout = dropout
        self.q = nn.Linear(m.hidden_size, m.hidden_size, bias=bias)
        self.kv = nn.Linear(m.hidden_size, 2 * m.hidden_size, bias=bias)
        self.out = nn.Linear(m.hidden_size, m.hidden_size, bias=bias)

    def forward(
        self,
        x_BSD: Tensor,
        memory_BTD: Tensor,
        rotation: Rotation,
        there: Rotation,
        bounds: Bounds | None = None,
    ) -> Tensor:
        q = self.q(x_BSD).unflatten(-1, (-1, self.head_size))
        k, v = self.kv(memory_BTD).unflatten(-1, (-1, 2, self.head_size)).unbind(-2)
        q, k = rotate(q, rotation), rotate(k, there)
        return self.out(attend(q, k, v, self.dropout if self.training else 0.0, bounds))


def attend(
    q_BSHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor, dropout: float, bounds: Bounds | None = None
) -> Tensor:
    """Return softmax attention -> [B, S, H * E]; every query row to every key row, or to those within
    `bounds`."""
    if bounds is not None and bounds.mask_B1ST is None:
        (B, S), T = q_BSHE.shape[:2], k_BTHE.shape[1]
        q, k, v = q_BSHE.flatten(0, 1), k_BTHE.flatten(0, 1), v_BTHE.flatten(0, 1)
        mixed = varlen_attn(q, k, v, bounds.query_starts, bounds.key_starts, S, T)
        assert isinstance(mixed, Tensor)
        return mixed.reshape(B, S, -1)
    if bounds is None:
        return _attend(q_BSHE, k_BTHE, v_BTHE, dropout, None, _is_slow_fused(q_BSHE))
    return _attend(q_BSHE, k_BTHE, v_BTHE, dropout, bounds.mask_B1ST, False)


def _attend(
    q_BSHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor, dropout: float, mask: Tensor | None, unfused: bool
) -> Tensor:
    q, k, v = q_BSHE.transpose(1, 2), k_BTHE.transpose(1, 2), v_BTHE.transpose(1, 2)
    if unfused:
        mixed_BHSE = _unfused_attention(q, k, v, dropout, mask)
    else:
        mixed_BHSE = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return mixed_BHSE.transpose(1, 2).flatten(-2)


def _is_slow_fused(x: Tensor) -> bool:
    """Whether scores in memory are faster: the CPU's fused kernel (torch 2.13) takes twice as long in 16
    bits, and more backwards."""
    return x.device.type == "cpu" and x.dtype.itemsize == 2


def attend_one_way(q_BLHE: Tensor, k_BLHE: Tensor, v_BLHE: Tensor, dropout: float, one: OneWay) -> Tensor:
    """Return softmax attention -> [B, L, H * E] of visible rows among each other, and of masks to all."""
    q, k, v = (rows[:, : one.V] for rows in (q_BLHE, k_BLHE, v_BLHE))
    visible = attend(q, k, v, dropout, one.among)
    if one.join is not None:
        k_BLHE, v_BLHE = take(k_BLHE, one.join), take(v_BLHE, one.join)
    return torch.cat((visible, attend(q_BLHE[:, one.V :], k_BLHE, v_BLHE, dropout, one.masks)), 1)


def attend_locally(q_BSHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, dropout: float, local: Local) -> Tensor:
    """Return softmax attention -> [B, S, H * E] of each row to those that a local layer lets it see."""
    if local.join is not None:
        q, k, v = (take(rows, local.join) for rows in (q_BSHE, k_BSHE, v_BSHE))
        mixed = attend_locally(q, k, v, dropout, local._replace(join=None))
        return take(mixed, local.join.argsort(1))
    if local.flex is not None:
        q, k, v = (rows.transpose(1, 2) for rows in (q_BSHE, k_BSHE, v_BSHE))
        return _flex_attention(q.device.type)(q, k, v, block_mask=local.flex).transpose(1, 2).flatten(-2)
    # Split and joined again, for the gradient of each slice of all rows would be as large as all rows.
    q_parts, k_parts, v_parts = (rows.split(local.window // 2, 1) for rows in (q_BSHE, k_BSHE, v_BSHE))
    parts = []
    for i, mask in enumerate(local.masks):
        near = slice(max(0, i - 1), i + 2)
        k, v = torch.cat(k_parts[near], 1), torch.cat(v_parts[near], 1)
        parts.append(_attend(q_parts[i], k, v, dropout, mask, _is_slow_fused(k)))
    return torch.cat(parts, 1)


@cache
def _flex_attention(device: str) -> Any:
    """The kernel is what torch.compile makes of it; a CPU runs the function itself, in tests."""
    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=False)


def take(x_BSX: Tensor, rows_BT: Tensor) -> Tensor:
    """Return rows of each sequence, by number -> [B, T, ...]."""
    B, S = x_BSX.shape[:2]
    flat = rows_BT + S * torch.arange(B, device=rows_BT.device)[:, None]
    return x_BSX.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, (B, -1))


def _unfused_attention(
    q_BHSE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, dropout: float, mask: Tensor | None
) -> Tensor:
    """Attention with its scores in memory; under a mask each row must see another."""
    scores_BHST = (q_BHSE * q_BHSE.shape[-1] ** -0.5) @ k_BHTE.transpose(-1, -2)
    if mask is not None:
        scores_BHST = scores_BHST.masked_fill(~mask, float("-inf"))
    return F.dropout(scores_BHST.softmax(-1), dropout) @ v_BHTE


def supports_varlen(device: torch.device) -> bool:
    """Return whether torch's kernel for rows of varying length runs here. It takes 16 bits and drops
    nothing."""
    return device.type == "cuda" and torch.is_autocast_enabled("cuda")


def supports_flex(device: torch.device) -> bool:
    """Return whether flex_attention's kernel runs here. It drops nothing."""
    return device.type == "cuda"


def rotate(x_BSHE: Tensor, rotation: Rotation) -> Tensor:
    """Apply rotary positions (Su et al. 2021, arXiv 2104.09864) in the half-split layout, in float32.

    The halves are exchanged by rolling: of two halves put together in 16 bits, torch 2.13 compiles a backward
    pass for the CPU that gives no numbers.
    """
    if rotation is None:
        return x_BSHE
    cos, sin = rotation
    x = x_BSHE.to(torch.promote_types(x_BSHE.dtype, cos.dtype))
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x_BSHE.dtype)
