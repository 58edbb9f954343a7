"""What `tools.plan` shows: tables of at most 80 columns, if the names of configs are short, else of 100."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from pretrain.terminal import wrapped
from tools.plan.memory import Layout
from tools.plan.schema import MethodCosts, MissingCount, PlannedLayout, RunPlan, ScaledPlan, ScalingRow
from tools.shared.tables import aligned

LEGEND = """Memory of a rank in GiB; the total is that of its fullest moment.
Layout: tensor x data, ZeRO stage, micro-batch x accumulation; o (O): optimizer
(all) offloaded; r: recomputed."""

NAME = 24
"""Letters of a config's name that are shown."""
PAYS = 1.5
"""Doubling the devices pays while it makes a run this much faster."""


def text(plans: Sequence[RunPlan]) -> str:
    """Return what the runs are, what a rank holds and, where a device is named, how long they take."""
    parts = [_costs(plans), _run(plans), _memory(plans)]
    if plans[0].step_seconds:
        parts.append(_time(plans))
    parts += _cautions(plans)
    if any(plan.vocab_size_from == "assumed" for plan in plans):
        parts.append(f"Vocabulary: {plans[0].vocab_size:,} pieces, assumed; model.vocab_size=N sets it.")
    return wrapped("\n\n".join(parts))


def _cautions(plans: Sequence[RunPlan]) -> list[str]:
    """What figures are of, where it is not plain."""
    found = []
    if any(plan.phases > 1 for plan in plans):
        found.append(
            "Runs in phases: costs of a sequence are means over all their sequences, seconds\n"
            "and MFU over all their updates; the layout is the last phase's, memory that of\n"
            "the one that needs most."
        )
    for plan in plans:
        if (held := plan.mapped_bytes_per_node) and held.orders:
            found.append(
                f"{_name(plan)}: ranks of a node share {held.total / 2**30:.2f} GiB of its memory for"
                f" where documents are, {held.orders / 2**30:.2f} of them files in corpus.copies."
            )
    if (most := max(plan.copied_bytes_on_rank_0 for plan in plans) / 2**30) >= 0.01:
        found.append(
            f"Rank 0 needs {most:.2f} GiB more of its host's memory for checkpoints;\n"
            "checkpoint.background=false waits instead."
        )
    if names := [_name(plan) for plan in plans if plan.phases > 1 and plan.figures_of != "run"]:
        found.append(f"Updates are known only once it has run; of the last phase: {', '.join(names)}.")
    return found


def _parts(plans: Sequence[RunPlan]) -> list[str]:
    """The parts of FLOPs; the optimizer where one of the plans has any of it."""
    multiplies = any(plan.flops_per_step.optimizer for plan in plans)
    return ["encoder", "decoder", "head", *(["optimizer"] if multiplies else [])]


def _costs(plans: Sequence[RunPlan]) -> str:
    parts = _parts(plans)
    rows = [["config", "params", "GFLOPs", "parts, %", "t-layers", "no head", "FLOPs", "time"]]
    for plan in plans:
        per, relative = plan.flops_per_sequence, plan.relative
        shares = [f"{100 * vars(per)[part] / per.total:.0f}" for part in parts]
        rows.append(
            [
                _name(plan),
                _count(plan.parameters["total"]),
                f"{per.total / 1e9:,.4g}",
                "/".join(shares),
                *("-" if ratio is None else f"{ratio:.3f}" for ratio in vars(relative).values()),
            ]
        )
    note = f"Training on a sequence in GFLOPs, those of {'/'.join(parts)} in %,\n"
    note += "and its cost against mlm at 15 %: token-layers, FLOPs without and with the\n"
    note += "head, estimated device time."
    return f"{note}\n\n{aligned(rows)}"


def _run(plans: Sequence[RunPlan]) -> str:
    """What the whole run takes; its updates are in the table of times, if there is one."""
    parts, is_timed = _parts(plans), bool(plans[0].step_seconds)
    titles = ["optim" if part == "optimizer" else part for part in parts]
    rows = [["config", "updates", "tokens", "FLOPs", *titles, "t-layers"]]
    for plan in plans:
        spent = plan.flops_total_by_part
        work = [vars(spent)[part] if spent else None for part in ("total", *parts)]
        figures = [plan.tokens_total, *work, plan.token_layers]
        rows.append([_name(plan), _maybe(plan.steps, ",d"), *map(_power, figures)])
    if is_timed:
        rows = [[name, *figures] for name, _, *figures in rows]
    about = "tokens" if is_timed else "updates, tokens"
    return f"The whole run: {about}, FLOPs and their parts, token-layers.\n\n{aligned(rows)}"


def _memory(plans: Sequence[RunPlan]) -> str:
    rows = [["config", "layout", "params", "grads", "optim", "activ", "head", "buff", "total"]]
    for plan in plans:
        held = vars(plan.memory_bytes_per_rank)
        sizes = [f"{held[name] / 2**30:.2f}" for name in held if name != "host"]
        rows.append([_name(plan), layout_word(plan.layout), *sizes])
    return f"{LEGEND}\n\n{aligned(rows)}"


