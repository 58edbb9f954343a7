"""Parameters in Hugging Face's words, both ways, and a run that starts from such a folder.

Four targets hold our blocks exactly: `roberta` and `bert` (post-LN), `roberta-prelayernorm` (pre-LN) and
`modernbert`, with local layers or without. The mapping only renames, slices, reorders and
pads with zeros. So it is linear and maps gradients as well as weights, which is how it is tested; and
it can be undone to the bit. What they have and our models need not (a token type that every token
has, RoBERTa's rows of positions for padding, BERT's second token type) is kept where a run starts from a
folder.

Our fused projection is laid out head by head, and Hugging Face wants [all queries; all keys;
all values].
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config import ModelOptions
from pretrain.data.tokenizer import JSON_FILE, MODEL_FILE, Tokenizer, load_tokenizer
from pretrain.errors import UserError
from pretrain.files import parse_json

SETTINGS, WEIGHTS = "config.json", "model.safetensors"
SHARDS = "model.safetensors.index.json"
"""In its place where a model is saved in several files: which tensor is in which."""

log = logging.getLogger(__name__)


class _Names(NamedTuple):
    """Prefix of the encoder beside a head, and the head's modules."""

    prefix: str
    dense: str
    norm: str
    bias: str
    decoder: str


_LM_HEAD = ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder")
_TRANSFORM = "cls.predictions.transform"
_NAMES = {
    "bert": _Names(
        "bert.",
        f"{_TRANSFORM}.dense",
        f"{_TRANSFORM}.LayerNorm",
        "cls.predictions.bias",
        "cls.predictions.decoder",
    ),
    "roberta": _Names("roberta.", *_LM_HEAD),
    "roberta-prelayernorm": _Names("roberta_prelayernorm.", *_LM_HEAD),
    "modernbert": _Names("model.", "head.dense", "head.norm", "decoder.bias", "decoder"),
}

_POSITIONS = "embeddings.position_embeddings.weight"
_TOKEN_TYPES = "embeddings.token_type_embeddings.weight"


def model_type(m: ModelOptions) -> str:
    """Return Hugging Face's name of this block."""
    if m.block == "roberta":
        return "roberta" if m.norm == "post" else "roberta-prelayernorm"
    return {"bert": "bert", "modern": "modernbert"}[m.block]


def layer_types(m: ModelOptions) -> list[str]:
    """Return Hugging Face's names of a modern encoder's layers."""
    return [f"{'sliding' if m.is_local(i) else 'full'}_attention" for i in range(m.num_layers)]


def _words(m: ModelOptions) -> str:
    return f"embeddings.{'tok' if m.block == 'modern' else 'word'}_embeddings.weight"


def _modules(m: ModelOptions) -> dict[str, str]:
    """Our modules and theirs of the same content (queries, keys and values apart), head left out."""
    modern, pre = m.block == "modern", m.norm == "pre"
    modules = {"embedding_norm": "embeddings.norm" if modern else "embeddings.LayerNorm"}
    for i in range(m.num_layers):
        a, b = f"layers.{i}", f"{'layers' if modern else 'encoder.layer'}.{i}"
        if modern:
            if i > 0:  # the first layer's norm is the embedding norm
                modules[f"{a}.attention_norm"] = f"{b}.attn_norm"
            modules |= {
                f"{a}.attention.out": f"{b}.attn.Wo",
                f"{a}.ffn_norm": f"{b}.mlp_norm",
                f"{a}.ffn.gate_up": f"{b}.mlp.Wi",
                f"{a}.ffn.down": f"{b}.mlp.Wo",
            }
        else:
            modules |= {
                f"{a}.attention_norm": f"{b}.attention{'' if pre else '.output'}.LayerNorm",
                f"{a}.attention.out": f"{b}.attention.output.dense",
                f"{a}.ffn_norm": f"{b}.{'intermediate' if pre else 'output'}.LayerNorm",
                f"{a}.ffn.up": f"{b}.intermediate.dense",
                f"{a}.ffn.down": f"{b}.output.dense",
            }
    if pre:
        modules["final_norm"] = "final_norm" if modern else "LayerNorm"
    return modules


