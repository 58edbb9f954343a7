"""The tables of the pages say what was measured, and nothing else."""

from pathlib import Path

import pytest

from pretrain.errors import UserError
from tools.benchmark import tables

PAGES = {str(path.relative_to(tables.ROOT)): path for path in tables.pages()}
TEXT = "before\n<!-- table: memory -->\n{}\n<!-- end -->\nafter\n"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_as_measured(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    assert tables.written(PAGES[name]) == text, "run python -m tools.benchmark table"
    assert text.count("<!-- table: ") == text.count("<!-- end -->")


def test_every_table_stands_in_a_page_and_every_result_is_read() -> None:
    texts = [path.read_text(encoding="utf-8") for path in PAGES.values()]
    for name in tables.TABLES:
        assert sum(f"<!-- table: {name} -->\n" in text for text in texts) == 1, name
    found = {path.stem.removeprefix("benchmark-") for path in tables.RESULTS.glob("*.json")}
    assert found == set(tables.FILES)


def test_a_figure_that_was_written_by_hand_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    page = tmp_path / "README.md"
    page.write_text(TEXT.format("| mlm | 1 MB |"), encoding="utf-8")
    assert tables.main(["--check"]) == 1
    assert "README.md: not as measured" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == TEXT.format("| mlm | 1 MB |")
    assert tables.main([]) == 0
    assert page.read_text(encoding="utf-8") == TEXT.format(tables.TABLES["memory"]())
    assert tables.main(["--check"]) == 0


def test_an_unknown_table_is_named(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(TEXT.replace("memory", "mermory"), encoding="utf-8")
    with pytest.raises(UserError, match="no table 'mermory'; take one of demo"):
        tables.written(page)
