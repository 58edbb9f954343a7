"""The closed forms against torch's own counters."""

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.account import devices, flops
from pretrain.config import geometry
from pretrain.data.masking import counts
from pretrain.model import late_mask as model
from tests.support.methods import BLOCKS, FORMS, METHODS, small

VOCAB = 150


def build(method, block, **sections):
    sections["model"] = {**METHODS[method], **FORMS[block], **sections.get("model", {})}
    config = small(method, block, **sections)
    c = counts(config.masking, config.train.seq_length)
    built = model.LateMaskModel(config.model, VOCAB, VOCAB - 1, config.train.recompute == "block")
    model.init_weights(built, 0)
    rows = geometry.Rows(c.length, c.visible, c.predicted)
    ids = torch.randint(4, VOCAB, (3, c.length))
    positions = torch.arange(c.length).expand(3, -1)
    return config, built, rows, model.Batch(ids, positions, ids[:, -c.predicted :], c.masked)


def counted(module, batch):
    # The fused CPU kernel counts as 0 (pytorch issue 195460): the maths kernel is what can be counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(batch).backward()
    return counter


@pytest.mark.parametrize(("method", "block"), list(itertools.product(METHODS, [*BLOCKS, "local"])))
@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_training_flops_equal_torchs_counter(method, block, rate):
    config, built, rows, batch = build(method, block, masking={"rate": rate})
    expected = flops.training(config.model, rows, VOCAB) * 3
    assert counted(built, batch).get_total_flops() == expected.total


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_predicted_costs_nothing(method):
    config, built, rows, batch = build(method, "modern", masking={"rate": 0.5, "predict": 0.2})
    assert (batch.ids.shape[1], rows.length, rows.predicted) == (24 - 7, 24 - 7, 4)
    expected = flops.training(config.model, rows, VOCAB) * 3
    assert counted(built, batch).get_total_flops() == expected.total


