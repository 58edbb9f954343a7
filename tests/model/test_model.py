"""The model in permuted row order against slow, obvious references in natural order.

The reference below reads the same parameters but shares no code with the model: one sequence at a
time, boolean indexing and scatter, attention with a written-out softmax, rotation as complex
multiplication. torch's and Hugging Face's encoders are further, independent oracles.
"""

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.model.attention import _flex_mask
from pretrain.model.huggingface import hugging_face_state, left_out
from pretrain.model.late_mask import Batch, LateMaskModel, init_weights
from tests.support.methods import BLOCKS, METHODS, small
from tools.export.huggingface import hugging_face_config

VOCAB, MASK, LAYERS, B, L = 50, 49, 2, 2, 20
PREDICTED, MASKED = 8, 5
TOKENIZER = SimpleNamespace(vocab_size=VOCAB, bos=0, pad=1, eos=2, mask=MASK)
SHARED_POSITIONS = "3ml-self, positions shared"
VARIANTS = [*METHODS, SHARED_POSITIONS]
BOUNDED = [name for name in VARIANTS if name != "retromae"]
LATE = [name for name in VARIANTS if name != "mlm"]

blocks = pytest.mark.parametrize("block", BLOCKS)
late = pytest.mark.parametrize("method", LATE)


def make_config(block: str, method: str, **more: Any) -> Config:
    if method == SHARED_POSITIONS:
        method, more = "3ml-self", {"decoder_positions": "shared", **more}
    return small(method, block, model={"max_positions": 72, "vocab_multiple": 32, **more})


def make_model(block: str, method: str, recompute: bool = False, **more: Any) -> LateMaskModel:
    """A model whose every parameter is random: biases, norm gains and padded rows too."""
    model = LateMaskModel(make_config(block, method, **more).model, VOCAB, MASK, recompute)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty(parameter.shape).normal_(0.0, 0.15, generator=generator)
            is_gain = "norm" in name and name.endswith("weight")
            parameter.copy_(1.0 + noise if is_gain else noise)
    return model


class Natural(NamedTuple):
    """A corrupted batch in the order of the text: what the papers describe."""

    ids: Tensor
    """[B, L] pieces, [MASK] where masked."""
    targets: Tensor
    """[B, L] true pieces."""
    predicted: Tensor
    """[B, L] bool."""
    masked: Tensor
    """[B, L] bool, a part of predicted."""


