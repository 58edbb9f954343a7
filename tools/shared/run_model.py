"""The model of a run, for the programs that use one: export, evaluate, fill_mask, analyze and others."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from pretrain import checkpoint
from pretrain.checkpoint import State
from pretrain.config import Config
from pretrain.data.corpora import tokenizer_folder
from pretrain.data.indexed import corpus_file
from pretrain.data.tokenizer import Tokenizer, load_tokenizer
from pretrain.errors import UserError
from pretrain.files import seen_from
from pretrain.model.late_mask import Batch, Decoder, LateMaskModel
from pretrain.run_folder import run_config


class RunModel(NamedTuple):
    """A checkpoint brought to life."""

    model: LateMaskModel
    """On the CPU, float32, in evaluation mode."""
    config: Config
    tokenizer: Tokenizer
    state: State


def load_model(run: str | Path, which: str | int = "latest") -> RunModel:
    """Return the model of a run's checkpoint (latest, best or a step), every byte of it verified."""
    path, stamps = checkpoint.find_verified(run, which)
    state = checkpoint.read_state(path, stamps)
    config = run_config(run)
    tokenizer = load_tokenizer(tokenizer_folder(config.corpus))
    if state.fingerprints.get("tokenizer", tokenizer.hash) != tokenizer.hash:
        raise UserError(
            f"{tokenizer_folder(config.corpus)}: not the tokenizer that {run} was trained with; put that one"
            " back"
        )
    model = LateMaskModel(config.model, tokenizer.vocab_size, tokenizer.mask)
    model.load_state_dict(checkpoint.read_tensors(path, stamps=stamps))
    return RunModel(model.eval(), config, tokenizer, state)


def default_device() -> torch.device:
    """Return the GPU, or without one the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def held_out_corpus(run: str | Path, config: Config, given: str | None) -> str:
    """Return the prefix of the corpus that is given, else of the run's own; UserError where there is none."""
    prefix = given or config.corpus.valid
    if not prefix:
        raise UserError(f"{run}: its config has no corpus.valid; name a corpus with --corpus PREFIX")
    if not corpus_file(prefix, "bin").is_file():
        raise UserError(
            f"{prefix}: no corpus there{seen_from(prefix)}; start this in the folder of the training, or name"
            " the corpus with --corpus PREFIX"
        )
    return prefix


def masked_batch(model: LateMaskModel, ids_BL: torch.Tensor) -> Batch:
    """Return texts [B, L] with M [MASK]s each as the model takes them: these last, and all predicted."""
    masked_BL = ids_BL == model.mask_id
    order_BL = masked_BL.long().argsort(dim=1, stable=True)
    M = int(masked_BL[0].sum())
    assert (masked_BL.sum(1) == M).all()
    return Batch(ids_BL.gather(1, order_BL), order_BL, torch.zeros_like(ids_BL[:, :M]), M)


def mask_logits(model: LateMaskModel, ids_BL: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, M, W] of the masks of texts, which join where they joined in training."""
    return vocabulary_logits(model, model.predicted_rows(masked_batch(model, ids_BL)))


def vocabulary_logits(model: LateMaskModel, rows: torch.Tensor) -> torch.Tensor:
    """Return the logits [..., W] of predicted rows [..., D], without the padding of the word table."""
    vocab_size = model.cross_entropy.vocab_size
    return model.head(rows) @ model.tok.weight[:vocab_size].T + model.head.bias[:vocab_size]


def listen(stack: LateMaskModel | Decoder, see: Callable[[int, torch.Tensor], None]) -> list[RemovableHandle]:
    """Have `see` called with each layer's number and output: 0 is what the first layer reads, and the last
    is taken after the final norm. Returns the hooks."""
    first, *rest = stack.layers

    def output(layer: int) -> Callable[..., None]:
        return lambda _module, _inputs, rows: see(layer, rows)

    return [
        first.register_forward_pre_hook(lambda _module, inputs: see(0, inputs[0])),
        *(layer.register_forward_hook(output(i)) for i, layer in enumerate([first, *rest][:-1], 1)),
        stack.final_norm.register_forward_hook(output(len(stack.layers))),
    ]
