"""The peers' updates of the same task, each from its own library, with the weights that ours starts from.

All are given what their users can have without changing the model: SDPA attention, our optimizer (fused
AdamW with decay groups), autocast for bf16 and clipping by torch's own function.

    hugging face            RobertaForMaskedLM: the head computes the logits of every row; for a modern task
                            ModernBertForMaskedLM, which selects the predicted rows first
    freed memory kept       the same after our own `pretrain.build.keep_freed_memory` (CPU)
    hugging face trainer    the same under Trainer, with its data loader and its bookkeeping
    compiled, masked head   its encoder and its head, the latter on the predicted rows, in torch.compile
    fairseq style           as DinkyTrain and fairseq do it: separate q, k and v, attention as two products
                            around a softmax, boolean selection of the predicted rows, log-softmax in fp32
    megatron-core           BertModel of local layers (no TransformerEngine), logits of every row; in bf16 its
                            weights are bf16 too, without the float32 copies that its own optimizer keeps
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.build import keep_freed_memory
from pretrain.config import ModelOptions
from pretrain.model.huggingface import hugging_face_state
from pretrain.parallel.optimizer import adamw
from tools.benchmark.task import SIZES, VOCAB, BenchmarkTask, Update

IGNORED = -100
"""Label of a row that is not predicted."""


def natural(task: BenchmarkTask) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `mlm` batch as peers want it: ids [B, L], labels [B, L] and the rows predicted [B * P].

    The last are places in the flattened batch.
    """
    masked = task.masked("mlm")
    predicted = masked.positions[:, -masked.targets.shape[1] :]
    ids, labels = np.empty_like(masked.ids), np.full_like(masked.ids, IGNORED)
    np.put_along_axis(ids, masked.positions, masked.ids, 1)
    np.put_along_axis(labels, predicted, masked.targets, 1)
    rows = (predicted + np.arange(len(ids))[:, None] * task.length).ravel()
    return tuple(torch.from_numpy(array).to(task.device) for array in (ids, labels, rows))  # type: ignore[return-value]


def training_loop(task: BenchmarkTask, model: nn.Module, loss_of: Callable[[], Tensor]) -> Update:
    """Return the plain loop that a user of torch writes."""
    parameters = list(model.parameters())
    optimizer = adamw(parameters, task.config().optimizer)

    def update() -> Tensor:
        with torch.autocast(task.device.type, torch.bfloat16, enabled=task.precision == "bf16"):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return update


# ---- Hugging Face --------------------------------------------------------------------------------


def hugging_face_model(task: BenchmarkTask, attention: str = "sdpa") -> Any:
    """Return RobertaForMaskedLM, or ModernBertForMaskedLM, with the first weights of our `mlm`, in training
    mode."""
    from transformers import AutoModelForMaskedLM

    config = task.config("mlm")
    theirs = _modern_bert(config.model) if task.modern else _roberta(config.model)
    model = AutoModelForMaskedLM.from_config(theirs, attn_implementation=attention)
    state = hugging_face_state(config.model, task.module(config).state_dict(), VOCAB, head=True)
    model.load_state_dict(state, strict=False)  # tied names apart
    return model.to(task.device).train()


def _roberta(model: ModelOptions) -> Any:
    from transformers import RobertaConfig

    return RobertaConfig(
        **_sizes(model),
        max_position_embeddings=model.max_positions + 2,
        type_vocab_size=1,
        layer_norm_eps=model.norm_eps,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _modern_bert(model: ModelOptions) -> Any:
    """ModernBERT with our widths, whose layers all attend to all rows as ours do."""
    from transformers import ModernBertConfig

    return ModernBertConfig(
        **_sizes(model),
        max_position_embeddings=model.max_positions,
        norm_eps=model.norm_eps,
        layer_types=["full_attention"] * model.num_layers,
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": model.rope_theta}},
        sparse_prediction=True,
    )


def _sizes(model: ModelOptions) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.ffn_size,
    }


def hugging_face(task: BenchmarkTask) -> Update:
    model = hugging_face_model(task)
    ids, labels, _ = natural(task)
    return training_loop(task, model, lambda: model(input_ids=ids, labels=labels).loss)


def hugging_face_keeping(task: BenchmarkTask) -> Update:
    if task.device.type == "cpu":
        keep_freed_memory()
    return hugging_face(task)


