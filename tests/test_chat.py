"""Conversations with a kept KV cache, and the commands around them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import CLIP, NEXT
from llava.cli import main as visionzip_command
from llava.eval.run_llava import main as run_llava
from llava.mm_utils import process_images, tokenizer_image_token
from llava.serve.chat import ChatSession, with_image_tokens
from llava.serve.cli import main as llava_cli
from visionzip import visionzip

GENERATE = {"max_new_tokens": 8, "min_new_tokens": 3}
QUESTIONS = ["What is shown here?", "And behind it?", "Is it red?"]


def picture(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(params=["pad", "anyres"])
def session(request: pytest.FixtureRequest, load):
    """A zipped model in a conversation; ``session.encoded`` counts the images that the vision tower has seen."""
    tokenizer, model, processor, _ = load(**NEXT if request.param == "anyres" else {})
    model.config.max_position_embeddings = 2048
    visionzip(model, dominant=5, contextual=2)
    session = ChatSession(model, tokenizer, processor, **GENERATE)
    session.encoded = 0

    def count(module: Any, args: tuple, output: Any) -> None:
        session.encoded += 1

    model.get_vision_tower().encoder.embeddings.register_forward_hook(count)
    return session


def recompute(session: ChatSession, images: list[Image.Image]) -> str:
    """The answer to the last question from scratch, as LLaVA's own commands compute it: whole prompt, no cache."""
    conversation = session.conversation.copy()
    conversation.messages[-1] = (conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), session.tokenizer, return_tensors="pt")
    out = session.model.generate(
        ids[None],
        images=process_images(images, session.image_processor, session.model.config),
        image_sizes=[image.size for image in images],
        do_sample=False,
        **GENERATE,
    )
    return session.tokenizer.decode(out[0], skip_special_tokens=True).strip()


def test_three_turns_equal_recomputing_everything(session: ChatSession):
    image = picture(0)
    turns = []
    for number, question in enumerate(QUESTIONS):
        turns.append(session.ask(question, [image] if number == 0 else []))
        assert session.encoded == 1  # once, in the first turn
        assert turns[-1].text == recompute(session, [image])
        session.encoded = 1  # recompute has encoded it again
    first, second, third = turns
    assert first.cached_tokens == 0 and first.visual_tokens > 0 and first.vision_seconds > 0
    for before, turn in ((first, second), (second, third)):
        assert turn.visual_tokens == 0 and turn.vision_seconds == 0
        # All up to the last answer is cached, and of the answer whatever is tokenized as the model wrote it.
        assert turn.cached_tokens >= before.cached_tokens + before.fed_tokens
        question_and_answer = len(session.tokenizer(f"{before.text}</s>USER: {QUESTIONS[1]} ASSISTANT:").input_ids)
        assert 0 < turn.fed_tokens <= question_and_answer + 3


def test_what_the_model_wrote_is_not_fed_again(session: ChatSession):
    """Where the answer's text is tokenized as it was generated, only what is new goes through the model."""
    first = session.ask(QUESTIONS[0], [picture(0)])
    # Put words in its mouth that do survive: the cache then agrees with the prompt to the end of the answer.
    answer = "A red cube."
    session.conversation.messages[-1] = (session.conversation.roles[1], answer)
    session.ask(QUESTIONS[1])
    second = session.ask(QUESTIONS[2])
    assert second.cached_tokens > first.cached_tokens + first.fed_tokens


def test_an_image_in_a_later_turn(session: ChatSession):
    first, second = picture(0), picture(1, (60, 90))
    session.ask(QUESTIONS[0], [first])
    session.ask(QUESTIONS[1])
    turn = session.ask("Compare <image> with the first.", [second])
    assert session.encoded == 2 and turn.visual_tokens > 0
    assert turn.text == recompute(session, [first, second])


def test_reset_and_text_only(session: ChatSession):
    session.ask(QUESTIONS[0], [picture(0)])
    session.reset()
    assert session.ask("Hello").cached_tokens == 0
    assert session.conversation.messages[0] == ("USER", "Hello")


def test_what_goes_wrong_leaves_the_conversation_as_it_was(session: ChatSession):
    session.ask(QUESTIONS[0], [picture(0)])
    before = list(session.conversation.messages)
    with pytest.raises(TypeError, match="not a PIL image"):
        session.ask("And this?", ["cube.png"])
    with pytest.raises(ValueError, match="2 <image> but 1 images"):
        session.ask("<image> or <image>?", [picture(1)])
    session.model.config.max_position_embeddings = 40
    with pytest.raises(ValueError, match="context is 40"):
        session.ask(QUESTIONS[1])
    session.model.config.max_position_embeddings = 2048
    assert session.conversation.messages == before
    session.ask(QUESTIONS[1])
    with pytest.raises(ValueError, match="conv_mode='vicuna' is unknown"):
        ChatSession(session.model, session.tokenizer, session.image_processor, "vicuna")


def test_image_tokens_with_markers():
    class Config:
        mm_use_im_start_end = True

    assert with_image_tokens("What?", 2, None) == "<image>\n<image>\nWhat?"
    assert with_image_tokens("What is <image>?", 1, Config()) == "What is <im_start><image><im_end>?"


# Commands


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    picture(0).save(tmp_path / "cube.png")
    return tmp_path / "cube.png"


def run(*command: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, check=False, **kwargs
    )


