"""The work of a study: its corpora, and a cell from its first update to the last line of results.

All of it is done by other programs, and each of their folders says what is done: a cell that was killed goes
on where it was. When its lines are written, what no line needs any more is removed.
"""

import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pretrain.account import ledger
from pretrain.config import Config, dump_config
from pretrain.data.tokenizer import load_tokenizer
from pretrain.errors import STOPPED, UserError, was_stopped
from pretrain.evaluate import HeldOut
from pretrain.files import remove, write_whole
from pretrain.provenance import code_revision
from pretrain.run_folder import RunFolder, run_config
from tools import minimal_pairs, probe, sweep
from tools.analyze import rank
from tools.evaluate import BySource
from tools.finetune import table
from tools.finetune.cells import RUNS, read_runs
from tools.shared.encoders import open_encoder
from tools.shared.run_model import default_device, load_model
from tools.study.plan import Study, StudyCell, StudyModel, decay_name
from tools.study.results import StudyResult, append, read_results

_MICRO_BATCH = 32


def prepare(study: Study, data: Path) -> None:
    """Make tokenizer and corpora of the study's texts, unless they are there.

    UserError where anything is missing, also of what models are asked when they are trained.
    """
    wanted = study.options.evaluate
    tasks = [f"{wanted.tasks}/{task}" for task in wanted.probe + wanted.finetune]
    for place in (data / name for name in [*wanted.pairs, *wanted.last_pairs, *tasks]):
        if not place.exists():
            raise UserError(f"{place}: missing, and named in {study.path}: evaluate")
    options, texts = study.options, {"train": study.options.text, "valid": study.options.held_out}
    files = {part: [str(data / name) for name in names] for part, names in texts.items()}
    if not (study.tokenizer / "tokenizer.model").exists() and not options.tokenizer:
        words = ["--input", *files["train"], f"--output={study.tokenizer}"]
        _run(["tools.train_tokenizer", *words, f"--vocab-size={options.vocabulary}"])
    for part, names in files.items():
        prefix = study.corpus(part)
        if not prefix.with_suffix(".json").exists():
            words = ["--input", *names, f"--tokenizer={study.tokenizer}", f"--output={prefix}"]
            _run(["tools.encode_corpus", *words])
    if (pieces := load_tokenizer(study.tokenizer).vocab_size) != options.vocabulary:
        raise UserError(f"{study.path}: vocabulary = {options.vocabulary}, but the tokenizer has {pieces}")


def _run(words: Sequence[str]) -> None:
    """Run a program; UserError where it fails, SystemExit where it was stopped."""
    code = sweep.start([sys.executable, "-m", *words])
    if was_stopped(code):
        sys.exit(STOPPED)
    if code:
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}; see above"
        raise UserError(f"{' '.join(words[:2])}: ended {how}")


# ---- a cell --------------------------------------------------------------------------------------


def do(study: Study, cell: StudyCell, data: Path, file: Path) -> None:
    """Train and score the models of a cell that have no line yet, and add their lines."""
    begun = time.monotonic()
    done = {result.digest for result in read_results(file)}
    for target in study.targets(cell):
        if target.digest not in done:
            run = _trained(study, target)
            scores = score(study, target, run, data)
            now = time.monotonic()
            append(file, _result(study, target, run, scores, now - begun))
            begun = now
    _clear(study, cell)


def _trained(study: Study, target: StudyModel) -> Path:
    """Return the folder of the finished run that ends with a model."""
    if target.cell.tries:
        return _train(study.trial(target.cell))
    decay = study.decay(target)
    if not _is_finished(decay):
        _train(study.trunk(target.cell))
    return _train(decay)


def _train(config: Config) -> Path:
    """Start or continue a run unless it is finished; its folder."""
    if not _is_finished(config):
        file = _file(config)
        write_whole(file, dump_config(config).encode())
        _run(["pretrain", str(file)])
    return Path(config.run.dir)


def _is_finished(config: Config) -> bool:
    """Tell whether a run is, and is of this config: a study's file may have changed."""
    file, status = _file(config), RunFolder(config.run.dir).status()
    same = file.is_file() and file.read_text(encoding="utf-8") == dump_config(config)
    return same and status.get("state") == "finished"


def _file(config: Config) -> Path:
    return Path(f"{config.run.dir}.yaml")


def _clear(study: Study, cell: StudyCell) -> None:
    """Remove a cell's runs, but for that which ends with the last budget's model."""
    last = decay_name(study.options.shares[-1])
    for path in study.folder(cell).iterdir():
        if cell.tries or path.name.removesuffix(".yaml") != last:
            remove(path)


