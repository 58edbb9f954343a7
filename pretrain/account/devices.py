"""Accelerators by name: what they can do at most, and how they are joined. A device that is not here is
unknown: no MFU, no time, no fit, never a guess.

Rates are the makers' data sheets' (half of the figure "with sparsity" where only that is printed). The
trap: names contain each other ("RTX 4090" and "RTX 4090 Laptop GPU", "H100" and "H100 ... MIG 3g.40gb"), so
all words of a name must be known: one more is another device.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One device, and its share of a full node of the usual kind."""

    name: str
    peak: dict[str, float]
    """Dense matrix products in FLOP/s by precision; fp32 is the plain one, not TF32."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes/s."""
    link: float
    """To the others of its node, bytes/s in one direction."""
    network: float
    """To other nodes, bytes/s in one direction: its share of the node's adapters."""
    per_node: int
    watts: float
    """Largest board power (TDP)."""
    host: float
    """To the memory of its host, bytes/s in one direction: what offloaded state crosses."""
    source: str
    price: float = 0.0
    """Of an hour in dollars: a round figure of rental in 2025, an assumption."""
    gpu: bool = True
    latency: float | None = None
    """Seconds of a ring's step between its processes; None: not measured (see traffic.py)."""


def _device(
    name: str,
    bf16: float,
    fp32: float,
    gigabytes: float,
    terabytes_per_s: float,
    link: float,
    network: float,
    per_node: int,
    watts: float,
    host: float,
    price: float,
    source: str,
) -> Device:
    """Teraflop/s, gigabytes (2^30 as the drivers count), terabytes/s, gigabytes/s of the links, dollars."""
    peak = {"bf16": bf16 * 1e12, "fp16": bf16 * 1e12, "fp32": fp32 * 1e12}  # tensor cores make no difference
    memory, bandwidth = gigabytes * 2**30, terabytes_per_s * 1e12
    return Device(
        name, peak, memory, bandwidth, link * 1e9, network * 1e9, per_node, watts, host * 1e9, source, price
    )


# Links: NVLink or Infinity Fabric in one direction; where there is none, PCIe. Networks: the adapters of
# the maker's reference node, divided by its devices (DGX A100 200 Gb/s, DGX H100 / H200 / B200 400 Gb/s).
DEVICES = (
    _device("A100 40GB", 312, 19.5, 40, 1.555, 300, 25, 8, 400, 25, 1.3, "NVIDIA A100 data sheet, SXM4 40GB"),
    _device("A100", 312, 19.5, 80, 2.039, 300, 25, 8, 400, 25, 1.8, "NVIDIA A100 data sheet, SXM4 80GB"),
    _device("A100 PCIe 40GB", 312, 19.5, 40, 1.555, 25, 25, 8, 250, 25, 1.2, "NVIDIA A100 data sheet, PCIe"),
    _device("A100 PCIe 80GB", 312, 19.5, 80, 1.935, 25, 25, 8, 300, 25, 1.6, "NVIDIA A100 data sheet, PCIe"),
    _device("H100 PCIe", 756, 51, 80, 2.0, 50, 25, 8, 350, 50, 2.4, "NVIDIA H100 data sheet, PCIe"),
    _device("H100 NVL", 835, 60, 94, 3.9, 300, 25, 8, 400, 50, 2.6, "NVIDIA H100 data sheet, NVL"),
    _device("H100", 989, 67, 80, 3.35, 450, 50, 8, 700, 50, 3.0, "NVIDIA H100 data sheet, SXM5"),
    _device("H200", 989, 67, 140, 4.8, 450, 50, 8, 700, 50, 3.5, "NVIDIA H200 data sheet, SXM"),
    _device("B200", 2250, 75, 180, 8.0, 900, 50, 8, 1000, 50, 5.0, "NVIDIA DGX B200 data sheet"),
    _device("L40S", 362, 91.6, 45, 0.864, 25, 25, 8, 350, 25, 1.0, "NVIDIA L40S data sheet"),
    _device("RTX 4090", 165, 82.6, 24, 1.008, 25, 12.5, 8, 450, 25, 0.5, "NVIDIA Ada architecture paper"),
    # torch sees two devices in an MI250X, one of each die.
    _device(
        "MI250X", 191.5, 23.95, 64, 1.6, 50, 12.5, 8, 280, 36, 1.0, "AMD MI250X data sheet, one of two dies"
    ),
    _device("MI300X", 1307, 163.4, 192, 5.3, 448, 50, 8, 750, 50, 2.5, "AMD MI300X data sheet"),
)


ALIASES = {
    "A100 40GB": ("A100-SXM4-40GB", "A100-SXM-40GB"),
    "A100": ("A100-SXM4-80GB", "A100-SXM-80GB", "A100 80GB", "A100 SXM", "A100 SXM4"),
    "H100 PCIe": ("H100 PCIe 80GB",),
    "H100": ("H100 80GB HBM3", "H100 80GB", "H100 SXM", "H100 SXM5", "H100 SXM 80GB", "H100 SXM5 80GB"),
    "H200": ("H200 SXM", "H200 141GB", "H200 SXM 141GB"),
    "MI300X": ("MI300X OAM",),
}
"""What drivers and people call a device besides, the makers' words and the order of words apart."""
MAKERS = {"nvidia", "geforce", "tesla", "amd", "instinct"}
"""Words that tell no devices apart."""


def find(name: str) -> Device | None:
    """Return the device that a driver or a person calls so (``NVIDIA H100 80GB HBM3``, ``h100``); None:
    unknown."""
    words = _words(name)
    for device in DEVICES:
        if words in map(_words, (device.name, *ALIASES.get(device.name, ()))):
            return device
    return None


def _words(name: str) -> set[str]:
    return set(name.lower().replace("-", " ").split()) - MAKERS


def peak(device: str, precision: str) -> float | None:
    """Return the dense peak in FLOP/s of the device so named, None when the table does not know it."""
    found = find(device)
    return found.peak.get(precision) if found else None
