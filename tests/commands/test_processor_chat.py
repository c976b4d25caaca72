"""``visionzip chat`` with today's families: the model's own template, and a cache that later turns go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from seam_checkpoints import save_checkpoint

from checkpoints import picture
from llava.cli import main as visionzip_command
from llava.model.stock.processor_model import (
    assistant_turn,
    inputs_of,
    load_model,
    load_processor,
    prompt_of,
    user_turn,
)
from llava.serve.processor_chat import ProcessorSession
from visionzip import visionzip

GENERATE = {"max_new_tokens": 6, "min_new_tokens": 3}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(request.param, tmp_path_factory.mktemp("chat") / request.param)


def load(folder: Path) -> tuple[Any, Any]:
    processor = load_processor(str(folder))
    return load_model(str(folder), processor, "cpu", torch.float32), processor


def asked_anew(model: Any, processor: Any, messages: list[dict[str, Any]], images: list[Any]) -> str:
    """The answer to a conversation from scratch: whole prompt, no cache."""
    inputs = inputs_of(processor, [prompt_of(processor, messages)], [images])
    output = model.generate(**inputs, do_sample=False, **GENERATE)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("order", ["image first", "text first"])
@pytest.mark.parametrize("setting", [{"keep": 0.4}, {"keep": 1.0}, None], ids=str)
def test_turns_equal_recomputing_everything(checkpoint: Path, setting: dict[str, Any] | None, order: str):
    """Images in two turns, of unequal size; text in the others. Zipped, only what is new is fed and encoded."""
    model, processor = load(checkpoint)
    if setting:
        visionzip(model, **setting)
    session, encoded = ProcessorSession(model, processor, **GENERATE), []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    turns = [
        ("What is shown?", [picture(0, (90, 60))]),
        ("Why?", []),
        ("And here?", [picture(1, (60, 90))]),
        ("So?", []),
    ]
    if order == "text first":
        turns = [turns[1], turns[0], turns[3]]
    messages, images, before = [], [], None
    for text, new in turns:
        encoded.clear()
        turn = session.ask(text, new)
        assert turn.fed_tokens == encoded[0]
        messages, images = [*messages, user_turn(text, len(new))], [*images, *new]
        assert turn.text == asked_anew(model, processor, messages, images)
        messages.append(assistant_turn(turn.text))
        if setting:
            assert bool(turn.visual_tokens) == bool(new) and (turn.vision_seconds > 0) == bool(new)
            assert turn.cached_tokens >= (before.cached_tokens + before.fed_tokens if before else 0)
        else:
            assert turn.cached_tokens == 0 and bool(turn.visual_tokens) == bool(images)
        before = turn
    session.reset()
    assert session.ask(*turns[0]).text == asked_anew(
        model, processor, [user_turn(turns[0][0], len(turns[0][1]))], turns[0][1]
    )


def test_errors_leave_the_conversation_as_it_was(checkpoint: Path):
    model, processor = load(checkpoint)
    visionzip(model, keep=0.5)
    session = ProcessorSession(model, processor, **GENERATE)
    session.ask("What is shown?", [picture(0, (90, 60))])
    prompt = session.prompt
    for arguments, message in (
        (("Is it <image> here?",), "its text has 1 <image> for 0 images"),
        (("And this?", [[picture(0), picture(1)]]), "videos are talked about with LLaVA's families"),
        (("?" * 5000,), "tokens but the model's context is 4096"),
    ):
        with pytest.raises(ValueError, match=message):
            session.ask(*arguments)
    assert session.prompt == prompt and session.ask("Why?").cached_tokens > 0
    with pytest.raises(ValueError, match="num_beams=2 cannot be used here"):
        ProcessorSession(model, processor, num_beams=2)


def test_the_command(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Zipped by the family's default, by a flag, and not at all; flags of LLaVA's families are refused in one line."""
    image = tmp_path / "image.png"
    picture(0, (90, 60)).save(image)
    command = ["chat", "--model-path", str(checkpoint), "--image", str(image), "--temperature", "0", "--device", "cpu"]
    command += ["--max-new-tokens", "4"]
    visual = {}
    for name, more in (("half", []), ("few", ["--keep", "0.2"]), ("all", ["--vanilla"])):
        lines = iter(["What is shown?", "Why?", "/exit"])
        monkeypatch.setattr("builtins.input", lambda prompt, lines=lines: next(lines))
        assert visionzip_command([*command, *more]) == 0
        out = capsys.readouterr().out
        assert ("not zipped" in out) == (name == "all") and ("keep=0.2" in out) == (name == "few")
        first, second = (line for line in out.splitlines() if "tokens in" in line)
        visual[name] = int(first.partition("(")[2].split()[0])
        assert "(0 visual)" in second
    assert 0 < visual["few"] < visual["half"] == visual["all"] // 2
    for more, message in (
        (["--conv-mode", "v1"], "--conv-mode is for LLaVA's families"),
        (["--load-4bit"], "--load-4bit is for LLaVA's families"),
        (["--video", "clip.mp4"], "clip.mp4"),
        (["--vanilla", "--keep", "0.5"], "--vanilla keeps all visual tokens"),
    ):
        assert visionzip_command([*command, *more]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
