"""The page's model, who has it, a visitor who has added an image, and the page in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from served_page import MODEL, Served, served_page

from llava.commands.loading import load_from_arguments
from visionzip import unzip

if TYPE_CHECKING:  # they need gradio, and browsing Chromium, without which the tests are skipped
    from browsing import Browser

    from llava.demo.conversation.desk import Desk
    from llava.demo.conversation.talk import Talk


@pytest.fixture(scope="session")
def model() -> tuple[Any, ...]:
    given = {"model_path": str(MODEL), "model_base": None, "conv_mode": None, "device": "cpu"}
    return load_from_arguments(type("Args", (), given))


@pytest.fixture
def desk(model: tuple[Any, ...]) -> Desk:
    from llava.demo.conversation.desk import Desk  # noqa: PLC0415
    from llava.demo.models.llava_model import LlavaModel  # noqa: PLC0415

    unzip(model[1])
    return Desk(LlavaModel(*model), do_sample=False, max_new_tokens=12)


@pytest.fixture
def talk() -> Talk:
    from llava.demo.conversation.talk import Talk  # noqa: PLC0415
    from llava.demo.examples import EXAMPLES  # noqa: PLC0415

    talk = Talk()
    talk.add([EXAMPLES[0].upload()])
    return talk


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page in a process of its own."""
    with served_page(tmp_path_factory.mktemp("page"), "--max-new-tokens", "1900") as served:
        yield served


@pytest.fixture(scope="module")
def chromium(page: Served) -> Iterator[Browser]:
    from browsing import Browser  # noqa: PLC0415 - skips what asks for it where there is no Chromium

    browser = Browser(page)
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    """A new visit: a reloaded page has another session."""
    chromium.open()
    return chromium


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    """The first example's picture, as a file of a visitor's own."""
    from llava.demo.examples import EXAMPLES  # noqa: PLC0415

    file = tmp_path / "ring.jpg"
    file.write_bytes(EXAMPLES[0].upload().data)
    return file
