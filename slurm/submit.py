"""One command from a config to a queue that finishes by itself: ``python -m slurm.submit CONFIG``.

    python -m slurm.submit CONFIG [section.key=value ...] [--nodes N --gpus-per-node G --time T] [--dry-run]
    python -m slurm.submit CONFIG --pipeline corpus,train,evaluate,export,report --input 'text/*.jsonl.gz'
    python -m slurm.submit --array COMMANDS --output DIR
    python -m slurm.submit --runs CONFIG ... --output DIR
    python -m slurm.submit --status [RUN ...]
    python -m slurm.submit --cancel RUN ...

Config, code, packages and cluster.env are frozen in RUN/slurm, beside one sbatch file for each job; `sbatch`
of such a file submits the job again. A training job goes on until the budget is spent, through signals, time
limits and lost nodes (job.sh and `slurm.attempts`); the next job of a pipeline waits for that.
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.config import dump_config, load_config
from pretrain.continuing import refuse_changes
from pretrain.data.tokenizer import SMALLEST
from pretrain.errors import UserError
from pretrain.files import write_atomic
from pretrain.terminal import wrapped
from slurm import scheduler, status
from slurm.cluster import Cluster
from slurm.freeze import freeze, refuse_foreign
from slurm.render import STAGES, array_script, scripts
from slurm.sizing import (
    Shape,
    check_files,
    device_of,
    epochs_of,
    read_site,
    settled,
    shape,
    shape_of_array,
    size_line,
    with_tokenizer,
)
from slurm.time_limit import time_limit
from tools.plan.estimate import planned_recipe
from tools.shared import console, journal
from tools.shared.console import share, whole
from tools.shared.job_options import add_job_options


def submit(folder: Path, files: Mapping[str, str]) -> list[dict[str, str]]:
    """Writes the sbatch files and puts them into the queue, each after the one before."""
    submitted: list[dict[str, str]] = []
    for stage, text in files.items():
        script = folder / f"{stage}.sbatch"
        write_atomic(script, text)
        before = submitted[-1]["job"] if submitted else None
        job = scheduler.submit(script, before)
        journal.note(folder.parent, "submit", stage, job)
        submitted.append({"stage": stage, "job": job, "script": str(script)})
    return submitted


def refuse_live(run: Path) -> None:
    """Raise UserError if a job of this run is in the queue already."""
    for row in status.rows([run]):
        if row.state not in status.ENDED:
            raise UserError(
                f"{run}: {row.stage} is {row.state} as job {row.job}; wait for it, or stop it with"
                f" python -m slurm.submit --cancel {shlex.quote(str(run))}"
            )


def start_array(
    commands: Sequence[str], folder: Path, site: Cluster, form: Shape, args: argparse.Namespace
) -> str:
    """Submits commands for a shell as an array; its job id. `folder` keeps the frozen code and the logs."""
    script = array_script(len(commands), folder, site, form, args)
    refuse_live(folder)
    here = folder.absolute() / "slurm"
    here.mkdir(parents=True, exist_ok=True)
    freeze(here, site, form)
    for kept in ("done", "fruitless"):
        shutil.rmtree(here / kept, ignore_errors=True)
        (here / kept).mkdir()
    write_atomic(here / "commands.txt", "\n".join(commands) + "\n")
    return submit(here, {"array": script})[0]["job"]


def read_stages(words: str) -> list[str]:
    """Return the stages of a pipeline, which are to be named in their order."""
    stages = words.split(",")
    if wrong := [stage for stage in stages if stage not in STAGES]:
        raise UserError(f"--pipeline: no stage {wrong[0]!r}; there are {','.join(STAGES)}")
    if stages != sorted(stages, key=STAGES.index) or len(set(stages)) < len(stages):
        raise UserError(f"--pipeline {words}: name stages once, in the order of {','.join(STAGES)}")
    return stages


def submit_run(args: argparse.Namespace) -> int:
    """Put the jobs of a CONFIG into the queue."""
    site, stages = read_site(args), read_stages(args.pipeline)
    config = load_config(args.config, args.overrides)
    run = Path(config.run.dir)
    planned = with_tokenizer(config, args) if "corpus" in stages else config
    device = device_of(site, args)
    recipe, _ = planned_recipe(planned, device)
    form, (estimate,) = shape({args.config: recipe}, device, site, args)
    sizing = size_line(form, [estimate]) + (epochs_of(recipe, estimate) if "train" in stages else "")
    frozen = dump_config(settled(config, recipe))
    files = scripts(config, site, form, stages, args)
    refuse_foreign(run / "slurm")
    data = check_files(config, stages, args)
    if "train" in stages:
        refuse_changes(config, recipe, data)
    if args.dry_run:
        print(wrapped(sizing, sys.stderr), file=sys.stderr)
        return show(files, args.json)
    refuse_live(run)
    folder = run.absolute() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    freeze(folder, site, form)
    write_atomic(folder / "config.yaml", frozen)
    submitted = submit(folder, files)
    if args.json:
        console.print_json(submitted)
        return 0
    print(wrapped(sizing))
    print(f"config, code, packages and sbatch files are frozen in {run / 'slurm'}")
    for before, job in zip([None, *submitted], submitted, strict=False):
        print(f"job {job['job']}: {job['stage']}" + (f", after job {before['job']}" if before else ""))
    print(f"how it goes: python -m slurm.submit --status {shlex.quote(str(run))}")
    return 0


def show(files: Mapping[str, str], as_json: bool) -> int:
    """Prints sbatch files instead of submitting them."""
    if as_json:
        console.print_json([{"stage": stage, "text": text} for stage, text in files.items()])
    else:
        print("\n".join(f"# ==== {stage}\n{text}" for stage, text in files.items()))
    return 0


def submit_array(args: argparse.Namespace) -> int:
    """Put the lines of a file into the queue as an array."""
    if not args.output:
        raise UserError("--array needs --output DIR, for the logs and the frozen code")
    refuse_foreign(args.output / "slurm")
    commands = read_commands(args.array)
    site = read_site(args)
    form = shape_of_array(site, args)
    if args.dry_run:
        return show({"array": array_script(len(commands), args.output, site, form, args)}, args.json)
    job = start_array(commands, args.output, site, form, args)
    print(json.dumps({"stage": "array", "job": job}) if args.json else f"job {job}: {len(commands)} commands")
    return 0


def submit_runs(args: argparse.Namespace) -> int:
    """Put runs into the queue as an array, unless it is there; each is checked and frozen as one alone is."""
    if not args.output:
        raise UserError("--runs needs --output DIR, for the logs and the frozen code")
    refuse_foreign(args.output / "slurm")
    runs = {path.stem: load_config(path) for path in args.runs}
    data = {name: check_files(config, ["train"], args) for name, config in runs.items()}
    site = read_site(args)
    device = device_of(site, args)
    recipes = {name: planned_recipe(config, device)[0] for name, config in runs.items()}
    for name, config in runs.items():
        refuse_changes(config, recipes[name], data[name])
    form, estimates = shape(recipes, device, site, args)
    sizing = size_line(form, estimates)
    if args.dry_run:
        print(wrapped(sizing, sys.stderr), file=sys.stderr)
        return show({"array": array_script(len(runs), args.output, site, form, args)}, args.json)
    if jobs := [row for row in status.rows([args.output]) if row.state not in status.ENDED]:
        print(f"job {jobs[0].job}: {jobs[0].state}; start the same again for the table")
        return 0
    commands = []
    for name, config in runs.items():
        file = args.output.absolute() / "slurm" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, dump_config(settled(config, recipes[name])))
        commands.append(f'"$PYTHON" -m pretrain {shlex.quote(str(file))}')
    job = start_array(commands, args.output, site, form, args)
    print(f"{wrapped(sizing)}\njob {job}: {len(runs)} runs; start the same again for the table, and to go on")
    return 0


def read_commands(path: Path) -> list[str]:
    """Return the commands of a file, one a line; empty lines and those that begin with # say nothing."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save it as that") from None
    lines = [line.rstrip("\r") for line in lines]
    for number, line in enumerate(lines, 1):
        if line.endswith("\\") and not line.lstrip().startswith("#"):
            raise UserError(f"{path}:{number}: ends with a backslash; a command is one line")
    commands = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not commands:
        raise UserError(f"{path}: no commands; write one a line")
    return commands


