"""Configs in Hugging Face's words; the parameters are in `pretrain.model.huggingface`.

The trap, silent in transformers: defaults that differ from what was trained (norm epsilon, token
types, rotary base, sliding windows), so every value is written out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pretrain.config import Config, ModelOptions
from pretrain.data.tokenizer import Tokenizer
from pretrain.model.huggingface import first_position, layer_types, model_type, token_types

Form = Literal["masked-lm", "encoder", "late"]
"""What is exported: `mlm` with its head, the encoder of a late method, or all of a late method."""

MODELING = Path(__file__).with_name("modeling_latemask.py")
"""The code that a `late` folder brings along."""

_FINE_TUNING_DROPOUT = 0.1

_CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "roberta-prelayernorm": "RobertaPreLayerNorm",
    "modernbert": "ModernBert",
}


def model_class(m: ModelOptions, form: Form) -> str:
    """Name of the transformers class that holds this model."""
    if form == "late":
        return "LateMaskForMaskedLM"
    return _CLASSES[model_type(m)] + ("ForMaskedLM" if form == "masked-lm" else "Model")


def late_state(ours: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Return the parameters of a `late` folder: ours, without the padded rows of the vocabulary."""
    vocabulary = ("tok.weight", "head.bias")
    return {
        name: (tensor[:vocab_size] if name in vocabulary else tensor).contiguous()
        for name, tensor in ours.items()
    }


def hugging_face_config(config: Config, tokenizer: Tokenizer, form: Form) -> dict[str, Any]:
    """Return config.json of the exported folder, every value that matters written out."""
    model = config.model
    common = {
        "architectures": [model_class(model, form)],
        "model_type": model_type(model),
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.ffn_size,
        "initializer_range": model.init_std,
        "pad_token_id": tokenizer.pad,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "dtype": "float32",
        "tie_word_embeddings": True,
    }
    if form == "late":
        return common | _late_config(model, tokenizer)
    modern = model.block == "modern"
    return common | (_modernbert_config(model, tokenizer) if modern else _bert_config(model, tokenizer))


def _bert_config(m: ModelOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "max_position_embeddings": m.max_positions + first_position(m, tokenizer.pad),
        "type_vocab_size": token_types(m),
        "layer_norm_eps": m.norm_eps,
        "hidden_act": "gelu",
        # These act in fine-tuning only, which wants dropout even where pre-training had none.
        "hidden_dropout_prob": _FINE_TUNING_DROPOUT,
        "attention_probs_dropout_prob": _FINE_TUNING_DROPOUT,
    }


def _modernbert_config(m: ModelOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    local = m.local_rope_theta or m.rope_theta
    full, sliding = ({"rope_type": "default", "rope_theta": theta} for theta in (m.rope_theta, local))
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
        "layer_types": layer_types(m),
        "global_attn_every_n_layers": m.global_every if m.local_window else 1,
        **({"local_attention": m.local_window} if m.local_window else {}),
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        # What transformers 4 reads in place of the two keys above.
        "global_rope_theta": m.rope_theta,
        "local_rope_theta": local,
        "reference_compile": False,
    }


def _late_config(m: ModelOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    module = MODELING.stem
    same = (
        *("block", "norm", "mask_from", "join", "decoder_layers", "decoder_positions", "mask_vector"),
        *("mask_leak", "token_type", "norm_eps", "rope_theta", "local_window", "global_every"),
    )
    return {
        "model_type": "latemask",
        "auto_map": {
            "AutoConfig": f"{module}.LateMaskConfig",
            "AutoModelForMaskedLM": f"{module}.LateMaskForMaskedLM",
        },
        "tie_word_embeddings": False,  # one table is used twice, there is nothing to tie
        "max_position_embeddings": m.max_positions,
        "mask_token_id": tokenizer.mask,
        "decoder_kind": m.decoder,  # transformers takes a key `decoder` for the config of another model
        "local_rope_theta": m.local_rope_theta or m.rope_theta,
        **{name: getattr(m, name) for name in same},
    }


def register_late_models() -> None:
    """Have transformers load a `late` folder by the code here, not by what lies in the folder."""
    from transformers import AutoConfig, AutoModelForMaskedLM  # start-up time

    from tools.export.modeling_latemask import LateMaskConfig, LateMaskForMaskedLM

    AutoConfig.register("latemask", LateMaskConfig, exist_ok=True)
    AutoModelForMaskedLM.register(LateMaskConfig, LateMaskForMaskedLM, exist_ok=True)
