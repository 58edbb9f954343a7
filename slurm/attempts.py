"""Begins and ends an attempt: job.sh asks here what follows, and does it.

    python -m slurm.attempts begin RUN STAGE --job ID --nodes LIST --limit N
    python -m slurm.attempts end RUN STAGE --job ID --code CODE --limit N

`end` prints `done`, `again`, `again NODES` (without those, which have kept two attempts) or `stop`.
Launchers change exit codes, so what counts is the status.json that the run wrote during this attempt; only
where it said nothing does the code of srun decide.

Attempts are counted since the last progress, which is a new checkpoint (or a new part of a
corpus), not since the beginning. A run that is preempted a hundred times goes on; one that dies at the same
place `limit` times stops and says so.
"""

import sys
from pathlib import Path

from pretrain import checkpoint
from pretrain.config import load_config
from pretrain.errors import USER_ERROR, UserError
from pretrain.run_folder import RunFolder
from tools.shared import console, journal

DONE, AGAIN, STOP = "done", "again", "stop"


def progress(run: Path, stage: str) -> int:
    """Return a number that grows with the work that is safe on disk: the newest step, or the parts of a
    corpus."""
    if stage == "train":
        return max(checkpoint.steps(run), default=-1)
    config = load_config(run / "slurm" / "config.yaml")
    return sum(1 for _, prefix in config.corpus.blend for _ in Path(f"{prefix}.parts").glob("*.json"))


def failed_attempts(lines: list[journal.Line], stage: str, reached: int) -> int:
    """Return the attempts that began where the run still is, since it was submitted or had stopped."""
    count = 0
    for line in reversed([line for line in lines if line["stage"] == stage]):
        if line["event"] == "submit" and "instead_of" not in line or line.get("verdict") == STOP:
            break
        if line["event"] == "begin":
            if line.get("reached") != reached:
                break
            count += 1
    return count


def begin(run: Path, stage: str, job: str, nodes: str, limit: int) -> int:
    """Notes the attempt; exit code 1 if there were enough of them without progress."""
    reached = progress(run, stage)
    tried = failed_attempts(journal.read(run), stage, reached)
    if tried >= limit:
        reason = f"{tried} attempts without progress"
        journal.note(run, "end", stage, job, verdict=STOP, reason=reason)
        print(f"{stage}: {reason}; see the logs, then submit again", file=sys.stderr)
        return 1
    journal.note(run, "begin", stage, job, nodes=nodes, reached=reached)
    return 0


def end(run: Path, stage: str, job: str, code: int, limit: int) -> str:
    """Return what follows; noted with its reason."""
    lines = journal.read(run)
    began = max(
        (line["time"] for line in lines if line["event"] == "begin" and line["job"] == job), default=0
    )
    verdict, reason = verdict_on_attempt(run, stage, code, began)
    tried = failed_attempts(lines, stage, progress(run, stage))
    if verdict == AGAIN and tried >= limit:
        verdict, reason = STOP, f"{tried} attempts without progress; the last: {reason}"
    nodes = blamed(run, began) if stage == "train" and verdict == AGAIN else []
    journal.note(run, "end", stage, job, verdict=verdict, reason=reason, code=code, blames=nodes)
    before = {node for line in lines if line["stage"] == stage for node in line.get("blames", [])}
    if bad := before.intersection(nodes):  # the second time
        verdict = f"{AGAIN} {','.join(sorted(bad))}"
    print(f"{stage}: {reason}: {verdict}", file=sys.stderr)
    return verdict


def blamed(run: Path, began: float) -> list[str]:
    """Return the nodes of the ranks that kept an attempt that started at Unix time `began`."""
    status = RunFolder(run).status()
    nodes: list[str] = status.get("stalled", {}).get("hosts", []) if status.get("time", 0) >= began else []
    return nodes


def verdict_on_attempt(run: Path, stage: str, code: int, began: float) -> tuple[str, str]:
    """Return the verdict and reason of an attempt that started at Unix time `began` and ended with `code`."""
    status = RunFolder(run).last_attempt() if stage == "train" else {}
    if status and status["time"] >= began and status.get("state") != "running":
        code, reason = status["exit_code"], status["reason"]
    else:
        reason = f"ended with code {code} without a word of its own; see the log"
    if code == 0:
        return DONE, "finished" if stage != "train" else reason
    return (STOP if code == USER_ERROR else AGAIN), reason


def main() -> int:
    parser = console.parser("attempts", __doc__.partition("\n")[0], package="slurm")
    parser.add_argument("action", choices=("begin", "end"))
    parser.add_argument("run", type=Path)
    parser.add_argument("stage", choices=("corpus", "train"))
    parser.add_argument("--job", required=True)
    parser.add_argument("--nodes", default="")
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--limit", type=int, required=True, help="attempts without progress")
    args = parser.parse_args()
    if not journal.path(args.run).parent.is_dir():
        raise UserError(f"{args.run}: was never submitted from here; check the path")
    if args.action == "begin":
        return begin(args.run, args.stage, args.job, args.nodes, args.limit)
    print(end(args.run, args.stage, args.job, args.code, args.limit))
    return 0


if __name__ == "__main__":
    console.run(main)
