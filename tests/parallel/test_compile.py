"""Compilation: every layer is one graph, whole or divided, and computes what it computed before."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from pretrain.build import build_engine
from pretrain.config import config_warnings
from pretrain.model import attention
from pretrain.model.late_mask import Batch, LateMaskModel
from pretrain.parallel import engine, tensor_parallel, topology
from tests.parallel.test_engine import BATCH, TENSOR, ZERO, Case, check, expectation, on_ranks, update
from tests.parallel.test_engine import make_model as make_small
from tests.parallel.test_tensor_parallel import PADDED, make_batch, make_model
from tests.support import ranks
from tests.support.methods import small
from tools.benchmark.task import BenchmarkTask

KINDS = [
    ("3ml-self", "post"),
    ("3ml-cross", "pre"),
    ("3ml-query", "modern"),
    ("one-way", "post"),
    ("one-way", "local"),
]


def breaks(model: LateMaskModel, documents: bool = False) -> list[tuple[int, int]]:
    """(graphs, graph breaks) of each kind of layer, compiled with the inputs that it gets."""
    batch, found = make_batch(0), {}
    if documents:
        numbers = torch.arange(batch.ids.shape[1]).expand_as(batch.ids) % 3
        batch = batch._replace(documents=numbers, most_documents=4)

    def keep(layer: nn.Module, inputs: tuple) -> None:
        kind = len(inputs), inputs[0].shape[1], layer in list(model.layers)
        found[kind] = layer, tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)

    handles = [layer.register_forward_pre_hook(keep) for layer in model.all_layers()]
    model(batch)
    for handle in handles:
        handle.remove()
    seen = []
    for layer, inputs in found.values():
        torch._dynamo.reset()
        told = torch._dynamo.explain(layer)(*inputs)
        seen.append((told.graph_count, told.graph_break_count))
    return seen


def config(method: str, block: str):  # type: ignore[no-untyped-def]
    return small(method, block, model={"vocab_multiple": PADDED})


@pytest.mark.parametrize("documents", [False, True], ids=["packed", "bounded"])
@pytest.mark.parametrize(("method", "block"), KINDS)
def test_a_layer_is_one_graph(method: str, block: str, documents: bool) -> None:
    seen = breaks(make_model(config(method, block)), documents)
    assert seen == [(1, 0)] * len(seen) and len(seen) >= 2


def divided(method: str, block: str) -> list[tuple[int, int]]:
    model = make_model(config(method, block))
    tensor_parallel.shard(model, topology.connect(tensor=2))
    return breaks(model)


def test_a_divided_layer_is_one_graph_too() -> None:
    """The reductions between ranks are inside it: nothing leaves the graph for them."""
    for seen in ranks.run(2, divided, "3ml-query", "modern"):
        assert seen == [(1, 0)] * len(seen) and len(seen) >= 2


def test_every_form_of_a_layer_is_compiled() -> None:
    """Training, scoring and three lengths: beyond torch's own limit of eight a layer would run as it is."""
    counter = CompileCounter()
    task = BenchmarkTask("tiny", 32, 4)
    model = task.module(task.config("3ml-query"))
    build_engine(task.config("3ml-query", train={"compile": "default"}), model, topology.Topology(), 4)
    for layer in model.all_layers():
        layer.compile(backend=counter, dynamic=False)
    forms, cpu = [], torch.device("cpu")
    for length in (16, 24, 32):
        task = replace(task, length=length)
        batch = Batch.from_masked(task.masked("3ml-query"), cpu)
        model(batch).backward()
        with torch.no_grad():
            model(batch, score=True)
        forms.append(counter.frame_count)
    assert forms == [forms[0], 2 * forms[0], 3 * forms[0]] and forms[-1] > 8


def test_rotated_attention_in_16_bits_has_the_gradients_it_had() -> None:
    """Of wide heads: torch 2.13 can compile a rotation, for a CPU, into what gives no numbers."""
    B, S, H, E = 2, 128, 2, 64
    places = torch.arange(S).expand(B, S)
    rotation = make_model(config("mlm", "modern")).rotation(places)
    assert rotation
    cos, sin = (x.repeat_interleave(E // x.shape[-1], -1) for x in rotation)

    def mix(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.unflatten(-1, (H, 3, E)).unbind(-2)
        return attention.attend(
            attention.rotate(q, (cos, sin)), attention.rotate(k, (cos, sin)), v, dropout=0.0
        )

    torch.manual_seed(0)
    qkv = torch.randn(B, S, H * 3 * E, dtype=torch.bfloat16, requires_grad=True)
    found = []
    for function in (mix, torch.compile(mix, dynamic=False)):
        mixed = function(qkv)
        found.append(torch.autograd.grad(mixed, qkv, mixed.detach())[0].float())
    assert (found[0] - found[1]).norm() <= 1e-2 * found[0].norm()


# ---- CUDA graphs ---------------------------------------------------------------------------------


def test_under_graphs_gradients_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the engine does all else as it does without. Graphs need a GPU: here nothing is compiled."""
    modes: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda layer, mode, dynamic: modes.append(mode))
    case, place = Case(compile="reduce-overhead"), topology.Topology()
    check(case, place, expectation(Case()))
    assert set(modes) == {"reduce-overhead"}
    built = build_engine(case.config(), make_small(case), place, BATCH // 2)
    memory = {name: p.grad.data_ptr() for name, p in built.module.named_parameters()}
    for step in range(2):
        update(built, place, BATCH // 2, step)
        assert {name: p.grad.data_ptr() for name, p in built.module.named_parameters()} == memory


@pytest.mark.parametrize(
    ("keys", "mode"),
    [
        ({}, "max-autotune"),
        ({"train": {"recompute": "block"}}, "max-autotune-no-cudagraphs"),
        ({"train": {"engine": "deepspeed"}}, "max-autotune-no-cudagraphs"),
        ({"parallel": {"tensor": 2}}, "max-autotune-no-cudagraphs"),
        ({"train": {"compile": "reduce-overhead", "engine": "deepspeed"}}, "default"),
    ],
)
def test_graphs_are_left_out_where_they_cannot_be(keys: dict, mode: str) -> None:
    keys = {**keys, "train": {"compile": "max-autotune", **keys.get("train", {})}}
    made = small("3ml-self", **keys)
    assert engine.compile_mode(made) == mode
    said = any("is default here" in line for line in config_warnings(made))
    assert said is (made.train.compile == "reduce-overhead")


@pytest.mark.slow
def test_engines() -> None:
    """Plain, ZeRO, tensor-parallel, and both, compiled, against the same oracle as without."""
    layouts: list[Case] = [Case(), ZERO[1], ZERO[3], TENSOR[0], TENSOR[1]]
    compiled = [case._replace(compile="default") for case in layouts]
    graphs = Case(compile="reduce-overhead")
    ranks.run(2, on_ranks, [graphs, *compiled], {Case(): expectation(Case())})
