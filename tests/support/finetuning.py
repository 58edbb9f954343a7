"""A small encoder and a task that it learns at once."""

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

GOOD, BAD = ("fine", "lovely", "bright"), ("dull", "poor", "grey")
PLAIN = ("the", "film", "was", "and", "so", "very", "play", "a", "city", "in", "of", "name", "what", "?")


def encoder(folder: Path, dropout: float = 0.1, **settings: Any) -> Path:
    """Write a small BERT with random weights and a tokenizer of whole words."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN]
    vocabulary += [f"w{i}" for i in range(100)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"initializer_range": 0.2}  # learns at once
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes |= {"vocab_size": len(vocabulary), "max_position_embeddings": 64}
    config = transformers.BertConfig(**{**sizes, **drop, **settings})
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


def sentences(folder: Path, rows: int = 40, dev: int = 20) -> Path:
    """Write a task like SST-2 whose labels a word tells."""
    draw = random.Random(0)
    for split, count in (("train", rows), ("dev", dev)):
        lines = []
        for number in range(count):
            word = draw.choice((BAD, GOOD)[number % 2])
            more = " ".join(draw.choices(PLAIN, k=draw.randint(0, 6)))
            lines.append(f"the film was {word} {more}\t{number % 2}")
        path = folder / "SST-2" / f"{split}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
    return folder
