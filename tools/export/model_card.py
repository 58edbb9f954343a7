"""README.md of an exported model: what it is, what it read, what it cost, how to load it."""

import re
from collections.abc import Sequence
from statistics import median
from typing import Any

import yaml

from pretrain import __version__
from pretrain.account.ledger import Totals
from pretrain.checkpoint import State
from pretrain.config import Config, method_of, phase_configs
from pretrain.data.manifest import Manifest
from pretrain.data.masking import counts
from tools.export.huggingface import Form, model_class
from tools.export.sentences import EXAMPLE
from tools.shared.downstream import DownstreamScore

_METHODS = {
    "mlm": "ordinary masked language modelling (RoBERTa, Liu et al. 2019)",
    "3ml-self": "late masks with a self-attention decoder (3ML, Liao et al. 2022, arXiv 2211.04898)",
    "3ml-cross": "late masks with a cross-attention decoder (3ML, Liao et al. 2022, arXiv 2211.04898)",
    "3ml-query": "late masks, a decoder that updates only the predicted rows (after 3ML, arXiv 2211.04898)",
    "mae-lm": "an encoder that never sees [MASK] (MAE-LM, Meng et al. 2023, arXiv 2302.02060)",
    "retromae": "masks predicted from the first token alone (RetroMAE, Xiao et al. 2022, arXiv 2205.12035)",
    "shared-depth": "masks that join inside the encoder (after 3ML, arXiv 2211.04898)",
    "one-way": "masks inside the encoder to which no other row attends (after 3ML, arXiv 2211.04898)",
}

_FILL_MASK = """from transformers import pipeline

fill = pipeline("fill-mask", model="path/to/this/folder"{more})
print(fill("The weather is {mask} today."))
"""

_ENCODE = """from transformers import AutoModel, AutoTokenizer

folder = "path/to/this/folder"
tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
hidden = encoder(**tokenizer("The weather is fine today.", return_tensors="pt")).last_hidden_state
"""


def model_card(
    name: str,
    config: Config,
    mask_token: str,
    left_out: int,
    state: State | None = None,
    corpora: Sequence[tuple[float, Manifest]] = (),
    totals: Totals | None = None,
    ledger_head: str = "",
    licence: str | None = None,
    with_decoder: bool = False,
    scores: Sequence[DownstreamScore] = (),
    sentences: bool = False,
) -> str:
    """Return Markdown with Hugging Face's front matter.

    name: its title. left_out: parameters of the pre-training model that are not exported. state: the
    checkpoint; corpora: weight and manifest of each that it was trained on; totals: of the ledger;
    ledger_head: hash of its newest line. What is None or empty is said to be unknown.
    with_decoder: the folder holds the whole model of a late method. scores: of this checkpoint. sentences:
    the folder is one of sentence-transformers.
    """
    head = method_of(config) == "mlm" or with_decoder
    more = ", trust_remote_code=True" if with_decoder else ""
    example = EXAMPLE if sentences else (_FILL_MASK if head else _ENCODE).format(mask=mask_token, more=more)
    sections = [
        _front_matter(config, head, licence, sentences),
        f"# {_plain(name)}\n\n{_what(config, left_out, with_decoder)}",
        f"## Use\n\n```python\n{example}```\n\n{_advice(config)}",
        f"## Training data\n\n{_data(corpora, state)}",
        f"## Training\n\n{_training(config, state)}",
        f"## Cost\n\n{_cost(totals, ledger_head)}",
        *([f"## Scores\n\n{_scores(scores)}"] if scores else []),
        f"## Licence\n\n{_licence(licence)}",
        f"## Configuration\n\n```yaml\n{_configuration(config)}```",
    ]
    return "\n\n".join(sections) + "\n"


def _plain(text: str) -> str:
    """Text of others as Markdown that shows it: no markup, HTML, link or table cell begins in it."""
    return re.sub(r"([\\`*_\[\]<>#|~&!$])", r"\\\1", " ".join(text.split()))


def _front_matter(config: Config, head: bool, licence: str | None, sentences: bool) -> str:
    values: dict[str, Any] = {
        "library_name": "sentence-transformers" if sentences else "transformers",
        "pipeline_tag": "sentence-similarity" if sentences else "fill-mask" if head else "feature-extraction",
        "tags": ["latemask", method_of(config)],
    }
    if licence:
        values = {"license": licence, **values}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _what(config: Config, left_out: int, with_decoder: bool) -> str:
    model, method = config.model, method_of(config)
    form: Form = "late" if with_decoder else "masked-lm" if method == "mlm" else "encoder"
    text = (
        f"A bidirectional encoder of {model.num_layers} layers x {model.hidden_size}, pre-trained with"
        f" LateMask {__version__} by {_METHODS[method.removesuffix('+leak')]}. Class:"
        f" `{model_class(model, form)}`."
    )
    if model.mask_leak and model.mask_from:
        text += (
            f" Other than there, its encoder saw {model.mask_leak:.0%} of the [MASK]s (`model.mask_leak`)."
        )
    if with_decoder:
        text += (
            " It is the whole pre-training model, decoder and head included, and can fill in masks. Its code"
            " is in the folder: read modeling_latemask.py before you trust it. To fine-tune, take the"
            " encoder, exported without the decoder."
        )
    if left_out:
        text += (
            f" The decoder, mask vector and head of pre-training ({left_out:,} parameters) are not part"
            " of it: it encodes texts without masks, and cannot fill them in."
        )
    return text


