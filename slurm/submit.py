"""One command from a config to a queue that finishes by itself: ``python -m slurm.submit CONFIG``.

    python -m slurm.submit CONFIG [section.key=value ...] [--nodes N --gpus-per-node G --time T] [--dry-run]
    python -m slurm.submit CONFIG --pipeline corpus,train,evaluate,export,report --input 'text/*.jsonl.gz'
    python -m slurm.submit --array COMMANDS --output DIR
    python -m slurm.submit --status [RUN ...]
    python -m slurm.submit --cancel RUN ...

Config, code, packages and cluster.env are frozen in RUN/slurm, beside one sbatch file for each job; `sbatch`
of such a file submits the job again. A training job goes on until the budget is spent, through signals, time
limits and lost nodes (job.sh and `slurm.attempts`); the next job of a pipeline waits for that.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain import budget, checkpoint, config
from pretrain.checkpoint import code_revision, write_atomic
from pretrain.config import Config, UserError
from pretrain.corpus import corpus_file, load_manifest, tokenizer_folder
from pretrain.tokenizer import SMALLEST, load_tokenizer
from slurm import cluster, journal, scheduler, status
from slurm.cluster import Cluster
from slurm.forms import seconds, time_limit
from tools import console, encode_corpus, layouts, plan
from tools.console import share, whole
from tools.text_files import find_files

ROOT = Path(__file__).parent.parent
STAGES = ("corpus", "train", "evaluate", "export", "report")
PROGRAMS = ("evaluate", "export", "report")
"""Those of one program on one node."""
FEW = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of nodes that are tried where none is given."""


@dataclass(frozen=True)
class Shape:
    """Nodes of a job and ranks on each."""

    nodes: int
    tasks: int
    gpus: int
    """On each node."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks


# ---- sizing --------------------------------------------------------------------------------------


def read_site(args: argparse.Namespace) -> Cluster:
    """The site's file; the example where a dry run finds none. Warns of what jobs are not going to find."""
    path = args.cluster or cluster.DEFAULT
    if args.dry_run and not args.cluster and not path.is_file():
        _warn(f"{path}: no such file; what follows is of {cluster.EXAMPLE}")
        return cluster.read(cluster.EXAMPLE)
    site = cluster.read(path)
    if site.container and not site.python:
        _warn(
            f"{path}: SRUN or WRAP starts a container, in which jobs would call {sys.executable} of this"
            " machine; set PYTHON to the image's own, such as python3"
        )
    lost = scheduler.of_a_job(os.environ)
    if lost and not args.dry_run and "SLURM_JOB_ID" not in os.environ:  # then they may be wishes
        _warn(f"{', '.join(lost)}: not passed on to jobs; export what they need in setup() of {path}")
    return site


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def shape(options: Config, site: Cluster, args: argparse.Namespace) -> tuple[Shape, dict[str, Any]]:
    """The job that a config asks for, and the plan of it; UserError if it cannot fit, with what does."""
    form, (estimate,) = shape_of_all({args.config: options}, site, args)
    return form, estimate


def shape_of_all(
    runs: Mapping[str, Config], site: Cluster, args: argparse.Namespace
) -> tuple[Shape, list[dict[str, Any]]]:
    """The job that does for each of the runs, by name, and their plans; UserError as above.

    Without --nodes: the fewest on which the parallel settings fit the site's device.
    """
    gpus = site.gpus_per_node if args.gpus_per_node is None else args.gpus_per_node
    bare = args.gpus_per_node == 0 and site.gpus_per_node  # DEVICE is that of the site's GPUs
    where = f"{args.cluster or cluster.DEFAULT}: DEVICE="
    device = layouts.named(site.device, where) if site.device and not bare else None
    tasks = args.tasks_per_node or site.tasks_per_node or gpus or 1
    refusal = None
    for nodes in [args.nodes] if args.nodes else FEW:
        try:
            form = Shape(nodes, tasks, gpus)
            return form, [plan.plan(each, form.ranks, device, name=name) for name, each in runs.items()]
        except UserError as error:
            refusal = refusal or error
    assert refusal
    raise refusal


