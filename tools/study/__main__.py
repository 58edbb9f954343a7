"""Compare methods at equal cost, with an interval over seeds: ``python -m tools.study FILE --data DIR``.

FILE says methods, sizes, seeds, budgets and evaluations (`options`). The program tries learning rates, trains
trunks and decays, scores each model, and writes what it found. A model that has a line in
RESULTS/NAME.jsonl is not trained again, so the same command goes on wherever that file is.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pretrain.errors import STOPPED, UserError
from tools.shared import console, outputs, tables
from tools.shared.job_options import add_job_options, submit_array
from tools.study import pages
from tools.study.plan import Study, StudyCell, open_study
from tools.study.results import StudyResult, read_results, refuse_others

FAILED = 1
RESULTS = Path("tools/study/results")


def main(arguments: Sequence[str] | None = None) -> int:
    about = "Compare methods at equal cost, with an interval over seeds"
    return run(make_parser("study", about, RESULTS).parse_args(arguments))


def run(args: argparse.Namespace) -> int:
    """Do what a command line says; its exit code."""
    study = open_study(args.study, args.work)
    file = args.results / f"{study.name}.jsonl"
    results = read_results(file)
    outputs.check([page_file(study, args), *picture_files(study, args).values()])
    if args.plan:
        print(plan_text(study, results))
        return 0
    if not args.report:
        if args.data is None:
            raise UserError(f"--data is missing: the folder with {study.options.text[0]} and the other texts")
        if args.cell:
            return do_cell(study, args.cell, args.data, file)
        if args.dry_run and not args.slurm:
            raise UserError("--dry-run: goes with --slurm; --plan says what is left to do")
        if not args.dry_run:
            prepare(study, args.data, results, file)
        code = queue(study, results, args) if args.slurm else run_here(study, args, file)
        if code or args.slurm:
            return code
    report(study, read_results(file), args)
    return 0


def make_parser(name: str, about: str, results: Path) -> argparse.ArgumentParser:
    """Return the parser of a program that does a study. results: where its lines are, unless it is told."""
    parser = console.parser(name, about)
    parser.add_argument("study", type=Path, metavar="FILE", help="YAML file (configs/study/)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of texts, pairs and tasks that FILE names"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="corpora, runs and logs (runs/study-NAME)")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        default=results,
        help="NAME.jsonl, the page and its pictures (%(default)s)",
    )
    parser.add_argument("--plan", action="store_true", help="print cells, FLOPs and hours left, no more")
    parser.add_argument("--report", action="store_true", help="write the page from the results, no more")
    parser.add_argument(
        "--jobs", type=console.whole(1), default=1, metavar="N", help="processes side by side (%(default)s)"
    )
    parser.add_argument("--cell", metavar="NAME", help="do this cell alone, no page")
    parser.add_argument(
        "--slurm", action="store_true", help="submit the cells that can be done as a job array"
    )
    parser.add_argument("--dry-run", action="store_true", help="with --slurm: print the sbatch file")
    add_job_options(parser)
    return parser


def plan_text(study: Study, results: Sequence[StudyResult]) -> str:
    """Return what is left to do, and the next cells."""
    rows = [["size", "cells left", "of", "FLOPs left", "process-hours left"]]
    total, all_cells = 0.0, list(study.cells(results))
    for size in study.options.sizes:
        cells, flops, hours = study.left(size, results)
        total += hours
        whole = sum(cell.size == size for cell in all_cells)
        rows.append([size, str(cells), str(whole), f"{flops:.2e}", f"{hours:.1f}"])
    todo = study.todo(results)
    following = [f"next: {', '.join(cell.name for cell in todo[:4])}"] if todo else ["all cells are done"]
    return "\n".join([tables.aligned(rows), "", f"{total:.1f} process-hours in all", *following])


def prepare(study: Study, data: Path, results: Sequence[StudyResult], file: Path) -> None:
    """Make the corpora, and compare them with those of the results that are there."""
    from tools.study import work  # torch takes seconds

    work.prepare(study, data)
    refuse_others(file, results, study.fingerprint)


def do_cell(study: Study, name: str, data: Path, file: Path) -> int:
    """Do one cell; 75 after the signal of a job's end."""
    from tools.study import work  # torch takes seconds

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: sys.exit(STOPPED))
    results = read_results(file)
    refuse_others(file, results, study.fingerprint)
    cells = {cell.name: cell for cell in study.ready(results)}
    if name in cells:
        work.do(study, cells[name], data, file)
    elif name not in {cell.name for cell in study.cells(results)} - {
        cell.name for cell in study.todo(results)
    }:
        raise UserError(f"--cell {name}: no cell of {study.path} that can be done now; see --plan")
    return 0


