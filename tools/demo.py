"""The whole path on the sample corpus: ``make demo``.

Raw text -> tokenizer -> indexed dataset -> MLM at 15 %, 3ML at 50 % and LateMask's own recipe on the same
budget of FLOPs -> export -> report -> a masked word filled in by each. Every step is a command that is
printed as you would type it. Steps that are done are not done again; a run that was interrupted continues.
"""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pretrain.config import load_config
from pretrain.errors import DEFECT
from pretrain.files import check_folder
from tools.shared import console

ROOT = Path(__file__).parent.parent
SAMPLE, CONFIGS = Path("tools/sample"), Path("configs")
RUNS = ("demo-mlm", "demo-3ml", "demo-latemask")
TEXT = "It was the <mask> of the year."
VOCABULARY = 4096


def steps(home: Path, overrides: Sequence[str]) -> list[tuple[str, list[str], Path | None]]:
    """Return (what it does, program and arguments, the file that says it is done), in order."""
    data = home / "demo-data"
    tokenizer = data / "tokenizer"
    todo: list[tuple[str, list[str], Path | None]] = [
        (
            "a vocabulary from the training text",
            ["tools.train_tokenizer", "--input", f"{SAMPLE / 'train.jsonl.gz'}", "--output", f"{tokenizer}"]
            + ["--vocab-size", str(VOCABULARY)],
            tokenizer / "tokenizer.model",
        )
    ]
    for part in ("train", "valid"):
        prefix = data / part
        command = ["tools.encode_corpus", "--input", f"{SAMPLE / part}.jsonl.gz"]
        todo.append(
            (
                f"the {part} text as an indexed dataset",
                [*command, "--tokenizer", f"{tokenizer}", "--output", f"{prefix}"],
                prefix.with_suffix(".json"),
            )
        )
    where = [f"corpus.train={data / 'train'}", f"corpus.valid={data / 'valid'}"]
    for name in RUNS:
        command = ["pretrain", f"{CONFIGS / name}.yaml", f"run.dir={home / name}", *where, *overrides]
        todo.append((f"pre-training: {name}", command, None))
    for name in RUNS:
        export = ["tools.export", f"{home / name}", "--output", f"{home / name / 'export'}", "--overwrite"]
        todo.append((f"a Hugging Face folder from {name}", export, None))
    runs = [f"{home / name}" for name in RUNS]
    todo.append(
        (
            "what it cost and what it gave",
            ["tools.report", *runs, "--output", f"{home / 'demo-report'}"],
            None,
        )
    )
    todo.append(
        (
            "how often the grammatical sentence of two is the more likely",
            ["tools.minimal_pairs", *runs, "--data", f"{SAMPLE / 'pairs.jsonl'}"],
            None,
        )
    )
    if find_spec("sklearn"):  # an extra
        words = ["--data", f"{SAMPLE / 'labels'}", "--output", f"{home / 'demo-probe'}"]
        todo.append(("what each layer knows of the kind of a text", ["tools.probe", *runs, *words], None))
    todo += [
        (f"{name} fills in a masked word", ["tools.fill_mask", run, TEXT], None)
        for name, run in zip(RUNS, runs, strict=True)
    ]
    return todo


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("demo", "The whole path on the sample corpus, in under ten minutes")
    parser.add_argument(
        "--home", type=Path, default=Path("runs"), help="folder of everything made (%(default)s)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="for all runs, such as budget.flops=1e12"
    )
    args = parser.parse_args(arguments)
    for name in RUNS:  # a mistake is told before the first step
        load_config(str(ROOT / CONFIGS / f"{name}.yaml"), args.overrides)
    check_folder(args.home)
    home = args.home.absolute() if Path.cwd() != ROOT else args.home
    begin = time.monotonic()
    # Ctrl-C reaches the program of the step as well; that saves its work and comes back here.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    for title, command, done in steps(home, args.overrides):
        shown = ["python", "-m", *command]
        print(f"\n== {title}\n$ {shlex.join(shown)}", flush=True)
        if done is not None and done.exists():
            print(f"done before: {done}", flush=True)
            continue
        code = subprocess.run([sys.executable, *shown[1:]], cwd=ROOT, check=False).returncode
        if code:
            print(f"stopped at this step (exit code {code}); start again to go on", file=sys.stderr)
            return max(code, DEFECT)  # below 0: a signal's number
    minutes = (time.monotonic() - begin) / 60
    print(f"\n{minutes:.1f} minutes. The report: {home / 'demo-report' / 'report.html'}")
    print(f"The encoders, for transformers: {home}/demo-*/export")
    return 0


if __name__ == "__main__":
    console.run(main)
