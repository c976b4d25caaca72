"""LLaVA's visual tokens inside the engine, which are compared with transformers' (see engine_inside.py).

Opt-in: ``bash scripts/serve_test.sh``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from served import inside, needs_engine
from tiny_served import LLAVAS, write_llava

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