# ---- many cells ----------------------------------------------------------------------------------


def run_here(study: Study, args: argparse.Namespace, file: Path) -> int:
    """Do all cells in --jobs processes at a time; 1 where one failed, which keeps none of the others."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    running, failed = dict[StudyCell, "subprocess.Popen[bytes]"](), dict[StudyCell, int]()
    try:
        while True:
            waiting = [cell for cell in study.ready(read_results(file)) if cell not in {*running, *failed}]
            for cell in waiting[: args.jobs - len(running)]:
                print(f"{time.strftime('%H:%M:%S')} {cell.name}", file=sys.stderr, flush=True)
                running[cell] = start(study, cell, args)
            if not running:
                break
            while all(process.poll() is None for process in running.values()):
                time.sleep(0.2)
            for cell, process in list(running.items()):
                if process.poll() is not None:
                    del running[cell]
                    if process.returncode:
                        failed[cell] = process.returncode
                        print(
                            f"{cell.name}: exit code {process.returncode}; see {log_of(study, cell)}",
                            file=sys.stderr,
                        )
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    if STOPPED in failed.values():
        return STOPPED
    if left := len(study.todo(read_results(file))):
        print(f"{left} cells are not done: {len(failed)} failed, others wait for their rate", file=sys.stderr)
    return FAILED if failed else 0


def log_of(study: Study, cell: StudyCell) -> Path:
    """Return where a cell's process writes."""
    return study.work / "logs" / f"{cell.name}.log"


def start(study: Study, cell: StudyCell, args: argparse.Namespace) -> "subprocess.Popen[bytes]":
    log = log_of(study, cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stderr:
        command = [sys.executable, "-m", *cell_words(study, cell, args)]
        return subprocess.Popen(command, env=console.shared_cores(args.jobs), stdout=stderr, stderr=stderr)


def cell_words(study: Study, cell: StudyCell, args: argparse.Namespace) -> list[str]:
    """Return the words that do a cell from any folder."""
    words = [
        "tools.study",
        str(study.path.absolute()),
        f"--data={args.data.absolute()}",
        f"--work={study.work}",
    ]
    return [*words, f"--results={args.results.absolute()}", f"--cell={cell.name}"]


def queue(study: Study, results: Sequence[StudyResult], args: argparse.Namespace) -> int:
    """Hand the cells that can be done to `slurm.submit` as an array; its exit code."""
    ready, waiting = study.ready(results), len(study.todo(results))
    if waiting > len(ready):
        print(f"{waiting - len(ready)} cells wait for their rate: submit again after these", file=sys.stderr)
    if not ready:
        print("nothing is left to be submitted; without --slurm: the page", file=sys.stderr)
        return 0
    lines = [f'"$PYTHON" -m {shlex.join(cell_words(study, cell, args))}' for cell in ready]
    return submit_array(lines, study.work / "jobs", args)


# ---- what was found ------------------------------------------------------------------------------


def page_file(study: Study, args: argparse.Namespace) -> Path:
    """Return where the page is written."""
    return Path(args.results) / f"RESULTS-{study.name}.md"


def picture_files(study: Study, args: argparse.Namespace) -> dict[str, Path]:
    """Return where the pictures are written, by size."""
    return {size: Path(args.results) / f"{study.name}-{size}.png" for size in study.options.sizes}


def report(study: Study, results: Sequence[StudyResult], args: argparse.Namespace) -> None:
    """Write the page and its pictures."""
    for size in pages.Found(study, results).sizes():
        outputs.write(picture_files(study, args)[size], pages.figure(study, results, size))
    outputs.write(page_file(study, args), pages.page(study, results, f"{study.name}-{{}}.png"))
    print(f"{page_file(study, args)}: written")


if __name__ == "__main__":
    console.run(main)
