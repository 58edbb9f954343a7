"""What sentence-transformers needs beside an encoder: its tokens averaged are the text's embedding.

The names of classes and keys are those of its version 2, which 6.2 reads as well (and the tests load).
"""

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from pretrain.data.tokenizer import Tokenizer
from pretrain.model.late_mask import LateMaskModel

POOLING = "1_Pooling"
MODULES, SETTINGS = "modules.json", "sentence_bert_config.json"
FILES = frozenset({MODULES, SETTINGS, f"{POOLING}/config.json"})

EXAMPLE = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
print(model.similarity(model.encode("A fine day."), model.encode("The weather is good.")))
"""

_TEXTS = ("The weather is fine today.", "A much longer text, so that the shorter one of the two is padded.")


def write_sentence_modules(folder: Path, hidden_size: int, max_length: int) -> None:
    """Write `FILES`. hidden_size: width of the embedding; max_length: tokens beyond which a text is cut."""
    kinds = {"": "Transformer", POOLING: "Pooling"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    pooling = {"word_embedding_dimension": hidden_size, "pooling_mode_mean_tokens": True}
    (folder / POOLING).mkdir()
    for name, content in (
        (MODULES, modules),
        (SETTINGS, {"max_seq_length": max_length, "do_lower_case": False}),
        (f"{POOLING}/config.json", pooling | {"pooling_mode_cls_token": False}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def embeddings_differ(
    folder: Path, model: LateMaskModel, tokenizer: Tokenizer, max_length: int
) -> float | None:
    """Return the largest difference between sentence-transformers' embeddings and the means of `model`'s
    rows, relative to scale; None where that package is not installed. max_length: tokens of a text."""
    if find_spec("sentence_transformers") is None:
        return None
    from sentence_transformers import SentenceTransformer  # optional, and seconds of start-up

    theirs = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    found = theirs.encode(list(_TEXTS), convert_to_tensor=True, show_progress_bar=False)
    expected = torch.stack([_mean(model, tokenizer, text, max_length) for text in _TEXTS])
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _mean(model: LateMaskModel, tokenizer: Tokenizer, text: str, max_length: int) -> Tensor:
    """Return the mean [D] of a text's rows, the two specials among them."""
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(text)[: max_length - 2], tokenizer.eos]])
    return model.encode(ids, torch.arange(ids.shape[1])[None])[0].mean(0)
