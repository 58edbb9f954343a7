"""Write the tables of measurements in the pages from what was measured: ``python -m tools.benchmark table``.

A page says where a table stands, ``<!-- table: NAME -->`` and ``<!-- end -->``; what is between the two is
what `TABLES[NAME]` returns. A new table is a function that returns its rows, a line in `TABLES`, and the two
marks. ``--check`` writes nothing and fails where a page says other than its documents.

It imports the rooms whose documents it shows, and no other room imports this one: how a table of scores, of
a plan or of a study looks is said there, and what stands in which page is said here.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

from pretrain.account import devices
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.files import write_whole
from tools import probe
from tools.benchmark.gpu import GpuReport
from tools.finetune import cells
from tools.finetune import table as finetune_table
from tools.plan import estimate, layouts, published
from tools.plan import pages as plan_pages
from tools.plan.schema import Calibration
from tools.report import pages as report_pages
from tools.report.schema import Report
from tools.shared import console, typed_json
from tools.shared.measure import BenchmarkRow
from tools.shared.tables import markdown
from tools.speedrun import records
from tools.study.plan import open_study
from tools.study.results import read_results

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"

Rows = Sequence[Sequence[str]]
"""Of words; the first row heads the others."""


def main(arguments: Sequence[str]) -> int:
    parser = console.parser("benchmark table", "Write the tables of measurements in the pages")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 where a page is not as measured"
    )
    args = parser.parse_args(arguments)
    stale = [path for path in pages() if path.read_text(encoding="utf-8") != written(path)]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'not as measured' if args.check else 'written'}")
        if not args.check:
            write_whole(path, written(path).encode())
    return int(args.check and bool(stale))


def pages() -> list[Path]:
    """Return the pages of this checkout."""
    return sorted(path for room in ("", "*/", "tools/*/") for path in ROOT.glob(f"{room}*.md"))


def written(page: Path) -> str:
    """Return the text of a page with its tables as they were measured; UserError names an unknown table."""

    def table(found: re.Match[str]) -> str:
        if found["name"] not in TABLES:
            raise UserError(f"{page}: no table {found['name']!r}; take one of {', '.join(TABLES)}")
        return f"{found['begin']}\n{TABLES[found['name']]()}\n<!-- end -->"

    marks = r"(?P<begin><!-- table: (?P<name>[\w-]+) -->)\n.*?<!-- end -->"
    return re.sub(marks, table, page.read_text(encoding="utf-8"), flags=re.DOTALL)


# ---- speeds --------------------------------------------------------------------------------------

FILES = (
    *("step-fp32", "step-bf16", "step-base-128", "step-base-512", "step-base-512-query"),
    *("step-large-128-self", "step-large-128-query", "step-large-128-self-fp32"),
    *("step-large-128-query-fp32", "step-large-512-self-fp32", "step-large-512-query-fp32"),
    *("step-large-512-self", "step-large-512-self-b4", "step-large-512-query"),
    *(
        "scaling-tensor",
        "scaling-zero",
        "scaling-tensor-bf16",
        "scaling-exposed",
        "scaling-saves",
        "head",
        "attention-128",
        "attention-512",
    ),
    *("memory", "optimizer", "corpus", "corpus-ids", "many-documents"),
)
"""The results, ``results/benchmark-NAME.json``. Of rows with one name the last is shown."""

_LATE = [
    (f"`{method}` time / own `mlm`, {size} {length}, minus FLOP ratio", ".05 / .02", row)
    for method in ("3ml-self", "3ml-query")
    for size in ("base", "large")
    for length in (128, 512)
    for row in [f"{method} against mlm, {size} {length}, DTYPE"]
]
_HEAD = [
    (f"head / {peer}: {what}", goal, f"head against {peer}, 4096 x 768 x 50304, DTYPE: {what}")
    for peer in ("logits and cross-entropy", "linear_cross_entropy", "checkpointed chunks")
    for what, goal in (("time", "1.15 / -"), ("peak memory", "0.167 / 0.125"))
    for goal in [goal if peer == "logits and cross-entropy" else "-"]
]
_ATTENTION = [
    (f"{name}, length {length}", "-", f"attention, {row}, base {length}, DTYPE")
    for length in (128, 512)
    for name, row in (
        ("attention layer, rate / Hugging Face's (sdpa)", "packed, against hugging face sdpa"),
        ("attention layer, rate / Hugging Face's (eager)", "packed, against hugging face eager"),
        ("the same bounded by four documents / packed", "bounded, against packed"),
    )
]
_OPTIMIZER = [
    (
        "update of the parameters, StableAdamW / AdamW",
        "-",
        "update of the parameters, stable-adamw against adamw, base, DTYPE",
    ),
    *(
        line
        for ranks, which in (("1 rank", "Muon on one rank"), ("8 ranks", "Muon on one of eight"))
        for line in (
            (
                f"the same, {which} / AdamW",
                "-",
                f"update of the parameters, muon on {ranks} against adamw, base, DTYPE",
            ),
            (
                f"what {which} adds to an update of 32,768 rows a rank, minus share of FLOPs",
                ".04 / -",
                f"what muon on {ranks} adds to an update, base, DTYPE",
            ),
        )
    ),
]
SPEEDS = [
    ("`mlm` rate / Hugging Face eager loop", "1.40 / 1.50", "mlm against hugging face, base 128, DTYPE"),
    (
        "the same, the peer given our memory setting",
        "-",
        "mlm against hugging face, freed memory kept, base 128, DTYPE",
    ),
    (
        "/ Hugging Face compiled, masked head",
        "1.0 / 1.1",
        "mlm against hugging face compiled, masked head, base 128, DTYPE",
    ),
    (
        "/ fairseq's way (DinkyTrain's): masked head, attention as products",
        "1.0 / 1.1",
        "mlm against fairseq style, base 128, DTYPE",
    ),
    *_LATE,
    (
        "a layer, tensor parallel 2 / 1, wall time, one thread a rank",
        ".60 / .55",
        "a layer, tensor parallel 2 against 1, base 128, DTYPE",
    ),
    (
        "ZeRO-1 engine / plain engine, one rank",
        "1.10 / 1.03",
        "an update, zero 1 against the plain engine, base 128, DTYPE",
    ),
    *_HEAD,
    *_ATTENTION,
    *_OPTIMIZER,
]
"""What is measured, our goal (floor / aim), and the name of its row."""

CORPUS = [
    (
        "GPT-2 ids, text to .bin, plain Python / Hugging Face `encode_batch` + megatron-core's builder",
        "3.4 / 5",
        "byte-level BPE, cached, text to .bin",
    ),
    ("the same with fastokens", "30 / 60", "byte-level BPE, fastokens, text to .bin"),
    (
        "sentencepiece unigram / plain `encode` to list + builder",
        "1.2 / 1.3",
        "sentencepiece unigram, text to .bin",
    ),
    ("sentencepiece bpe / the same", "2.3 / 5", "sentencepiece bpe, text to .bin"),
    ("masking 256 x 512 / Hugging Face's collator", "8 / 9.5", "masking, against Hugging Face"),
    ("masking / fairseq's logic", "15 / 18", "masking, against fairseq"),
    ("reading 4,096 x 128 / megatron-core `IndexedDataset[i]`", "4 / 6", "reading a batch, 4,096 x 128"),
    ("reading 256 x 512 / the same", "-", "reading a batch, 256 x 512"),
    (
        "reading 2 million documents, order mapped / in memory, 4,096 x 128",
        "0.98 / -",
        "many documents, 4,096 x 128, mapped",
    ),
    ("the same, 256 x 512", "0.98 / -", "many documents, 256 x 512, mapped"),
    (
        "merge of 1,000 shards, peak memory / megatron-core `add_index`",
        "0.1 / 0.02",
        "merge of 1,000 shards, peak memory",
    ),
    ("two processes / one, wall time", "1.8 / -", "two processes, against one"),
    ("start-up to the first document", "1 s / -", "start-up to the first document"),
]
"""The same of the path from text to a corpus."""


GPU = "H200"
"""Of which the tables tell, and have goals: results of others are kept beside it."""


@cache
def results(gpu: bool) -> dict[str, BenchmarkRow]:
    """Return the rows of all results of the tables' GPU, or of a CPU, by their names."""
    rows = [row for name in FILES for row in measured(name)]
    for path in sorted((RESULTS / "gpu").glob("*.json")):
        rows += [row for step in typed_json.read(GpuReport, path).steps for row in step.rows]
    return {
        row.name: row for row in rows if (GPU in row.device if gpu else not row.device.startswith("NVIDIA"))
    }


