"""One fine-tuning from beginning to end: a model with a fresh head, updates, outputs, and what they cost.

It is transformers' own loop (AdamW without decay of biases and norms, gradients clipped at 1,
a rate that rises and falls linearly) in two pages, and a test holds its losses and outputs equal to the
Trainer's.

Letters: B rows of a batch, L their padded length.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from pretrain.errors import UserError
from tools.finetune.task import IGNORED
from tools.shared.encoders import refuse_decoder, refuse_made_up

WARMUP, WEIGHT_DECAY, CLIP = 0.06, 0.1, 1.0
BETAS, EPSILON = (0.9, 0.98), 1e-6
"""RoBERTa's of fine-tuning."""
EVALUATION_BATCH = 64
_LABELS = ("labels", "start_positions", "end_positions")
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
Feature = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a fine-tuning is free to choose."""

    lr: float
    batch: int
    epochs: int
    seed: int


@dataclass(frozen=True)
class Cost:
    """FLOPs of the model's products, padding included, and seconds on one device."""

    flops: int
    seconds: float


def load_tokenizer(folder: str) -> Any:
    """Return the tokenizer of a folder; UserError if it cannot say which letters its tokens are of."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except Exception as error:  # of many packages, whatever lies in the folder
        raise UserError(f"{folder}: transformers cannot load its tokenizer ({_first_line(error)})") from error
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"{folder}: its tokenizer needs a padding token and a tokenizer.json")
    refuse_made_up(folder, tokenizer)
    return tokenizer


def load_model(folder: str, auto: str, settings: dict[str, Any], seed: int, random: bool) -> PreTrainedModel:
    """Return the encoder of a folder with a head drawn by `seed`, on the CPU, in float32.

    random: all weights are drawn, not the head's alone. UserError if the folder has no whole encoder.
    """
    refuse_decoder(folder)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    family = getattr(transformers, f"AutoModelFor{auto}")
    torch.manual_seed(seed)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL, **settings)
        if random:
            return family.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model, info = family.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # of another task's head
            output_loading_info=True,
            **_LOCAL,
        )
    except Exception as error:  # as above
        raise UserError(f"{folder}: transformers cannot load it ({_first_line(error)})") from error
    # transformers draws what a folder lacks; of an encoder that would be scored as if it were trained.
    prefix = f"{model.base_model_prefix}."
    lacking = [name for name in info["missing_keys"] if name.startswith(prefix) and ".pooler." not in name]
    if lacking:
        raise UserError(f"{folder}: no whole encoder, it has no weights for {', '.join(sorted(lacking)[:3])}")
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def collate(features: Sequence[Feature], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch, padded to its longest row; padding has no label."""
    length = max(len(each["input_ids"]) for each in features)
    padding = {"input_ids": pad, "labels": IGNORED}
    found = {}
    for name, first in features[0].items():
        values = [each[name] for each in features]
        if isinstance(first, list):
            values = [row + [padding.get(name, 0)] * (length - len(row)) for row in values]
        found[name] = torch.tensor(values, device=device)
    return found


def batches(count: int, settings: Settings) -> Iterator[list[list[int]]]:
    """Yield for each epoch the places of the rows of each batch."""
    order = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        places = torch.randperm(count, generator=order).tolist()
        yield [places[start : start + settings.batch] for start in range(0, count, settings.batch)]


def train(
    model: PreTrainedModel, features: Sequence[Feature], pad: int, settings: Settings
) -> tuple[float, int, Cost]:
    """Fine-tune a model in its place; the mean loss of the last epoch, the updates, the cost of them."""
    device = next(model.parameters()).device
    steps = -(-len(features) // settings.batch) * settings.epochs
    optimizer = torch.optim.AdamW(_groups(model), settings.lr, BETAS, EPSILON)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(np.ceil(WARMUP * steps)), steps)
    flops_of, flops, begun = flops_per_row(model), 0, time.perf_counter()
    torch.manual_seed(settings.seed)  # dropout, however many numbers the head took
    model.train()
    for epoch in batches(len(features), settings):
        total = torch.zeros((), device=device)
        for places in epoch:
            batch = collate([features[place] for place in places], pad, device)
            with _precision(device):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.detach() * len(places)
            flops += 3 * len(places) * flops_of(batch["input_ids"].shape[1])
        mean = total.item() / len(features)  # waits for the device
    return mean, steps, Cost(flops, time.perf_counter() - begun)


@torch.no_grad()
def outputs(model: PreTrainedModel, features: Sequence[Feature], pad: int) -> tuple[list[np.ndarray], Cost]:
    """Return the logits of each input, without those of padding, and the cost of them."""
    device = next(model.parameters()).device
    flops_of, flops, begun = flops_per_row(model), 0, time.perf_counter()
    found: list[Any] = [None] * len(features)
    by_length = sorted(range(len(features)), key=lambda place: len(features[place]["input_ids"]))
    model.eval()
    for start in range(0, len(features), EVALUATION_BATCH):
        places = by_length[start : start + EVALUATION_BATCH]
        inputs = [{k: v for k, v in features[place].items() if k not in _LABELS} for place in places]
        batch = collate(inputs, pad, device)
        with _precision(device):
            answer = model(**batch)
        if "logits" in answer:
            logits = answer.logits
        else:
            logits = torch.stack((answer.start_logits, answer.end_logits), dim=-1)
        for place, each in zip(places, logits.float().cpu().numpy(), strict=True):
            found[place] = each if each.ndim == 1 else each[: len(features[place]["input_ids"])]
        flops += len(places) * flops_of(batch["input_ids"].shape[1])
    return found, Cost(flops, time.perf_counter() - begun)


def _groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Parameters by weight decay: biases and norms, which are vectors, have none."""
    decayed = [each for each in model.parameters() if each.ndim > 1]
    others = [each for each in model.parameters() if each.ndim <= 1]
    return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


def precision(device: torch.device) -> str:
    """Return bf16 where a GPU has it, else fp32."""
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def _precision(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if precision(device) == "bf16" else nullcontext()


def flops_per_row(model: PreTrainedModel) -> Callable[[int], int]:
    """Return the FLOPs of a forward pass of one row by its length.

    They are a polynomial of degree two, which three counted lengths give.
    """
    by_length = np.polyfit(_LENGTHS, [_counted(model, length) for length in _LENGTHS], 2)
    return lambda length: round(float(np.polyval(by_length, length)))


_LENGTHS = (8, 16, 24)


@torch.no_grad()
def _counted(model: PreTrainedModel, length: int) -> int:
    """Return torch's count, with attention as products: fused kernels count as nothing on CPUs."""
    ids = torch.full((1, length), 5, device=next(model.parameters()).device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    return counter.get_total_flops()
