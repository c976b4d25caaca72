"""The page with models of transformers that bring their own processor, on tiny random checkpoints."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from seam_checkpoints import save_checkpoint
from served_page import free_port

from checkpoints import picture
from llava.cli import main
from llava.commands.loading import load_with_processor
from llava.serve.processor_chat import ProcessorSession
from visionzip import VisionZipConfig, unzip, visionzip
from visionzip.integrations import family_of

pytest.importorskip("gradio", reason="gradio is not installed (extra demo)")

import gradio

from llava.demo.conversation.desk import Desk
from llava.demo.conversation.setting import Setting
from llava.demo.conversation.talk import StoppedError, Talk
from llava.demo.drawing import pictures
from llava.demo.examples import EXAMPLES
from llava.demo.handlers import Handlers
from llava.demo.models import processor_model as page_models
from llava.demo.page import Page
from llava.demo.uploads.images import Upload

GENERATE = {"max_new_tokens": 4, "min_new_tokens": 3}
OWN = "the method's own"
HALF = Setting(0.5)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
def page_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> page_models.ProcessorModel:
    folder = save_checkpoint(request.param, tmp_path_factory.mktemp("page") / request.param)
    return page_models.ProcessorModel(
        *load_with_processor(SimpleNamespace(model_path=str(folder), device="cpu"), False)
    )


@pytest.fixture
def desk(page_model: page_models.ProcessorModel) -> Desk:
    visionzip(unzip(page_model.model))
    return Desk(page_model, **GENERATE)


@pytest.fixture
def talk() -> Talk:
    talk = Talk()
    talk.add([uploaded(0, (90, 60))])
    return talk


def uploaded(seed: int, size: tuple[int, int]) -> Upload:
    file = io.BytesIO()
    picture(seed, size).save(file, "PNG")
    return Upload(f"{seed}.png", file.getvalue())


def ask(desk: Desk, talk: Talk, question: str, setting: Setting) -> dict:
    for _ in desk.ask(talk, question, setting):
        pass
    return talk.exchanges[-1].answers


def test_both_sides_answer_with_a_kept_cache(desk: Desk, talk: Talk):
    """As sessions of their own do: vanilla as the stock model, zipped with half of the tokens."""
    questions = ["What is it?", "Why?"]
    found = [ask(desk, talk, question, HALF) for question in questions]
    assert found[1]["vanilla"].turn.cached_tokens > found[1]["zipped"].turn.cached_tokens > 0
    assert found[0]["zipped"].visual_tokens == found[1]["zipped"].visual_tokens == found[0]["vanilla"].visual_tokens / 2
    assert found[1]["zipped"].turn.visual_tokens == 0
    image: Image.Image = talk.pictures[0].upload.open()
    for slot, keep in (("vanilla", None), ("zipped", 0.5)):
        unzip(desk.model)
        if keep:
            visionzip(desk.model, keep=keep)
        session = ProcessorSession(desk.model, desk.page_model._processor, **GENERATE)
        texts = [session.ask(question, [image] if turn == 0 else []).text for turn, question in enumerate(questions)]
        assert texts == [answers[slot].turn.text for answers in found]


def test_another_setting_begins_anew(desk: Desk, talk: Talk):
    ask(desk, talk, "What is it?", HALF)
    second = ask(desk, talk, "Why?", Setting(0.25, "uniform"))
    assert second["zipped"].turn.cached_tokens == 0 < second["vanilla"].turn.cached_tokens
    assert second["zipped"].visual_tokens < second["vanilla"].visual_tokens / 2
    talk.begin()
    with pytest.raises(StoppedError):
        for exchange in desk.ask(talk, "And now?", HALF):
            if exchange and "vanilla" in exchange.answers:
                talk.stop()
    assert len(talk.exchanges) == 2
    talk.begin()
    assert ask(desk, talk, "And now?", HALF)["zipped"].visual_tokens == second["vanilla"].visual_tokens / 2


def test_the_picture(desk: Desk, talk: Talk):
    """The whole image, whose "patches" are tokens of the language model; InternVL has cut it into tiles besides."""
    data = desk.picture(talk.pictures[0], HALF)
    (tile,) = data["tiles"]
    rows, columns = tile["grid"]
    kept = sum(role in ("kept", "target") for role in tile["role"])
    pieces = 5 if "InternVL" in type(desk.model).__name__ else 1
    assert data["tokens"] == [pieces * rows * columns, pieces * kept]
    assert tile["rects"][-1][2:] == [90, 60] == data["size"]
    assert len(tile["attention"]) == data["layers"] > data["layer"]
    assert (data["pairable"], data["pickable"]) == (True, pieces == 1)
    (tile,) = desk.page_model.picture(talk.pictures[0].upload.open(), pairs=True)["tiles"]
    assert len(base64.b64decode(tile["pairs"])) == (rows * columns) ** 2


def test_patches_picked_by_hand(desk: Desk, talk: Talk):
    before = ask(desk, talk, "What is it?", HALF)
    data = desk.picture(talk.pictures[0], HALF)
    if not data["pickable"]:  # the page does not offer it
        assert "InternVL" in type(desk.model).__name__
        return
    talk.pictures[0].picks = ((2, 5, 7),)
    for _ in desk.ask_again(talk, HALF):
        pass
    answers = talk.exchanges[0].answers
    assert answers["zipped"].visual_tokens == 3 and answers["vanilla"] is before["vanilla"]
    shown = desk.picture(talk.pictures[0], HALF)["tiles"][0]["role"]
    assert [patch for patch, role in enumerate(shown) if role == "kept"] == [2, 5, 7]
    assert desk.picture(replace(talk.pictures[0], picks=None), HALF) == data  # the setting is back


def test_patches_picked_of_one_image_among_several(desk: Desk, talk: Talk):
    """The others are left to the method; a later turn goes on from the cache."""
    talk.add([uploaded(1, (60, 90)), uploaded(2, (90, 90))])
    data = [desk.picture(each, HALF) for each in talk.pictures]
    if not all(each["pickable"] for each in data):
        assert "InternVL" in type(desk.model).__name__
        return
    talk.pictures[1].picks = ((2, 5, 7),)
    for question in ("What is it?", "Why?"):
        answers = ask(desk, talk, question, HALF)
        kept = data[0]["tokens"][1] + 3 + data[2]["tokens"][1]
        assert answers["zipped"].visual_tokens == kept < answers["vanilla"].visual_tokens / 2
    assert answers["zipped"].turn.cached_tokens > kept
    talk.pictures[0].picks = ((1,),)
    list(desk.ask_again(talk, HALF))
    assert talk.exchanges[-1].answers["zipped"].visual_tokens == 4 + data[2]["tokens"][1]


def test_compare(desk: Desk, talk: Talk):
    rows = {row[0]: row for row in desk.compare(talk, talk.pictures[0], "What?", 0.5, ["visionzip", "divprune"]) if row}
    assert rows["vanilla"][2].visual_tokens == 2 * rows["visionzip"][2].visual_tokens
    assert pictures.strip(talk.pictures[0], list(rows.values())).count("<svg") == 3


def test_controls(desk: Desk):
    """Images of any size have no number of tokens for a slider to end at: there a budget is a share."""
    handlers = Handlers(desk)
    fixed = desk.patches is not None
    assert handlers.budget() == (("tokens", 16, 8) if fixed else ("percent", 100, 50))
    with pytest.raises(ValueError, match="is unknown: use one of percent" if not fixed else "outside 1 to 16"):
        handlers.setting("visionzip", "tokens", 20)
    assert handlers.setting("visionzip", "percent", 25, OWN, OWN).keep == 0.25
    page = Page(desk, "a model")
    assert page.parts["unit"].value == handlers.units[0]
    assert "clips" not in page.parts  # its processor gets images, also in chat


@pytest.mark.parametrize("own", [{"keep": 0.5, "max_tokens": 3}, {"keep": 3}, {"dominant": 2, "contextual": 1}])
def test_a_checkpoints_own_number_of_tokens_stays_a_limit(desk: Desk, talk: Talk, own: dict):
    """Also where a budget is a share, as images have any size; and where the slider has been moved."""
    visionzip(unzip(desk.model), **own)
    begun = Desk(desk.page_model, **GENERATE)
    assert ask(begun, talk, "What is it?", begun.default)["zipped"].visual_tokens % 3 == 0
    if begun.patches is None:
        moved = Handlers(begun).setting("divprune", "percent", 90)
        assert ask(begun, talk, "And now?", moved)["zipped"].visual_tokens == 3
        assert str(moved) == "divprune, 90% of the patches, at most 3 tokens"


def test_a_checkpoints_own_budget_of_whole_videos_stays(desk: Desk):
    if "video" not in family_of(desk.model).modalities:
        assert "Gemma3" in type(desk.model).__name__ or "InternVL" in type(desk.model).__name__
        return
    visionzip(unzip(desk.model), keep=0.5, video_keep=0.1)
    begun = Desk(desk.page_model, **GENERATE)
    Handlers(begun).setting("uniform", "percent", 20).put_on(begun.model)
    assert begun.model._visionzip.config == VisionZipConfig(
        keep=0.2, method="uniform", layer=begun.default.layer, video_keep=0.1
    )


def test_an_example(desk: Desk, talk: Talk):
    """Each of the paper's figures; of Figure 14 what merged patches attend to."""
    for example in EXAMPLES:
        change = Handlers(desk).example(talk, example, "visionzip", "percent", 50)
        shown = json.loads(change["picture"])
        assert shown["data"]["method"] == "visionzip"
    assert shown["hint"].startswith("Figure 14") and shown["data"]["tiles"][0]["pairs"]


