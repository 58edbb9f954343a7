"""Files from strangers: what each reader reads, good, to be spoilt; and how much it may take."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain import checkpoint
from pretrain.account import ledger
from pretrain.account.ledger_writer import Ledger
from pretrain.account.recipe import make_recipe
from pretrain.checkpoint import State
from pretrain.config import Config, build_config, load_config
from pretrain.continuing import refuse_changes
from pretrain.data.corpora import open_data
from pretrain.data.indexed import IndexedReader
from pretrain.data.manifest import load_manifest, read_sources
from pretrain.data.tokenizer import load_tokenizer, train_sentencepiece
from pretrain.model import huggingface
from pretrain.model.late_mask import LateMaskModel
from pretrain.monitor import read_metrics
from pretrain.run_folder import RunFolder, run_config
from tests.conftest import encode


@dataclass(frozen=True)
class Reader:
    """A reader, and the files that it reads (of the folder that `make` fills)."""

    files: tuple[str, ...]
    read: Callable[[Path], Any]


def make(folder: Path) -> None:
    """Fill a folder with one good file of each kind."""
    texts = [f"the {number} small words of text number {number * number}" for number in range(200)]
    train_sentencepiece(texts, folder / "tokenizer", "unigram", 300)
    encode(texts, folder / "tokenizer", folder / "corpus")
    _make_json_tokenizer(folder / "json")
    config = {"run": {"dir": str(folder / "run")}, "corpus": {"train": str(folder / "corpus")}}
    tree = {**config, "model": SMALL, "budget": {"steps": 5}, "train": {"seq_length": 16, "batch_size": 4}}
    import yaml

    (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    _make_run(folder, build_config(tree))
    _make_export(folder)
    line = json.dumps({"step": 1, "loss": 2.5, "time": 1.0, "progress": 0.1})
    (folder / "run" / "metrics.jsonl").write_text(f"{line}\n" * 3, encoding="utf-8")


SMALL = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_size": 16, "max_positions": 16}


def _make_json_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made.train_from_iterator(
        ["some words of text"] * 9, trainers.BpeTrainer(vocab_size=90, special_tokens=names)
    )
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))


class Tensors:
    """A checkpoint's source."""

    def tensors(self, kind: str) -> Any:
        yield "tok.weight", torch.ones(4, 4)


def _make_run(folder: Path, config: Config) -> None:
    run = RunFolder(folder / "run")
    run.claim()
    run.write_config(config)
    run.write_status("stopped", 3, "a reason", 75)
    book = Ledger.open(run.path, 1, "CPU")
    book.begin()
    head = book.save()
    book.note("stop")
    state = State(3, 12, 3, config.model_dump(mode="json"), {}, head, account=book.account)
    checkpoint.save(run, Tensors(), state, 1)  # type: ignore[arg-type]
    run.release()


def _make_export(folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import RobertaConfig, RobertaForMaskedLM

    tokenizer = load_tokenizer(folder / "tokenizer")
    made = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=18,
            layer_norm_eps=1e-5,
            pad_token_id=1,
            hidden_act="gelu",
            type_vocab_size=1,
        )
    )
    made.save_pretrained(folder / "export")
    shutil.copytree(folder / "export", folder / "shards")
    tensors = {name: tensor.contiguous() for name, tensor in made.state_dict().items()}
    (folder / "shards" / "model.safetensors").unlink()
    tensors.pop("lm_head.decoder.weight", None), tensors.pop("lm_head.decoder.bias", None)
    save_file(tensors, folder / "shards" / "part.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _start_from(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        tokenizer = load_tokenizer(folder / "tokenizer")
        config = build_config(
            {
                "run": {"dir": "r"},
                "corpus": {"train": "t"},
                "budget": {"steps": 1},
                "train": {"seq_length": 16},
                "model": {**SMALL, "init_from": str(folder / name), "vocab_size": tokenizer.vocab_size},
            }
        )
        module = LateMaskModel(config.model, tokenizer.vocab_size, tokenizer.mask)
        return huggingface.load_folder(module, config.model, tokenizer)

    return read


def _checkpoint(folder: Path) -> Any:
    path = checkpoint.find_verified(folder / "run", 3)[0]
    return checkpoint.read_state(path), checkpoint.read_tensors(path)


def _sealed(folder: Path) -> Any:
    """As a stranger would hand it over: with hashes that fit."""
    path = checkpoint.locate(folder / "run", 3)
    state = checkpoint.read_state(path)
    build_config(state.config, "config of the checkpoint")
    return checkpoint.read_tensors(path)


def _corpus(folder: Path) -> Any:
    load_manifest(folder / "corpus")
    read_sources(folder / "corpus")
    reader = IndexedReader(folder / "corpus")
    return reader.document_lengths, reader.tokens[:3]


def _continues(folder: Path) -> Any:
    config = load_config(folder / "config.yaml")
    data = open_data(config.corpus)
    refuse_changes(config, make_recipe(config, data.tokenizer.vocab_size), data)


def _tokenizer(name: str) -> Callable[[Path], Any]:
    return lambda folder: load_tokenizer(folder / name).encode("some text")


def _run(folder: Path) -> Any:
    return run_config(folder / "run"), read_metrics(folder / "run")


def _ledger(folder: Path) -> Any:
    return ledger.check(folder / "run"), ledger.total([folder / "run"])


_STEP = "run/checkpoints/step-00000003"
_STATE, _MODEL = f"{_STEP}/state.json", f"{_STEP}/model.safetensors"
READERS = {
    "config": Reader(("config.yaml",), lambda folder: load_config(folder / "config.yaml")),
    "corpus": Reader(("corpus.idx", "corpus.bin", "corpus.json"), _corpus),
    "sentencepiece": Reader(("tokenizer/tokenizer.model",), _tokenizer("tokenizer")),
    "tokenizer.json": Reader(("json/tokenizer.json",), _tokenizer("json")),
    "checkpoint": Reader((_STATE, f"{_STEP}/manifest.json", _MODEL), _checkpoint),
    "sealed checkpoint": Reader((_STATE, _MODEL), _sealed),
    "run": Reader(("run/config.yaml", "run/metrics.jsonl"), _run),
    "ledger": Reader(("run/ledger.jsonl",), _ledger),
    "status": Reader(("run/status.json",), lambda folder: RunFolder(folder / "run").last_attempt()),
    "continues": Reader((_STATE, "run/checkpoints/latest", "run/config.yaml"), _continues),
    "export": Reader(("export/config.json", "export/model.safetensors"), _start_from("export")),
    "shards": Reader(
        ("shards/model.safetensors.index.json", "shards/part.safetensors"), _start_from("shards")
    ),
}