# ---- looking and stopping ------------------------------------------------------------------------


def runs_of(words: Sequence[str]) -> list[Path]:
    """Return the run folders that words name: folders, or configs with overrides; all in runs/ if there are
    none."""
    if not words:
        return sorted(path.parent.parent for path in Path("runs").glob("*/slurm/journal.jsonl"))
    changes = [word for word in words if "=" in word and not Path(word).exists()]
    named = [word for word in words if word not in changes]
    if changes and not any(Path(word).is_file() for word in named):
        raise UserError(f"{changes[0]}: no such folder, and no CONFIG that it would change; name one of them")
    runs = [
        Path(load_config(word, changes).run.dir) if Path(word).is_file() else Path(word) for word in named
    ]
    for run in runs:
        if not journal.path(run).exists():
            raise UserError(f"{run}: was never submitted from here; check the path")
    return runs


def show_status(words: Sequence[str], as_json: bool) -> int:
    table = status.rows(runs_of(words))
    if as_json:
        console.print_json(table)
    else:
        print(status.text(table) if table else "no run in runs/ was submitted")
    return 0


def cancel(words: Sequence[str]) -> int:
    """Ends every job of the runs that is still in the queue, the last of a chain first."""
    if not words:
        raise UserError("--cancel: name the runs")
    table = status.rows(runs_of(words))
    for row in reversed(table):
        if row.state in status.ENDED:
            continue
        journal.note(row.run, "cancel", row.stage, row.job)
        scheduler.cancel(row.jobs)
        print(f"cancelled job {', '.join(row.jobs)}: {row.stage} of {row.run}")
    for run in dict.fromkeys(row.run for row in table):
        ended = [row for row in table if row.run == run]
        if all(row.state in status.ENDED for row in ended):
            stages = ", ".join(f"{row.stage} {row.state}" for row in ended)
            print(f"{run}: no job in the queue ({stages})")
    return 0


