"""sbatch files: the templates with their heads and values."""

import argparse
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.config import Config
from pretrain.errors import UserError
from slurm import cluster, scheduler
from slurm.cluster import Cluster
from slurm.sizing import Shape, tokenizer_of, vocabulary
from slurm.time_limit import seconds
from tools.encode_corpus import __main__ as encode_corpus

STAGES = ("corpus", "train", "evaluate", "export", "report")
PROGRAMS = ("evaluate", "export", "report")
"""Those of one program on one node."""


def render(stage: str, template: str, heads: Sequence[str], values: Mapping[str, str]) -> str:
    """Return an sbatch file: the template with its heads and values."""
    text = (cluster.HERE / f"{template}.sbatch").read_text(encoding="utf-8")
    values = {**values, "stage": stage, "headers": "\n".join(f"#SBATCH {head}" for head in heads)}
    return re.sub(r"@(\w+)@", lambda found: values[found[1]], text)


def heads(site: Cluster, folder: Path, stage: str, form: Shape, args: argparse.Namespace) -> list[str]:
    """Return the #SBATCH words of a job. Slurm reads quotes in them as a shell does; % is special in
    paths."""
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
    config: Config, site: Cluster, form: Shape, stages: Sequence[str], args: argparse.Namespace
) -> dict[str, str]:
    """Stage -> its sbatch file."""
    run = Path(config.run.dir).absolute()
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
            values |= _corpus_values(config, args)
        elif stage in programs:
            values["command"] = shlex.join(programs[stage])
        size = {"train": form, "corpus": Shape(args.corpus_nodes, args.corpus_tasks_per_node, 0)}
        size["evaluate"] = Shape(1, 1, min(1, form.gpus))  # a large model takes hours on a few cores
        template = "report" if stage in programs else stage
        words = heads(site, folder, stage, size.get(stage, Shape(1, 1, 0)), args)
        found[stage] = render(stage, template, words, values)
    return found


def _corpus_values(config: Config, args: argparse.Namespace) -> dict[str, str]:
    """What the corpus job reads and writes: the one corpus that the config trains on."""
    if not isinstance(config.corpus.train, str):
        raise UserError(
            "corpus.train: a blend is made of several corpora; encode each with tools.encode_corpus"
        )
    if not args.input:
        raise UserError("--pipeline corpus needs raw text; name it with --input F...")
    if "-" in args.input:
        raise UserError("--input -: a job has no standard input; write the text to a file")
    prefix, valid = Path(config.corpus.train).absolute(), config.corpus.valid
    if valid and Path(valid).absolute() == Path(f"{prefix}-valid") and not args.holdout:
        raise UserError(f"corpus.valid = {valid} is what --holdout SHARE sets aside; give it, such as 0.005")
    tokenizer = str(tokenizer_of(config))
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
        "vocab_size": str(vocabulary(config, args)),
        "limits": shlex.join(_limits(encoding)),
        "options": shlex.join([*holdout, *choices]),
    }


def _limits(encoding: argparse.Namespace) -> list[str]:
    """What is refused of the text: a new tokenizer passes over the same documents as the corpus."""
    going = ["--keep-going"] if encoding.keep_going else []
    return ["--max-document-bytes", str(encoding.max_document_bytes), *going]


def array_script(count: int, folder: Path, site: Cluster, form: Shape, args: argparse.Namespace) -> str:
    """Return the sbatch file of an array of `count` commands, each in a job of this shape."""
    here, tasks = folder.absolute() / "slurm", min(count, scheduler.MAX_ARRAY)
    values = {"here": shlex.quote(str(here)), "count": str(count), "tasks": str(tasks)}
    at_once = f"%{args.at_once}" if args.at_once else ""
    words = heads(site, here, "array", form, args)
    return render("array", "array", [*words, f"--array=0-{tasks - 1}{at_once}"], values)
