"""``visionzip visualize``: the files that it writes, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

import visionzip as package
from checkpoints import NEXT, picture
from llava.cli import main as visionzip_command
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from visionzip import visionzip
from visionzip.visualize import (
    attention_histogram,
    inspect_tokens,
    overview,
)

FIGURES = ("attention", "histogram", "layers", "overlay", "tokens")


def words(figure: Figure) -> str:
    """All text of a figure's panels."""
    texts = [[axes.get_title(), axes.get_xlabel(), *(text.get_text() for text in axes.texts)] for axes in figure.axes]
    return "\n".join(sum(texts, [row.get_suptitle() for row in figure.subfigs]))


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    picture(0).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_visionzip_visualize(make_checkpoint: Any, image_file: Path, tmp_path: Path, capsys):
    """As a user types it: two images whose tiles differ in number, in a model of LLaVA-NeXT."""
    picture(1, (20, 200)).save(tmp_path / "tall.png")
    out = tmp_path / "results" / "figures"
    model = ["--model-path", str(make_checkpoint(**NEXT)), "--device", "cpu", "--dominant", "5", "--contextual", "2"]
    images = ["--image", str(image_file), str(tmp_path / "tall.png")]
    assert visionzip_command(["visualize", *model, *images, "--output", str(out)]) == 0
    assert sorted(file.name for file in out.iterdir()) == [f"{name}.png" for name in FIGURES]
    written = capsys.readouterr().out.splitlines()
    assert sorted(written) == [f"wrote {out / name}.png" for name in FIGURES]
    with Image.open(out / "tokens.png") as tokens:
        assert tokens.size == (13 * 150, 2 * 4 * 150)


@pytest.mark.parametrize("budget", [["--keep", "4"], ["--keep", "0.25"]], ids=["number", "share"])
def test_visualize_draws_other_methods(make_checkpoint: Any, image_file: Path, tmp_path: Path, budget: list[str]):
    """As the registry has them: of the 16 patches 4 are kept, which is what the figures of the function show."""
    model = ["--model-path", str(make_checkpoint()), "--device", "cpu", "--method", "divprune", *budget]
    assert visionzip_command(["visualize", *model, "--image", str(image_file), "--output", str(tmp_path)]) == 0
    _, loaded, processor, _ = load_pretrained_model(str(make_checkpoint()), device="cpu")
    visionzip(loaded, keep=4, method="divprune")
    maps = inspect_tokens(loaded, process_images([picture(0)], processor, loaded.config))
    figure, tokens = overview(maps), maps[0]
    assert "16 patches + CLS become 4 visual tokens (24%), divprune" in words(figure)
    assert "4 kept patches" in words(figure) and "12 patches dropped" in words(figure)
    share = tokens.attention[tokens.layer][tokens.roles.dominant].sum() / tokens.attention[tokens.layer].sum()
    assert share < tokens.top_share(tokens.layer)  # they are not the highest ones
    assert f"they hold {share:.0%} of the attention" in words(figure)
    assert "as many of the highest patches as are kept, 4 of 16" in words(attention_histogram([tokens]))
    figure.savefig(tmp_path / "expected.png", format="png")
    assert (tmp_path / "tokens.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_visualize_explains_bad_input(make_checkpoint: Any, image_file: Path, tmp_path: Path, unread: None, capsys):
    """Before the model is loaded."""
    command = [
        "visualize",
        "--model-path",
        str(make_checkpoint()),
        "--image",
        str(image_file),
        "--output",
        str(tmp_path),
    ]
    text = tmp_path / "notes.png"
    text.write_text("not an image")
    for more, message in (
        (["--image", "none.png"], "no image file at none.png"),
        (["--image", str(text)], "notes.png is not a readable image"),
        (["--output", str(text)], f"--output {text}: {text} is a file"),
        (["--output", str(text / "figures")], f"--output {text / 'figures'}: {text} is a file"),
        (["--dominant", "0"], "dominant=0 is below 1"),
        (["--method", "norm"], "method='norm' needs keep"),
        (["--method", "nrom", "--keep", "4"], "method='nrom' is unknown: use one of visionzip, "),
        (["--method", "nrom", "--keep", "4"], "did you mean 'norm'?"),
        (["--method", "fastv", "--keep", "4"], "--method fastv does not choose before the language model"),
        (["--keep", "4", "--contextual", "2"], "--keep 4 was given with --dominant or --contextual"),
        (["--keep", "1.5"], "keep=1.5 is outside 0 to 1"),
    ):
        assert visionzip_command([*command, *more]) == 2, more
        assert message in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.png", "photo.png"]


def test_without_matplotlib(make_checkpoint: Any, image_file: Path, unread: None, monkeypatch: Any, capsys):
    """It is an extra: the command says how to install it."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "visionzip.visualize")
    monkeypatch.delattr(package, "visualize")
    command = ["visualize", "--model-path", str(make_checkpoint()), "--image", str(image_file)]
    assert visionzip_command(command) == 2
    assert 'pip install "llava-visionzip[figures]"' in capsys.readouterr().err