def _advice(config: Config) -> str:
    lengths = dict.fromkeys(str(phase.train.seq_length) for phase in phase_configs(config))
    return (
        f"Trained on sequences of {', then '.join(lengths)} tokens. Letters such as `<mask>` in a text"
        " become the special token, unless the tokenizer is called with `split_special_tokens=True`, as"
        " training did."
    )


def _data(corpora: Sequence[tuple[float, Manifest]], state: State | None) -> str:
    if not corpora:
        known = state and state.fingerprints.get("train")
        return f"Corpus with fingerprint `{known}`." if known else "Not recorded."
    whole = sum(weight for weight, _ in corpora)
    return "\n\n".join(
        (f"{weight / whole:.1%} of the samples: " if len(corpora) > 1 else "") + _corpus(manifest)
        for weight, manifest in corpora
    )


def _corpus(manifest: Manifest) -> str:
    rows = [f"{manifest.documents:,} documents, {manifest.tokens:,} tokens."]
    if manifest.sources:
        rows += ["", "| source | documents | tokens | bytes of text |", "|---|---|---|---|"]
        rows += [
            f"| {_plain(kind)} | {tally.documents:,} | {tally.tokens:,} | {tally.text_bytes:,} |"
            for kind, tally in manifest.sources.items()
        ]
    return "\n".join([*rows, "", f"Fingerprint `{manifest.fingerprint}`."])


def _training(config: Config, state: State | None) -> str:
    masking, length = config.masking, config.train.seq_length
    predicted = counts(masking, length).predicted / (length - 2)
    shares = ", ".join(
        f"{share:.0%} {what}"
        for share, what in zip(masking.corruption, ("[MASK]", "random", "kept"), strict=True)
    )
    batches = dict.fromkeys(str(phase.train.batch_size) for phase in phase_configs(config))
    text = (
        f"{predicted:.0%} of the tokens predicted ({shares}), {', then '.join(batches)} sequences an update."
    )
    if state is not None:
        text += f" This is the model after {state.step:,} updates ({state.samples:,} sequences)."
        if state.loss is not None:
            text += f" Held-out loss {state.loss:.4f} nats (15 % of tokens masked)."
    return text


def _cost(totals: Totals | None, ledger_head: str) -> str:
    if totals is None:
        return "Not recorded."
    spent = totals.device_seconds
    rows = [
        ("updates", f"{totals.steps:,}"),
        ("tokens read", f"{totals.tokens_seen:,}"),
        ("tokens predicted", f"{totals.tokens_predicted:,}"),
        ("model FLOPs", f"{totals.flops['total']:.3e}"),
        ("device-hours", f"{spent['total'] / 3600:.3f}"),
        ("of them lost to restarts", f"{spent['lost'] / 3600:.3f}"),
    ]
    if totals.kwh is not None:
        rows.append(("energy, kWh", f"{totals.kwh:.3f}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    text = f"From the ledger of the whole run, all attempts:\n\n| | |\n|---|---|\n{table}"
    if ledger_head:
        text += (
            f"\n\nThe ledger's newest line then had the hash `{ledger_head}`, which stands for all before it:"
            " `python -m tools.ledger check RUN --head HASH` says whether a ledger is still that one."
        )
    return text


def _scores(scores: Sequence[DownstreamScore]) -> str:
    """Return a row for each task, metric and protocol: the median of its scores, their range and number."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for each in scores:
        groups.setdefault((each.task, each.metric, each.protocol), []).append(each.score)
    rows = ["| task | metric | protocol | score | lowest to highest | scores |", "|---|---|---|---|---|---|"]
    for names, values in groups.items():
        spread = f"{median(values):.3f} | {min(values):.3f} to {max(values):.3f} | {len(values)}"
        rows.append(f"| {' | '.join(map(_plain, names))} | {spread} |")
    return "\n".join([*rows, "", "Scores of different protocols do not compare."])


def _licence(licence: str | None) -> str:
    if licence:
        return f"{_plain(licence)}."
    return "Not stated by its maker. The licences of the training data apply."


def _configuration(config: Config) -> str:
    # Sections that describe the model and its training; paths of the machine stay at home.
    kept = ("model", "masking", "train", "optimizer", "schedule", "budget")
    values = {name: config.model_dump(mode="json")[name] for name in kept}
    return yaml.safe_dump(values, sort_keys=False)