def make_batches(seed: int = 0, length: int = L) -> tuple[Natural, Batch, Tensor]:
    """The same batch in natural and in permuted order, and the order [B, L] that relates them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(B)])
    targets = torch.randint(4, VOCAB - 1, (B, length), generator=generator)
    rank = order.argsort(1)
    predicted, masked = rank >= length - PREDICTED, rank >= length - MASKED
    ids = torch.where(masked, MASK, targets)
    replaced = predicted & ~masked & (torch.rand(B, length, generator=generator) < 0.5)
    ids = torch.where(replaced, torch.randint(4, VOCAB - 1, (B, length), generator=generator), ids)
    natural = Natural(ids, targets, predicted, masked)
    last = order[:, length - PREDICTED :]
    batch = Batch(ids.gather(1, order), order, targets.gather(1, last), MASKED)
    return natural, batch, order


# ---- the reference -------------------------------------------------------------------------------


def reference_rows(model: LateMaskModel, batch: Natural, documents: Tensor | None = None) -> Tensor:
    """Last hidden states of the predicted tokens, text order within a sequence: [B * P, D].

    With `documents` [B, L] each of a window's documents goes through the model alone, in its place.
    """
    if documents is None:
        documents = torch.zeros_like(batch.ids)
    rows = []
    for b in range(len(batch.ids)):
        for number in documents[b].unique():
            place = (documents[b] == number).nonzero()[:, 0]
            rows.append(_sequence(model, *(column[b, place] for column in batch), place))
    return torch.cat(rows)


def reference_loss(model: LateMaskModel, batch: Natural, documents: Tensor | None = None) -> Tensor:
    logits = reference_logits(model, reference_rows(model, batch, documents))
    return F.cross_entropy(logits, batch.targets[batch.predicted])


def reference_logits(model: LateMaskModel, rows_ND: Tensor) -> Tensor:
    hidden = _norm(model.head.norm, _gelu(_linear(model.head.dense, rows_ND)))
    return (hidden @ model.tok.weight.T + model.head.bias)[:, :VOCAB]


def _sequence(
    model: LateMaskModel, ids: Tensor, targets: Tensor, predicted: Tensor, masked: Tensor, place: Tensor
) -> Tensor:
    m = model.m
    own = m.mask_from > 0 and m.mask_vector == "learned"
    mask_row = model.mask_vector if own else model.tok.weight[MASK]
    here = masked.logical_not() if m.mask_from > 0 else torch.ones_like(masked)
    x, attends = _embedded(model, model.tok.weight[ids[here]], place[here]), None
    for i, layer in enumerate(model.layers):
        if 0 < m.mask_from == i:
            full = x.new_zeros(len(ids), m.hidden_size)
            full[here] = x
            full[masked] = _embedded(model, mask_row.expand(int(masked.sum()), -1), place[masked])
            x, here = full, torch.ones_like(masked)
            if m.join == "one_way":
                attends = masked[:, None] | ~masked[None, :]
        if local := m.local_window > 0 and i % m.global_every != 0:
            near = (place[here][:, None] - place[here]).abs() <= m.local_window // 2
            seen = near if attends is None else near & attends
        x = _layer(model, layer, x, place[here], attends=seen if local else attends, local=local)
    x = _norm(model.final_norm, x)
    if model.decoder is not None:
        x = _decoded(model, x, here, masked, predicted, mask_row, place)
    return x[predicted]


def _decoded(
    model: LateMaskModel,
    encoded: Tensor,
    here: Tensor,
    masked: Tensor,
    predicted: Tensor,
    mask_row: Tensor,
    place: Tensor,
) -> Tensor:
    m, d = model.m, model.decoder
    assert d is not None
    x = encoded.new_zeros(len(masked), m.hidden_size)
    if m.decoder == "bottleneck":
        x[predicted] = _bottleneck(model, encoded[0], predicted, mask_row, place[here][0], place)
        return x
    x[here] = encoded
    x[masked] = mask_row
    if m.block == "roberta":
        table = model.positions if m.decoder_positions == "shared" else d.positions
        x = _norm(d.input_norm, x + table.weight[place])
    for layer in d.layers:
        if m.decoder == "query":
            changed = x.clone()
            changed[predicted] = _query_layer(model, layer, x, predicted, place)
            x = changed
        elif m.decoder == "cross":
            x = _layer(model, layer, x, place, encoded, place[here])
        else:
            x = _layer(model, layer, x, place)
    return _norm(d.final_norm, x)


def _bottleneck(
    model: LateMaskModel,
    first: Tensor,
    predicted: Tensor,
    mask_row: Tensor,
    first_place: Tensor,
    place: Tensor,
) -> Tensor:
    """Only the first row that is no late mask is known, and where the predicted tokens are."""
    m, d = model.m, model.decoder
    assert d is not None
    x = torch.stack([first, *mask_row.expand(int(predicted.sum()), -1)])
    where = torch.cat((first_place[None], place[predicted]))
    if m.block == "roberta":
        table = model.positions if m.decoder_positions == "shared" else d.positions
        x = _norm(d.input_norm, x + table.weight[where])
    asking = torch.arange(len(x)) > 0
    for layer in d.layers:
        x = torch.cat((x[:1], _query_layer(model, layer, x, asking, where)))
    return _norm(d.final_norm, x[1:])


def _embedded(model: LateMaskModel, words: Tensor, place: Tensor) -> Tensor:
    if model.m.block == "roberta":
        words = words + model.positions.weight[place]
    return _norm(model.embedding_norm, words)


def _layer(
    model: LateMaskModel,
    layer: nn.Module,
    x: Tensor,
    place: Tensor,
    memory: Tensor | None = None,
    memory_place: Tensor | None = None,
    attends: Tensor | None = None,
    local: bool = False,
) -> Tensor:
    def attend(h: Tensor) -> Tensor:
        q, k, v = _heads(model, layer.attention.qkv, h, 3)
        return _linear(layer.attention.out, _attention(model, q, k, v, place, place, attends, local))

    def attend_memory(h: Tensor) -> Tensor:
        (q,) = _heads(model, layer.cross.q, h, 1)
        k, v = _heads(model, layer.cross.kv, memory, 2)
        return _linear(layer.cross.out, _attention(model, q, k, v, place, memory_place))

    x = _residual(model, layer.attention_norm, attend, x)
    if memory is not None:
        x = _residual(model, layer.cross_norm, attend_memory, x)
    return _residual(model, layer.ffn_norm, lambda h: _ffn(layer.ffn, h), x)


def _query_layer(model: LateMaskModel, layer: nn.Module, x: Tensor, asking: Tensor, place: Tensor) -> Tensor:
    """A self layer in which only the rows that ask are updated."""
    pre = model.m.norm == "pre"
    h = _norm(layer.attention_norm, x) if pre else x
    (q,) = _heads(model, layer.attention.q, h[asking], 1)
    k, v = _heads(model, layer.attention.kv, h, 2)
    change = _linear(layer.attention.out, _attention(model, q, k, v, place[asking], place))
    y = x[asking] + change
    y = y if pre else _norm(layer.attention_norm, y)
    return _residual(model, layer.ffn_norm, lambda h: _ffn(layer.ffn, h), y)


def _residual(model: LateMaskModel, norm: nn.Module, change: Any, x: Tensor) -> Tensor:
    if model.m.norm == "pre":
        return x + change(_norm(norm, x))
    return _norm(norm, x + change(x))


def _heads(model: LateMaskModel, linear: nn.Linear, x: Tensor, parts: int) -> list[list[Tensor]]:
    """`parts` lists of one [S, E] per head; the rows of the projection are head by head."""
    size = model.m.hidden_size // model.m.num_heads
    pieces = _linear(linear, x).split(size, dim=-1)
    return [list(pieces[part::parts]) for part in range(parts)]


def _attention(
    model: LateMaskModel,
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    here: Tensor,
    there: Tensor | None,
    attends: Tensor | None = None,
    local: bool = False,
) -> Tensor:
    """attends: bool [S, T], the pairs of rows that attend; default all."""
    mixed = []
    for q_SE, k_TE, v_TE in zip(q, k, v, strict=True):
        if model.m.block == "modern":
            theta = model.m.local_rope_theta if local else model.m.rope_theta
            q_SE, k_TE = _turned(theta, q_SE, here), _turned(theta, k_TE, there)
        scores = q_SE @ k_TE.T / math.sqrt(q_SE.shape[-1])
        if attends is not None:
            scores = scores.masked_fill(~attends, -math.inf)
        top = scores.detach().max() if scores.numel() else 0.0  # a document may have no row here
        odds = (scores - top).exp()
        mixed.append(odds / odds.sum(-1, keepdim=True) @ v_TE)
    return torch.cat(mixed, -1)


def _turned(theta: float, x_SE: Tensor, place: Tensor | None) -> Tensor:
    """Pairs (i, i + E/2) as complex numbers times e^(i angle). cos and sin are float32, the model's
    contract with Hugging Face; the product has the precision of x."""
    assert place is not None
    half = x_SE.shape[-1] // 2
    exponent = 2 * torch.arange(half, dtype=torch.float32) / (2 * half)
    frequency = 1.0 / theta**exponent
    angle = place.float()[:, None] * frequency
    turn = torch.complex(angle.cos().to(x_SE.dtype), angle.sin().to(x_SE.dtype))
    z = torch.complex(x_SE[:, :half], x_SE[:, half:]) * turn
    return torch.cat((z.real, z.imag), -1)


def _ffn(ffn: nn.Module, h: Tensor) -> Tensor:
    if not ffn.gated:
        return _linear(ffn.down, _gelu(_linear(ffn.up, h)))
    both = _linear(ffn.gate_up, h)
    half = both.shape[-1] // 2
    return _linear(ffn.down, _gelu(both[:, :half]) * both[:, half:])


def _linear(linear: nn.Module, x: Tensor) -> Tensor:
    y = x @ linear.weight.T
    return y if linear.bias is None else y + linear.bias


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return y if norm.bias is None else y + norm.bias


def _gelu(x: Tensor) -> Tensor:
    return x * (1.0 + torch.erf(x / math.sqrt(2.0))) / 2.0


# ---- comparing -----------------------------------------------------------------------------------


def gradients(model: LateMaskModel, loss: Tensor, unused: bool = False) -> dict[str, Tensor]:
    """By name; `unused`: a parameter may have no part in the loss, its gradient is 0."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=unused, materialize_grads=unused)
    return dict(zip(names, found, strict=True))


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Equal names, and differences below `tolerance` x the largest value of the tensor; a tensor
    whose true values vanish (the bias of the keys) is measured by the largest value of all."""
    assert ours.keys() == theirs.keys()
    floor = 1e-2 * max(value.abs().max().item() for value in theirs.values())
    for name, value in theirs.items():
        scale = max(value.abs().max().item(), floor)
        error = (ours[name] - value).abs().max().item()
        assert error <= tolerance * scale, f"{name}: {error} of {scale}"


def permuted_logits(model: LateMaskModel, batch: Batch, natural: Natural, order: Tensor) -> Tensor:
    """Our logits of the predicted rows, put back into text order: [B * P, W]."""
    hidden = model.head(model.predicted_rows(batch))
    logits = (hidden @ model.tok.weight.T + model.head.bias)[..., :VOCAB]
    full = logits.new_zeros(*order.shape, VOCAB)
    places = order[:, -PREDICTED:, None].expand(-1, -1, VOCAB)
    return full.scatter(1, places, logits)[natural.predicted]


# ---- against the reference -----------------------------------------------------------------------


@pytest.mark.parametrize("block", [*BLOCKS, "local"])
@pytest.mark.parametrize("method", VARIANTS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_permuted_equals_natural(block: str, method: str, dtype: torch.dtype, tolerance: float) -> None:
    model = make_model(block, method).to(dtype)
    natural, batch, order = make_batches()
    loss, expected = model(batch), reference_loss(model, natural)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    logits = {"logits": permuted_logits(model, batch, natural, order)}
    others = {"logits": reference_logits(model, reference_rows(model, natural))}
    assert_near(logits, others, tolerance)
    assert_near(gradients(model, loss), gradients(model, expected), tolerance)


DOCUMENTS = torch.tensor([[0] * 7 + [1] * 4 + [2] * 9, [0] * 20])
"""[B, L] as in a window that two documents end in, and one of a single document."""


def slow_varlen(
    q: Tensor, k: Tensor, v: Tensor, begin_q: Tensor, begin_k: Tensor, most_q: int, most_k: int
) -> Tensor:
    """What `varlen_attn` promises, one stretch at a time: [rows, H, E]."""
    assert begin_q.dtype == begin_k.dtype == torch.int32
    mixed = torch.zeros_like(q)
    for i in range(len(begin_q) - 1):
        asking, asked = slice(*begin_q[i : i + 2].tolist()), slice(*begin_k[i : i + 2].tolist())
        assert asking.stop - asking.start <= most_q and asked.stop - asked.start <= most_k
        scores = torch.einsum("she,the->hst", q[asking], k[asked]) / math.sqrt(q.shape[-1])
        mixed[asking] = torch.einsum("hst,the->she", scores.softmax(-1), v[asked])
    return mixed


@blocks
@pytest.mark.parametrize("method", BOUNDED)
@pytest.mark.parametrize("stretches", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_documents_kept_apart(
    block: str, method: str, stretches: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each document as if it were alone in the model, forward and gradients; by mask and by stretches."""
    monkeypatch.setattr("pretrain.model.late_mask.supports_varlen", lambda device: stretches)
    monkeypatch.setattr("pretrain.model.attention.varlen_attn", slow_varlen)
    model = make_model(block, method).double()
    natural, batch, order = make_batches(seed)
    bounded = batch._replace(documents=DOCUMENTS.gather(1, order), most_documents=4)
    loss, expected = model(bounded), reference_loss(model, natural, DOCUMENTS)
    assert abs(expected.item() - model(batch).item()) > 1e-5  # it matters
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    logits = {"logits": permuted_logits(model, bounded, natural, order)}
    others = {"logits": reference_logits(model, reference_rows(model, natural, DOCUMENTS))}
    assert_near(logits, others, 1e-10)
    assert_near(gradients(model, loss), gradients(model, expected), 1e-10)


