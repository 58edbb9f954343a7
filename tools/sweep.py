"""Ablations: one config, some keys with several values each, every combination a run, one table.

    python -m tools.sweep configs/3ml-self-base.yaml --output runs/ablation \
        --over model.mask_from=0,3,6,12 masking.rate=0.15,0.5

Runs go one after the other on this machine, or with --slurm side by side as a job array. Each variant is
a config file and a run folder of the same name, so a sweep that was interrupted goes on when it is started
again, and any variant can be run alone with ``python -m pretrain``. A combination that the config refuses
is named in the table and left out.

A decoder needs mask_from = num_layers. Where a swept mask_from lies below, the variant has no
decoder, unless decoder_layers is swept too.
"""

import argparse
import itertools
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pretrain.account import epochs, ledger
from pretrain.config import Config, dump_config, load_config, method_of, parse_overrides
from pretrain.errors import STOPPED, UserError, was_stopped
from pretrain.monitor import read_metrics
from pretrain.run_folder import RunFolder
from pretrain.terminal import wrapped
from tools.plan.estimate import epochs_read, planned_recipe
from tools.shared import console, outputs
from tools.shared.job_options import add_job_options, job_words
from tools.shared.tables import aligned, table_files, write_table

FIELDS = dict.fromkeys(("name", "values", "run", "method", "state"), "")
"""By which the table of a sweep is known."""
KILLED = 1
"""Exit code: a run was killed (the others go on)."""


@dataclass(frozen=True)
class Variant:
    """One combination of values."""

    name: str
    values: dict[str, Any]
    """By key, as swept."""
    config: Config | None
    """None if the config refuses the combination."""
    refusal: str = ""


def variants(path: str, overrides: list[str], over: list[str], output: Path) -> list[Variant]:
    """Return every combination of the values in `over` (``key=v1,v2``), the last key changing fastest."""
    axes = [_axis(word) for word in over]
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--over {key}: given twice; give all its values at once")
    leaves = [key.rpartition(".")[2] for key in keys]
    names = [key if leaves.count(leaf) > 1 else leaf for key, leaf in zip(keys, leaves, strict=True)]
    found: list[Variant] = []
    for combination in itertools.product(*(texts for _, texts in axes)):
        name = "_".join(f"{key}-{_slug(text)}" for key, text in zip(names, combination, strict=True))
        if any(variant.name == name for variant in found):
            raise UserError(f"--over: two runs would be named {name}; give each value once")
        words = [f"{key}={text}" for key, text in zip(keys, combination, strict=True)]
        variant = _variant(path, overrides, words, name, output)
        for other in found:
            if other.values == variant.values:
                raise UserError(f"--over: {other.name} and {name} are the same; give each value once")
        found.append(variant)
    return found


def _axis(word: str) -> tuple[str, list[str]]:
    """``a.b=1,[2,3]`` -> ("a.b", ["1", "[2,3]"]): commas inside brackets belong to a value."""
    key, equals, text = word.partition("=")
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            values.append("")
        else:
            values[-1] += letter
    if not equals or "." not in key or not all(values):
        raise UserError(f"--over {word!r}: write section.key=value,value,...")
    return key, [value.strip() for value in values]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


