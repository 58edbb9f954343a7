"""Fine-tunes encoders on labelled text and says what they score, with a spread and beside baselines.

    python -m tools.finetune runs/3ml-query-base other/encoder --data glue --tasks CoLA RTE --output scores

An encoder is a run, which is exported first, or a Hugging Face folder on this disk; a task is a folder of
--data: GLUE's, SQuAD's JSON, CoNLL's columns, or TSV and JSONL with a task.yaml.

The grid is a list of cells (`cells`), and runs.jsonl has a line for each that is done. So
processes that share the cells out, on this machine or in a job array, need to know nothing of each other.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pretrain.errors import STOPPED, UserError, was_stopped
from pretrain.files import remove
from tools.finetune import table
from tools.finetune.cells import MNLI, RANDOM, RUNS, FinetuneRun, append, chosen, current, do, read_runs
from tools.finetune.plan import PROTOCOLS, Plan, Source, make_plan, refuse_others
from tools.finetune.tasks import STARTED_FROM_MNLI
from tools.shared import console, downstream, outputs
from tools.shared.job_options import add_job_options, submit_array

TABLE = "table.md"

# ---- running -------------------------------------------------------------------------------------


def run_share(plan: Plan) -> int:
    """Do the cells of a share that are not done, on one device."""
    import torch  # takes seconds, which the sharing process does without

    gpus = torch.cuda.device_count()
    device = f"cuda:{plan.args.share[0] % gpus}" if gpus else "cpu"
    tasks, file = {task.name: task for task in plan.tasks}, plan.args.output / RUNS
    while True:
        runs = read_runs(file)
        cell = next(iter(plan.todo(runs, plan.args.share)), None)
        if cell is None:
            return 0
        begun, kept = time.monotonic(), plan.kept(cell) if cell.kept else None
        partial = kept.with_name(f".partial-{kept.name}") if kept else None
        run = do(cell, tasks[cell.task], str(plan.folder(cell)), device, partial)
        if kept and partial:
            if kept.exists():  # a kill came before its line, or runs.jsonl is gone
                remove(kept)
            partial.rename(kept)
        append(file, run)
        print(f"{_line(run)} ({time.monotonic() - begun:.0f} s)", file=sys.stderr, flush=True)


def _line(run: FinetuneRun) -> str:
    """Return what is said of a run when it is done."""
    cell, scores = (
        run.cell,
        [
            f"{split} {metric} {100 * score:.1f}"
            for split, all in run.scores.items()
            for metric, score in all.items()
        ],
    )
    setting = f" lr {cell.lr:g} batch {cell.batch} seed {cell.seed}" if cell.epochs else ""
    return f"{cell.encoder}{f', {cell.start}' if cell.start else ''}{setting}: {', '.join(scores)}"


def run_here(plan: Plan, words: Sequence[str]) -> None:
    """Do all cells in --jobs processes, those that wait for others behind them; UserError if one fails."""
    file, jobs = plan.args.output / RUNS, plan.args.jobs
    while todo := set(plan.todo(read_runs(file))):
        with console.counter("finetune", len(todo), "runs") as advance, tempfile.TemporaryDirectory() as logs:
            processes = [_start(words, share, jobs, Path(logs) / f"{share}") for share in range(jobs)]
            try:
                while any(process.poll() is None for process in processes):
                    time.sleep(0.5)
                    left = todo - {run.cell for run in read_runs(file)}
                    advance(len(todo) - len(left))
                    todo = left
            finally:
                for process in processes:
                    process.terminate()
                    process.wait()
            said = [line for log in sorted(Path(logs).iterdir()) for line in _lines(log)]
        _check([process.returncode for process in processes], said)


def _check(codes: Sequence[int], said: Sequence[str]) -> None:
    """Raise UserError where a process failed or was killed, SystemExit where one was stopped.

    said: by all of them.
    """
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    errors += [
        f"a process was ended by {signal.Signals(-code).name}; start again to go on, with fewer --jobs if"
        " memory was short"
        for code in codes
        if code < 0 and not was_stopped(code)
    ]
    if errors:
        raise UserError("\n".join(dict.fromkeys(errors)))
    if any(map(was_stopped, codes)):
        sys.exit(STOPPED)
    if any(codes):
        raise RuntimeError("\n".join(said[-30:]))


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8").splitlines()


def _start(words: Sequence[str], share: int, jobs: int, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tools.finetune", *words, f"--share={share}/{jobs}"]
    with log.open("wb") as stderr:
        return subprocess.Popen(
            command, env=console.shared_cores(jobs), stdout=subprocess.DEVNULL, stderr=stderr
        )


def queue(plan: Plan, words: Sequence[str]) -> int:
    """Hand the cells to `slurm.submit` as an array; its exit code."""
    todo = plan.todo(read_runs(plan.args.output / RUNS))
    if not todo:
        print("nothing is left to be submitted; without --slurm: the table", file=sys.stderr)
        return 0
    shares = min(len(todo), MAX_SHARES)
    owners = sorted({cell.owner(shares) for cell in todo})
    lines = [f'"$PYTHON" -m tools.finetune {shlex.join(words)} --share={owner}/{shares}' for owner in owners]
    return submit_array(lines, plan.args.output / "jobs", plan.args)


MAX_SHARES = 100
"""Tasks of an array: each loads torch once, and does one cell after the other."""


# ---- the command ---------------------------------------------------------------------------------


def record(plan: Plan, runs: Sequence[FinetuneRun]) -> None:
    """Write the scores of encoders to the downstream.jsonl of their folder."""
    for source in plan.sources:
        groups: dict[tuple[str, str], list[FinetuneRun]] = {}
        for run in current(runs):
            if run.cell.encoder == source.name and run.cell.start != RANDOM and not run.cell.kept:
                groups.setdefault((run.cell.task, run.cell.start), []).append(run)
        scores = [
            downstream.DownstreamScore(
                step=source.step,
                task=f"{split} from MNLI" if run.cell.start == MNLI else split,
                metric=metric,
                score=score,
                seed=run.cell.seed,
                n=run.n[split],
                protocol=downstream.of_mean(f"finetune {plan.protocol}", source.averaged),
                model=str(source.path) if source.step is None else "",
            )
            for group in groups.values()
            for run in chosen(group, plan.args.best_on_dev)
            for split, metrics in run.scores.items()
            for metric, score in metrics.items()
        ]
        downstream.record(folder_of(source, plan.args.output), scores)


def folder_of(source: Source, output: Path) -> Path:
    """Return where an encoder's scores are recorded: with its run, or in OUTPUT."""
    return output if source.step is None else source.path