# ---- the command line ----------------------------------------------------------------------------


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line, checked."""
    parser = console.parser("submit", "Put a run, a pipeline or an array into Slurm's queue", True, "slurm")
    parser.usage = (
        "%(prog)s CONFIG [section.key=value ...] [options]\n"
        "       %(prog)s --status | --cancel [RUN ...]\n"
        "       %(prog)s --array FILE --output DIR [options]\n"
        "       %(prog)s --runs CONFIG ... --output DIR [options]"
    )
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="YAML file; or RUN for --status, --cancel"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values over CONFIG's")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the sbatch files, write and submit nothing"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--status", action="store_true", help="how the runs' jobs stand (all of runs/)")
    what.add_argument("--cancel", action="store_true", help="end all jobs of the runs")
    what.add_argument(
        "--array",
        type=Path,
        metavar="FILE",
        help="commands for a shell, one a line; each has one GPU or process, with --nodes N whole nodes",
    )
    what.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        metavar="CONFIG",
        help="an array of runs; their jobs are alike",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of an array's logs and frozen code"
    )
    add_job_options(parser)
    chain = parser.add_argument_group("pipeline")
    chain.add_argument(
        "--pipeline", default="train", metavar="LIST", help=f"stages of {','.join(STAGES)} (%(default)s)"
    )
    chain.add_argument("--input", nargs="+", metavar="F", help="raw text, as for tools.encode_corpus")
    console.add_text_options(chain)
    chain.add_argument(
        "--vocab-size",
        type=whole(SMALLEST),
        metavar="N",
        help="of a new tokenizer (model.vocab_size, or 32000)",
    )
    chain.add_argument("--holdout", type=share, metavar="SHARE", help="of the documents for corpus.valid")
    chain.add_argument(
        "--encode", default="", metavar="OPTIONS", help="more for tools.encode_corpus: '--dedup'"
    )
    chain.add_argument(
        "--corpus-nodes", type=whole(1), default=1, metavar="N", help="nodes that encode (%(default)s)"
    )
    chain.add_argument(
        "--corpus-tasks-per-node",
        type=whole(1),
        default=8,
        metavar="N",
        help="processes of such a node (%(default)s)",
    )
    args = parser.parse_intermixed_args(_joined(sys.argv[1:] if words is None else words))
    if not (args.config or args.status or args.cancel or args.array or args.runs):
        parser.error("name a CONFIG, or ask for --status, --cancel, --array or --runs")
    if args.time is not None:
        try:
            time_limit(args.time)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --time: {error}")
    if args.array and args.config:
        parser.error(f"--array {args.array}: its lines are whole commands; leave out {args.config}")
    if args.dry_run and (args.status or args.cancel):
        parser.error("--dry-run is for what is submitted, not for --status or --cancel")
    return args


def _joined(words: Sequence[str]) -> list[str]:
    """``--encode --dedup`` as ``--encode=--dedup``: options are what it takes, which argparse refuses."""
    found: list[str] = []
    for word in words:
        if found and found[-1] == "--encode":
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(words)
    named = [args.config, *args.overrides] if args.config else []
    if args.status:
        return show_status(named, args.json)
    if args.cancel:
        return cancel(named)
    if args.runs:
        return submit_runs(args)
    return submit_array(args) if args.array else submit_run(args)


if __name__ == "__main__":
    console.run(main)
