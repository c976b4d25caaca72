"""LLaVA's visual tokens inside the engine, and checkpoints of ours in stock vLLM (see engine_inside.py).

Opt-in: ``bash scripts/serve_test.sh``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from served import ROOT, inside, needs_engine
from tiny_served import LLAVAS, write_llava, write_qwen

from llava import cli

pytestmark = needs_engine


@pytest.mark.parametrize("siglip", [False, True], ids=["clip", "siglip"])
@pytest.mark.parametrize("family", list(LLAVAS))
def test_visual_tokens_of_all_methods_are_those_of_transformers(family: str, siglip: bool, tmp_path: Path):
    """Of images of different shapes, tile by tile, whether the encoder sees them all at once or two at a time."""
    found = inside("engine_inside.py", "compare", write_llava(tmp_path / "tiny", family, siglip))
    assert len(found) > 2 * 10 and not [each for each in found if not each["right"]]


def test_an_image_is_encoded_once_in_three_turns(tmp_path: Path):
    (found,) = inside("engine_inside.py", "count", write_llava(tmp_path / "tiny", "llava", False))
    assert found["right"], found


@pytest.mark.parametrize("kind", ["converted", "llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_stock_vllm_loads_what_we_write(kind: str, tmp_path: Path):
    """What ``convert`` writes of the embedded model, and what ``save_pretrained`` of a zipped model writes."""
    path = tmp_path / "tiny"
    if kind == "converted":
        cli.main(["convert", str(ROOT / "checkpoints/llava-mini"), str(path), "--to", "transformers"])
    else:
        path = write_llava(path, kind, False) if kind in LLAVAS else write_qwen(path, kind)
    found = inside("engine_inside.py", "stock", path)
    assert len(found) == 2 and not [each for each in found if not each["right"]]