@cache
def measured(name: str) -> list[BenchmarkRow]:
    """Return the rows of one file of results."""
    return typed_json.read(list[BenchmarkRow], RESULTS / f"benchmark-{name}.json")


def speeds() -> Rows:
    """Return each speed on a CPU in both precisions, and on a GPU in bf16."""
    columns = ["CPU, fp32", "CPU, bf16", GPU]
    return [["measure (base, length 128, unless named)", "goal: floor / aim", *columns], *_speeds()]


def _speeds() -> Iterator[list[str]]:
    for what, goal, name in SPEEDS:
        cpu = [ratio(results(False).get(name.replace("DTYPE", dtype))) for dtype in ("fp32", "bf16")]
        title, gpu = name.replace("DTYPE", "bf16"), results(True)
        row = gpu.get(f"{title}, compile default") or gpu.get(title)
        yield [what, goal, *cpu, ratio(row) if row else "not measured yet"]


def saves() -> Rows:
    """Return for how long a save keeps ranks from training, beside one that they all wait for."""
    rows = [["", "beside training, ms", "waited for, ms", "share"]]
    for row in measured("scaling-saves"):
        assert row.ratio and row.peer
        spread = f"{100 * row.spread[0]:.1f} to {100 * row.spread[1]:.1f}"
        share = f"{100 * row.ratio:.1f} % ({spread})"
        rows.append([row.name, f"{1e3 * row.ours:.0f}", f"{1e3 * row.peer:,.0f}", share])
    return rows