def _result(
    study: Study, target: StudyModel, run: Path, scores: dict[str, float], seconds: float
) -> StudyResult:
    cell, totals, line = target.cell, ledger.total([run]), ledger.read(run)[-1]
    return StudyResult(
        digest=target.digest,
        size=cell.size,
        method=cell.method,
        seed=cell.seed,
        lr=cell.lr,
        share=target.share,
        step=totals.steps,
        tokens=totals.tokens_seen,
        flops=totals.flops["total"],
        flops_without_head=totals.flops_without_head,
        token_layers=totals.token_layers,
        device_hours=totals.device_seconds["productive"] / 3600,
        seconds=round(seconds, 1),
        scores={name: round(value, 6) for name, value in scores.items()},
        corpus=study.fingerprint,
        commit=code_revision() or "",
        device=line.device,
        precision=run_config(run).train.precision or "",
        torch=torch.__version__,
    )


# ---- scores --------------------------------------------------------------------------------------


def score(study: Study, target: StudyModel, run: Path, data: Path) -> dict[str, float]:
    """Return what a model scores, by name; a rate that is tried has a held-out loss alone."""
    wanted, last = study.options.evaluate, target.share == study.options.shares[-1]
    found = dict(_held_out(study, run))
    if target.cell.tries:
        return {"loss": found["loss"]}
    found |= _pairs(run, [data / name for name in wanted.pairs + wanted.last_pairs * last])
    if last:
        found |= _probed(run, data / wanted.tasks, wanted.probe, wanted.probe_rows)
        if wanted.rank_tokens:
            found |= _ranks(study, run, wanted.rank_tokens)
        if wanted.finetune and target.cell.method in study.methods(headline=True):
            found |= _fine_tuned(study, run, data / wanted.tasks)
    return found


def _held_out(study: Study, run: Path) -> Iterator[tuple[str, float]]:
    model, config, tokenizer, _ = load_model(run)
    device, prefix = default_device(), str(study.corpus("valid"))
    held_out = HeldOut.of(config, tokenizer, prefix, study.options.evaluate.samples)
    by_source = BySource(model.to(device), held_out, prefix)
    found = held_out.score(by_source, _MICRO_BATCH, device)
    yield "loss", found.loss
    yield "accuracy", found.accuracy
    if found.bits_per_byte:
        yield "bits per byte", found.bits_per_byte
    for name, source in by_source.result().items():
        if source["bits_per_byte"]:
            yield f"bits per byte, {name}", source["bits_per_byte"]


def _pairs(run: Path, files: Sequence[Path]) -> dict[str, float]:
    """Return the share of pairs whose good sentence is the more likely, of each file."""
    if not files:
        return {}
    encoder, metric = open_encoder(str(run), head=True), minimal_pairs.METRICS[0]
    scored = minimal_pairs.score_pairs(encoder, minimal_pairs.read_all(list(map(str, files))), metric)
    rows = minimal_pairs.shares("", encoder.step, scored, metric)
    return {row.data: row.accuracy for row in rows if row.field == minimal_pairs.ALL}


def _probed(run: Path, folder: Path, tasks: Sequence[str], rows: int) -> dict[str, float]:
    encoder = open_encoder(str(run))
    found = dict[str, float]()
    for task in tasks:
        results = probe.probe(encoder, "", probe.TRAINED, probe.read_task(folder, task, rows))
        found |= {f"probe {each.task}, {each.metric}": each.score for each in probe.best(results)}
        last = max(each.layer or 0 for each in results)
        cosines = [each for each in results if each.states in probe.COSINES and each.layer == last]
        found |= {f"{each.states}, {each.task}, {each.metric}": each.score for each in cosines}
    return found


def _ranks(study: Study, run: Path, tokens: int) -> dict[str, float]:
    """Return the effective ranks of the encoder's last layer, of text without masks."""
    loaded = load_model(run)
    device = default_device()
    loaded.model.to(device)
    rows = rank.measure(loaded, str(study.corpus("valid")), tokens, device)
    (row,) = (
        row
        for row in rows
        if (row["part"], row["layer"], row["rows"]) == ("encoder", loaded.config.model.num_layers, rank.CLEAN)
    )
    return {f"rank {name}": row[name] for name in rank.MEASURES}


def _fine_tuned(study: Study, run: Path, folder: Path) -> dict[str, float]:
    """Return the median score of the fine-tunings on each task."""
    wanted = study.options.evaluate
    with tempfile.TemporaryDirectory() as scratch:
        words = [f"encoder={run}", f"--data={folder}", "--tasks", *wanted.finetune, f"--output={scratch}"]
        words += [f"--seeds={wanted.finetune_seeds}", f"--train-rows={wanted.finetune_rows}"]
        _run(["tools.finetune", *words])
        entries = table.entries(read_runs(Path(scratch) / RUNS), all_metrics=True)
    return {f"fine-tuned {each.column}": each.median for each in entries if each.encoder == "encoder"}
