"""Energy of runs, and carbon where its factor is given.

Grams of CO2 equivalent per kWh of electricity are the user's to know: of a contract, an hour, a grid or the
mean of a country and year, each another convention; so the source is given with the number and shown with it.

The CSV has the column names of CodeCarbon 3.3 and its units (kWh, W, s, kg), one line for each attempt; what
was not measured is empty: so are the factor for cooling (PUE) and whether it was a cloud. Its energy is what
this run's ranks and their share of the hosts took. It may be written on another machine than that
of the run, so what it says of machine and software is what the attempt left in provenance.json.
"""

import csv
import io
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pretrain.account import ledger
from pretrain.account.energy import PARTS
from pretrain.account.ledger import JOULES_PER_KWH
from pretrain.errors import UserError
from pretrain.run_folder import read_provenance
from pretrain.terminal import wrapped
from tools.shared import outputs
from tools.shared.tables import aligned

COLUMNS = (
    *("timestamp", "project_name", "run_id", "experiment_id", "duration", "emissions", "emissions_rate"),
    *("cpu_power", "gpu_power", "ram_power", "cpu_energy", "gpu_energy", "ram_energy", "energy_consumed"),
    "water_consumed",
    *("country_name", "country_iso_code", "region", "cloud_provider", "cloud_region", "os"),
    *("python_version", "codecarbon_version", "cpu_count", "cpu_model", "gpu_count", "gpu_model"),
    *("longitude", "latitude", "ram_total_size", "tracking_mode"),
    *("cpu_utilization_percent", "gpu_utilization_percent", "ram_utilization_percent", "ram_used_gb"),
    *("on_cloud", "pue", "wue"),
)
FIELDS = dict.fromkeys(COLUMNS, "") | {"project_name": "LateMask"}
"""By which this program's CSV is known from CodeCarbon's own."""


@dataclass(frozen=True)
class CarbonFactor:
    """What a kWh of electricity emits, by whom."""

    grams_per_kwh: float
    source: str


@dataclass(frozen=True)
class AttemptEnergy:
    """Energy of an attempt, and how it was measured."""

    run: str
    attempt: int
    end: float
    """Unix time in seconds."""
    seconds: float
    device: str
    ranks: int
    provenance: dict[str, Any]
    """What the attempt said of its software; {} if it is not known."""
    sensors: dict[str, str]
    """Part -> method."""
    host_share: float | None
    kwh: dict[str, float]
    """By part, of those that were measured."""


@dataclass(frozen=True)
class Emissions:
    """Energy of runs, and carbon where its factor is given; None where nothing was measured."""

    attempts: list[AttemptEnergy]
    kwh: float | None
    metered_share: float | None
    """Of the device-hours."""
    intensity: CarbonFactor | None
    kg_co2e: float | None


def carbon_factor(grams: str, source: str) -> CarbonFactor:
    """Return the factor of ``--carbon``; UserError if it is none, or nobody's."""
    try:
        value = float(grams)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"--carbon {grams}: not a number of grams per kWh; give one of 0 or more")
    if not source.strip():
        raise UserError(f"--carbon {grams}: say where it is from, such as 'Ember, Germany, 2023'")
    return CarbonFactor(value, source)


def attempts(run: str) -> list[AttemptEnergy]:
    """Return the energy of each attempt of a run."""
    found = []
    lines = ledger.read(run)
    for number in dict.fromkeys(line.attempt for line in lines):
        own = [line for line in lines if line.attempt == number]
        about = next((line.details for line in own if "sensors" in line.details), {})
        before, joules = own[0].joules, own[-1].joules  # no sensor was read before the first line
        found.append(
            AttemptEnergy(
                run=str(run),
                attempt=number,
                end=own[-1].time,
                seconds=sum(own[-1].seconds.values()),
                device=own[-1].device,
                ranks=own[-1].ranks,
                provenance=_provenance(Path(run), own[0]),
                sensors=about.get("sensors", {}),
                host_share=about.get("host_share"),
                kwh={
                    part: (joules[part] - before.get(part, 0.0)) / JOULES_PER_KWH
                    for part in PARTS
                    if part in about.get("sensors", {}) and part in joules
                },
            )
        )
    return found


