"""Frozen encoders behind one face: the checkpoint of a run, or any Hugging Face folder on this disk.

Texts are batched by their shape, so nothing is padded, and what a text scores depends on no
other. A run is used as it was trained: its own tokenizer, its [MASK]s in the decoder where they are late.

A layer's state is its output; state 0 is the embeddings, and the last is taken after the final norm. Letters:
B texts, L tokens of each, M [MASK]s of each, D width, W pieces.

Transformers fills what a folder has not with random weights and goes on, so a folder without the
head of a masked LM would be scored by noise; missing weights are errors here.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from pretrain.data.tokenizer import read_json_tokenizer
from pretrain.errors import UserError
from pretrain.files import parse_json
from pretrain.model.late_mask import LateMaskModel, init_weights
from tools.shared.run_model import (
    RunModel,
    default_device,
    listen,
    load_model,
    masked_batch,
    vocabulary_logits,
)

TOKENS_PER_BATCH = 4096
"""Rows of a forward pass: a few dozen sentences, enough to keep the cores of a CPU at work."""
_RUN, _FOLDER = "config.yaml", "config.json"


class Tokens(NamedTuple):
    """A text as the encoder reads it, sequence specials included."""

    ids: list[int]
    words: list[int | None]
    """Number of the word that each token is of; None for specials."""


class Encoder(ABC):
    """A model that stands still, on a GPU where there is one, in float32.

    Attributes:
        name: the path that it was opened by.
        step: of its checkpoint; None for a folder that is no run.
        averaged: the checkpoints that its weights are a mean of; "" where they are one's own.
        max_length: most tokens of a text, specials included.
        mask_id: id of its [MASK].
    """

    name: str
    step: int | None
    averaged: str = ""
    max_length: int
    mask_id: int
    device: torch.device
    _model: Any
    _settings: str
    """The model's config and its tokenizer."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that its answers depend on, whatever file or seed the weights are of."""
        digest = hashlib.blake2b(f"{self.max_length} {self._settings}".encode(), digest_size=16)
        for name, tensor in self._model.state_dict().items():
            if "pooler" in name:  # drawn where a folder has none, and not used here
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @abstractmethod
    def tokens(self, text: str) -> Tokens:
        """Return the tokens of a text, however many there are."""

    @abstractmethod
    def states(self, ids_BL: Tensor) -> list[Tensor]:
        """Return the hidden states [B, L, D] of the embeddings and of each layer."""

    @abstractmethod
    def mask_logits(self, ids_BL: Tensor) -> Tensor:
        """Return the logits [B, W] of the first [MASK] of each text; all have the same number of them."""

    @abstractmethod
    def untrained(self, seed: int) -> "Encoder":
        """Return an encoder of the same architecture and tokenizer with random weights."""

    def cut(self, tokens: Tokens) -> Tokens:
        """Return the tokens of a text, without its last ones where there are more than the model takes."""
        over = len(tokens.ids) - self.max_length
        if over <= 0:
            return tokens
        ids, words = tokens
        return Tokens(ids[: -over - 1] + ids[-1:], words[: -over - 1] + words[-1:])


def open_encoder(path: str, which: str = "latest", head: bool = False) -> Encoder:
    """Return the encoder of a run (its checkpoint `which`) or of a Hugging Face folder.

    head: with the head that answers [MASK]s. UserError if there is no model, or not all of it.
    """
    if is_run(path, which):
        return _Run(path, load_model(path, which))
    return _HuggingFace.load(path, head)


def is_run(path: str, which: str = "latest") -> bool:
    """Tell a run from a Hugging Face folder, without reading it; UserError for what is neither, or has no
    checkpoints although one is asked for."""
    if (Path(path) / _RUN).is_file():
        return True
    if (Path(path) / _FOLDER).is_file():
        if which != "latest":
            raise UserError(
                f"{path}: a Hugging Face folder has no checkpoints; leave out --checkpoint {which}"
            )
        return False
    raise UserError(
        f"{path}: neither a run (it has no {_RUN}) nor a Hugging Face folder (no {_FOLDER}); models are read"
        " from folders on this disk"
    )