def exposed() -> Rows:
    """Return what of the sums of gradients nothing hides, on links with a rate, beside the plan's."""
    head = ["", "link", "forward and backward pass", "sums after it", "exposed", "share", "plan: share"]
    rows = [head]
    for row in measured("scaling-exposed"):
        about = row.settings
        assert row.ratio and row.peer
        rows.append(
            [
                row.name,
                f"{about['mbit']:,} Mbit/s",
                f"{about['pass_ms']:,.0f} ms",
                f"{row.peer:,.0f} ms",
                f"{row.ours:,.0f} ms",
                f"{100 * row.ratio:.1f} % ({100 * row.spread[0]:.1f} to {100 * row.spread[1]:.1f})",
                f"{100 * about['planned_ms'] / about['planned_peer_ms']:.1f} %",
            ]
        )
    return rows


GOALS = {
    "base 128": 355,
    "base 512": 355,
    "large 128": 435,
    "large 512": 435,
    "modernbert-base 512": 258,
}
"""Model TFLOP/s of `mlm` on an H200 in bf16; ModernBERT's are those of its published run on H100s."""


def gpu_updates() -> str:
    """Return what whole updates took on a GPU, or what to do to know it."""
    found = [row for row in results(True).values() if row.unit == "model TFLOP/s"]
    if not found:
        return f"Not measured yet: `{GPU_COMMAND}`, and its `gpu.json` as `results/gpu/h200.json`."
    head = ["", "ms an update", "model TFLOP/s", "goal", "MFU", "GB", "time / `mlm`'s, minus FLOP ratio"]
    return markdown([head, *map(_gpu_update, found)])


GPU_COMMAND = "python -m tools.benchmark gpu --minutes 9 --output DIR"


def _gpu_update(row: BenchmarkRow) -> list[str]:
    method, what = row.name.split(", ", 1)
    about, device = row.settings, devices.find(row.device)
    against = results(True).get(f"{method} against mlm, {what}")
    goal = GOALS.get(what.partition(",")[0]) if method == "mlm" else None
    return [
        f"`{method}`, {what}",
        f"{1e3 * about['seconds']:.1f}",
        f"{row.ours:.0f}",
        f"{goal}" if goal else "",
        f"{100 * row.ours * 1e12 / device.peak[row.dtype]:.0f} %" if device else "",
        f"{about['peak_bytes'] / 1e9:.1f}",
        ratio(against) if against else "",
    ]


