"""Parameters and configs in Hugging Face's words.

Three targets hold our blocks exactly: `roberta` (post-LN), `roberta-prelayernorm` (pre-LN) and
`modernbert` with every layer global. The one idea: the mapping only renames, slices, reorders and
pads with zeros, so it is linear and maps gradients as well as weights, which is how it is tested.

The traps, each silent in transformers: defaults that differ from what was trained (norm epsilon,
token types, rotary base, sliding windows), so every value is written out; and our fused projection,
laid out head by head, which Hugging Face wants as [all queries; all keys; all values].
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config import Config, Model
from pretrain.tokenizer import Tokenizer

_FINE_TUNING_DROPOUT = 0.1

_HEADS = {
    "roberta": ("roberta.", "lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    "roberta-prelayernorm": (
        "roberta_prelayernorm.",
        "lm_head.dense",
        "lm_head.layer_norm",
        "lm_head.bias",
    ),
    "modernbert": ("model.", "head.dense", "head.norm", "decoder.bias"),
}
"""Prefix of the encoder beside a head, and the head's dense layer, norm and bias."""

_CLASSES = {
    "roberta": "Roberta",
    "roberta-prelayernorm": "RobertaPreLayerNorm",
    "modernbert": "ModernBert",
}


def model_type(m: Model) -> str:
    """Hugging Face's name of this block."""
    if m.block == "modern":
        return "modernbert"
    return "roberta" if m.norm == "post" else "roberta-prelayernorm"


def hugging_face_state(
    m: Model, ours: Mapping[str, Tensor], vocab_size: int, head: bool
) -> dict[str, Tensor]:
    """Our parameters (or their gradients) under Hugging Face's names, the decoder left out.

    vocab_size: rows of the word table to keep, padding excluded. head: the masked-LM class, else
    the base class. The key set is the one that `save_pretrained` of that class writes.
    """
    encoder = _modernbert(m, ours) if m.block == "modern" else _roberta(m, ours)
    words = "embeddings.tok_embeddings.weight" if m.block == "modern" else _ROBERTA_WORDS
    encoder[words] = ours["tok.weight"][:vocab_size]
    if not head:
        return {name: tensor.contiguous() for name, tensor in encoder.items()}
    prefix, dense, norm, bias = _HEADS[model_type(m)]
    theirs = {prefix + name: tensor for name, tensor in encoder.items()}
    theirs |= _rename(ours, {"head.dense": dense, "head.norm": norm})
    theirs[bias] = ours["head.bias"][:vocab_size]
    return {name: tensor.contiguous() for name, tensor in theirs.items()}


_ROBERTA_WORDS = "embeddings.word_embeddings.weight"


def _roberta(m: Model, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    pre = m.norm == "pre"
    positions = ours["positions.weight"]
    theirs = {
        # Rows 0 and 1 stand for "no position" (padding); ours start at row 2.
        "embeddings.position_embeddings.weight": F.pad(positions, (0, 0, 2, 0)),
        "embeddings.token_type_embeddings.weight": torch.zeros_like(positions[:1]),
    }
    modules = {"embedding_norm": "embeddings.LayerNorm"}
    for i in range(m.num_layers):
        a, b = f"layers.{i}", f"encoder.layer.{i}"
        modules |= {
            f"{a}.attention_norm": f"{b}.attention{'' if pre else '.output'}.LayerNorm",
            f"{a}.attention.out": f"{b}.attention.output.dense",
            f"{a}.ffn_norm": f"{b}.{'intermediate' if pre else 'output'}.LayerNorm",
            f"{a}.ffn.up": f"{b}.intermediate.dense",
            f"{a}.ffn.down": f"{b}.output.dense",
        }
        for part in ("weight", "bias"):
            split = _split_heads(m, ours[f"{a}.attention.qkv.{part}"])
            for name, tensor in zip(("query", "key", "value"), split, strict=True):
                theirs[f"{b}.attention.self.{name}.{part}"] = tensor
    if pre:
        modules["final_norm"] = "LayerNorm"
    return theirs | _rename(ours, modules)


def _modernbert(m: Model, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    theirs = {}
    modules = {"embedding_norm": "embeddings.norm", "final_norm": "final_norm"}
    for i in range(m.num_layers):
        a, b = f"layers.{i}", f"layers.{i}"
        if i > 0:  # the first layer's norm is the embedding norm
            modules[f"{a}.attention_norm"] = f"{b}.attn_norm"
        modules |= {
            f"{a}.attention.out": f"{b}.attn.Wo",
            f"{a}.ffn_norm": f"{b}.mlp_norm",
            f"{a}.ffn.gate_up": f"{b}.mlp.Wi",
            f"{a}.ffn.down": f"{b}.mlp.Wo",
        }
        split = _split_heads(m, ours[f"{a}.attention.qkv.weight"])
        theirs[f"{b}.attn.Wqkv.weight"] = torch.cat(split)
    return theirs | _rename(ours, modules)


def _split_heads(m: Model, fused: Tensor) -> tuple[Tensor, ...]:
    """[H * 3 * E, ...] laid out head by head -> queries, keys, values, each [H * E, ...]."""
    heads = fused.unflatten(0, (m.num_heads, 3, -1))
    return tuple(part.flatten(0, 1) for part in heads.unbind(1))


def _rename(ours: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    return {
        f"{theirs}.{part}": ours[f"{name}.{part}"]
        for name, theirs in modules.items()
        for part in ("weight", "bias")
        if f"{name}.{part}" in ours
    }


def model_class(m: Model, head: bool) -> str:
    """Name of the transformers class that holds this model."""
    return _CLASSES[model_type(m)] + ("ForMaskedLM" if head else "Model")


def left_out(ours: Mapping[str, Tensor], head: bool) -> list[str]:
    """Names of our parameters that the export does not carry: decoder, mask vector, head."""
    gone = ("decoder.", "mask_vector") + (() if head else ("head.",))
    return [name for name in ours if name.startswith(gone)]


def hugging_face_config(config: Config, tokenizer: Tokenizer, head: bool) -> dict[str, Any]:
    """config.json of the exported folder, every value that matters written out."""
    m = config.model
    common = {
        "architectures": [model_class(m, head)],
        "model_type": model_type(m),
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": m.hidden_size,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "intermediate_size": m.ffn_size,
        "initializer_range": m.init_std,
        "pad_token_id": tokenizer.pad,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "dtype": "float32",
        "tie_word_embeddings": True,
    }
    modern = m.block == "modern"
    return common | (_modernbert_config(m, tokenizer) if modern else _roberta_config(m))


def _roberta_config(m: Model) -> dict[str, Any]:
    return {
        "max_position_embeddings": m.max_positions + 2,
        "type_vocab_size": 1,
        "layer_norm_eps": m.norm_eps,
        "hidden_act": "gelu",
        # These act in fine-tuning only, which wants dropout even where pre-training had none.
        "hidden_dropout_prob": _FINE_TUNING_DROPOUT,
        "attention_probs_dropout_prob": _FINE_TUNING_DROPOUT,
    }


def _modernbert_config(m: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": m.rope_theta}
    return {
        "max_position_embeddings": m.max_positions,
        "norm_eps": m.norm_eps,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "cls_token_id": tokenizer.bos,
        "sep_token_id": tokenizer.eos,
        "layer_types": ["full_attention"] * m.num_layers,
        "global_attn_every_n_layers": 1,
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
        # What transformers 4 reads in place of the two keys above.
        "global_rope_theta": m.rope_theta,
        "local_rope_theta": m.rope_theta,
        "reference_compile": False,
    }
