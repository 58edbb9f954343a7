"""The bytes that the plan says ranks send, against the byte counter of the interface that they use.

Real gloo ranks train in a network namespace of their own, whose loopback nobody else uses: what its
counter gains is what all ranks sent, and the headers of as many packets as it counts. On a busy machine
TCP may send something twice, so of a few rounds the smallest is taken.
"""

import fcntl
import json
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain.account.recipe import make_recipe
from pretrain.build import build_engine
from pretrain.model import late_mask as model
from pretrain.parallel import topology
from tests.support import ranks
from tests.support.methods import small
from tools.plan import traffic
from tools.plan.memory import Layout

ROOT = Path(__file__).parents[2]
VOCAB = 4096
PRIMITIVE = 1_000_000
"""Elements of the tensor that the primitives are tried with."""
ROUNDS = 3
HEADERS = 14 + 20 + 32
"""Bytes of a packet that are Ethernet's, IPv4's, and TCP's with its time stamps."""


def case(world, micro, accumulation, method="mlm", block="post", **sections):
    """A config whose ranks send megabytes in a step of little arithmetic, and how it is run."""
    parallel = sections.get("parallel", {})
    data = world // parallel.get("tensor", 1)
    shape = {"hidden_size": 256, "ffn_size": 1024, "max_positions": 64, "vocab_size": VOCAB}
    train = {"seq_length": 64, "batch_size": data * micro * accumulation, **sections.pop("train", {})}
    if parallel.get("zero"):
        train["engine"] = "deepspeed"
    shape |= sections.pop("model", {})
    return small(method, block, model=shape, train=train, **sections), micro, accumulation


DATA = {
    "all-reduce": case(2, 2, 1),
    "one all-reduce for all micro-batches": case(2, 2, 2),
    "bf16": case(2, 2, 1, parallel={"reduce_dtype": "bf16"}),
    "words in the table": case(2, 70, 1),
    "tied": case(2, 2, 1, "mae-lm"),
    "muon": case(2, 2, 1, optimizer={"kind": "muon"}),
    "muon in bf16": case(2, 2, 1, optimizer={"kind": "muon"}, train={"precision": "bf16"}),
    "zero 1": case(2, 2, 2, parallel={"zero": 1}),
    "zero 2": case(2, 2, 2, parallel={"zero": 2}),
    "zero 3": case(2, 2, 2, parallel={"zero": 3}),
}
TWO = {"tensor": 2}
TENSOR = {
    "mlm": case(2, 16, 1, parallel=TWO),
    "recomputed": case(2, 8, 2, parallel=TWO, train={"recompute": "block"}),
    "bf16": case(2, 16, 1, "3ml-self", parallel=TWO, train={"precision": "bf16"}),
    "cross": case(2, 16, 1, "3ml-cross", "pre", parallel=TWO),
    "tied": case(2, 16, 1, "mae-lm", parallel=TWO),
    **{
        f"{method}, {block}, recomputed": case(
            2, 8, 1, method, block, parallel=TWO, train={"recompute": "block"}, model={"dropout": dropout}
        )
        for method, block, dropout in (
            ("mlm", "pre", 0.0),
            ("3ml-self", "modern", 0.0),
            ("3ml-cross", "pre", 0.0),
            ("3ml-query", "modern", 0.0),
            ("mlm", "modern", 0.1),
        )
    },
}
BOTH = {
    "query": case(4, 8, 1, "3ml-query", "modern", parallel={"tensor": 2, "zero": 1}),
    "muon": case(4, 8, 1, "3ml-query", "modern", parallel=TWO, optimizer={"kind": "muon"}),
}
GROUPS = {"data": (2, DATA), "tensor": (2, TENSOR), "both": (4, BOTH)}


# ---- in the namespace ----------------------------------------------------------------------------


def raise_loopback():
    with socket.socket() as any_socket:
        up = struct.pack("16sh14x", b"lo", 1)  # struct ifreq with IFF_UP
        fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS


