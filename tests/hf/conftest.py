"""The model that several files ask."""

from __future__ import annotations

from typing import Any

import pytest
from hf_models import llava

from visionzip import visionzip


@pytest.fixture
def model() -> Any:
    """A LLaVA-1.5 of transformers that keeps 4 dominant and 2 contextual tokens of 16 patches."""
    return visionzip(llava(), 4, 2)