def gpu_others() -> str:
    """Return what else was measured on a GPU."""
    shown = {name.replace("DTYPE", "bf16") for _, _, name in SPEEDS}
    rows = [
        [row.name, f"{row.ours:,.4g} {row.unit}", ratio(row) if row.ratio else ""]
        for row in results(True).values()
        if row.unit != "model TFLOP/s" and row.name.partition(", compile")[0] not in shown
    ]
    if not rows:
        return "Not measured yet."
    return markdown([["measure", "ours", "ours / peer"], *rows])


def ratio(row: BenchmarkRow | None) -> str:
    """Return the cell of a row: its median and extremes, beside the FLOPs' ratio where it has one."""
    if row is None:
        return "not measured"
    if row.ratio is None:
        return f"{row.ours:.2f} {row.unit}"
    if row.runs == 1:
        return f"{_digits(row.ratio)} ({row.ours:,.0f} of {row.peer:,.0f} {row.unit})"
    extremes = " to ".join(map(_digits, row.spread)) + ("" if row.runs == 5 else f", {row.runs} rounds")
    if row.flop_ratio is None:
        return f"{_digits(row.ratio)} ({extremes})"
    over = row.ratio - row.flop_ratio
    return f"{row.ratio:.3f} - {row.flop_ratio:.3f} = {over:+.3f} (ratio {extremes})"


def _digits(value: float) -> str:
    """Return three of them."""
    return f"{value:#.3g}".rstrip(".")


def memory() -> Rows:
    """Return the peak of an update, without recomputation and with it."""
    rows = [["", "`train.recompute: none`", "`block`"]]
    for row in measured("memory"):
        method = row.name.split(", ")[1]
        rows.append([f"`{method}`", f"{row.peer:,.0f} {row.unit}", f"{row.ours:,.0f} {row.unit}"])
    return rows


def corpus() -> Rows:
    """Return the speeds of the path from text to a corpus."""
    head = ["ours / peer", "goal: ship / aim", "ratio"]
    return [head, *([what, goal, ratio(results(False).get(name))] for what, goal, name in CORPUS)]


def corpus_memory() -> Rows:
    """Return the largest process of encoding, by tokenizer."""
    names = {
        "sentencepiece unigram, 32,000 pieces": "unigram",
        "sentencepiece bpe, 32,000 pieces, cached": "bpe",
        "GPT-2, plain Python, cached": "byte-level BPE",
        "GPT-2, fastokens": "fastokens",
    }
    found = {what: results(False)[f"unseen words, {name}, peak memory"] for what, name in names.items()}
    return [
        ["tokenizer", "largest process"],
        *([what, f"{row.ours:,.0f} {row.unit}"] for what, row in found.items()),
    ]


def commands(corpus: bool) -> Rows:
    """Return the results' files with the commands that measured them, where `--output` says no more."""
    return [["file", "commit", "command"], *_commands(corpus)]


def _commands(corpus: bool) -> Iterator[list[str]]:
    for name in FILES:
        found = dict.fromkeys((row.commit or "", row.command) for row in measured(name))
        for commit, command in found:
            shown = commit[:12] + "-dirty" * commit.endswith("-dirty")
            if ("benchmark corpus" in command) == corpus:
                short = re.sub(r"^python -m tools\.benchmark | --(output|profile) \S+", "", command)
                room = "../benchmark/" if corpus else ""
                yield [f"[{name}]({room}results/benchmark-{name}.json)", shown, f"`{short}`"]


# ---- plans ---------------------------------------------------------------------------------------


def plan_methods() -> Rows:
    """Return the four costs of all methods at 512 tokens."""
    costs = {"token_layers": "token-layers", "flops_without_head": "FLOPs without head"}
    costs |= {"flops_with_head": "FLOPs", "device_time": "time (est.)"}
    rows = estimate.methods(512, devices.find("H100"))
    sizes = list(dict.fromkeys(row.size for row in rows))
    titles = [f"{size}: {title}" for size in sizes for title in costs.values()]
    table: dict[str, list[str]] = {}
    for row in rows:
        name = f"`{row.method}` {100 * row.rate:.0f} %{' *' * row.all_mask}"
        table.setdefault(name, [name]).extend(f"{vars(row.relative)[cost]:.3f}" for cost in costs)
    return [["", *titles], *table.values()]