def _projections(m: ModelOptions) -> dict[str, list[str]]:
    """Our fused projections and theirs, in the order queries, keys, values; one if they fuse them too."""
    if m.block == "modern":
        return {f"layers.{i}.attention.qkv": [f"layers.{i}.attn.Wqkv"] for i in range(m.num_layers)}
    parts = ("query", "key", "value")
    return {
        f"layers.{i}.attention.qkv": [f"encoder.layer.{i}.attention.self.{part}" for part in parts]
        for i in range(m.num_layers)
    }


# ---- from here to there --------------------------------------------------------------------------


def hugging_face_state(
    m: ModelOptions, ours: Mapping[str, Tensor], vocab_size: int, head: bool, pad: int = 1
) -> dict[str, Tensor]:
    """Return our parameters (or their gradients) under Hugging Face's names, the decoder left out.

    vocab_size: rows of the word table to keep, padding excluded. head: the masked-LM class, else
    the base class. pad: id of the padding piece, after which RoBERTa's positions begin. The key set is
    the one that `save_pretrained` of that class writes.
    """
    encoder = _rename(ours, _modules(m))
    for name, parts in _projections(m).items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in ours:
                flat = _by_part(m, ours[f"{name}.{kind}"])
                for part, tensor in zip(parts, flat.chunk(len(parts)), strict=True):
                    encoder[f"{part}.{kind}"] = tensor
    encoder[_words(m)] = ours["tok.weight"][:vocab_size]
    if m.block != "modern":
        encoder |= _tables(m, ours, pad)
    if not head:
        return {name: tensor.contiguous() for name, tensor in encoder.items()}
    names = _NAMES[model_type(m)]
    theirs = {names.prefix + name: tensor for name, tensor in encoder.items()}
    theirs |= _rename(ours, {"head.dense": names.dense, "head.norm": names.norm})
    theirs[names.bias] = ours["head.bias"][:vocab_size]
    return {name: tensor.contiguous() for name, tensor in theirs.items()}


def first_position(m: ModelOptions, pad: int) -> int:
    """Return the row of their table that is our position 0: RoBERTa's up to the padding id stand for "no
    position"."""
    return pad + 1 if m.block == "roberta" else 0


def token_types(m: ModelOptions) -> int:
    """Return the rows of their table of token types, of which every token here has the first."""
    return 2 if m.block == "bert" else 1


def _tables(m: ModelOptions, ours: Mapping[str, Tensor], pad: int) -> dict[str, Tensor]:
    """Positions with RoBERTa's rows of "no position" before them, of which only the last is ever looked up,
    and token types.

    The two last of those rows are kept where a run starts from a folder; any others are zero.
    """
    positions, before = ours["positions.weight"], first_position(m, pad)
    types = positions.new_zeros(token_types(m), m.hidden_size)
    padding = positions.new_zeros(before, m.hidden_size)
    if m.token_type and m.block == "bert":
        types = torch.stack((ours["token_type"], ours["second_token_type"]))
    elif m.token_type:
        types = ours["token_type"][None]
        padding = F.pad(ours["padding_positions"].view(2, -1), (0, 0, max(before - 2, 0), 0))[-before:]
    return {_POSITIONS: torch.cat((padding, positions)), _TOKEN_TYPES: types}