@blocks
@pytest.mark.parametrize("method", BOUNDED)
def test_a_document_without_a_visible_row(block: str, method: str) -> None:
    """It has nothing to look at in the encoder's output; what comes out is still a number."""
    model = make_model(block, method).double()
    natural, _, _ = make_batches()
    masked = torch.stack((DOCUMENTS[0] == 1, DOCUMENTS[0] == 1))
    documents = DOCUMENTS[:1].expand(B, -1)
    natural = natural._replace(
        predicted=masked, masked=masked, ids=torch.where(masked, MASK, natural.targets)
    )
    order = masked.long().argsort(dim=1, stable=True)
    ids, targets = natural.ids.gather(1, order), natural.targets.gather(1, order)[:, -4:]
    bounded = Batch(ids, order, targets, 4, documents.gather(1, order), 4)
    loss, expected = model(bounded), reference_loss(model, natural, documents)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("method", ["mlm", "shared-depth", "one-way", "3ml-cross", "3ml-query"])
@pytest.mark.parametrize("bounded", [False, True])
def test_local_layers(method: str, bounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By blocks, and by what flex_attention is told (run by torch itself here), beside documents too."""
    model = make_model("local", method).double()
    natural, batch, order = make_batches()
    if bounded:
        batch = batch._replace(documents=DOCUMENTS.gather(1, order), most_documents=4)
    expected = reference_loss(model, natural, DOCUMENTS if bounded else None)
    loss, whole = model(batch), make_model("modern", method).double()(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert abs(loss.item() - whole.item()) > 1e-5  # it matters
    assert_near(gradients(model, loss), gradients(model, expected), 1e-10)
    monkeypatch.setattr("pretrain.model.late_mask.supports_flex", lambda device: True)
    with torch.no_grad():
        assert model(batch).item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("side", [1, 64, 100, 128, 300])
def test_flex_attention_skips_nothing_that_is_seen(side: int) -> None:
    """Blocks that it is told to work on cover all pairs within the window of 600 rows of 1,000."""
    places = torch.stack([torch.randperm(1000)[:600].sort().values for _ in range(2)])
    traits = (places, torch.zeros_like(places), torch.zeros_like(places, dtype=torch.bool))
    found = _flex_mask(traits, side).to_dense()[0, 0].bool()
    near = (places[:, :, None] - places[:, None]).abs() <= side
    assert found.repeat_interleave(128, 0).repeat_interleave(128, 1)[:600, :600][near.any(0)].all()
    assert side > 128 or not found[0, 2:].any()


def test_one_document_is_no_bound() -> None:
    model = make_model("post", "3ml-self").double()
    _, batch, _ = make_batches()
    whole = batch._replace(documents=torch.zeros_like(batch.ids))
    assert model(whole).item() == pytest.approx(model(batch).item(), rel=1e-12)


@blocks
@late
def test_masks_of_any_number(block: str, method: str) -> None:
    """All-[MASK] corruption, no [MASK] at all, and every token predicted."""
    model = make_model(block, method).double()
    for predicted, masked in ((6, 6), (6, 0), (L, 9)):
        natural, _, order = make_batches()
        rank = order.argsort(1)
        natural = natural._replace(predicted=rank >= L - predicted, masked=rank >= L - masked)
        ids = torch.where(natural.masked, MASK, natural.targets)
        natural = natural._replace(ids=ids)
        targets = natural.targets.gather(1, order[:, L - predicted :])
        batch = Batch(ids.gather(1, order), order, targets, masked)
        expected = reference_loss(model, natural).item()
        assert model(batch).item() == pytest.approx(expected, rel=1e-10), (predicted, masked)


@blocks
@late
@pytest.mark.parametrize("leak, late_masks", [(0.4, 3), (0.5, 2), (1.0, 0)])
def test_leaked_masks_are_pieces_like_others(block: str, method: str, leak: float, late_masks: int) -> None:
    """Of five [MASK] rows the encoder sees the leaked ones (halves rounded up): the reference is told so
    by what it takes for masked."""
    model = make_model(block, method, mask_leak=leak).double()
    natural, batch, order = make_batches()
    natural = natural._replace(masked=order.argsort(1) >= L - late_masks)
    loss, expected = model(batch), reference_loss(model, natural)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    ours, theirs = (gradients(model, loss, unused=True) for loss in (loss, expected))
    assert_near(ours, theirs, 1e-10)


@blocks
def test_all_masks_leaked_is_mlm(block: str) -> None:
    """With no decoder the same bits; with one, the encoder of mlm and a decoder after it."""
    plain, batch = make_model(block, "mlm"), make_batches()[1]
    for method in METHODS:
        leaky = make_model(block, method, mask_leak=1.0)
        leaky.load_state_dict(plain.state_dict(), strict=False)
        if leaky.decoder is None:
            assert torch.equal(leaky(batch), plain(batch))
        encoded = leaky.encode(batch.ids, batch.positions, MASKED)
        assert torch.equal(encoded, plain.encode(batch.ids, batch.positions, MASKED))
        assert leaky.decoder is None or not torch.equal(leaky(batch), plain(batch))


# ---- against torch.nn's own encoder --------------------------------------------------------------


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_mlm_equals_torch_encoder(norm: str) -> None:
    """torch.nn.TransformerEncoder holding the same weights, in natural order, float64."""
    model = make_model(norm, "mlm").double()
    m = model.m
    shape = (m.hidden_size, m.num_heads, m.ffn_size, 0.0, "gelu", m.norm_eps)
    layer = nn.TransformerEncoderLayer(*shape, batch_first=True, norm_first=norm == "pre")
    encoder = nn.TransformerEncoder(layer, m.num_layers, enable_nested_tensor=False).double()

    def torch_names(ours: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs = {}
        for i in range(m.num_layers):
            for part in ("weight", "bias"):
                fused = ours[f"layers.{i}.attention.qkv.{part}"].unflatten(0, (m.num_heads, 3, -1))
                theirs[f"layers.{i}.self_attn.in_proj_{part}"] = fused.transpose(0, 1).flatten(0, 2)
                for name, other in (
                    ("attention.out", "self_attn.out_proj"),
                    ("attention_norm", "norm1"),
                    ("ffn_norm", "norm2"),
                    ("ffn.up", "linear1"),
                    ("ffn.down", "linear2"),
                ):
                    theirs[f"layers.{i}.{other}.{part}"] = ours[f"layers.{i}.{name}.{part}"]
        return theirs

    state = dict(model.named_parameters())
    encoder.load_state_dict(torch_names({name: p.detach() for name, p in state.items()}))
    natural, batch, _ = make_batches()
    words = model.tok(natural.ids) + model.positions.weight[:L]
    x = model.final_norm(encoder(model.embedding_norm(words)))
    hidden = model.head(x[natural.predicted])
    logits = F.linear(hidden, model.tok.weight, model.head.bias)[:, :VOCAB]
    expected = F.cross_entropy(logits, natural.targets[natural.predicted])
    loss = model(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    theirs = dict(zip(names, torch.autograd.grad(expected, parameters), strict=True))
    assert_near(torch_names(gradients(model, loss)), theirs, 1e-10)


# ---- against Hugging Face ------------------------------------------------------------------------


def hugging_face(block: str, model: LateMaskModel, method: str, head: bool) -> nn.Module:
    """transformers' model of this block holding our weights; no key may be missing or left over."""
    import transformers

    form = "masked-lm" if head else "encoder"
    values = hugging_face_config(make_config(block, method), TOKENIZER, form)
    settings = transformers.AutoConfig.for_model(**values)
    auto = transformers.AutoModelForMaskedLM if head else transformers.AutoModel
    theirs = auto.from_config(settings).eval().to(model.tok.weight.dtype)
    ours = hugging_face_state(model.m, model.state_dict(), VOCAB, head)
    missing, unexpected = theirs.load_state_dict(ours, strict=False)
    absent = {name for name in missing if "pooler" not in name and "decoder" not in name}
    assert not unexpected and not absent
    return theirs


@pytest.fixture
def exact_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers rotates in float32; here it keeps the precision of its input (cos, sin stay
    float32 values), so that double precision can be compared."""
    from transformers.models.modernbert import modeling_modernbert as modern

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return q * cos + modern.rotate_half(q) * sin, k * cos + modern.rotate_half(k) * sin

    monkeypatch.setattr(modern, "apply_rotary_pos_emb", rotate)


@blocks
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.usefixtures("exact_rotation")
def test_mlm_equals_hugging_face(block: str, dtype: torch.dtype, tolerance: float) -> None:
    model = make_model(block, "mlm").to(dtype)
    theirs = hugging_face(block, model, "mlm", head=True)
    natural, batch, order = make_batches(length=70)  # beyond ModernBERT's local window
    logits = theirs(input_ids=natural.ids).logits[natural.predicted]
    # Their own loss function would round double precision to float32.
    expected, loss = F.cross_entropy(logits, natural.targets[natural.predicted]), model(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    ours = {"logits": permuted_logits(model, batch, natural, order)}
    assert_near(ours, {"logits": logits}, tolerance)

    expected.backward()
    ours = gradients(model, loss)
    assert not ours["tok.weight"][VOCAB:].any() and not ours["head.bias"][VOCAB:].any()
    ours = hugging_face_state(model.m, ours, VOCAB, head=True)
    other = {name: p.grad for name, p in theirs.named_parameters() if name in ours}
    # Rows that our model does not have: the token type, and the positions of padding.
    for name in [name for name in ours if "token_type" in name]:
        del ours[name], other[name]
    assert_near(ours, other, tolerance)


@blocks
def test_float32_rotation_bound(block: str) -> None:
    """Unpatched, in float64: the rotary products in float32 are all that separates the two."""
    model = make_model(block, "mlm").double()
    natural, batch, order = make_batches(length=70)
    with torch.no_grad():
        out = hugging_face(block, model, "mlm", head=True)(input_ids=natural.ids)
        logits = permuted_logits(model, batch, natural, order)
    tolerance = 1e-6 if block == "modern" else 1e-12
    assert_near({"logits": logits}, {"logits": out.logits[natural.predicted]}, tolerance)


@blocks
@late
@pytest.mark.usefixtures("exact_rotation")
def test_late_encoder_equals_hugging_face(block: str, method: str) -> None:
    """The encoder of a late method, all tokens visible: what is exported."""
    model = make_model(block, method).double()
    ids = make_batches(length=70)[0].targets
    with torch.no_grad():
        theirs = hugging_face(block, model, method, head=False)(input_ids=ids).last_hidden_state
        ours = model.encode(ids, torch.arange(70).expand(B, -1))
    assert_near({"states": ours}, {"states": theirs}, 1e-10)


@blocks
@pytest.mark.parametrize("method", VARIANTS)
def test_every_parameter_is_exported_or_named(block: str, method: str) -> None:
    """Each parameter gets a value of its own; those that survive the mapping are the exported."""
    model = make_model(block, method)
    head = method == "mlm"
    names = enumerate(model.named_parameters())
    state = {name: torch.full_like(p, float(i + 1)) for i, (name, p) in names}
    theirs = hugging_face_state(model.m, state, VOCAB, head)
    carried = {int(value) for tensor in theirs.values() for value in tensor.unique()} - {0}
    gone = left_out(state, head)
    expected = {i + 1 for i, name in enumerate(state) if name not in gone}
    assert carried == expected
    assert bool(gone) == (method != "mlm")


# ---- what a late mask must not do ----------------------------------------------------------------


def encoder_rows(model: LateMaskModel, batch: Batch) -> list[Tensor]:
    """Output of each encoder layer in one forward pass."""
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: seen.append(out)) for layer in model.layers]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return seen


@blocks
@late
def test_encoder_never_sees_a_mask(block: str, method: str) -> None:
    """Only V rows enter, and the identity of what is masked leaves no trace, to the bit."""
    model = make_model(block, method)
    _, batch, _ = make_batches()
    ids = batch.ids.clone()
    ids[:, L - MASKED :] = 7
    before, after = encoder_rows(model, batch), encoder_rows(model, batch._replace(ids=ids))
    for i, (one, other) in enumerate(zip(before, after, strict=True)):
        late_layer = 0 < model.m.mask_from <= i
        assert one.shape[1] == (L if late_layer else L - MASKED)
        assert torch.equal(one, other)


@blocks
@pytest.mark.parametrize("bounded", [False, True])
def test_a_one_way_join_leaves_the_encoder_as_it_is(block: str, bounded: bool) -> None:
    """Visible rows come out as from a text without the masked tokens; of a two-way join they do not."""
    _, batch, order = make_batches()
    V = L - MASKED
    documents = DOCUMENTS.gather(1, order) if bounded else None
    batch = batch._replace(documents=documents, most_documents=4)
    alone = batch._replace(ids=batch.ids[:, :V], positions=batch.positions[:, :V], num_masked=0)
    alone = alone._replace(documents=None if documents is None else documents[:, :V])
    for method, equal in (("one-way", True), ("shared-depth", False)):
        model = make_model(block, method).double()
        rows, words = encoder_rows(model, batch)[-1], encoder_rows(model, alone)[-1]
        if bounded and not equal:  # there rows stand by document after the join
            rows = rows.gather(1, model._order(batch).join.argsort(1)[..., None].expand_as(rows))
        assert torch.allclose(rows[:, :V], words, rtol=0, atol=1e-12) == equal


@blocks
def test_mlm_encoder_sees_all_rows(block: str) -> None:
    _, batch, _ = make_batches()
    rows = [out.shape[1] for out in encoder_rows(make_model(block, "mlm"), batch)]
    assert rows == [L] * LAYERS


@blocks
@pytest.mark.parametrize("method", VARIANTS)
def test_order_of_rows_is_free(block: str, method: str) -> None:
    """Shuffling the context rows changes nothing but rounding."""
    model = make_model(block, method).double()
    _, batch, _ = make_batches()
    shuffle = torch.cat((torch.randperm(L - PREDICTED), torch.arange(L - PREDICTED, L)))
    other = batch._replace(ids=batch.ids[:, shuffle], positions=batch.positions[:, shuffle])
    assert model(other).item() == pytest.approx(model(batch).item(), rel=1e-12)


# ---- the rest of the model's contract ------------------------------------------------------------


@pytest.mark.parametrize("block", [*BLOCKS, "local"])
@pytest.mark.parametrize("method", VARIANTS)
def test_recompute_changes_nothing(block: str, method: str) -> None:
    _, batch, _ = make_batches()
    results = []
    for recompute in (False, True):
        model = make_model(block, method, recompute, dropout=0.1)
        torch.manual_seed(1)
        loss = model(batch)
        results.append((loss, gradients(model, loss)))
    (loss, grads), (other_loss, other_grads) = results
    assert torch.equal(loss, other_loss)
    for name, gradient in grads.items():
        assert torch.equal(gradient, other_grads[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [*BLOCKS, "local"])
@pytest.mark.parametrize("method", VARIANTS)
def test_nothing_is_read_that_nobody_wrote(block: str, method: str, dtype: torch.dtype) -> None:
    """Why runs need not fill new tensors, as torch does here, with what is no number."""
    model, (_, batch, _) = make_model(block, method), make_batches()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(9).isnan().all()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = model(batch)
        assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())
    finally:
        torch.use_deterministic_algorithms(False)


@blocks
def test_recompute_runs_layers_again(block: str) -> None:
    model = make_model(block, "3ml-self", recompute=True)
    assert model.decoder is not None
    runs = []
    for layer in (*model.layers, *model.decoder.layers):
        layer.attention.register_forward_hook(lambda *_: runs.append(1))
    model(make_batches()[1]).backward()
    assert len(runs) == 2 * (LAYERS + len(model.decoder.layers))


@blocks
@pytest.mark.parametrize("method", VARIANTS)
def test_dropout_acts_in_training_only(block: str, method: str) -> None:
    _, batch, _ = make_batches()
    plain, dropping = make_model(block, method), make_model(block, method, dropout=0.2)
    torch.manual_seed(0)
    losses = {dropping.train()(batch).item() for _ in range(3)}
    assert len(losses) == 3
    dropping.eval()
    assert dropping(batch).item() == plain.eval()(batch).item() == plain.train()(batch).item()


def test_decoder_dropout_is_its_own() -> None:
    """Dropout 0 in the decoder leaves the decoder still: from one encoder output, one result."""
    _, batch, _ = make_batches()
    model = make_model("post", "mae-lm", dropout=0.2, decoder_dropout=0.0).train()
    encoded = model.encode(batch.ids, batch.positions, MASKED)
    once, twice = (model._decode(encoded, batch, PREDICTED) for _ in range(2))
    assert torch.equal(once, twice)
    dropping = make_model("post", "mae-lm", dropout=0.0, decoder_dropout=0.2).train()
    encoded, again = (dropping.encode(batch.ids, batch.positions, MASKED) for _ in range(2))
    assert torch.equal(encoded, again)
    once, twice = (dropping._decode(encoded, batch, PREDICTED) for _ in range(2))
    assert not torch.equal(once, twice)


@blocks
@pytest.mark.parametrize("method", VARIANTS)
def test_score_counts_the_same_rows(block: str, method: str) -> None:
    model = make_model(block, method).double()
    natural, batch, order = make_batches()
    logits = permuted_logits(model, batch, natural, order)
    targets = natural.targets[natural.predicted]
    with torch.no_grad():  # in training nobody asks who is right
        total, right = model(batch, score=True).tolist()
    expected = F.cross_entropy(logits, targets, reduction="sum").item()
    assert total == pytest.approx(expected, rel=1e-12)
    assert right == int((logits.argmax(-1) == targets).sum())


def test_padded_rows_change_nothing() -> None:
    model = make_model("post", "3ml-self")
    assert len(model.tok.weight) > VOCAB
    _, batch, _ = make_batches()
    before = model(batch)
    with torch.no_grad():
        model.tok.weight[VOCAB:] = 100.0
        model.head.bias[VOCAB:] = 100.0
    assert torch.equal(model(batch), before)


# ---- initial weights -----------------------------------------------------------------------------


def initial(block: str, method: str, seed: int, **more: Any) -> dict[str, Tensor]:
    model = LateMaskModel(make_config(block, method, **more).model, VOCAB, MASK)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # a value that init_weights forgets would stay
    init_weights(model, seed)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@blocks
def test_initial_weights_depend_on_name_and_seed_only(block: str) -> None:
    """A decoder, another depth or torch's generator leave the other values as they are."""
    base = initial(block, "mlm", 3)
    torch.manual_seed(12345)
    for other in (
        initial(block, "3ml-self", 3),
        initial(block, "mlm", 3, num_layers=LAYERS + 1),
        initial(block, "mlm", 3),
    ):
        assert base.keys() <= other.keys()
        for name, value in base.items():
            assert torch.equal(value, other[name]), name
    reseeded = initial(block, "mlm", 4)
    for name, value in base.items():
        random = not name.endswith("bias") and "norm" not in name
        assert torch.equal(value, reseeded[name]) != random, name


@blocks
@pytest.mark.parametrize("method", VARIANTS)
def test_initial_values(block: str, method: str) -> None:
    values = initial(block, method, 0, hidden_size=64, init_std=0.05)
    matrices = []
    for name, value in values.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            matrices.append(value[:VOCAB] if name == "tok.weight" else value)
    assert not values["tok.weight"][VOCAB:].any()
    for i, one in enumerate(matrices):
        n = one.numel()
        assert abs(float(one.mean())) < 5 * 0.05 / math.sqrt(n)
        assert abs(float(one.std()) / 0.05 - 1) < 5 / math.sqrt(2 * n)
        assert not any(one.shape == two.shape and torch.equal(one, two) for two in matrices[:i])
