"""A Hugging Face folder from a run: encoder, config, tokenizer, model card.

Nothing is believed: the written folder is loaded by transformers and must give the training model's
logits (or, after a late method, hidden states) and the training tokenizer's ids before it appears under
its final name.

What a late method trained beside the encoder (decoder, mask vector, head) is left out, unless the
pre-training model itself is asked for: then the folder brings the code that it needs
(modeling_latemask.py), and loads with trust_remote_code.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pretrain import checkpoint
from pretrain.account import ledger
from pretrain.config import Config, method_of
from pretrain.data.indexed import corpus_file
from pretrain.data.manifest import Manifest, load_manifest
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UserError
from pretrain.files import check_folder, digest, parse_json, seen_from, try_lock
from pretrain.model.huggingface import SETTINGS, WEIGHTS, hugging_face_state, left_out
from pretrain.model.late_mask import LateMaskModel
from tools.export.huggingface import MODELING, Form, hugging_face_config, late_state, model_class
from tools.export.model_card import model_card
from tools.export.sentences import FILES, POOLING, embeddings_differ, write_sentence_modules
from tools.export.tokenizer import check_tokenizer, write_tokenizer
from tools.shared import console, downstream
from tools.shared.run_model import load_model, mask_logits

TOLERANCE = 1e-4
"""Largest difference of an output, relative to the largest output."""
CHECK_TOKENS = 512
"""More than 66: a ModernBERT with local layers is right up to there and wrong beyond."""


class ExportError(RuntimeError):
    """The written folder does not compute what the training model does: a defect, not the user's."""


def export_folder(
    model: LateMaskModel,
    config: Config,
    tokenizer: Tokenizer,
    output: str | Path,
    card: str,
    overwrite: bool = False,
    with_decoder: bool = False,
    sentences: bool = False,
) -> dict[str, Any]:
    """Writes, checks and only then names the folder `output`; returns a report.

    card: text of README.md. overwrite: replace an earlier export there. with_decoder: the whole model of a
    late method. sentences: with what sentence-transformers needs.
    UserError if `output` is something else; ExportError, and nothing left behind, if the
    check fails.
    """
    output = Path(output).resolve()  # of a link, what it points to is replaced
    _recover(output)
    _refuse(output, overwrite)
    form, length = form_of(config, with_decoder), config.train.seq_length
    with _partial_folder(output) as partial:
        parameters = _write(partial, model, config, tokenizer, form)
        write_tokenizer(tokenizer, partial, length)
        if sentences:
            write_sentence_modules(partial, config.model.hidden_size, length)
        (partial / "README.md").write_text(card, encoding="utf-8")
        written = _digests(partial)
        difference = check_model(partial, model, tokenizer, form)
        check_tokenizer(partial, tokenizer)
        embeddings = check_sentences(partial, model, tokenizer, length) if sentences else None
        if _digests(partial) != written:
            raise UserError(f"{partial}: something else writes there; nothing was exported, start again")
        _refuse(output, overwrite)  # what came in meanwhile stays
        _publish(partial, output)
    return {
        "path": str(output),
        "class": model_class(config.model, form),
        "method": method_of(config),
        "parameters": parameters,
        "parameters_left_out": count_left_out(model, form),
        "largest_difference": difference,
        "sentence_transformers": sentences,
        "embeddings_difference": embeddings,
    }


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of each file: transformers reads by name what is checked."""
    return {str(file): digest(file) for file in folder.rglob("*") if file.is_file()}


def form_of(config: Config, with_decoder: bool) -> Form:
    """Return what of the model is exported; UserError if there is no decoder to add."""
    if method_of(config) != "mlm":
        return "late" if with_decoder else "encoder"
    if with_decoder:
        raise UserError("--with-decoder: the model of this run has no late masks; leave it out")
    return "masked-lm"


def count_left_out(model: LateMaskModel, form: Form) -> int:
    """Return the parameters that the export does not carry (padded rows of the word table apart)."""
    state = model.state_dict()
    return 0 if form == "late" else sum(state[name].numel() for name in left_out(state, form == "masked-lm"))


_ALWAYS = {SETTINGS, WEIGHTS, "README.md", "tokenizer.json", "tokenizer_config.json"}
WRITTEN = frozenset({*_ALWAYS, MODELING.name, *FILES})
"""All names that an export may write: nothing else is ever replaced."""
MARK = "latemask_export"
"""Key of config.json with the sha256 of the weights beside it, which another program's are not."""
MODEL_TYPES = ("bert", "roberta", "roberta-prelayernorm", "modernbert", "latemask")