def _by_part(m: ModelOptions, fused: Tensor) -> Tensor:
    """[H * 3 * E, ...] laid out head by head -> [queries; keys; values], each [H * E, ...]."""
    return fused.unflatten(0, (m.num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _by_head(m: ModelOptions, parts: Tensor) -> Tensor:
    """The inverse of `_by_part`."""
    return parts.unflatten(0, (3, m.num_heads, -1)).transpose(0, 1).flatten(0, 2)


def _rename(tensors: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    return {
        f"{new}.{kind}": tensors[f"{old}.{kind}"]
        for old, new in modules.items()
        for kind in ("weight", "bias")
        if f"{old}.{kind}" in tensors
    }


def left_out(ours: Mapping[str, Tensor], head: bool) -> list[str]:
    """Names of our parameters that the export does not carry: decoder, mask vector, head."""
    gone = ("decoder.", "mask_vector") + (() if head else ("head.",))
    return [name for name in ours if name.startswith(gone)]


# ---- from there to here --------------------------------------------------------------------------


def our_state(m: ModelOptions, theirs: Mapping[str, Tensor], rows: int, pad: int = 1) -> dict[str, Tensor]:
    """Return their parameters under our names: the inverse of `hugging_face_state`, with or without a head.

    rows: of our word table; those beyond theirs are zero. pad: id of the padding piece.
    """
    prefix, dense, norm, bias, _ = _NAMES[model_type(m)]
    if any(name.startswith(prefix + "embeddings.") for name in theirs):
        theirs = {name.removeprefix(prefix): tensor for name, tensor in theirs.items()}
    modules = {new: old for old, new in _modules(m).items()} | {dense: "head.dense", norm: "head.norm"}
    ours = _rename(theirs, modules)
    for name, parts in _projections(m).items():
        for kind in ("weight", "bias"):
            if f"{parts[0]}.{kind}" in theirs:
                whole = torch.cat([theirs[f"{part}.{kind}"] for part in parts])
                ours[f"{name}.{kind}"] = _by_head(m, whole)
    words = theirs[_words(m)]
    ours["tok.weight"] = F.pad(words, (0, 0, 0, rows - len(words)))
    if bias in theirs:
        ours["head.bias"] = F.pad(theirs[bias], (0, rows - len(theirs[bias])))
    if m.block != "modern":
        before, ours["positions.weight"] = theirs[_POSITIONS].tensor_split([first_position(m, pad)])
        ours["token_type"] = theirs[_TOKEN_TYPES][0]
        if m.block == "bert":
            ours["second_token_type"] = theirs[_TOKEN_TYPES][1]
        else:
            ours["padding_positions"] = F.pad(before, (0, 0, 1, 0))[-2:].flatten()
    return ours


def load_folder(model: torch.nn.Module, m: ModelOptions, tokenizer: Tokenizer) -> list[str]:
    """Puts what the folder `m.init_from` holds into our model; returns our parameters it has not.

    UserError, with every reason, if it does not fit.
    """
    folder = Path(str(m.init_from))
    settings = _read_settings(folder)
    # Copies, for the tensors that are read are the file's own pages: what is checked is what is taken.
    weights = _read_weights(folder).items()
    theirs = {_current(name): tensor.to(torch.float32, copy=True) for name, tensor in weights}
    problems = _other_settings(m, settings, tokenizer) + _other_pieces(folder, tokenizer)
    if not problems:
        theirs = _with_bias(m, theirs, settings)
        problems = _other_head(m, theirs, settings) or _other_tensors(
            m, theirs, model.state_dict(), tokenizer
        )
    if problems:
        raise UserError("\n".join(f"model.init_from = {folder}: {problem}" for problem in problems))
    if unused := sorted(name for name in theirs if _is_unused(m, name)):
        log.info("init_from   %s; passed over, as masked LMs have none: %s", folder, ", ".join(unused))
    ours = our_state(m, theirs, len(model.get_parameter("tok.weight")), tokenizer.pad)
    model.load_state_dict(ours, strict=False)
    return [name for name, _ in model.named_parameters() if name not in ours]


def _current(name: str) -> str:
    """The name of today of a tensor: a LayerNorm of BERT as first released has a gamma and a beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = parse_json((folder / SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError) as error:
        raise UserError(f"model.init_from = {folder}: no readable {SETTINGS} there ({error})") from None
    return settings


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if not (folder / SHARDS).is_file():
            return load_file(folder / WEIGHTS)
        shards = parse_json((folder / SHARDS).read_text(encoding="utf-8"))["weight_map"]
        files = sorted({Path(name).name for name in shards.values()})
        theirs = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"model.init_from = {folder}: no readable {WEIGHTS} there ({error}); save the model with"
            " save_pretrained of transformers"
        ) from None
    if other := sorted(shards.keys() ^ theirs.keys()):
        raise UserError(
            f"model.init_from = {folder}: {other[0]} is in only one of {SHARDS} and its files; they are of"
            " different models: save it again"
        )
    return theirs


def _other_settings(m: ModelOptions, theirs: Mapping[str, Any], tokenizer: Tokenizer) -> list[str]:
    """What our config says otherwise than theirs."""
    if theirs.get("model_type") != model_type(m):
        return [
            f"holds a {theirs.get('model_type')}, but model.block = {m.block} with model.norm = {m.norm} is a"
            f" {model_type(m)}"
        ]
    modern = m.block == "modern"
    wanted: dict[str, tuple[str, Any]] = {
        "num_hidden_layers": ("model.num_layers", m.num_layers),
        "hidden_size": ("model.hidden_size", m.hidden_size),
        "num_attention_heads": ("model.num_heads", m.num_heads),
        "intermediate_size": ("model.ffn_size", m.ffn_size),
        "vocab_size": ("the tokenizer's vocabulary", tokenizer.vocab_size),
        "norm_eps" if modern else "layer_norm_eps": ("model.norm_eps", m.norm_eps),
        "hidden_activation" if modern else "hidden_act": ("activation", "gelu"),
    }
    if not modern:
        first = first_position(m, tokenizer.pad)
        name = f"model.max_positions + {first}" if first else "model.max_positions"
        wanted["pad_token_id"] = ("the tokenizer's padding", tokenizer.pad)
        wanted["max_position_embeddings"] = (name, m.max_positions + first)
        wanted["type_vocab_size"] = ("token types", token_types(m))
    found = [
        f"its {key} is {theirs.get(key)!r}, {name} is {value!r}"
        for key, (name, value) in wanted.items()
        if theirs.get(key) != value
    ]
    found += [
        f"its {key} is {theirs[key]!r}, for which there is no block here (it would have to be {value!r})"
        for key, value in (_MODERN if modern else _BERT).items()
        if theirs.get(key, value) != value
    ]
    return found + (_other_attention(m, theirs) if modern else [])


_DECODER = {"is_decoder": False, "add_cross_attention": False}
_BERT = _DECODER | {"position_embedding_type": "absolute"}
_MODERN = _DECODER | {
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "classifier_activation": "gelu",
}
"""Settings that change what is computed and have one value here, which is also the default of theirs."""


def _other_attention(m: ModelOptions, theirs: Mapping[str, Any]) -> list[str]:
    """Other layers that are local, another window, other rotations. Defaults are those of transformers."""
    every, window = theirs.get("global_attn_every_n_layers", 3), theirs.get("local_attention", 128)
    kinds = theirs.get("layer_types") or [
        f"{'sliding' if i % every else 'full'}_attention" for i in range(m.num_layers)
    ]
    if kinds != layer_types(m):
        local = [i for i, kind in enumerate(kinds) if kind != "full_attention"]
        return [
            f"attends locally in layers {local} (from 0), by model.local_window and global_every it is"
            f" {[i for i in range(m.num_layers) if m.is_local(i)]}"
        ]
    found = _other_rotation(theirs, "full_attention", "global_rope_theta", 160_000.0, m.rope_theta)
    if "sliding_attention" in kinds:
        if window != m.local_window:
            found.append(f"its local_attention is {window}, model.local_window {m.local_window}")
        theta = m.local_rope_theta or m.rope_theta
        found += _other_rotation(theirs, "sliding_attention", "local_rope_theta", 10_000.0, theta)
    return found


def _other_rotation(
    theirs: Mapping[str, Any], kind: str, older: str, default: float, wanted: float
) -> list[str]:
    """`older`: the name of transformers 4 for the base of a kind of layers."""
    given = theirs.get("rope_parameters") or {}
    rope = given.get(kind, given if kind == "full_attention" else None) or {}
    scaled = {
        key: value for key, value in rope.items() if key != "rope_theta" and value not in ("default", 1)
    }
    if scaled or theirs.get("rope_scaling"):
        return [
            f"scales its rotary positions ({scaled or theirs['rope_scaling']}); plain ones are known here"
        ]
    theta = rope.get("rope_theta", theirs.get(older, default))
    name = older.removeprefix("global_")
    return [] if theta == wanted else [f"its {name} is {theta!r}, model.{name} {wanted!r}"]


def _other_pieces(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Where the folder has a tokenizer, its pieces must be ours: the rows of the word table mean them."""
    if not any((folder / name).is_file() for name in (MODEL_FILE, JSON_FILE)):
        return []
    theirs = load_tokenizer(folder)
    if theirs.vocab_size != tokenizer.vocab_size:
        return [f"its tokenizer has {theirs.vocab_size} pieces, the corpus' {tokenizer.vocab_size}"]
    for i in range(tokenizer.vocab_size):
        if theirs.piece(i) != tokenizer.piece(i):
            return [
                f"its tokenizer calls id {i} {theirs.piece(i)!r}, the corpus' {tokenizer.piece(i)!r};"
                " encode the corpus with the folder's tokenizer"
            ]
    return []


def _with_bias(m: ModelOptions, theirs: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Theirs with the head's bias where it is stored under the decoder's name alone, or is none (zeros)."""
    _, dense, _, bias, decoder = _NAMES[model_type(m)]
    if bias in theirs or f"{dense}.weight" not in theirs:
        return theirs
    if (copy := theirs.get(f"{decoder}.bias")) is not None:
        return theirs | {bias: copy}
    if settings.get("decoder_bias") is False and not _tasks(m, theirs):
        return theirs | {bias: torch.zeros(int(settings["vocab_size"]))}
    return theirs


def _tasks(m: ModelOptions, theirs: Mapping[str, Tensor]) -> list[str]:
    """Modules beside the encoder and the head of masked language modelling, such as a classifier."""
    prefix, dense, *_ = _NAMES[model_type(m)]
    ours = {prefix.split(".")[0], dense.split(".")[0], *(name.split(".")[0] for name in _modules(m).values())}
    return sorted({name.split(".")[0] for name in theirs} - ours - {"embeddings", "pooler", "decoder"})


def _other_head(m: ModelOptions, theirs: Mapping[str, Tensor], settings: Mapping[str, Any]) -> list[str]:
    """Why the head of theirs is none of ours: of another task, or not tied to the word table."""
    _, dense, _, bias, decoder = _NAMES[model_type(m)]
    if tasks := _tasks(m, theirs):
        return [
            f"holds a model of another task ({', '.join(tasks)}); save its encoder alone"
            " (model.base_model.save_pretrained) to start from that with a new head"
        ]
    if f"{dense}.weight" not in theirs:
        return []
    words = next((tensor for name, tensor in theirs.items() if name.endswith(_words(m))), None)
    for name, tied in ((f"{decoder}.weight", words), (f"{decoder}.bias", theirs.get(bias))):
        if name in theirs and tied is not None and not torch.equal(theirs[name], tied):
            return [f"{name} differs from what it would be tied to; only a tied head is known here"]
    if settings.get("tie_word_embeddings") is False and f"{decoder}.weight" not in theirs:
        return [f"its head is not tied (tie_word_embeddings), and there is no {decoder}.weight"]
    return []


def _other_tensors(
    m: ModelOptions, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], tokenizer: Tokenizer
) -> list[str]:
    """Names and shapes that are not those our model would be exported with."""
    prefix, _, _, bias, decoder = _NAMES[model_type(m)]
    prefixed = any(name.startswith(prefix + "embeddings.") for name in theirs)
    base = hugging_face_state(m, ours, tokenizer.vocab_size, head=False, pad=tokenizer.pad)
    wanted = {prefix * prefixed + name: tensor for name, tensor in base.items()}
    if bias in theirs:
        whole = hugging_face_state(m, ours, tokenizer.vocab_size, head=True, pad=tokenizer.pad)
        wanted |= {name: tensor for name, tensor in whole.items() if not name.startswith(prefix)}
    found = [f"has no tensor {name}" for name in wanted.keys() - theirs.keys()]
    for name in wanted.keys() & theirs.keys():
        here, there = list(wanted[name].shape), list(theirs[name].shape)
        if here != there:
            found.append(f"{name} has the shape {there}, this config makes it {here}")
    known = {f"{decoder}.weight", f"{decoder}.bias"}  # copies that `_other_head` found equal
    for name in theirs.keys() - wanted.keys() - known:
        inner = name.removeprefix(prefix)
        counting = inner == "embeddings.position_ids" and torch.equal(
            theirs[name].flatten(), torch.arange(theirs[name].numel()).float()
        )
        if not counting and not _is_unused(m, name):
            found.append(f"{name}: no place for it")
    return _few(sorted(found))


def _is_unused(m: ModelOptions, name: str) -> bool:
    """Whether it is of a pooler or of next-sentence prediction, which a masked LM has not."""
    inner = name.removeprefix(_NAMES[model_type(m)].prefix)
    return inner.startswith(("pooler.dense.", "cls.seq_relationship."))


def _few(found: list[str]) -> list[str]:
    """The first lines, and how many more: another kind of model differs in every tensor."""
    return found if len(found) <= 8 else [*found[:6], f"{len(found) - 6} tensors more that do not fit"]
