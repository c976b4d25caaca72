"""The page's model, who has it, and a visitor who has added an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from served_page import MODEL

from llava.commands.loading import load_from_arguments
from visionzip import unzip

if TYPE_CHECKING:  # they need gradio, without which the tests are skipped
    from llava.demo.desk import Desk
    from llava.demo.talk import Talk


@pytest.fixture(scope="session")
def model() -> tuple[Any, ...]:
    given = {"model_path": str(MODEL), "model_base": None, "conv_mode": None, "device": "cpu"}
    return load_from_arguments(type("Args", (), given))


@pytest.fixture
def desk(model: tuple[Any, ...]) -> Desk:
    from llava.demo.desk import Desk  # noqa: PLC0415
    from llava.demo.models import LlavaModel  # noqa: PLC0415

    unzip(model[1])
    return Desk(LlavaModel(*model), do_sample=False, max_new_tokens=12)


@pytest.fixture
def talk() -> Talk:
    from llava.demo.examples import EXAMPLES  # noqa: PLC0415
    from llava.demo.talk import Talk  # noqa: PLC0415

    talk = Talk()
    talk.add([EXAMPLES[0].upload()])
    return talk