def _provenance(run: Path, first: ledger.LedgerLine) -> dict[str, Any]:
    """What the attempt with this first line said of its software, a moment before; {} if it is not known.

    By its time: attempts that failed before their first line are in provenance.json only.
    """
    told = read_provenance(run)
    begin = first.time - sum(first.seconds.values())
    return next((one for one in reversed(told) if begin - 1 <= one["time"] <= first.time + 1), {})


def report(runs: list[str], carbon: CarbonFactor | None, table: str | None) -> tuple[Emissions, str]:
    """Return the energy of the runs as a document and as text; `table`: a CSV to write."""
    if table:
        outputs.check([table], fields=FIELDS)
    found = [one for run in runs for one in attempts(run)]
    measured = [one for one in found if one.kwh]
    total = sum(sum(one.kwh.values()) for one in measured) if measured else None
    spent = ledger.total(runs)
    seconds = spent.device_seconds["total"]
    document = Emissions(
        attempts=found,
        kwh=total,
        metered_share=spent.metered_device_seconds / seconds if seconds else None,
        intensity=carbon,
        kg_co2e=total * carbon.grams_per_kwh / 1e3 if carbon and total is not None else None,
    )
    if table:
        outputs.write(table, _csv(found, carbon), FIELDS)
    return document, _text(document)


def _text(document: Emissions) -> str:
    rows = [["attempt", "hours", *(f"{part} kWh" for part in PARTS), "measured by"]]
    for one in document.attempts:
        kwh = [f"{one.kwh[part]:.6f}" if part in one.kwh else "-" for part in PARTS]
        how = ", ".join(f"{part}: {method}" for part, method in one.sensors.items()) or "nothing"
        if one.host_share is not None:
            how += f"; {one.host_share:.0%} of the host"
        rows.append([f"{one.run} {one.attempt}", f"{one.seconds / 3600:.4f}", *kwh, how])
    text = aligned(rows)
    if document.kwh is None:
        return f"{text}\nenergy: not measured"
    text += f"\nenergy: {document.kwh:.6f} kWh, metered in {document.metered_share:.1%} of the device-hours"
    if carbon := document.intensity:
        text += (
            f"\ncarbon: {document.kg_co2e:.6f} kg CO2e at {carbon.grams_per_kwh:g} g/kWh ({carbon.source})"
        )
    return wrapped(text)


def _csv(found: list[AttemptEnergy], carbon: CarbonFactor | None) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for one in found:
        writer.writerow(_row(one, carbon))
    return text.getvalue()


def _row(one: AttemptEnergy, carbon: CarbonFactor | None) -> dict[str, Any]:
    """A line of the CSV: powers are means over the attempt."""
    kwh, seconds = one.kwh, one.seconds
    on_gpu, told = "gpu" in one.sensors, one.provenance
    row = {
        "timestamp": datetime.fromtimestamp(one.end).isoformat(timespec="seconds"),
        "project_name": FIELDS["project_name"],
        "run_id": f"{one.run}#{one.attempt}",
        "duration": round(seconds, 3),
        "os": told.get("os", ""),
        "python_version": told.get("python", ""),
        "codecarbon_version": f"LateMask {told['version']}" if told else "",
        "gpu_count": one.ranks if on_gpu else "",
        "gpu_model": one.device if on_gpu else "",
        "cpu_model": "" if on_gpu else one.device,
        "tracking_mode": "process",
    }
    for part, energy in kwh.items():
        row |= {f"{part}_energy": energy, f"{part}_power": energy * JOULES_PER_KWH / seconds}
    if kwh:
        row["energy_consumed"] = sum(kwh.values())
    if carbon and kwh:
        kilograms = sum(kwh.values()) * carbon.grams_per_kwh / 1e3
        row |= {"emissions": kilograms, "emissions_rate": kilograms / seconds}
    return row