def _variant(path: str, overrides: list[str], words: list[str], name: str, output: Path) -> Variant:
    tree = parse_overrides(words)
    values = {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
    here = [*overrides, *words, f"run.dir={output / name}"]
    try:
        return Variant(name, values, _load(path, here, values))
    except UserError as error:
        reason = "; ".join(
            line.removeprefix(f"{path}: ").removeprefix("command line: ") for line in str(error).splitlines()
        )
        return Variant(name, values, None, reason)


def _load(path: str, words: list[str], values: dict[str, Any]) -> Config:
    """Reads a variant; see the trap above."""
    swept, mask_from = "model.mask_from" in values, values.get("model.mask_from")
    if not swept or "model.decoder_layers" in values:
        return load_config(path, words)
    plain = load_config(path, [*words, "model.mask_from=0", "model.decoder_layers=0"])
    late = mask_from == plain.model.num_layers
    return load_config(path, words if late else [*words, "model.decoder_layers=0"])


# ---- running -------------------------------------------------------------------------------------


def prepare(variant: Variant, output: Path, folder: Path | None = None) -> Path | None:
    """Write the config of a variant to `folder` (the output's); None if its run is done."""
    text, written = _text_of(variant), config_file(variant, output)
    unchanged = _unchanged(variant, written)
    if unchanged and RunFolder(output / variant.name).status().get("state") == "finished":
        return None
    file = (folder or output) / written.name
    if folder or not unchanged:
        outputs.write(file, text)
    return file


def config_file(variant: Variant, output: Path) -> Path:
    """Return where the config of a variant is kept."""
    return output / f"{variant.name}.yaml"


def _text_of(variant: Variant) -> str:
    assert variant.config
    return f"{outputs.YAML_MARK}\n{dump_config(variant.config)}"


def _unchanged(variant: Variant, file: Path) -> bool:
    """Whether a file is the variant's config, with the mark or, of an older program, without it."""
    text = _text_of(variant).encode()
    return file.is_file() and file.read_bytes() in (text, text.partition(b"\n")[2])


def check_outputs(args: argparse.Namespace, possible: Sequence[Variant]) -> None:
    """Raise UserError where another's file is in the place of the table or of a variant's config."""
    files = [(each, config_file(each, args.output)) for each in possible]
    outputs.check((file for each, file in files if not _unchanged(each, file)), [args.config])
    outputs.check(table_files(args.output, "sweep"), fields=FIELDS)


def warn_of_epochs(possible: Sequence[Variant]) -> None:
    """Tell once what is absurd in the budget of several variants."""
    told: dict[str, list[str]] = {}
    for each in possible:
        assert each.config
        with suppress(UserError):  # which its run tells
            if text := epochs.warning(epochs_read(planned_recipe(each.config)[0], None)):
                told.setdefault(text, []).append(each.name)
    for text, names in told.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(wrapped(f"warning: {names[0]}{others}: {text}", sys.stderr), file=sys.stderr)


def run(variant: Variant, output: Path) -> int:
    """Starts or continues a variant unless it is done; the exit code of its run."""
    file = prepare(variant, output)
    return start([sys.executable, "-m", "pretrain", str(file)]) if file else 0


def queue(possible: Sequence[Variant], args: argparse.Namespace) -> int:
    """Hand the variants that are not done to `slurm.submit`, as an array; its exit code."""
    command = [sys.executable, "-m", "slurm.submit", f"--output={args.output}", *job_words(args)]
    with tempfile.TemporaryDirectory() as scratch:  # what is refused leaves nothing
        files = [str(file) for each in possible if (file := prepare(each, args.output, Path(scratch)))]
        if not files:
            print("all runs are done", file=sys.stderr)
            return 0
        if args.dry_run:
            return start([*command, "--dry-run", "--runs", *files], sys.__stderr__ if args.json else None)
        code = start([*command, "--runs", *files])
    if code == 0:
        for each in possible:
            prepare(each, args.output)
    return code


def start(command: list[str], stdout: IO[str] | None = sys.__stderr__) -> int:
    """Run a program to its end; its exit code. Who stops the sweep stops it, and it saves its work.

    stdout: ours carries the table alone.
    """
    process = subprocess.Popen(command, stdout=stdout)
    handlers = {
        signal.SIGTERM: lambda number, frame: process.send_signal(number),
        signal.SIGUSR1: lambda number, frame: process.send_signal(number),
        signal.SIGINT: lambda number, frame: None,  # a terminal's Ctrl-C reaches it as well
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def described(variant: Variant, output: Path) -> dict[str, Any]:
    """Return a row of the table: what the variant is, how it stands, what it cost and what it gave."""
    folder = output / variant.name
    row: dict[str, Any] = {"name": variant.name, "values": variant.values, "run": str(folder)}
    outcome = dict.fromkeys(("method", "state", "reason", "steps", "flops", "device_hours", *_SCORES))
    if variant.config is None:
        return row | outcome | {"state": "refused", "reason": variant.refusal}
    outcome |= {"method": method_of(variant.config), "state": "not started"}
    status = RunFolder(folder).status()
    if status:
        outcome |= {"state": status["state"], "reason": status["reason"]}
    if (folder / "ledger.jsonl").exists():
        totals = ledger.total([folder])
        outcome |= {"steps": totals.steps, "flops": totals.flops["total"]}
        outcome["device_hours"] = totals.device_hours
    if (folder / "metrics.jsonl").exists():
        for line in read_metrics(folder):
            outcome |= {name: line[name] for name in _SCORES if name in line}
    return row | outcome


_SCORES = ("held_out_loss", "held_out_accuracy", "held_out_bits_per_byte")


def text(rows: list[dict[str, Any]]) -> str:
    """Return the table for people, without columns that have nothing yet."""
    head = ["variant", "method", "state", "steps", "FLOPs", "held-out loss", "accuracy"]
    lines = [head]
    for row in rows:
        figures = (
            (row["steps"], ","),
            (row["flops"], ".3g"),
            (row["held_out_loss"], ".4f"),
            (row["held_out_accuracy"], ".2%"),
        )
        shown = ["-" if value is None else format(value, how) for value, how in figures]
        lines.append([row["name"], row["method"] or "-", row["state"], *shown])
    told = [column for column in zip(*lines, strict=True) if set(column[1:]) != {"-"}]
    refused = [f"{row['name']} was left out: {row['reason']}" for row in rows if row["state"] == "refused"]
    return "\n".join([aligned(list(zip(*told, strict=True))), *(wrapped(line, indent=4) for line in refused)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("sweep", "Run every combination of some values of a config", reports=True)
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="the same in every run")
    parser.add_argument(
        "--over", nargs="+", required=True, metavar="section.key=v1,v2", help="what differs between runs"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="configs, runs and table; same DIR: goes on (runs/sweep-CONFIG)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list the runs and start none; with --slurm also the sbatch file",
    )
    parser.add_argument("--slurm", action="store_true", help="submit the runs as a job array")
    add_job_options(parser)
    args = parser.parse_intermixed_args(arguments)
    args.output = args.output or Path("runs") / f"sweep-{Path(args.config).stem}"
    todo = variants(args.config, args.overrides, args.over, args.output)
    possible = [variant for variant in todo if variant.config]
    if not possible:
        raise UserError(f"--over: no combination is possible; the first: {todo[0].refusal}")
    check_outputs(args, possible)
    warn_of_epochs(possible)
    code = queue(possible, args) if args.slurm else 0
    if code:
        return code
    for number, variant in enumerate(possible, 1):
        if args.dry_run or args.slurm:
            break
        print(f"== {number} of {len(possible)}: {variant.name}", file=sys.stderr, flush=True)
        result = run(variant, args.output)
        if was_stopped(result):
            print(f"stopped in {variant.name}; start the same again to go on", file=sys.stderr)
            return STOPPED
        code = code or (result if result >= 0 else KILLED)
    rows = [described(variant, args.output) for variant in todo]
    if not args.dry_run:
        write_table(args.output, "sweep", rows, FIELDS)
    if args.json:
        console.print_json(rows)
    else:
        print(text(rows))
    return code


if __name__ == "__main__":
    console.run(main)
