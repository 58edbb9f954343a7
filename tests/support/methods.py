"""Small configs of every method, for the tests."""

from pretrain.config import Config, build_config

METHODS = {
    "mlm": {},
    "3ml-self": {"mask_from": 2, "decoder_layers": 2, "decoder": "self"},
    "3ml-cross": {"mask_from": 2, "decoder_layers": 2, "decoder": "cross"},
    "3ml-query": {"mask_from": 2, "decoder_layers": 2, "decoder": "query"},
    "mae-lm": {"mask_from": 2, "decoder_layers": 4, "decoder": "self", "mask_vector": "tied"},
    "retromae": {"mask_from": 2, "decoder_layers": 2, "decoder": "bottleneck"},
    "shared-depth": {"mask_from": 1},
    "one-way": {"mask_from": 1, "join": "one_way"},
}
BLOCKS = {
    "post": {"block": "roberta", "norm": "post"},
    "pre": {"block": "roberta", "norm": "pre"},
    "modern": {"block": "modern"},
}
LOCAL = {"block": "modern", "local_window": 6, "global_every": 2, "local_rope_theta": 200.0}
FORMS = BLOCKS | {"bert": {"block": "bert"}, "local": LOCAL}
"""Blocks by what they are exported as: `bert` computes what `post` does, `local` is `modern` with a layer
that is."""


def small(method: str = "mlm", block: str = "post", **sections: dict) -> Config:
    """A 2 x 32 model of the method; keyword arguments add to the sections."""
    model = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "ffn_size": 48,
        "max_positions": 40,
        **METHODS[method],
        **FORMS[block],
    }
    masking = {"corruption": [1, 0, 0]} if method == "mae-lm" else {}
    tree = {
        "run": {"dir": "run"},
        "corpus": {"train": "corpus"},
        "model": model,
        "masking": {"rate": 0.5, **masking},
        "train": {"seq_length": 24, "batch_size": 8, "precision": "fp32"},
        "budget": {"steps": 5},
    }
    for section, values in sections.items():
        kept = {} if section == "budget" else tree.get(section, {})
        tree[section] = {**kept, **values}
    return build_config(tree)