def _time(plans: Sequence[RunPlan]) -> str:
    layout = plans[0].layout
    rows = [["config", "steps", "step s", "hours", "device-h", "kWh", "$", "MFU %"]]
    for plan in plans:
        rows.append(
            [
                _name(plan),
                _maybe(plan.steps, ",d"),
                _maybe(plan.step_seconds, ".3g"),
                *map(_amount, (plan.hours, plan.device_hours, plan.kwh, plan.cost)),
                _maybe(plan.mfu and 100 * plan.mfu, ".0f"),
            ]
        )
    bound = f"{plans[0].achieved:.2f} of its peak in products ({plans[0].achieved_from})"
    price, watts = plans[0].price, plans[0].watts
    dollars = f"$ at {price:g} a device-hour" if price else "no $ without --price"
    energy = f"kWh at {watts:g} W a device without hosts" if watts else "no kWh without --watts"
    return (
        f"Time on {layout.gpus} x {layout.device}, at {bound};\n"
        f"{energy}; {dollars} (--watts, --price).\n\n"
        f"{aligned(rows)}"
    )


def scaling_text(plan: ScaledPlan) -> str:
    """Counts of devices and what each gives, and where it stops to pay."""
    rows = plan.scaling
    table = [["devices", "layout", "step ms", "hours", "device-h", "kWh", "gain", "efficiency"]]
    for row in rows:
        table.append(
            [
                f"{row.gpus:,}",
                layout_word(row.layout),
                _amount(row.step_seconds and 1e3 * row.step_seconds),
                *map(_amount, (row.hours, row.device_hours, row.kwh)),
                _maybe(row.gain, ".2f"),
                f"{row.efficiency:.2f}",
            ]
        )
    title = f"{_name(plan)} on {plan.layout.device}, the fastest layout for each count."
    missing = _missing(plan.scaling_missing)
    return wrapped(f"{title}\n\n{aligned(table)}\n{missing}\n{verdict(rows)}")


def _missing(counts: Sequence[MissingCount]) -> str:
    """Why counts are not in the table, a sentence for each reason."""
    found: dict[str, list[str]] = {}
    for one in counts:
        found.setdefault(one.why, []).append(f"{one.gpus:,}")
    return "".join(fill(f"Not on {', '.join(gpus)}: {why}.", 80) + "\n" for why, gpus in found.items())


def pays_up_to(rows: Sequence[ScalingRow]) -> int:
    """Return the largest count up to which each doubling pays."""
    best = rows[0].gpus
    for row in rows[1:]:
        if (row.gain or 0) < PAYS:
            break
        best = row.gpus
    return best


def verdict(rows: Sequence[ScalingRow]) -> str:
    """Return one sentence."""
    return f"Doubling pays (a gain of {PAYS} or more) up to {pays_up_to(rows):,} devices."


def methods_text(rows: Sequence[MethodCosts], device: str | None) -> str:
    """Return a line for each method and rate, with the four costs for base and large."""
    sizes = list(dict.fromkeys(row.size for row in rows))
    measures = {"token_layers": "t-lay", "flops_without_head": "no hd", "flops_with_head": "FLOPs"}
    if device:
        measures["device_time"] = "time"
    table = [["method, rate", *(f"{word}" for _ in sizes for word in measures.values())]]
    for start in range(0, len(rows), len(sizes)):
        line = rows[start : start + len(sizes)]
        first = line[0]
        masks = " *" if first.all_mask else ""
        costs = [f"{vars(row.relative)[name]:.3f}" for row in line for name in measures]
        table.append([f"{first.method} {100 * first.rate:.0f} %{masks}", *costs])
    where = f", time on one {device} estimated" if device else ""
    return wrapped(
        f"Cost of a sequence of {rows[0].seq_length} tokens against mlm at 15 %: token-layers, FLOPs\n"
        f"without and with the head{where};\n"
        f"first for {', then for '.join(sizes)}. * all [MASK], else 80/10/10.\n\n{aligned(table)}"
    )


def layout_word(layout: Layout | PlannedLayout) -> str:
    """Return ``2x4 z1 16x8``: tensor 2, data 4, ZeRO 1, micro-batches of 16, 8 of them."""
    word = f"{layout.tensor}x{layout.data} z{layout.zero} {layout.micro_batch}x{layout.accumulation}"
    word += {"none": "", "optimizer": " o", "all": " O"}[layout.offload]
    return word + (" r" if layout.recompute == "block" else "")


def _name(plan: RunPlan) -> str:
    """Of the config; of a long one the beginning and the end, which tell it from others."""
    stem = Path(plan.config).stem
    return stem if len(stem) <= NAME else f"{stem[: NAME - 12]}..{stem[-10:]}"


def _count(number: int) -> str:
    return f"{number / 1e6:.1f}M"


def _maybe(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _power(value: float | None) -> str:
    """Three digits and a power of ten."""
    return _maybe(value, ".2e").replace("e+", "e")


def _amount(value: float | None) -> str:
    """Four digits or decimals, and no powers of ten."""
    size = value or 0.0
    return _maybe(value, ",.0f" if size >= 1000 else ".4g" if size >= 0.1 else ".4f")
