"""Three texts in three scripts: one tokenizer, a blend with smoothed shares, words without spaces."""

import json
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import load_config
from pretrain.data.corpora import open_blend, open_data
from pretrain.data.masking import masker
from pretrain.data.rng import Rules
from pretrain.data.tokenizer import _unspaced, load_tokenizer
from tests.support.runs import finish
from tools import train_tokenizer
from tools.encode_corpus import __main__ as encode_corpus
from tools.inspect_corpus import __main__ as inspect_corpus

TEXTS = Path(__file__).parents[1] / "fixtures" / "scripts"
LANGUAGES = ("greek", "japanese", "russian")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokenizer`, and a corpus of each language, of very different sizes."""
    folder = tmp_path_factory.mktemp("languages")
    for number, name in enumerate(LANGUAGES):
        text = (TEXTS / f"{name}.txt").read_text(encoding="utf-8")
        line = json.dumps({"text": text, "source": name}) + "\n"
        (folder / f"{name}.jsonl").write_text(line * 3 * 4**number, encoding="utf-8")
    files = [str(TEXTS / f"{name}.txt") for name in LANGUAGES]
    train_tokenizer.main(["--input", *files, "--output", f"{folder}/tokenizer", "--vocab-size", "500"])
    for name in LANGUAGES:
        words = ["--input", f"{folder}/{name}.jsonl", "--tokenizer", f"{folder}/tokenizer"]
        encode_corpus.main([*words, "--output", f"{folder}/{name}", "--workers", "1"])
    return folder


def test_a_blend_of_languages(
    corpora: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shares that are read are those of the tokens to the power; the account is by source."""
    tokens = {}
    for name in LANGUAGES:
        capsys.readouterr()
        inspect_corpus.main([f"{corpora}/{name}", "--json"])
        (source,) = json.loads(capsys.readouterr().out)["manifest"]["sources"].items()
        assert source[0] == name
        tokens[name] = source[1]["tokens"]
    blend = "[" + ", ".join(f"[{tokens[name]}, {corpora}/{name}]" for name in LANGUAGES) + "]"
    words = [str(tiny / "tiny.yaml"), f"run.dir={tmp_path}/run", f"corpus.train={blend}", "corpus.alpha=0.3"]
    words += ["corpus.valid=null", "masking.scheme=whole_word", "evaluate.every_steps=null", "budget.steps=2"]
    config = load_config(words[0], words[1:])
    read = open_blend(config, open_data(config.corpus)).epochs(10_000)
    windows = [
        round(read[f"{corpora}/{name}"] * sampler.samples_per_epoch)
        for name, sampler in zip(
            LANGUAGES, open_blend(config, open_data(config.corpus)).samplers, strict=True
        )
    ]
    powers = np.array([tokens[name] ** 0.3 for name in LANGUAGES])
    assert windows == pytest.approx(10_000 * powers / powers.sum(), rel=0.01)
    finish(words)


def test_words_of_a_script_without_spaces(corpora: Path, tiny: Path) -> None:
    """Japanese is not masked by the sentence, Greek and Russian still by the word; older runs as before."""
    tokenizer = load_tokenizer(corpora / "tokenizer")
    masking = load_config(tiny / "tiny.yaml", ["masking.scheme=whole_word"]).masking
    ids = {name: tokenizer.encode((TEXTS / f"{name}.txt").read_text(encoding="utf-8")) for name in LANGUAGES}
    now, before = (masker(masking, 24, tokenizer, rules=Rules(rules)).word_starts for rules in (3, 2))
    for name in ("greek", "russian"):
        assert (now[ids[name]] == before[ids[name]]).all()
    assert before[ids["japanese"]].sum() <= 3 < 40 < now[ids["japanese"]].sum()


def test_pieces_of_scripts_without_spaces() -> None:
    """In the three conventions; marks above and below a letter begin no word."""
    sentencepiece = ["\u2581the", "cat", "猫", "ニャー", "。", "ไทย", "ั", "ខ្មែរ"]
    assert _unspaced(sentencepiece).tolist() == [False, False, True, True, False, True, False, True]
    assert _unspaced(["the", "##cat", "##猫", "猫"]).tolist() == [False, False, True, True]
    letters = ["猫", "ไ", "é", "word"]
    in_bytes = ["".join(map(chr, letter.encode())) for letter in letters]
    assert _unspaced(["\u0120the", *in_bytes]).tolist() == [False, True, True, False, False]