def _refuse(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise UserError(f"{output}: a file, no exported model; choose another --output")
    if not _is_export(output):
        raise UserError(f"{output}: exists and is no exported model; choose another --output")
    if not overwrite:
        raise UserError(f"{output}: holds a model already; choose another --output or add --overwrite")
    if foreign := _foreign(output):
        raise UserError(
            f"{output}: has {', '.join(foreign[:5])}{' ...' if foreign[5:] else ''}, which no export writes;"
            " move that away, or choose another --output"
        )


def _is_export(folder: Path) -> bool:
    """Whether an export wrote it: with the mark of its weights, or before there was one.

    Such a folder has the names of an export, no other and none less, and settings of a kind exported here.
    """
    try:
        settings = parse_json((folder / SETTINGS).read_text(encoding="utf-8"))
        known = settings["model_type"] in MODEL_TYPES
        if MARK in settings:
            return settings[MARK] == digest(folder / WEIGHTS)["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return known and {each.name for each in folder.iterdir()} - {MODELING.name} == _ALWAYS


def _foreign(folder: Path) -> list[str]:
    """Names of what no export writes."""
    return sorted(
        name
        for each in folder.rglob("*")
        if (name := each.relative_to(folder).as_posix()) not in WRITTEN or not each.is_file()
        if name != POOLING or each.is_symlink() or not each.is_dir()
    )


LOCK = ".latemask-export"
"""The first file of an unfinished export, and the first to go: without it the folder is not ours."""


@contextmanager
def _partial_folder(output: Path) -> Iterator[Path]:
    """Yield a folder beside the output, locked, and remove what is left of it."""
    partial = _partial(output)
    _remove_partial(partial)
    partial.mkdir(parents=True)
    try:
        with (partial / LOCK).open("w", encoding="utf-8") as lock:
            try_lock(lock, partial)
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(output: Path) -> Path:
    return output.with_name(f".partial-{output.name}")


def _remove_partial(partial: Path) -> None:
    """Remove what a kill left of an export; UserError for anything else, an export that goes on included."""
    if not os.path.lexists(partial):
        return
    if partial.is_symlink() or not partial.is_dir() or set(_foreign(partial)) - {LOCK}:
        raise UserError(f"{partial}: in the way, and not left by an export; move it away")
    if (partial / LOCK).is_file():
        with (partial / LOCK).open("a", encoding="utf-8") as lock:
            if not try_lock(lock, partial):
                raise UserError(
                    f"{partial}: in use by another export; wait for it, or choose another --output"
                )
    elif any(partial.iterdir()) and not _is_export(partial):
        raise UserError(f"{partial}: in the way, and not left by an export; move it away")
    shutil.rmtree(partial)


def _write(folder: Path, model: LateMaskModel, config: Config, tokenizer: Tokenizer, form: Form) -> int:
    ours, vocab_size = model.state_dict(), tokenizer.vocab_size
    if form == "late":
        state = late_state(ours, vocab_size)
        shutil.copyfile(MODELING, folder / MODELING.name)
    else:
        state = hugging_face_state(config.model, ours, vocab_size, form == "masked-lm", tokenizer.pad)
    tensors = {name: tensor.float() for name, tensor in state.items()}
    try:
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    except SafetensorError as error:  # a full disk above all
        raise UserError(f"{folder / WEIGHTS}: cannot be written ({error})") from error
    settings = hugging_face_config(config, tokenizer, form) | {MARK: digest(folder / WEIGHTS)["sha256"]}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(folder / SETTINGS, folder / WEIGHTS)  # safetensors creates 0600, whatever the umask
    return sum(tensor.numel() for tensor in state.values())


def _aside(output: Path) -> Path:
    """Where an earlier export waits while the new one takes its name."""
    return output.with_name(f".old-{output.name}")


def _recover(output: Path) -> None:
    """Remove what a kill left, or bring the earlier export back that it left aside before the new one was in
    place; UserError where anything else is in the way."""
    _remove_partial(_partial(output))
    old = _aside(output)
    if not os.path.lexists(old):
        return
    if old.is_symlink() or not old.is_dir() or _foreign(old) or not _is_export(old):
        raise UserError(f"{old}: in the way, and not left by an export; move it away")
    if output.exists():
        shutil.rmtree(old)
    else:
        old.rename(output)


def _publish(partial: Path, output: Path) -> None:
    """Two renames; a kill between them leaves the old one aside, which the next call brings back."""
    old = _aside(output)
    (partial / LOCK).unlink()
    if output.exists():
        output.rename(old)
    partial.rename(output)
    if old.exists():
        shutil.rmtree(old)


# ---- checking ------------------------------------------------------------------------------------


@torch.no_grad()
def check_model(folder: Path, model: LateMaskModel, tokenizer: Tokenizer, form: Form) -> float:
    """Return the largest difference between transformers and `model`, relative to scale; ExportError if too
    large.

    One sequence of full length and one padded to it, in natural order, random pieces and masks. Of a late
    model the answers to the masks are compared.
    """
    theirs = _load(folder, form)
    model = model.eval()
    length = min(model.m.max_positions, CHECK_TOKENS)
    worst = 0.0
    ids = _probe(tokenizer, length, masks=form != "encoder")
    lengths = (length, length // 2 + 1)
    attention = torch.tensor([[i < n for i in range(length)] for n in lengths]).long()
    padded = torch.where(attention.bool(), ids, tokenizer.pad)
    answer = theirs(input_ids=padded, attention_mask=attention)
    for row, n in enumerate(lengths):
        expected = _outputs(model, ids[row : row + 1, :n], tokenizer.vocab_size, form)
        found = (answer.last_hidden_state if form == "encoder" else answer.logits)[row : row + 1, :n]
        if form == "late":
            found = found[:, ids[row, :n] == tokenizer.mask]
        worst = max(
            worst, ((found - expected).abs().max() / expected.abs().max()).nan_to_num(torch.inf).item()
        )
    if worst > TOLERANCE:
        raise ExportError(
            f"the exported model differs from the trained one by {worst:.1e} of its outputs' scale"
            f" (allowed {TOLERANCE:.0e}); nothing was written. This is a defect: please report it"
        )
    return worst


@torch.no_grad()
def check_sentences(
    folder: Path, model: LateMaskModel, tokenizer: Tokenizer, max_length: int
) -> float | None:
    """Return the largest difference of embeddings, as `embeddings_differ`; ExportError if too large."""
    worst = embeddings_differ(folder, model.eval(), tokenizer, max_length)
    if worst is not None and not worst <= TOLERANCE:
        raise ExportError(
            f"sentence-transformers' embeddings differ by {worst:.1e} of their scale (allowed"
            f" {TOLERANCE:.0e}); nothing was written. This is a defect: please report it"
        )
    return worst


def _load(folder: Path, form: Form) -> torch.nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    auto = transformers.AutoModel if form == "encoder" else transformers.AutoModelForMaskedLM
    with _place_for_code() if form == "late" else nullcontext():
        model, info = auto.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=form == "late",
        )
    # Base classes bring a pooler that pre-training knows nothing about.
    missing = [name for name in info["missing_keys"] if "pooler" not in name]
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ExportError(f"transformers does not take the weights: {info}")
    return model.eval()


@contextmanager
def _place_for_code() -> Iterator[None]:
    """A temporary cache of modules for transformers where its own, below HOME, cannot be written."""
    from transformers import dynamic_module_utils

    usual = dynamic_module_utils.HF_MODULES_CACHE
    try:
        check_folder(usual)
    except UserError:
        pass
    else:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="latemask-modules-") as folder:
        dynamic_module_utils.HF_MODULES_CACHE = folder
        try:
            yield
        finally:
            dynamic_module_utils.HF_MODULES_CACHE = usual


def _probe(tokenizer: Tokenizer, length: int, masks: bool) -> Tensor:
    """Two rows [2, length] of random pieces between <s> and </s>, every seventh a [MASK] if `masks`."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.from_numpy(tokenizer.random_ids).long()
    ids = pool[torch.randint(len(pool), (2, length), generator=generator)]
    ids[:, 0], ids[:, -1] = tokenizer.bos, tokenizer.eos
    if masks:
        ids[:, 3::7] = tokenizer.mask
    return ids


def _outputs(model: LateMaskModel, ids: Tensor, vocab_size: int, form: Form) -> Tensor:
    """Logits [1, n, W] (of the masks, if they are late), or the encoder's output [1, n, D], of the
    training model in natural order."""
    if form == "late":
        return mask_logits(model, ids)
    hidden = model.encode(ids, torch.arange(ids.shape[1])[None])
    if form == "encoder":
        return hidden
    return model.head(hidden) @ model.tok.weight[:vocab_size].T + model.head.bias[:vocab_size]


# ---- the program ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("export", "Write a run's encoder as a Hugging Face folder", reports=True)
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    console.add_checkpoint(parser)
    parser.add_argument(
        "--with-decoder",
        action="store_true",
        help="the whole pre-training model of a late method, which can fill in masks (needs"
        " trust_remote_code to load)",
    )
    parser.add_argument(
        "--milestones",
        action="store_true",
        help="all weights that checkpoint.keep kept, a folder in DIR each",
    )
    parser.add_argument(
        "--sentence-transformers",
        action="store_true",
        help="add what sentence-transformers needs: a text's embedding is the mean of its tokens",
    )
    parser.add_argument("--license", metavar="NAME", help="licence for the model card, such as apache-2.0")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export there")
    args = parser.parse_args(arguments)
    if args.sentence_transformers and args.with_decoder:
        raise UserError("--sentence-transformers takes the encoder alone; leave --with-decoder out")
    if not args.milestones:
        report = _export(args, args.checkpoint, Path(args.output))
    else:
        names = [name for name in checkpoint.named_weights(args.run) if name.startswith(checkpoint.MILESTONE)]
        if not names:
            raise UserError(f"{args.run}: kept no milestones; checkpoint.keep says which a run keeps")
        Path(args.output).mkdir(parents=True, exist_ok=True)
        report = {name: _export(args, name, Path(args.output) / name) for name in names}
    if args.json:
        console.print_json(report)
    else:
        print("\n".join(map(_text, report.values() if args.milestones else [report])))
    return 0


def _export(args: argparse.Namespace, which: str, folder: Path) -> dict[str, Any]:
    """Write one checkpoint, and return what was written."""
    output = folder.resolve()
    _recover(output)
    _refuse(output, args.overwrite)  # before minutes of reading
    check_folder(output.parent)
    model, config, tokenizer, state = load_model(args.run, which)
    form = form_of(config, args.with_decoder)
    sentences = args.sentence_transformers
    card = model_card(
        Path(args.run).absolute().name,
        config,
        tokenizer.piece(tokenizer.mask),
        count_left_out(model, form),
        state,
        _corpora(config),
        ledger.total([args.run]),
        ledger.head(args.run),
        args.license,
        args.with_decoder,
        [score for score in downstream.read(args.run) if score.step == state.step],
        sentences,
    )
    report = export_folder(
        model, config, tokenizer, str(folder), card, args.overwrite, args.with_decoder, sentences
    )
    return {"checkpoint": state.step, **report}


def _corpora(config: Config) -> list[tuple[float, Manifest]]:
    """Return weight and manifest of each training corpus; none, with a word of it, where one is gone."""
    blend = config.corpus.blend
    for _, prefix in blend:
        if not corpus_file(prefix, "json").is_file():
            print(
                f"warning: {prefix}: no corpus there{seen_from(prefix)}; the model card says nothing of the"
                " training data",
                file=sys.stderr,
            )
            return []
    return [(weight, load_manifest(prefix)) for weight, prefix in blend]


def _text(report: dict[str, Any]) -> str:
    left = report["parameters_left_out"]
    gone = f"; left out: {left:,} parameters of decoder, mask vector and head" if left else ""
    step, parameters = f"{report['checkpoint']:,}", f"{report['parameters']:,}"
    embeddings = report["embeddings_difference"]
    and_sentences = "" if embeddings is None else f", sentence-transformers to {embeddings:.1e}"
    if report["sentence_transformers"] and embeddings is None:
        and_sentences = "; sentence-transformers is not installed, so its embeddings were not compared"
    return (
        f"{report['path']}: {report['class']} of step {step}, {parameters} parameters{gone}."
        f" transformers agrees with the training model to {report['largest_difference']:.1e}{and_sentences}."
    )


if __name__ == "__main__":
    console.run(main)