@pytest.mark.parametrize("leak", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_parts_equal_torchs_counter(method, leak):
    """Encoder and head counted as modules; what is left is the decoder."""
    config, built, rows, batch = build(method, "post", model={"mask_leak": leak})
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as encoder:
            built.encode(batch.ids, batch.positions, batch.num_masked)
        with FlopCounterMode(display=False) as body:
            built.predicted_rows(batch)
        with FlopCounterMode(display=False) as everything:
            built(batch)
    part = flops.forward(config.model, rows, VOCAB) * 3
    assert encoder.get_total_flops() == part.encoder
    assert body.get_total_flops() == part.encoder + part.decoder
    assert everything.get_total_flops() == part.total


@pytest.mark.parametrize("block", [*BLOCKS, "local"])
@pytest.mark.parametrize(
    ("method", "dropout"), [("mlm", 0.0), ("one-way", 0.0), ("3ml-query", 0.0), ("3ml-cross", 0.1)]
)
def test_recomputation_counts_in_hardware_flops(method, dropout, block):
    config, built, rows, batch = build(
        method, block, model={"dropout": dropout}, train={"recompute": "block"}
    )
    cost = flops.step_cost(config.model, rows, VOCAB, 3, "block")
    assert counted(built.train(), batch).get_total_flops() == cost.hardware_flops > cost.flops.total


def test_an_update_by_muon_costs_what_it_multiplies():
    config, _, rows, _ = build("3ml-cross", "modern")
    model = config.model
    plain, update = (flops.step_cost(model, rows, VOCAB, 3, "block", kind) for kind in ("adamw", "muon"))
    # 4 layers and 2 crossings of 4 squares, 12 products between widths of 32 and 48: both on 32 rows.
    expected = 5 * (24 * 6 * 32**3 + 12 * (4 * 32 * 32 * 48 + 2 * 32**3))
    assert update.flops.parts == {**plain.flops.parts, "optimizer": expected}
    assert update.flops.without_head == plain.flops.encoder + plain.flops.decoder + expected
    assert update.hardware_flops == plain.hardware_flops + expected
    assert update.token_layers == plain.token_layers


@pytest.mark.parametrize(
    ("size", "length", "method", "ratio"),
    # Relative to mlm at 15 %, V 50,265, 80/10/10, derived independently from the papers' formulas.
    [
        ("base", 128, "3ml-self", 0.923),
        ("base", 512, "3ml-self", 0.895),
        ("large", 128, "3ml-self", 0.745),
        ("large", 512, "3ml-self", 0.728),
        ("base", 128, "3ml-cross", 0.966),
        ("large", 512, "3ml-cross", 0.751),
        ("base", 128, "3ml-query", 0.857),
        ("base", 512, "3ml-query", 0.828),
        ("large", 128, "3ml-query", 0.711),
        ("large", 512, "3ml-query", 0.693),
        ("base", 128, "mae-lm", 1.169),
        ("large", 512, "mae-lm", 1.007),
    ],
)
def test_published_sizes_cost_what_the_papers_arithmetic_says(size, length, method, ratio):
    layers, width = {"base": (12, 768), "large": (24, 1024)}[size]
    shape = {"num_layers": layers, "hidden_size": width, "num_heads": 16, "ffn_size": 4 * width,
             "max_positions": 512, "vocab_multiple": 1}  # fmt: skip

    def cost(name, rate):
        late = {**METHODS[name], **({"mask_from": layers} if name != "mlm" else {})}
        config = small(name, model={**shape, **late}, masking={"rate": rate}, train={"seq_length": length})
        # The papers' arithmetic has fractions of rows and counts <s> and </s> among the maskable ones.
        masked = rate * length * config.masking.corruption[0]
        rows = geometry.Rows(length, length - masked, rate * length)
        return flops.forward(config.model, rows, 50265).total

    rate = 0.15 if method == "mae-lm" else 0.5
    assert cost(method, rate) / cost("mlm", 0.15) == pytest.approx(ratio, abs=0.0005001)


def test_token_layers_of_base_are_the_papers_three_quarters():
    """12 + 2 layers, rate 0.5, 80/10/10: (12 x 0.6 + 2) / 12 = 0.767 of the baseline's."""
    late = small("3ml-self", model={"num_layers": 12, "mask_from": 12})
    plain = small("mlm", model={"num_layers": 12})
    rows = geometry.Rows(512, 308, 255)
    ratio = flops.token_layers(late.model, rows) / flops.token_layers(plain.model, rows)
    assert ratio == pytest.approx((12 * 308 / 512 + 2) / 12)


def test_peaks_name_the_device_or_nothing():
    assert devices.peak("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert devices.peak("NVIDIA H100 PCIe", "bf16") == 756e12
    assert devices.peak("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert devices.peak("AMD EPYC 9B45", "bf16") is None
    assert devices.peak("NVIDIA H1000", "bf16") is None


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L40S", "L40S"),
        ("A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI250X", "MI250X"),
        ("AMD Instinct MI300X", "MI300X"),
        ("h100", "H100"),
        ("rtx 4090", "RTX 4090"),
    ],
)
def test_devices_are_known_by_what_drivers_call_them(called, name):
    found = devices.find(called)
    assert found and found.name == name


@pytest.mark.parametrize(
    "other",
    [
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H200 NVL",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA H100 96GB HBM3",
        "NVIDIA GH200 480GB",
        "Tesla V100-SXM2-32GB",
        "NVIDIA",
        "",
    ],
)
def test_what_resembles_a_device_is_unknown(other):
    assert devices.find(other) is None


def test_every_name_is_one_devices():
    names = [device.name for device in devices.DEVICES]
    assert set(devices.ALIASES) <= set(names)
    names += [alias for aliases in devices.ALIASES.values() for alias in aliases]
    sets = [frozenset(devices._words(name)) for name in names]
    assert len(set(sets)) == len(sets)
