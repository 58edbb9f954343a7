"""What the programs share: arguments in their bounds, places that can be written."""

import json
from pathlib import Path

import pytest

from pretrain.errors import UserError
from pretrain.files import check_folder
from tools import demo
from tools.shared import console


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (console.whole(2), {"2": 2, "70": 70}, ["1", "-1", "2.5", "two", ""]),
        (console.whole(8, 512), {"8": 8, "512": 512}, ["7", "513"]),
        (console.share, {"0.5": 0.5, "1e-3": 0.001}, ["0", "1", "nan", "x"]),
        (console.positive, {"0.5": 0.5, "1e3": 1000.0}, ["0", "-3", "nan", "inf", "much"]),
        (console.prefix, {"a": "a", "d/a.b": "d/a.b", "../a": "../a"}, ["", "d/", ".", "d/..", "/"]),
    ],
)
def test_arguments_in_their_bounds(kind, good, bad):
    parser = console.parser("test", "")
    parser.add_argument("--it", type=kind)
    for text, value in good.items():
        assert parser.parse_args([f"--it={text}"]).it == value
    for text in bad:
        with pytest.raises(UserError, match=f"^argument --it: .*{text}.*see python -m tools.test --help"):
            parser.parse_args([f"--it={text}"])


def test_blank_lines_of_a_list_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("\na b\n \n c\n\n")
    parser = console.parser("test", "")
    parser.add_argument("names", nargs="+")
    assert parser.parse_args([f"@{tmp_path}/list"]).names == ["a b", " c"]


def test_home_is_spelt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no shell does it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "list").write_text("~/c\n")
    parser = console.parser("test", "")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--output")
    args = parser.parse_args(["--output=~/out", "~/a*.txt", "b~/", "@~/list"])
    assert args.output == f"{tmp_path}/out"
    assert args.names == [f"{tmp_path}/a*.txt", "b~/", f"{tmp_path}/c"]


def test_a_place_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for good in (tmp_path, tmp_path / "a" / "b", "relative", "."):
        check_folder(good)
    for bad in ("/proc/q", "/proc/q/r", "file", "file/a"):
        with pytest.raises(UserError, match=f"^{bad}: cannot be written"):
            check_folder(bad)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_no_number_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"loss": float("nan"), "most": [1.5, float("inf")]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "loss": None,
        "most": [1.5, None],
    }


@pytest.mark.parametrize(
    "words", [["nonsense"], ["foo.bar=1"], ["model.num_layers=none"], ["--home", "/proc/q"]]
)
def test_a_demo_tells_mistakes_before_its_first_step(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        demo.main(["--home", str(tmp_path), *words])
    assert not list(tmp_path.iterdir())


def test_a_bar_of_finished_work_is_full(capfd: pytest.CaptureFixture[str]) -> None:
    with console.progress("read", 2000) as advance:
        advance(1200)
    told = capfd.readouterr().err
    assert "2.0/2.0 kB" in told and "?" not in told


def test_models_are_named_by_their_folders_where_these_differ() -> None:
    assert console.labels(["runs/a", "b/"]) == {"runs/a": "a", "b/": "b"}
    assert console.labels(["a/export", "b/export", "c"]) == {
        "a/export": "a/export",
        "b/export": "b/export",
        "c": "c",
    }
