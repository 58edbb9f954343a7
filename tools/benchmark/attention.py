"""One attention layer, forward and backward, beside Hugging Face's on the same rows.

Ours is the fused, head-by-head projection; theirs three projections, with SDPA and with the two products
around a softmax. A last row compares our attention bounded by documents (four of equal length in a
window) with our own over the whole window.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from pretrain.model.attention import Attention, Bounds, Order
from pretrain.parallel.topology import device_name
from tools.benchmark import task as benchmark_task
from tools.benchmark.task import SIZES, BenchmarkTask, in_turns
from tools.shared import measure
from tools.shared.measure import BenchmarkRow, Done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmark_task.add_arguments(parser)


def count(args: argparse.Namespace) -> int:
    return len(benchmark_task.tasks(args)) * 4 * (1 + args.runs)


def rows(args: argparse.Namespace, done: Done) -> Iterator[BenchmarkRow]:
    for task in benchmark_task.tasks(args):
        model = task.config().model
        ours = {name: Attention(model, 0.0) for name in ("packed", "bounded")}
        sides = {
            "packed": passes(task, ours["packed"], None),
            "bounded": passes(task, ours["bounded"], bounds(task)),
        }
        sides |= {kind: passes(task, hugging_face_attention(task, kind)) for kind in ("sdpa", "eager")}
        repeat = 8 if task.device.type == "cpu" else 100
        seconds = in_turns(sides, args.runs, repeat, task.device, done=done)
        pairs = [("packed", "sdpa"), ("packed", "eager"), ("bounded", "packed")]
        for side, other in pairs:
            peer = "packed" if other == "packed" else f"hugging face {other}"
            yield measure.row(
                f"attention, {side}, against {peer}, {task.size} {task.length}, {task.precision}",
                "slots/s",
                [task.slots / time for time in seconds[side]],
                [task.slots / time for time in seconds[other]],
                ["torch", "transformers"],
                task.precision,
                device_name(task.device),
                settings=task.settings(),
            )


def bounds(task: BenchmarkTask) -> Bounds:
    """Return four documents in each window, their rows sorted."""
    numbers = (torch.arange(task.length) * 4 // task.length).expand(task.batch_size, -1).contiguous()
    varlen = task.device.type == "cuda" and task.precision == "bf16"
    places = torch.arange(task.length, device=task.device).expand(task.batch_size, -1)
    order = Order.of(places, numbers.to(task.device), task.length, 1, 4, varlen)
    found = order.bounds(order.visible, order.visible)
    assert found is not None
    return found


def hugging_face_attention(task: BenchmarkTask, kind: str) -> nn.Module:
    """Return the projections, attention and output projection of RobertaLayer, without its norm."""
    from transformers import RobertaConfig
    from transformers.models.roberta.modeling_roberta import RobertaSelfAttention

    shape = SIZES[task.size]
    theirs = RobertaConfig(
        hidden_size=shape["hidden_size"],
        num_attention_heads=shape["num_heads"],
        attention_probs_dropout_prob=0.0,
    )
    theirs._attn_implementation = kind

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = RobertaSelfAttention(theirs)
            self.out = nn.Linear(shape["hidden_size"], shape["hidden_size"])

        def forward(self, x_BSD: Tensor, rotation: None) -> Tensor:
            return self.out(self.attention(x_BSD)[0])

    return Layer()


def passes(task: BenchmarkTask, layer: nn.Module, *bounds: Bounds | None) -> Callable[[], Tensor]:
    """Return one forward and backward pass of `layer` over random rows."""
    layer.to(task.device).train()
    width = SIZES[task.size]["hidden_size"]
    x = torch.randn(task.batch_size, task.length, width, device=task.device, requires_grad=True)

    def work() -> Tensor:
        x.grad = None
        layer.zero_grad()
        with torch.autocast(task.device.type, torch.bfloat16, enabled=task.precision == "bf16"):
            out = layer(x, None, *bounds)
        out.backward(torch.ones_like(out))
        return out.detach()

    return work