def with_vocabulary(options: Config, args: argparse.Namespace) -> Config:
    """The config with the size of the vocabulary that the corpus job finds, or is going to make."""
    tokenizer = _tokenizer(options)
    if tokenizer is None or options.model.vocab_size:
        return options
    found = any((tokenizer / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
    size = load_tokenizer(tokenizer).vocab_size if found else vocabulary(options, args)
    return options.model_copy(update={"model": options.model.model_copy(update={"vocab_size": size})})


def vocabulary(options: Config, args: argparse.Namespace) -> int:
    """Pieces of a tokenizer that the corpus job makes."""
    own: int | None = options.model.vocab_size
    if args.vocab_size and own not in (None, args.vocab_size):
        raise UserError(f"--vocab-size {args.vocab_size}: model.vocab_size is {own}; leave one of them out")
    return own or args.vocab_size or 32_000


def settled(options: Config, planned: Config | None = None) -> Config:
    """The config with an amount for a budget that is relative to another recipe, which may be edited or
    go on before a job reads it. planned: the config with the vocabulary that it is going to have."""
    return options.model_copy(update={"budget": plan.with_vocabulary(planned or options)[0].budget})


# ---- what jobs read ------------------------------------------------------------------------------


def check_files(options: Config, stages: Sequence[str], args: argparse.Namespace) -> None:
    """UserError where a job would not find what it reads, unless an earlier one makes it."""
    run, first, read = Path(options.run.dir), stages[0], options.corpus
    made = set()
    if first == "corpus":
        if not Path(f"{read.train}.json").exists():  # else the job has nothing left to do
            find_files(args.input)
        made = {Path(f"{read.train}{side}").absolute() for side in ("", "-valid")}
    elif first != "train" and not checkpoint.steps(run):
        raise UserError(f"{run}: has no checkpoint for {first}; begin the --pipeline with train")
    if "train" not in stages:
        return
    check_data(read, made)
    if "evaluate" in stages and not read.valid:
        raise UserError("--pipeline evaluate: the config has no corpus.valid; name a held-out corpus")


def check_data(read: config.Corpus, made: Collection[Path] = ()) -> None:
    """UserError unless all that a run reads is there, or among what is `made` before it.

    What is in the files is the pre-flight's to check.
    """
    for prefix in [*(prefix for _, prefix in read.blend), *([read.valid] if read.valid else [])]:
        if Path(prefix).absolute() in made:
            continue
        load_manifest(prefix)
        for file in (corpus_file(prefix, "bin"), corpus_file(prefix, "idx")):
            if not file.is_file():
                raise UserError(f"{file}: no such file; copy or encode the corpus again")
    if not made:
        load_tokenizer(tokenizer_folder(read))


def refuse_changes(options: Config) -> None:
    """UserError where the run has a checkpoint that cannot go on with this config, as its job would say.

    What only a job knows, such as the precision of its device, is taken to be as it was.
    """
    run = Path(options.run.dir)
    newest = checkpoint.pointed(run, "latest")
    if newest is None or not newest.is_dir():
        return
    state = checkpoint.read_state(newest)
    before = config.build(state.config, f"{newest}: config").train
    train = options.train
    known = {
        name: getattr(before, name) for name in ("precision", "deterministic") if getattr(train, name) is None
    }
    filled = options.model_copy(update={"train": train.model_copy(update=known)})
    checkpoint.check_continues(state, plan.with_vocabulary(filled)[0], {})


# ---- what a job is -------------------------------------------------------------------------------


def render(stage: str, template: str, heads: Sequence[str], values: Mapping[str, str]) -> str:
    """An sbatch file: the template with its heads and values."""
    text = (cluster.HERE / f"{template}.sbatch").read_text(encoding="utf-8")
    values = {**values, "stage": stage, "headers": "\n".join(f"#SBATCH {head}" for head in heads)}
    return re.sub(r"@(\w+)@", lambda found: values[found[1]], text)


def heads(site: Cluster, folder: Path, stage: str, form: Shape, args: argparse.Namespace) -> list[str]:
    """The #SBATCH words of a job. Slurm reads quotes in them as a shell does; % is special in paths."""
    for name in (str(folder), os.getcwd()):
        if re.search(r"[\\\n\r]", name):
            raise UserError(f"{name!r}: Slurm cannot have a backslash or a line's end in a path; rename it")
    single = stage in PROGRAMS
    # Also what gets no GPU because of --gpus-per-node 0.
    cpus = not form.gpus and (single or stage == "corpus" or bool(site.gpus_per_node))
    training = stage == "train" or (stage == "array" and 0 < form.gpus == site.gpus_per_node)
    log = "%A_%a" if stage == "array" else "%j"
    limit = args.time or (site.cpu_time if single else "") or site.time
    # To the ranks, in time to save; a corpus job unwinds on SIGTERM; the other programs save nothing.
    told = {"train": "USR1", "array": "USR1", "corpus": "TERM"}.get(stage)
    if told and site.signal_seconds >= seconds(limit):
        raise UserError(
            f"{args.cluster or cluster.DEFAULT}: SIGNAL_SECONDS={site.signal_seconds} is not shorter than a"
            f" job ({limit}), which would be told to end when it begins; lower it, or raise TIME or --time"
        )
    found = {
        "job-name": f"{folder.parent.name}:{stage}",
        "chdir": os.getcwd(),
        "output": str(folder / stage).replace("%", "%%") + f"-{log}.log",
        "open-mode": "append",
        "partition": args.partition or (site.cpu_partition if cpus else "") or site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": "" if cpus else site.constraint,
        "nodes": str(form.nodes),
        "ntasks-per-node": str(form.tasks),
        "cpus-per-task": str(1 if stage == "corpus" else site.cpus_per_task),  # its ranks have no threads
        "mem": site.memory if training else "",
        "time": limit,
        "signal": f"{told}@{site.signal_seconds}" if told else "",
    }
    words = [f"--{name}={shlex.quote(value)}" for name, value in found.items() if value]
    words += ["--requeue" if site.requeue == "yes" else "--no-requeue"]
    if form.gpus:
        behind = ":" if site.gpu_option.startswith("--gres") else "="
        words.append(f"{site.gpu_option}{behind}{form.gpus}")
    words += [" ".join(site.options.split())] if site.options else []
    if broken := [word for word in words if re.search(r"[\n\r]", word)]:
        raise UserError(f"{args.cluster or cluster.DEFAULT}: {broken[0]!r} is to be one line; correct it")
    return words


def scripts(
    options: Config, site: Cluster, form: Shape, stages: Sequence[str], args: argparse.Namespace
) -> dict[str, str]:
    """Stage -> its sbatch file."""
    run = Path(options.run.dir).absolute()
    folder = run / "slurm"
    programs = {
        "evaluate": ["tools.evaluate", str(run)],
        "export": ["tools.export", str(run), "--output", str(run / "export"), "--overwrite"],
        "report": ["tools.report", str(run), "--output", str(run / "report")],
    }
    found = {}
    for stage in stages:
        values = {"here": shlex.quote(str(folder))}
        if stage == "corpus":
            values |= _corpus_values(options, args)
        elif stage in programs:
            values["command"] = shlex.join(programs[stage])
        size = {"train": form, "corpus": Shape(args.corpus_nodes, args.corpus_tasks_per_node, 0)}
        size["evaluate"] = Shape(1, 1, min(1, form.gpus))  # a large model takes hours on a few cores
        template = "report" if stage in programs else stage
        words = heads(site, folder, stage, size.get(stage, Shape(1, 1, 0)), args)
        found[stage] = render(stage, template, words, values)
    return found


def _corpus_values(options: Config, args: argparse.Namespace) -> dict[str, str]:
    """What the corpus job reads and writes: the one corpus that the config trains on."""
    if not isinstance(options.corpus.train, str):
        raise UserError(
            "corpus.train: a blend is made of several corpora; encode each with tools.encode_corpus"
        )
    if not args.input:
        raise UserError("--pipeline corpus needs raw text; name it with --input F...")
    if "-" in args.input:
        raise UserError("--input -: a job has no standard input; write the text to a file")
    prefix, valid = Path(options.corpus.train).absolute(), options.corpus.valid
    if valid and Path(valid).absolute() == Path(f"{prefix}-valid") and not args.holdout:
        raise UserError(f"corpus.valid = {valid} is what --holdout SHARE sets aside; give it, such as 0.005")
    tokenizer = str(_tokenizer(options))
    holdout = ["--holdout", str(args.holdout)] if args.holdout else []
    form = ["--text-key", args.text_key, "--txt-document", args.txt_document]
    given = ["--input", *args.input, *form, "--tokenizer", tokenizer, "--output", str(prefix), *holdout]
    try:
        choices = shlex.split(args.encode)
        encoding = encode_corpus.arguments([*given, *choices])
    except (ValueError, UserError) as error:
        raise UserError(f"--encode {args.encode!r}: {error}") from None
    return {
        "tokenizer": shlex.quote(tokenizer),
        "prefix": shlex.quote(str(prefix)),
        "input": shlex.join([*args.input, *form]),
        "vocab_size": str(vocabulary(options, args)),
        "limits": shlex.join(_limits(encoding)),
        "options": shlex.join([*holdout, *choices]),
    }


def _limits(encoding: argparse.Namespace) -> list[str]:
    """What is refused of the text: a new tokenizer passes over the same documents as the corpus."""
    going = ["--keep-going"] if encoding.keep_going else []
    return ["--max-document-bytes", str(encoding.max_document_bytes), *going]


def _tokenizer(options: Config) -> Path | None:
    """Folder of the tokenizer that the corpus job uses, or makes; None for a blend."""
    if not isinstance(options.corpus.train, str):
        return None
    return Path(options.corpus.tokenizer or Path(options.corpus.train).parent / "tokenizer").absolute()


# ---- freezing and submitting ---------------------------------------------------------------------


def freeze(folder: Path, site: Cluster, form: Shape) -> None:
    """Code, packages and cluster.env as they are now; a job reads nothing else of ours."""
    shutil.rmtree(folder / "code", ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__", "sample", "results")
    for package in ("pretrain", "tools", "slurm"):
        shutil.copytree(ROOT / package, folder / "code" / package, ignore=skip)
    write_atomic(folder / "code" / "REVISION", f"{code_revision() or 'unknown'}\n")
    own = {"PYTHON": site.python or sys.executable, "GPUS_PER_NODE": str(form.gpus)}
    lines = [f"{name}={shlex.quote(value)}" for name, value in own.items()]
    write_atomic(
        folder / "cluster.env", site.text + "\n# ---- of this submission\n" + "\n".join(lines) + "\n"
    )
    packages = {f"{one.name}=={one.version}" for one in importlib.metadata.distributions()}
    python = f"# Python {platform.python_version()} on {platform.platform()}"
    write_atomic(folder / "requirements.txt", "\n".join([python, *sorted(packages)]) + "\n")


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
    """UserError if a job of this run is in the queue already."""
    for row in status.rows([run]):
        if row["state"] not in status.ENDED:
            raise UserError(
                f"{run}: {row['stage']} is {row['state']} as job {row['job']}; wait for it, or stop it with"
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


def array_script(count: int, folder: Path, site: Cluster, form: Shape, args: argparse.Namespace) -> str:
    """The sbatch file of an array of `count` commands, each in a job of this shape."""
    here, tasks = folder.absolute() / "slurm", min(count, scheduler.MAX_ARRAY)
    values = {"here": shlex.quote(str(here)), "count": str(count), "tasks": str(tasks)}
    at_once = f"%{args.at_once}" if args.at_once else ""
    words = heads(site, here, "array", form, args)
    return render("array", "array", [*words, f"--array=0-{tasks - 1}{at_once}"], values)


def shape_of_array(site: Cluster, args: argparse.Namespace) -> Shape:
    """Of each command: nodes as cluster.env has them with --nodes; else one GPU, or one process without."""
    gpus = site.gpus_per_node if args.nodes else min(1, site.gpus_per_node)
    if args.gpus_per_node is not None:
        gpus = args.gpus_per_node
    tasks = args.tasks_per_node or (site.tasks_per_node if args.nodes else None)
    return Shape(args.nodes or 1, tasks or gpus or 1, gpus)


def submit_run(args: argparse.Namespace) -> int:
    """CONFIG -> jobs in the queue."""
    site = read_site(args)
    options = config.load(args.config, args.overrides)
    stages = args.pipeline.split(",")
    if wrong := [stage for stage in stages if stage not in STAGES]:
        raise UserError(f"--pipeline: no stage {wrong[0]!r}; there are {','.join(STAGES)}")
    if stages != sorted(stages, key=STAGES.index) or len(set(stages)) < len(stages):
        raise UserError(f"--pipeline {args.pipeline}: name stages once, in the order of {','.join(STAGES)}")
    planned = with_vocabulary(options, args) if "corpus" in stages else options
    form, estimate = shape(planned, site, args)
    files = scripts(options, site, form, stages, args)
    if "train" in stages:
        refuse_changes(planned)
    try:
        check_files(options, stages, args)
    except UserError as error:
        if not args.dry_run:  # which may look at a cluster's jobs from anywhere
            raise
        _warn(str(error))
    sizing = size_line(form, [estimate]) + (_epochs(planned) if "train" in stages else "")
    if args.dry_run:
        print(sizing, file=sys.stderr)
        return show(files, args.json)
    run = Path(options.run.dir)
    refuse_live(run)
    folder = run.absolute() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    freeze(folder, site, form)
    write_atomic(folder / "config.yaml", config.dump(settled(options, planned)))
    submitted = submit(folder, files)
    if args.json:
        console.print_json(submitted)
        return 0
    print(sizing)
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


def size_line(form: Shape, estimates: Sequence[dict[str, Any]]) -> str:
    """What the plan says of a job, or of the largest of several, for people."""
    words = f"nodes x ranks: {form.nodes} x {form.tasks}"
    gigabytes = max(each["memory_bytes_per_rank"]["total"] for each in estimates) / 1e9
    hours = [each["hours"] for each in estimates if each["hours"]]
    if gigabytes >= 0.05:
        words += f"; {gigabytes:,.1f} GB a rank"
    if hours:
        words += f", about {max(hours):,.1f} hours of training"
    if len(hours) > 1:
        words += f", {sum(hours):,.1f} in all {len(hours)}"
    return words


def submit_array(args: argparse.Namespace) -> int:
    """The lines of a file -> an array in the queue."""
    if not args.output:
        raise UserError("--array needs --output DIR, for the logs and the frozen code")
    commands = read_commands(args.array)
    site = read_site(args)
    form = shape_of_array(site, args)
    if args.dry_run:
        return show({"array": array_script(len(commands), args.output, site, form, args)}, args.json)
    job = start_array(commands, args.output, site, form, args)
    print(json.dumps({"stage": "array", "job": job}) if args.json else f"job {job}: {len(commands)} commands")
    return 0


def _epochs(options: Config) -> str:
    """How often a run reads its corpora, as far as they are there and the budget tells."""
    options = plan.with_vocabulary(options)[0]
    spent = budget.Budget(options)
    try:
        tokens = sum(load_manifest(prefix).tokens for _, prefix in options.corpus.blend)
    except UserError:  # what is not there yet, or not good, is check_files' and the pre-flight's to say
        return ""
    if spent.measured or not tokens:
        return ""
    k = options.masking
    once = k.views if k.views_mode == "batch" else 1  # samples of one text
    read = sum(
        updates * phase.train.batch_size // once * (phase.train.seq_length - 2)
        for updates, phase in zip(spent.updates(), config.phases(options), strict=True)
    )
    return f", {read / tokens:,.2f} epochs"


def read_commands(path: Path) -> list[str]:
    """The commands of a file, one a line; empty lines and those that begin with # say nothing."""
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
    """The run folders that words name: folders, or configs with overrides; all in runs/ if there are none."""
    if not words:
        return sorted(path.parent.parent for path in Path("runs").glob("*/slurm/journal.jsonl"))
    changes = [word for word in words if "=" in word and not Path(word).exists()]
    named = [word for word in words if word not in changes]
    if changes and not any(Path(word).is_file() for word in named):
        raise UserError(f"{changes[0]}: no such folder, and no CONFIG that it would change; name one of them")
    runs = [
        Path(config.load(word, changes).run.dir) if Path(word).is_file() else Path(word) for word in named
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
        if row["state"] in status.ENDED:
            continue
        journal.note(row["run"], "cancel", row["stage"], row["job"])
        scheduler.cancel(row["jobs"])
        print(f"cancelled job {', '.join(row['jobs'])}: {row['stage']} of {row['run']}")
    for run in dict.fromkeys(row["run"] for row in table):
        ended = [row for row in table if row["run"] == run]
        if all(row["state"] in status.ENDED for row in ended):
            stages = ", ".join(f"{row['stage']} {row['state']}" for row in ended)
            print(f"{run}: no job in the queue ({stages})")
    return 0


# ---- the command line ----------------------------------------------------------------------------


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what a job may have; `tools.sweep --slurm` has them too."""
    jobs = parser.add_argument_group("jobs (defaults are those of cluster.env)")
    jobs.add_argument("--cluster", type=Path, metavar="FILE", help="the site's file (slurm/cluster.env)")
    jobs.add_argument("--nodes", type=whole(1), metavar="N", help="nodes of a job (the fewest that do)")
    jobs.add_argument("--gpus-per-node", type=whole(0), metavar="G", help="GPUs of a node; 0: none")
    jobs.add_argument(
        "--tasks-per-node", type=whole(1), metavar="R", help="ranks of a node (one for each GPU)"
    )
    jobs.add_argument(
        "--time", type=time_limit, metavar="T", help="limit of one job; a run takes as many as it needs"
    )
    jobs.add_argument("--partition", metavar="P")
    jobs.add_argument(
        "--at-once", type=whole(1), metavar="N", help="tasks of an array that run at the same time"
    )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = console.parser("submit", "Put a run, a pipeline or an array into Slurm's queue", True, "slurm")
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
    chain.add_argument("--corpus-nodes", type=whole(1), default=1, metavar="N", help="(%(default)s)")
    chain.add_argument("--corpus-tasks-per-node", type=whole(1), default=8, metavar="N", help="(%(default)s)")
    args = parser.parse_intermixed_args(_joined(sys.argv[1:] if words is None else words))
    if not (args.config or args.status or args.cancel or args.array):
        parser.error("name a CONFIG, or ask for --status, --cancel or --array")
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
    return submit_array(args) if args.array else submit_run(args)


if __name__ == "__main__":
    console.run(main)