def masked_head_compiled(task: BenchmarkTask) -> Update:
    model = hugging_face_model(task)
    ids, labels, rows = natural(task)
    targets = labels.flatten()[rows]

    def head(rows_ND: Tensor) -> Tensor:
        return model.decoder(model.head(rows_ND)) if task.modern else model.lm_head(rows_ND)

    def loss() -> Tensor:
        hidden = model.base_model(input_ids=ids).last_hidden_state
        return F.cross_entropy(head(hidden.flatten(0, 1)[rows]).float(), targets)

    return training_loop(task, model, torch.compile(loss, dynamic=False))


def fairseq_style(task: BenchmarkTask) -> Update:
    model = hugging_face_model(task, attention="eager")
    ids, labels, _ = natural(task)

    def loss() -> Tensor:
        chosen = labels.ne(IGNORED)
        hidden = model.roberta(input_ids=ids).last_hidden_state
        logits = model.lm_head(hidden[chosen])
        return F.nll_loss(F.log_softmax(logits.float(), -1), labels[chosen])

    return training_loop(task, model, loss)


def hugging_face_trainer(task: BenchmarkTask) -> Update:
    """Yield Trainer's own loop in a thread that takes one step at a time; needs the package `accelerate`."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ids, labels, _ = (tensor.cpu() for tensor in natural(task))
    go, done, losses = threading.Semaphore(0), threading.Semaphore(0), [torch.zeros(())]

    class Paced(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            done.release()
            go.acquire()

    class Watched(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            losses[0] = super().training_step(*args, **kwargs)
            return losses[0]

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            while True:
                yield from (
                    {"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)
                )

    recipe = task.config().optimizer
    arguments = TrainingArguments(
        output_dir="unused",
        max_steps=1_000_000,
        per_device_train_batch_size=task.batch_size,
        learning_rate=recipe.lr,
        lr_scheduler_type="constant",
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        adam_epsilon=recipe.eps,
        bf16=task.precision == "bf16",
        use_cpu=task.device.type == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Watched(hugging_face_model(task), arguments, train_dataset=Batches(), callbacks=[Paced()])
    threads = torch.get_num_threads()

    def work() -> None:
        torch.set_num_threads(threads)
        trainer.train()

    thread = threading.Thread(target=work, daemon=True)

    def update() -> Tensor:
        if thread.ident is None:
            thread.start()
        else:
            go.release()
        done.acquire()
        return losses[0]

    return update


# ---- Megatron ------------------------------------------------------------------------------------


def megatron(task: BenchmarkTask) -> Update:
    """Return a BertModel with every logit computed, as it comes; one process in groups of its own."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.transformer import TransformerConfig

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        backend = "nccl" if task.device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    if task.device.type == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(0)
    shape, bf16 = SIZES[task.size], task.precision == "bf16"
    theirs = TransformerConfig(
        num_layers=shape["num_layers"],
        hidden_size=shape["hidden_size"],
        num_attention_heads=shape["num_heads"],
        ffn_hidden_size=shape["ffn_size"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        autocast_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_cpu_initialization=task.device.type == "cpu",
        bias_dropout_fusion=True,
        bias_activation_fusion=True,
    )
    model = BertModel(
        config=theirs,
        num_tokentypes=0,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=VOCAB,
        max_sequence_length=512,
        share_embeddings_and_output_weights=True,
        add_binary_head=False,
    ).to(task.device)
    ids, labels, rows = natural(task)
    everything, targets = torch.ones_like(ids), labels.clamp(min=0)

    def loss() -> Tensor:
        losses = model(ids, everything, lm_labels=targets)
        found = losses[0] if isinstance(losses, tuple) else losses
        return found.flatten()[rows].mean()

    return training_loop(task, model, loss)


PEERS: dict[str, tuple[Callable[[BenchmarkTask], Update], tuple[str, ...]]] = {
    "hugging face": (hugging_face, ("transformers",)),
    "hugging face, freed memory kept": (hugging_face_keeping, ("transformers",)),
    "hugging face trainer": (hugging_face_trainer, ("transformers", "accelerate")),
    "hugging face compiled, masked head": (masked_head_compiled, ("transformers",)),
    "fairseq style": (fairseq_style, ("transformers",)),
    "megatron-core": (megatron, ("megatron-core",)),
}
"""Name -> what makes its update, and the packages it needs."""
MODERN = ("hugging face", "hugging face compiled, masked head")
"""Those that have a model of the modern block."""
