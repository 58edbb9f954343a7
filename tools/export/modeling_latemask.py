"""A LateMask pre-training model for transformers: encoder, late [MASK]s, decoder and head in one file.

`python -m tools.export RUN --with-decoder` puts this file into the folder it writes, so it needs torch
and transformers only; load the folder with

    AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)

It computes what training computed, in the order of the text: training drops the [MASK] rows from the
encoder and appends them later, here they are rows that nobody attends to until they join. Parameters
have the names that they have in training.

Letters: B batch, S rows of a text, D width, H heads, E head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

Rotation = tuple[Tensor, Tensor] | None
"""cos and sin, each [B, S, 1, E]; None where positions are learned."""


class LateMaskConfig(PretrainedConfig):
    """The options of a LateMask model; see the config of LateMask for what they mean."""

    model_type = "latemask"

    def __init__(
        self,
        vocab_size: int = 50265,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 512,
        norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        block: str = "roberta",
        norm: str = "post",
        mask_from: int = 12,
        join: str = "two_way",
        decoder_layers: int = 2,
        decoder_kind: str = "self",
        decoder_positions: str = "own",
        mask_vector: str = "learned",
        mask_leak: float = 0.0,
        token_type: bool = False,
        local_window: int = 0,
        global_every: int = 3,
        local_rope_theta: float = 10000.0,
        mask_token_id: int = 50264,
        **more: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.norm_eps = norm_eps
        self.rope_theta = rope_theta
        self.block = block
        self.norm = norm
        self.mask_from = mask_from
        self.join = join
        self.decoder_layers = decoder_layers
        self.decoder_kind = decoder_kind
        self.decoder_positions = decoder_positions
        self.mask_vector = mask_vector
        self.mask_leak = mask_leak
        self.token_type = token_type
        self.local_window = local_window
        self.global_every = global_every
        self.local_rope_theta = local_rope_theta
        self.mask_token_id = mask_token_id
        super().__init__(**more)


def make_norm(c: LateMaskConfig) -> nn.LayerNorm:
    return nn.LayerNorm(c.hidden_size, eps=c.norm_eps, bias=c.block != "modern")


def attend(q_BSHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor, seen_BST: Tensor) -> Tensor:
    """Return softmax attention of every row to those it sees (bool; S may be 1, for all) -> [B, S, D]."""
    q, k, v = q_BSHE.transpose(1, 2), k_BTHE.transpose(1, 2), v_BTHE.transpose(1, 2)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_BST[:, None])
    return mixed.transpose(1, 2).flatten(-2)


def rotate(x_BSHE: Tensor, rotation: Rotation) -> Tensor:
    if rotation is None:
        return x_BSHE
    cos, sin = rotation
    first, second = x_BSHE.chunk(2, -1)
    return (x_BSHE * cos + torch.cat((-second, first), -1) * sin).to(x_BSHE.dtype)


class Attention(nn.Module):
    """All rows ask, the seen rows answer; the fused projection is laid out head by head."""

    def __init__(self, c: LateMaskConfig) -> None:
        super().__init__()
        bias = c.block != "modern"
        self.head_size = c.hidden_size // c.num_attention_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=bias)
        self.out = nn.Linear(c.hidden_size, c.hidden_size, bias=bias)

    def forward(self, x: Tensor, rotation: Rotation, seen: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3, self.head_size)).unbind(-2)
        return self.out(attend(rotate(q, rotation), rotate(k, rotation), v, seen))


class CrossAttention(nn.Module):
    """All rows ask, the seen rows of a memory answer."""

    def __init__(self, c: LateMaskConfig) -> None:
        super().__init__()
        bias = c.block != "modern"
        self.head_size = c.hidden_size // c.num_attention_heads
        self.q = nn.Linear(c.hidden_size, c.hidden_size, bias=bias)
        self.kv = nn.Linear(c.hidden_size, 2 * c.hidden_size, bias=bias)
        self.out = nn.Linear(c.hidden_size, c.hidden_size, bias=bias)

    def forward(self, x: Tensor, memory: Tensor, rotation: Rotation, seen: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, self.head_size))
        k, v = self.kv(memory).unflatten(-1, (-1, 2, self.head_size)).unbind(-2)
        return self.out(attend(rotate(q, rotation), rotate(k, rotation), v, seen))


class FeedForward(nn.Module):
    """GELU layer, or GeGLU with [activated; linear] halves."""

    def __init__(self, c: LateMaskConfig) -> None:
        super().__init__()
        self.gated = c.block == "modern"
        if self.gated:
            self.gate_up = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        else:
            self.up = nn.Linear(c.hidden_size, c.intermediate_size)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=not self.gated)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            active, linear = self.gate_up(x).chunk(2, -1)
            return self.down(F.gelu(active) * linear)
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    """Attention and feed-forward; `kind` is self, cross (memory besides) or query (some rows stand)."""

    def __init__(self, c: LateMaskConfig, kind: str, normed_input: bool = False) -> None:
        super().__init__()
        self.kind, self.pre = kind, c.norm == "pre"
        self.attention_norm = nn.Identity() if normed_input else make_norm(c)
        self.attention = (CrossAttention if kind == "query" else Attention)(c)
        if kind == "cross":
            self.cross_norm = make_norm(c)
            self.cross = CrossAttention(c)
        self.ffn_norm = make_norm(c)
        self.ffn = FeedForward(c)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        seen: Tensor,
        memory: Tensor | None = None,
        seen_memory: Tensor | None = None,
        is_query: Tensor | None = None,
    ) -> Tensor:
        before = x
        h = self.attention_norm(x) if self.pre else x
        arguments = (h, h, rotation, seen) if self.kind == "query" else (h, rotation, seen)
        x = self._add(x, self.attention(*arguments), self.attention_norm)
        if self.kind == "cross":
            h = self.cross_norm(x) if self.pre else x
            x = self._add(x, self.cross(h, memory, rotation, seen_memory), self.cross_norm)
        h = self.ffn_norm(x) if self.pre else x
        x = self._add(x, self.ffn(h), self.ffn_norm)
        return x if is_query is None else torch.where(is_query[..., None], x, before)

    def _add(self, x: Tensor, change: Tensor, after: nn.Module) -> Tensor:
        return x + change if self.pre else after(x + change)


class Decoder(nn.Module):
    """The layers in which the [MASK]s are predicted."""

    def __init__(self, c: LateMaskConfig) -> None:
        super().__init__()
        learned = c.block != "modern"
        if learned and c.decoder_positions == "own":
            self.positions = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.input_norm = make_norm(c) if learned else nn.Identity()
        kind = "query" if c.decoder_kind == "bottleneck" else c.decoder_kind
        self.layers = nn.ModuleList(Layer(c, kind) for _ in range(c.decoder_layers))
        self.final_norm = make_norm(c) if c.norm == "pre" else nn.Identity()


class Head(nn.Module):
    """dense, GELU, norm; the word table and this bias follow."""

    def __init__(self, c: LateMaskConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, c.hidden_size, bias=c.block != "modern")
        self.norm = make_norm(c)
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x)))


class LateMaskForMaskedLM(PreTrainedModel):
    """Fills in [MASK]s as it learned to: they are not in the encoder, or not in its first layers."""

    config_class = LateMaskConfig
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: LateMaskConfig) -> None:
        super().__init__(config)
        c = config
        self.tok = nn.Embedding(c.vocab_size, c.hidden_size)
        if c.block != "modern":
            self.positions = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        if c.token_type:
            self.token_type = nn.Parameter(torch.zeros(c.hidden_size))
            if c.block == "bert":
                self.second_token_type = nn.Parameter(torch.zeros(c.hidden_size))
            else:
                self.padding_positions = nn.Parameter(torch.zeros(2 * c.hidden_size))
        self.embedding_norm = make_norm(c)
        self.layers = nn.ModuleList(
            Layer(c, "self", normed_input=c.block == "modern" and i == 0) for i in range(c.num_hidden_layers)
        )
        self.final_norm = make_norm(c) if c.norm == "pre" else nn.Identity()
        if c.mask_vector == "learned":
            self.mask_vector = nn.Parameter(torch.zeros(c.hidden_size))
        self.decoder = Decoder(c) if c.decoder_layers else None
        self.head = Head(c)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tok

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.tok = value  # type: ignore[assignment]

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from a folder; what is new there (a longer vocabulary) is left as torch makes it."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """Take input_ids [B, S] with [MASK]s; labels [B, S]: the true ids, -100 where there is no
        question."""
        text = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        positions = (text.long().cumsum(1) - 1).clamp(min=0)
        late = self._late(input_ids, text)
        x = self._predict(input_ids, positions, text, late)
        logits = F.linear(self.head(x), self.tok.weight, self.head.bias)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)

    def _late(self, ids: Tensor, text: Tensor) -> Tensor:
        """bool [B, S]: the [MASK]s that join late, all but the first few if trained with `mask_leak`."""
        masks = (ids == self.config.mask_token_id) & text
        leaked = (self.config.mask_leak * masks.sum(1, keepdim=True) + 0.5 + 1e-9).floor()
        return masks & (masks.cumsum(1) > leaked)

    def _predict(self, ids: Tensor, positions: Tensor, text: Tensor, late: Tensor) -> Tensor:
        c, rotation = self.config, self._rotation(positions, self.config.rope_theta)
        local_rotation = self._rotation(positions, c.local_rope_theta)
        near = (positions[:, :, None] - positions[:, None]).abs() <= c.local_window // 2
        visible, text = (text & ~late)[:, None], text[:, None]
        seen = visible
        vector = self.mask_vector if c.mask_vector == "learned" else self.tok.weight[c.mask_token_id]
        masks = vector.expand(*ids.shape, -1)
        x = self._embed(self.tok(ids), positions)
        for i, layer in enumerate(self.layers):
            if i == c.mask_from:
                x = torch.where(late[..., None], self._embed(masks, positions), x)
                seen = torch.where(late[..., None], text, visible) if c.join == "one_way" else text
            local = c.local_window and i % c.global_every
            x = layer(x, local_rotation if local else rotation, seen & near if local else seen)
        x = encoded = self.final_norm(x)
        if self.decoder is None:
            return x
        d = self.decoder
        is_mask = (ids == c.mask_token_id) & text[:, 0]
        if c.decoder_kind == "bottleneck":
            late, text = is_mask, text & (is_mask | (visible[:, 0].cumsum(1) == 1) & visible[:, 0])[:, None]
        x = torch.where(late[..., None], masks, x)
        if c.block != "modern":
            x = x + (d.positions if c.decoder_positions == "own" else self.positions)(positions)
        x = d.input_norm(x)
        is_query = is_mask if c.decoder_kind in ("query", "bottleneck") else None
        for layer in d.layers:
            x = layer(x, rotation, text, encoded, visible, is_query)
        return d.final_norm(x)

    def _embed(self, words: Tensor, positions: Tensor) -> Tensor:
        if self.config.token_type:
            words = words + self.token_type
        if self.config.block != "modern":
            words = words + self.positions(positions)
        return self.embedding_norm(words)

    def _rotation(self, positions: Tensor, theta: float) -> Rotation:
        c = self.config
        if c.block != "modern":
            return None
        size = c.hidden_size // c.num_attention_heads
        even = torch.arange(0, size, 2, device=positions.device).float()
        with torch.autocast(positions.device.type, enabled=False):
            angle = positions.float()[:, :, None, None] * (1.0 / (theta ** (even / size)))
            angle = torch.cat((angle, angle), -1)
            return angle.cos(), angle.sin()