def bytes_sent():
    """By the loopback of this namespace, without headers."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == "lo":
            sent, packets = map(int, fields.split()[8:10])
            return sent - HEADERS * packets
    raise AssertionError("no loopback")


def counted(here, action):
    """Bytes that all ranks together send in `action`."""
    return min(_round(here, action) for _ in range(ROUNDS))


def _round(here, action):
    here.barrier()
    time.sleep(0.1)  # what is still under way
    before = bytes_sent()
    here.barrier()
    action()
    here.barrier()
    time.sleep(0.1)
    after = bytes_sent()
    here.barrier()
    return after - before


def primitives(here):
    one, many = torch.ones(PRIMITIVE), torch.ones(here.world_size * PRIMITIVE)
    return {
        "all-reduce": counted(here, lambda: dist.all_reduce(many)),
        "all-gather": counted(here, lambda: dist.all_gather_into_tensor(many, one)),
        "reduce-scatter": counted(here, lambda: dist.reduce_scatter_tensor(one, many)),
    }


def train(group):
    """[bytes of a step of each case], and of each primitive, on this rank."""
    world, cases = GROUPS[group]
    first = next(iter(cases.values()))[0]
    here = topology.connect(first.parallel.tensor, needs_group=True)
    found = {name: trained(here, *one) for name, one in cases.items()}
    return found, primitives(here)


def trained(here, config, micro, accumulation):
    built = model.LateMaskModel(config.model, VOCAB, VOCAB - 1, config.train.recompute == "block")
    model.init_weights(built, 0)
    made = build_engine(config, built, here, micro)
    rows = make_recipe(config, VOCAB).phases[0].rows
    ids = torch.randint(4, VOCAB - 1, (micro, rows.length))
    positions = torch.arange(rows.length).expand(micro, -1)
    masked = rows.length - rows.visible
    batch = model.Batch(ids, positions, ids[:, -rows.predicted :].contiguous(), masked)

    def step():
        for _ in range(accumulation):
            made.backward(batch, 1 / accumulation)
        made.step(1e-4)

    step()  # ZeRO-3 looks at the order of the layers first
    return counted(here, step)


def in_namespace(group):
    raise_loopback()
    found, primitive = ranks.run(GROUPS[group][0], train, group)[0]
    print(json.dumps([found, primitive]))


# ---- outside -------------------------------------------------------------------------------------


def namespaces():
    command = ["unshare", "--map-root-user", "--net", "true"]
    if not shutil.which("unshare"):
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module", params=GROUPS)
def counts(request):
    """(name of the group, {case: bytes of a step}, {primitive: bytes})."""
    if not namespaces():
        pytest.skip("no network namespaces here (root, or unprivileged user namespaces)")
    code = f"from tests.tools import test_traffic; test_traffic.in_namespace({request.param!r})"
    done = subprocess.run(
        ["unshare", "--map-root-user", "--net", sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return request.param, *json.loads(done.stdout.splitlines()[-1])


def layout(world, config, micro, accumulation):
    p = config.parallel
    return Layout(
        tensor=p.tensor,
        data=world // p.tensor,
        micro_batch=micro,
        accumulation=accumulation,
        engine=config.train.engine,
        zero=p.zero,
        recompute=config.train.recompute,
        precision=config.train.precision,
        optimizer=config.optimizer.kind,
        reduce_dtype=p.reduce_dtype,
    )


def test_ranks_send_what_the_plan_says(counts):
    group, found, primitive = counts
    world, cases = GROUPS[group]
    # gloo has no reduce-scatter but an all-reduce; NCCL has.
    gloo = {"reduce-scatter": primitive["reduce-scatter"] / primitive["all-gather"]}
    assert gloo["reduce-scatter"] == pytest.approx(2, rel=0.01)
    for name, one in cases.items():
        config, where = one[0], layout(world, *one)
        calls = traffic.step(config.model, make_recipe(config, VOCAB).phases[0].rows, VOCAB, where)
        expected = world * sum(traffic.sent(call, where) * gloo.get(call.kind, 1) for call in calls)
        # ZeRO-3 keeps parameters of less than 100,000 elements gathered between micro-batches.
        slack = 0.02 if where.zero == 3 else 0.005
        assert found[name] == pytest.approx(expected, rel=slack), name
        assert expected > 1e7


def test_rings_send_their_share(counts):
    group, _, primitive = counts
    world = GROUPS[group][0]
    where = Layout(data=world)
    for kind in ("all-reduce", "all-gather"):
        call = traffic.Collective(kind, "data", 4 * world * PRIMITIVE)
        assert primitive[kind] == pytest.approx(world * traffic.sent(call, where), rel=0.005), kind


def test_twice_the_ranks_do_not_send_twice_each():
    call = traffic.Collective("all-reduce", "data", 1000)
    assert traffic.sent(call, Layout(data=2)) == 1000
    assert traffic.sent(call, Layout(data=1)) == 0
    assert traffic.sent(call, Layout(data=1000)) == pytest.approx(1998)