def by_shape(shapes: Sequence[tuple[int, ...]], tokens: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Yield the numbers of items that fit into one batch: of one shape, whose first number is the length.

    The longest come first, since what does not fit into memory should be known at once.
    """
    groups = defaultdict(list)
    for number, shape in enumerate(shapes):
        groups[shape].append(number)
    for shape in sorted(groups, reverse=True):
        group, size = groups[shape], max(1, tokens // shape[0])
        yield from (group[start : start + size] for start in range(0, len(group), size))


class _Run(Encoder):
    """The pre-training model of a checkpoint."""

    def __init__(self, name: str, run: RunModel) -> None:
        self.name, self.step, self._run = name, run.state.step, run
        self.averaged = ", ".join(run.state.averaged)
        # Positions may reach further than training did, and so does no export of the run.
        self.max_length, self.mask_id = run.config.train.seq_length, run.tokenizer.mask
        self.device = default_device()
        self._model = run.model.to(self.device)
        self._settings = f"{run.config.model} {run.tokenizer.hash}"
        self._json: Any = None
        if run.tokenizer.kind == "json":  # it cuts punctuation off words, as only the package tells
            self._json = read_json_tokenizer(run.tokenizer.path, run.tokenizer.content)
            self._json.encode_special_tokens = True

    def tokens(self, text: str) -> Tokens:
        tokenizer = self._run.tokenizer
        if self._json:
            found = self._json.encode(text, add_special_tokens=False)
            return Tokens([tokenizer.bos, *found.ids, tokenizer.eos], [None, *found.word_ids, None])
        ids = tokenizer.encode(text)
        words: list[int | None] = [*(tokenizer.word_starts[ids].cumsum() - 1).tolist()]
        return Tokens([tokenizer.bos, *ids.tolist(), tokenizer.eos], [None, *words, None])

    @torch.no_grad()
    def states(self, ids_BL: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        hooks = listen(self._model, lambda layer, rows_BLD: found.append(rows_BLD))
        ids_BL = ids_BL.to(self.device)
        self._model.encode(ids_BL, torch.arange(ids_BL.shape[1], device=self.device).expand_as(ids_BL))
        for hook in hooks:
            hook.remove()
        return found

    @torch.no_grad()
    def mask_logits(self, ids_BL: Tensor) -> Tensor:
        rows_BMD = self._model.predicted_rows(masked_batch(self._model, ids_BL.to(self.device)))
        return vocabulary_logits(self._model, rows_BMD[:, 0])

    def untrained(self, seed: int) -> Encoder:
        model = LateMaskModel(self._run.config.model, self._run.tokenizer.vocab_size, self.mask_id)
        init_weights(model, seed)
        return _Run(self.name, self._run._replace(model=model.eval()))


class _HuggingFace(Encoder):
    """A model of transformers: of a base class, or with the head of a masked LM."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name, self.step, self._tokenizer = name, None, tokenizer
        self.mask_id = -1 if tokenizer.mask_token_id is None else tokenizer.mask_token_id
        self.max_length = min(tokenizer.model_max_length, positions(model))
        self.device = default_device()
        self._model = model.eval().to(self.device)
        self._settings = f"{model.config.to_json_string()} {tokenizer.backend_tokenizer.to_str()}"

    @classmethod
    def load(cls, path: str, head: bool) -> "_HuggingFace":
        """Return the model of a folder; no code of the folder's is run, and nothing is unpickled."""
        if not head:
            refuse_decoder(path)
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        auto = transformers.AutoModelForMaskedLM if head else transformers.AutoModel
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, **local)
            model, info = auto.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **local
            )
        except Exception as error:  # of many packages, whatever lies in the folder
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(f"{path}: transformers cannot load it ({reason})") from error
        if model.config.is_encoder_decoder:
            raise UserError(f"{path}: a model of an encoder and a decoder; give an encoder")
        if not tokenizer.is_fast:
            raise UserError(f"{path}: its tokenizer does not tell words apart; it needs a tokenizer.json")
        refuse_made_up(path, tokenizer)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise UserError(f"{path}: its tokenizer has more pieces than the model; one is another model's")
        # Base classes bring a pooler that many encoders do without, and that is not used here.
        if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):
            what = "no masked LM" if head else "not a whole model"
            raise UserError(f"{path}: {what}, it has no weights for {', '.join(missing[:3])}")
        found = cls(path, model, tokenizer)
        if head and found.mask_id < 0:
            raise UserError(f"{path}: its tokenizer has no mask token; only masked LMs can be scored")
        return found

    def tokens(self, text: str) -> Tokens:
        # The characters of a special piece in a text are text, as they are in pre-training.
        found = self._tokenizer(text, split_special_tokens=True)
        return Tokens(found["input_ids"], found.word_ids())

    @torch.no_grad()
    def states(self, ids_BL: Tensor) -> list[Tensor]:
        found = self._model(**self._inputs(ids_BL), output_hidden_states=True)
        return [*found.hidden_states[:-1], found.last_hidden_state]  # some leave out the final norm

    @torch.no_grad()
    def mask_logits(self, ids_BL: Tensor) -> Tensor:
        rows, first = torch.arange(len(ids_BL)), (ids_BL == self.mask_id).long().argmax(1)

        def chosen(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0][rows, first],)

        # All rows but one would be multiplied by the word table, half of a small model's work, for nothing.
        table = self._model.get_output_embeddings()
        hook = None if table is None else table.register_forward_pre_hook(chosen)
        try:
            logits: Tensor = self._model(**self._inputs(ids_BL)).logits
        finally:
            if hook:
                hook.remove()
        return logits if logits.dim() == 2 else logits[rows, first]

    def _inputs(self, ids_BL: Tensor) -> dict[str, Tensor]:
        ids_BL = ids_BL.to(self.device)
        return {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}

    def untrained(self, seed: int) -> Encoder:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = type(self._model)(self._model.config)
        return _HuggingFace(self.name, model, self._tokenizer)


def refuse_decoder(path: str) -> None:
    """Raise UserError where a folder holds a late-mask model with its decoder, no class of transformers."""
    kind = None
    with suppress(OSError, ValueError, AttributeError):  # of which transformers will tell
        kind = parse_json((Path(path) / _FOLDER).read_bytes()).get("model_type")
    if kind == "latemask":
        raise UserError(
            f"{path}: has its decoder, which only minimal_pairs takes; name the run, or export it without"
            " --with-decoder"
        )


def refuse_made_up(path: str, tokenizer: Any) -> None:
    """Raise UserError where a folder has no tokenizer: transformers makes one up that knows no word."""
    names = set(tokenizer.vocab_files_names.values()) | {"tokenizer.json"}
    if not any((Path(path) / name).is_file() for name in names):
        raise UserError(f"{path}: has no tokenizer ({', '.join(sorted(names))}); copy it there")


def positions(model: Any) -> int:
    """Return the most tokens that a model takes; RoBERTa's table begins with rows of no position."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return getattr(model.config, "max_position_embeddings", None) or 512
