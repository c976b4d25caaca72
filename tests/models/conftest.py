"""The model that several files ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from visionzip import visionzip


@pytest.fixture(params=[False, True], ids=["vanilla", "zipped"])
def model(request: pytest.FixtureRequest, load: Callable[..., tuple[Any, ...]]) -> Any:
    """A LLaVA of 16 patches, as it is and keeping 5 dominant and 2 contextual tokens."""
    _, model, _, _ = load()
    return visionzip(model, dominant=5, contextual=2) if request.param else model
