"""The model of a run, for the programs that use one: export, evaluate, fill_mask, analyze."""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from pretrain import checkpoint, config
from pretrain.checkpoint import State
from pretrain.config import Config
from pretrain.data.corpora import tokenizer_folder
from pretrain.data.tokenizer import Tokenizer, load_tokenizer
from pretrain.errors import UserError
from pretrain.model.late_mask import Batch, LateMaskModel
from pretrain.run_folder import TOKENIZER


class RunModel(NamedTuple):
    """A checkpoint brought to life."""

    model: LateMaskModel
    """On the CPU, float32, in evaluation mode."""
    config: Config
    tokenizer: Tokenizer
    state: State


def load_model(run: str | Path, which: str | int = "latest") -> RunModel:
    """The model of a run's checkpoint (latest, best or a step), every byte of it verified."""
    path, stamps = checkpoint.find_verified(run, which)
    state = checkpoint.read_state(path, stamps)
    options = run_config(run)
    tokenizer = load_tokenizer(tokenizer_folder(options.corpus))
    if state.fingerprints.get("tokenizer", tokenizer.hash) != tokenizer.hash:
        raise UserError(
            f"{tokenizer_folder(options.corpus)}: not the tokenizer that {run} was trained with; put that one"
            " back"
        )
    model = LateMaskModel(options.model, tokenizer.vocab_size, tokenizer.mask)
    model.load_state_dict(checkpoint.read_tensors(path, stamps=stamps))
    return RunModel(model.eval(), options, tokenizer, state)


def run_config(run: str | Path) -> Config:
    """The resolved config that a run keeps; its tokenizer is the copy in the run's folder."""
    path, kept = Path(run) / "config.yaml", Path(run) / TOKENIZER
    options = config.build(config.read_yaml(path), str(path))
    if not kept.is_dir():
        return options
    return options.model_copy(update={"corpus": options.corpus.model_copy(update={"tokenizer": str(kept)})})


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint latest|best|STEP``."""
    parser.add_argument(
        "--checkpoint", default="latest", metavar="WHICH", help="latest, best or a step (%(default)s)"
    )


def mask_logits(model: LateMaskModel, ids: torch.Tensor) -> torch.Tensor:
    """ids [1, n] of a text -> logits [1, M, W] of its masks, which join where they joined in training."""
    masked = ids[0] == model.mask_id
    order = torch.cat(((~masked).nonzero(), masked.nonzero())).flatten()[None]
    M = int(masked.sum())
    batch = Batch(ids[:, order[0]], order, torch.zeros(1, M, dtype=torch.int64), M)
    vocab_size = model.cross_entropy.vocab_size
    hidden = model.head(model.predicted_rows(batch))
    return hidden @ model.tok.weight[:vocab_size].T + model.head.bias[:vocab_size]