def test_visionzip_chat(make_checkpoint, image_file: Path):
    """As a user types it: two questions, another image, and a wrong file that does not end the chat."""
    lines = ["What is shown?", "And behind it?", "/image nothing.png", f"/image {image_file}", "And here?", "/exit"]
    flags = ["--temperature", "0", "--max-new-tokens", "4", "--dominant", "5", "--contextual", "2"]
    command = ["-m", "llava.cli", "chat", "--model-path", str(make_checkpoint()), "--image", str(image_file), *flags]
    done = run(*command, input="\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert "VisionZip 5 + 2" in done.stdout
    costs = [line for line in done.stdout.splitlines() if "tokens in" in line]
    assert ["(7 visual)" in line for line in costs] == [True, False, True]
    assert [" 0 cached" in line for line in costs] == [True, False, False]
    assert all("prefill" in line and "tokens out" in line for line in costs)
    assert "no image file at nothing.png" in done.stdout


def test_chat_settings(make_checkpoint, image_file: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """``visionzip chat`` compresses unless told not to; LLaVA's own command leaves the model as it is."""
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    model = ["--model-path", str(make_checkpoint()), "--device", "cpu"]
    with pytest.warns(UserWarning, match="nothing will be compressed"):  # 54 + 10 of this tower's 17 tokens
        assert visionzip_command(["chat", *model]) == 0
    assert "VisionZip 54 + 10" in capsys.readouterr().out
    assert visionzip_command(["chat", *model, "--vanilla"]) == 0
    assert llava_cli([*model, "--image-file", str(image_file), "--conv-mode", "vicuna_v1"]) == 0
    assert capsys.readouterr().out.count("not zipped") == 2


def test_commands_explain_bad_input(make_checkpoint, image_file: Path, tmp_path: Path, capsys):
    text = tmp_path / "notes.png"
    text.write_text("not an image")
    model = ["--model-path", str(make_checkpoint())]
    for arguments, message in (
        (["chat", *model, "--image", str(text)], "notes.png is not a readable image"),
        (["chat", *model, "--image", "none.png"], "no image file at none.png"),
        (["chat", *model, "--dominant", "0"], "dominant=0 is below 1"),
        (["chat", "--model-path", "/nowhere"], "there is no folder /nowhere"),
        (["chat", *model, "--temperature", "-1"], "temperature=-1.0 is below 0"),
        (["benchmark", "tower", "--rounds", "0"], "--rounds 0"),
    ):
        assert visionzip_command(arguments) == 2, arguments
        assert message in capsys.readouterr().err


def test_run_llava(make_checkpoint, image_file: Path, capsys):
    model = ["--model-path", str(make_checkpoint()), "--image-file", f"{image_file},{image_file}"]
    flags = ["--temperature", "0", "--max_new_tokens", "5", "--num_beams", "2", "--query", "Compare them."]
    assert run_llava([*model, *flags]) == 0
    vanilla = capsys.readouterr().out
    assert run_llava([*model, *flags, "--dominant", "3", "--contextual", "1"]) == 0
    assert vanilla.strip() and capsys.readouterr().out != vanilla
    sampled = [
        "--temperature",
        "0.7",
        "--top_p",
        "0.9",
        "--max_new_tokens",
        "3",
        "--query",
        "What is <image-placeholder>?",
    ]
    assert run_llava([*model[:2], "--image-file", str(image_file), *sampled]) == 0


SNIPPET = """
from llava.model.builder import load_pretrained_model
from llava.mm_utils import get_model_name_from_path
from llava.eval.run_llava import eval_model
from visionzip import visionzip
model_path = "{folder}"
tokenizer, model, image_processor, context_len = load_pretrained_model(
    model_path=model_path, model_base=None, model_name=get_model_name_from_path(model_path))
model = visionzip(model, dominant=54, contextual=10)
args = type("Args", (), {{
    "model_path": model_path, "model_base": None, "model_name": get_model_name_from_path(model_path),
    "query": "What is shown here?", "conv_mode": None, "image_file": "{image}", "sep": ",",
    "temperature": 0, "top_p": None, "num_beams": 1, "max_new_tokens": 4,
}})()
eval_model(args)
import torch
print(tuple(model.encode_images(torch.randn(1, 3, 112, 112)).shape))
"""


def test_the_snippet_of_the_released_package(make_checkpoint, image_file: Path):
    folder = make_checkpoint(vision={**CLIP, "image_size": 112})  # 65 tokens
    done = run("-c", SNIPPET.format(folder=folder, image=image_file))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(1, 64, 32)"


def test_benchmark_tower(tmp_path: Path, capsys):
    output = tmp_path / "results" / "tower.json"
    command = ["benchmark", "tower", "--shape", "tiny", "--batch-sizes", "2", "--rounds", "2", "--output", str(output)]
    assert visionzip_command(command) == 0
    report = json.loads(output.read_text())
    assert report["torch"] == torch.__version__
    rows = {row["way"]: row for row in report["results"]}
    assert set(rows) == {"vanilla", "unzipped", "zipped", "released"}
    assert rows["vanilla"]["time_ratio"] == rows["vanilla"]["memory_ratio"] == 1
    assert all(row["seconds"] > 0 and row["memory_mib"] > 0 for row in rows.values())
    assert "zipped" in capsys.readouterr().out