def plan_scaling() -> Rows:
    """Return the plans of RoBERTa-large on 8, 64 and 512 H100s."""
    head = ["", "devices", "layout", "step", "hours", "device-hours", "kWh", "$", "MFU", "memory of a rank"]
    rows = [head]
    for gpus in (8, 64, 512):
        for method in ("mlm", "3ml-self", "3ml-query"):
            config = load_config(ROOT / "configs" / f"{method}-large.yaml")
            plan = estimate.plan(config, gpus, "H100", fastest=True)
            spent = [f"{amount:,.0f}" for amount in (plan.device_hours, plan.kwh, plan.cost)]
            assert plan.step_seconds and plan.mfu  # of the device that is named
            step, hours = f"{1e3 * plan.step_seconds:.0f} ms", f"{plan.hours:.2f}"
            held = f"{plan.memory_bytes_per_rank.total / 2**30:.1f} GiB"
            words = [f"`{method}`", f"{gpus}", plan_pages.layout_word(plan.layout), step, hours]
            rows.append([*words, *spent, f"{100 * plan.mfu:.0f} %", held])
    return rows


def plan_measured() -> Rows:
    """Return real steps beside their plans."""
    rows = [["", "seconds: plan", "measured", "", "bytes: plan", "measured", ""]]
    for row in typed_json.read(Calibration, layouts.RESULTS / "plan-cpu.json").rows:
        seconds = [
            f"{row.planned_seconds:.2f}",
            f"{row.seconds:.2f}",
            f"{100 * row.seconds_error:+.0f} %",
        ]
        held = [f"{size / 1e6:,.0f} MB" for size in (row.planned_bytes, row.bytes)]
        rows.append([row.name, *seconds, *held, f"{100 * row.bytes_error:+.1f} %"])
    return rows


def plan_published() -> Rows:
    """Return published runs beside their plans."""
    head = [
        "",
        "GPUs",
        "published: rows/s a GPU",
        "plan",
        "",
        "share of the peak that gives it",
        "what it did otherwise",
    ]
    rows = [head]
    for run in published.RUNS:
        device = run.device if isinstance(run.device, str) else run.device.name
        planned = run.planned_rate()
        speeds = [f"{run.rate:,.0f}", f"{planned:,.0f}", f"{100 * (planned / run.rate - 1):+.0f} %"]
        where = f"[{run.name}]({run.source})"
        rows.append([where, f"{run.gpus} x {device}", *speeds, f"{run.share():.2f}", run.why])
    return rows


# ---- runs and scores -----------------------------------------------------------------------------


def report(name: str, titles: Sequence[str]) -> Rows:
    """Return columns of a committed report."""
    path = ROOT / "tools" / "report" / "results" / f"{name}.json"
    return report_pages.columns(typed_json.read(Report, path), titles)


def probes() -> Rows:
    """Return what speaks for each probed encoder."""
    return probe.summary(typed_json.read(list[probe.Result], ROOT / "tools" / "results" / "probe.json"))


def finetuned() -> str:
    """Return the tables of fine-tuning, and their account."""
    runs = cells.read_runs(ROOT / "tools" / "finetune" / "results" / "runs.jsonl")
    return finetune_table.markdown(runs).strip()


LAYOUTS = Path(ROOT, "tests", "layouts", "results")


def layout_pairs() -> Rows:
    """Return how far losses are after loading into each kind of layout, relatively."""
    lines = (LAYOUTS / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, dict[str, list[float]]] = {}
    for line in map(json.loads, lines):
        kind = re.sub(r"-tp\d+-dp\d+$", "", line["to"])
        pairs = {f"{source} {line['to']}": losses for source, losses in line["from"].items()}
        found[kind] = found.get(kind, {}) | pairs
    everything = {pair: losses for pairs in found.values() for pair, losses in pairs.items()}
    rows = [["into", "pairs", "next loss", "the one after"]]
    for kind, pairs in {**found, "all": everything}.items():
        most = [max(each) for each in zip(*pairs.values(), strict=True)]
        rows.append([kind, f"{len(pairs):,}", *(f"{value:.0e}" if value else "0" for value in most)])
    return rows