def show(runs: Sequence[FinetuneRun], args: argparse.Namespace) -> None:
    """Print the tables."""
    if args.json:
        found = [asdict(entry) for entry in table.entries(runs, all_metrics=True)]
        console.print_json({"entries": found, "account": table.account(runs)})
    else:
        print(table.markdown(runs) if args.table else table.text(runs))


def _share(text: str) -> tuple[int, int]:
    share, _, shares = text.partition("/")
    if share.isdecimal() and shares.isdecimal() and int(share) < int(shares):
        return int(share), int(shares)
    raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 0/8")


def make_parser() -> argparse.ArgumentParser:
    parser = console.parser("finetune", "Fine-tune encoders on labelled text, beside baselines", reports=True)
    parser.add_argument("models", nargs="*", metavar="[NAME=]RUN|DIR", help="runs, and Hugging Face folders")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder of tasks, each a folder")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="names of folders: CoLA, RTE, SQuAD ...")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="runs.jsonl and table.md; same DIR: goes on"
    )
    grid = parser.add_argument_group("settings")
    grid.add_argument("--protocol", choices=PROTOCOLS, help="a grid (fixed, unless the next three are given)")
    grid.add_argument("--lrs", nargs="+", type=console.positive, metavar="X", help="learning rates")
    grid.add_argument(
        "--batch-sizes", nargs="+", type=console.whole(1), metavar="N", help="rows of an update"
    )
    grid.add_argument("--epochs", type=console.whole(1), metavar="N", help="passes over the rows")
    grid.add_argument(
        "--seeds", type=console.whole(1), default=5, metavar="N", help="runs of each setting (%(default)s)"
    )
    grid.add_argument(
        "--best-on-dev", action="store_true", help="choose settings on dev, and not on a tenth of train"
    )
    grid.add_argument(
        "--train-rows", type=console.whole(2), metavar="N", help="train on N rows, by their hash"
    )
    grid.add_argument(
        "--max-length", type=console.whole(8), default=256, metavar="N", help="tokens of a row (%(default)s)"
    )
    grid.add_argument(
        "--from-mnli",
        action="store_true",
        help=f"also start {', '.join(STARTED_FROM_MNLI)} from the encoder's model of MNLI",
    )
    console.add_checkpoint(parser)
    parser.add_argument("--keep-going", action="store_true", help="leave bad rows out, into rejected.jsonl")
    parser.add_argument(
        "--jobs",
        type=console.whole(1),
        default=1,
        metavar="N",
        help="processes; GPUs take turns (%(default)s)",
    )
    parser.add_argument("--share", type=_share, metavar="I/N", help="do part I of N of the runs, no table")
    parser.add_argument("--slurm", action="store_true", help="submit the runs as a job array")
    parser.add_argument(
        "--dry-run", action="store_true", help="count the runs; with --slurm: the sbatch file"
    )
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print the tables of a runs.jsonl, no more"
    )
    add_job_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = make_parser().parse_args(words)
    if args.table:
        if not args.table.exists():
            raise UserError(f"{args.table}: no such file")
        show(read_runs(args.table), args)
        return 0
    for name in ("models", "data", "tasks", "output"):
        if not getattr(args, name):
            raise UserError(f"{'RUN|DIR' if name == 'models' else f'--{name}'} is missing (see --help)")
    outputs.check([args.output / TABLE])
    plan = make_plan(args)
    file = args.output / RUNS
    for source in plan.sources:
        downstream.check(folder_of(source, args.output))
    refuse_others(plan, read_runs(file))
    for number in (signal.SIGTERM, signal.SIGUSR1):  # of a job's end
        signal.signal(number, lambda *_: sys.exit(STOPPED))
    if args.share:
        return run_share(plan)
    if args.slurm:
        return queue(plan, words)
    if args.dry_run:
        print(f"{len(plan.todo(read_runs(file)))} runs to do: {plan.protocol}")
        return 0
    run_here(plan, words)
    runs = read_runs(file)
    outputs.write(args.output / TABLE, f"{outputs.MARKDOWN_MARK}\n\n{table.markdown(runs)}")
    record(plan, [run for run in runs if run.cell.protocol == plan.protocol])
    show(runs, args)
    return 0


if __name__ == "__main__":
    console.run(main)