def test_a_figure_that_cannot_be_had(desk: Desk, talk: Talk, monkeypatch: pytest.MonkeyPatch):
    """Of a family whose encoder is read without pairs, as one of the user's own; the line says so."""
    monkeypatch.setattr(desk.page_model, "pairable", False)
    shown = json.loads(Handlers(desk).example(talk, EXAMPLES[-1], "visionzip", "percent", 50)["picture"])
    assert shown["hint"].startswith("Figure 14 is not to be had of this model")
    assert not shown["data"]["pairable"] and "pairs" not in shown["data"]["tiles"][0]


def test_a_class_of_which_nothing_is_known_is_refused():
    config = transformers.AyaVisionConfig(text_config={"num_hidden_layers": 1}, vision_config={"num_hidden_layers": 1})
    with torch.device("meta"):
        model = transformers.AyaVisionForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"does not know the encoder of AyaVision.*: use visionzip chat"):
        page_models.ProcessorModel(model, SimpleNamespace(tokenizer=None))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Any checkpoint that the other commands load; it has answered once before it is served."""
    served = []
    monkeypatch.setattr(Page, "launch", lambda page, host, port, **more: served.append(page))
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda blocks: None)
    folder = save_checkpoint("qwen3_vl", tmp_path / "qwen3_vl")
    command = ["demo", "--model-path", str(folder), "--device", "cpu", "--max-new-tokens", "2"]
    assert main([*command, "--port", str(free_port())]) == 0
    assert "the page: http://127.0.0.1:" in capsys.readouterr().out
    assert served[0].handlers.budget() == ("percent", 100, 50)