def layouts_refused() -> Rows:
    """Return why starts are refused, with the kinds of layouts."""
    told = json.loads((LAYOUTS / "refused.json").read_text(encoding="utf-8"))
    rows = [["a start with", "is refused"]]
    for reason in dict.fromkeys(told.values()):
        rows.append([", ".join(kind for kind in told if told[kind] == reason), reason])
    return rows


FAULTS = Path(ROOT, "tests", "faults", "results")


def faults(group: str) -> Rows:
    """Return what the campaigns of faults have counted, by `kind` or `layout`."""
    told: dict[str, list[int]] = {}
    for file in ("campaign.json", "jobs.json"):
        for name, counts in json.loads((FAULTS / file).read_text(encoding="utf-8"))[group].items():
            told[name] = [a + b for a, b in zip(told.get(name, [0, 0, 0]), counts, strict=True)]
    told = dict(sorted(told.items()))
    total = [sum(column) for column in zip(*told.values(), strict=True)]
    rows = [[group, "faults", "ended otherwise than promised", "in a run that did not end equal"]]
    return [*rows, *([name, *map(str, counts)] for name, counts in {**told, "all": total}.items())]


def failures() -> Rows:
    """Return the effective training time under failures, beside what is foreseen."""
    told = json.loads((FAULTS / "ettr.json").read_text(encoding="utf-8"))["runs"]
    rows = [
        ["mean time between failures", "`checkpoint.every_minutes`", "failures", "save every"]
        + ["effective time, measured", "foreseen", "best interval", "foreseen there"]
    ]
    for one in told:
        every = (
            one["every_minutes"] if one["every_minutes"] == "auto" else f"{float(one['every_minutes']):.2f}"
        )
        rows.append(
            [f"{one['mtbf'] / 60:.0f} min", every, f"{one['failures']}", f"{one['interval']:.0f} s"]
            + [f"{one['ettr']:.0%}", f"{one['foreseen']:.0%}"]
            + [f"{one['best_interval']:.0f} s", f"{one['best_foreseen']:.0%}"]
        )
    return rows


WORK = [
    "method",
    "tokens seen",
    "tokens predicted",
    *(f"FLOPs {part}" for part in ("encoder", "decoder", "head")),
]
HOURS = ["updates", "evaluation", "saving", "start-up", "lost hours", "FLOPs total", "lost FLOPs", "attempts"]


def speedrun(task: str) -> Rows:
    """Return the records of a task."""
    results = ROOT / "tools" / "speedrun" / "results" / f"{task}.jsonl"
    return records.rows(
        open_study(ROOT / "configs" / "speedrun" / f"{task}.yaml", None), read_results(results)
    )


TABLES: dict[str, Callable[[], str]] = {
    name: partial(lambda rows: markdown(rows()), rows)
    for name, rows in {
        "demo": partial(
            report, "demo", [*WORK, "token-layers", "device-hours", "loss", "unigram loss", "accuracy"]
        ),
        "account": partial(report, "report", ["method", "budget", "used", "device-hours", *HOURS, "loss"]),
        "speeds": speeds,
        "memory": memory,
        "exposed": exposed,
        "saves": saves,
        "commands": partial(commands, False),
        "corpus": corpus,
        "corpus-memory": corpus_memory,
        "corpus-commands": partial(commands, True),
        "plan-methods": plan_methods,
        "plan-scaling": plan_scaling,
        "plan-measured": plan_measured,
        "plan-published": plan_published,
        "probes": probes,
        "speedrun-sample": partial(speedrun, "sample"),
        "speedrun-medium": partial(speedrun, "medium"),
        "layouts": layout_pairs,
        "layouts-refused": layouts_refused,
        "faults": partial(faults, "kind"),
        "fault-layouts": partial(faults, "layout"),
        "failures": failures,
    }.items()
} | {"finetuned": finetuned, "gpu-updates": gpu_updates, "gpu-others": gpu_others}
"""By name in the pages: what makes the text of a table."""
