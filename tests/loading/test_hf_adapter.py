"""Transformers' checkpoints behind this package's commands: the same weights give the same answers in both layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_video import write_folder
from torch.nn.utils.rnn import pad_sequence

from checkpoints import NEXT, picture
from eval.__main__ import main as eval_command
from llava.cli import main
from llava.eval.run_llava import main as run_llava
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.stock.transformers_llava import TransformersLlava
from llava.serve.chat import ChatSession
from visionzip import unzip, visionzip
from visionzip.language import fastv, remove_pruning, sparsevlm
from visionzip.language.pruning import is_pruned

LAYOUTS = [pytest.param({}, id="1.5"), pytest.param(NEXT, id="next")]
QUESTIONS = [
    "USER: <image>\nWhat is it? ASSISTANT:",
    "USER: <image> and <image>\nWhich one is red? ASSISTANT:",
    "USER: Hello ASSISTANT:",
]
PICTURES = [picture(0), picture(1, (60, 60)), picture(2, (30, 100))]


def ask(tokenizer: Any, model: Any, processor: Any, **kwargs: Any) -> list[list[int]]:
    """Greedy answers to a batch with one image, with two and with none, without what ends or fills them."""
    rows = [tokenizer_image_token(question, tokenizer, return_tensors="pt") for question in QUESTIONS]
    masks = [torch.ones_like(row) for row in rows]
    answers = model.generate(
        pad_sequence(rows, batch_first=True, padding_side="left"),
        attention_mask=pad_sequence(masks, batch_first=True, padding_side="left"),
        images=list(process_images(PICTURES, processor, model.config)),
        image_sizes=[image.size for image in PICTURES],
        **{"do_sample": False, "max_new_tokens": 8, **kwargs},
    ).tolist()
    return [[token for token in answer if token not in tokenizer.all_special_ids] for answer in answers]


@torch.inference_mode()
def tokens_of(model: Any, processor: Any) -> list[torch.Tensor]:
    images = process_images(PICTURES, processor, model.config)
    return model.visual_tokens(images, [image.size for image in PICTURES])


@pytest.mark.parametrize("options", LAYOUTS)
def test_prompts_and_pixels_are_llavas(both, options: dict[str, Any]):
    (tokenizer, model, processor), (own_tokenizer, own_model, own_processor) = both(**options)
    for question in QUESTIONS:
        assert tokenizer_image_token(question, own_tokenizer) == tokenizer_image_token(question, tokenizer)
    blank = tokenizer.convert_tokens_to_ids("▁")
    ids = tokenizer_image_token(QUESTIONS[0], own_tokenizer)  # each piece of text begins with a blank of its own
    assert ids[ids.index(-200) - 1] == ids[ids.index(-200) + 1] == blank
    expected = process_images(PICTURES, processor, model.config)
    found = process_images(PICTURES, own_processor, own_model.config)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@torch.inference_mode()
def test_images_alone(both):
    """LLaVA's own name for it, which goes through the projector; zipped and not."""
    (_, model, processor), (_, own, _) = both()
    images = process_images(PICTURES, processor, model.config)
    for change in (unzip, lambda each: visionzip(each, dominant=5, contextual=2)):
        expected = change(model).encode_images(images)
        torch.testing.assert_close(change(own).encode_images(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", LAYOUTS)
@pytest.mark.parametrize(
    "setting",
    [None, {"dominant": 5, "contextual": 2}, {"keep": 5, "method": "visionzip-plus"}],
    ids=["vanilla", "visionzip", "plus"],
)
def test_tokens_and_answers_are_those_of_llavas_layout(both, options: dict[str, Any], setting: dict[str, Any] | None):
    (_, model, processor), (_, own, _) = loaded = both(**options)
    if setting:
        for each in (model, own):
            assert visionzip(each, **setting) is each
    expected, found = tokens_of(model, processor), tokens_of(own, loaded[1][2])
    assert [len(image) for image in found] == [len(image) for image in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    for how in ({}, {"num_beams": 2}):
        assert ask(*loaded[0], **how) == ask(*loaded[1], **how)
    prompt = tokenizer_image_token(QUESTIONS[0], loaded[0][0], return_tensors="pt")[None]
    images, sizes = process_images(PICTURES[:1], processor, model.config), [PICTURES[0].size]
    with torch.inference_mode():
        one, other = (each(prompt, images=images, image_sizes=sizes).logits for each in (model, own))
    one, other = (logits[..., : len(loaded[0][0])] for logits in (one, other))  # transformers' has rows more
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", LAYOUTS)
def test_unzip_gives_the_model_that_it_was(both, options: dict[str, Any]):
    _, model, processor = both(**options)[1]
    assert isinstance(model, TransformersLlava) and type(model.native).__module__.startswith("transformers.")
    before, length = tokens_of(model, processor), len(tokens_of(model, processor)[0])
    visionzip(model, dominant=5, contextual=2)
    assert model.config.visionzip == model.native.config.visionzip
    assert (model.get_vision_tower().visionzip.dominant, model.get_vision_tower().visionzip.contextual) == (5, 2)
    assert len(tokens_of(model, processor)[0]) < length
    unzip(model)
    assert model.get_vision_tower().visionzip is None and not hasattr(model.config, "visionzip")
    assert all(torch.equal(one, other) for one, other in zip(tokens_of(model, processor), before, strict=True))
    visionzip(model.native, dominant=5, contextual=2)  # the same thing
    assert model.get_vision_tower().visionzip.dominant == 5


def test_an_image_is_encoded_once(both):
    """Questions about one image share its visual tokens."""
    _, model, processor = both()[1]
    image = process_images([picture(0)], processor, model.config)[0]
    encoded = []
    model.get_vision_tower().encoder.embeddings.register_forward_hook(lambda *call: encoded.append(len(call[-1])))
    first, second = model.visual_tokens([image, image])
    assert encoded == [1] and torch.equal(first, second)


def test_a_zipped_checkpoint_comes_zipped(both, tmp_path: Path):
    tokenizer, model, processor = both()[1]
    visionzip(model, dominant=4, contextual=3)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "tuned")
    _, again, _, context = load_pretrained_model(str(tmp_path / "tuned"), device="cpu")
    assert again.get_vision_tower().visionzip.contextual == 3 and context == 2048
    assert all(len(image) == 7 for image in tokens_of(again, processor))


@pytest.mark.parametrize("options", LAYOUTS)
@pytest.mark.parametrize("setting", [{"dominant": 5, "contextual": 2}, {"keep": 7, "method": "visionzip-plus"}])
def test_chat_keeps_the_cache(both, options: dict[str, Any], setting: dict[str, Any]):
    """Three turns, a new image in the last one: answers and numbers of tokens are those of LLaVA's layout."""
    turns = []
    for tokenizer, model, processor in both(**options):
        visionzip(model, **setting)
        session = ChatSession(model, tokenizer, processor, max_new_tokens=6, min_new_tokens=3)
        asked = [session.ask("What?", [picture(0)]), session.ask("And behind it?"), session.ask("Here?", [picture(3)])]
        turns.append([(turn.text, turn.visual_tokens, turn.fed_tokens, turn.cached_tokens) for turn in asked])
    assert turns[0] == turns[1]
    assert turns[1][1][3] > turns[1][0][1] > turns[1][1][1] == 0  # the image is in the cache


@pytest.mark.usefixtures("quick_starts")
def test_commands(converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """``visionzip chat``, ``visualize`` and ``benchmark``, and LLaVA's own run_llava."""
    file, output = tmp_path / "cube.png", tmp_path / "times.json"
    picture(0).save(file)
    model = ["--model-path", str(converted()), "--device", "cpu"]
    budget = ["--dominant", "5", "--contextual", "2"]
    lines = iter(["What is shown?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", *model, *budget, "--image", str(file), "--max-new-tokens", "3", "--temperature", "0"]) == 0
    printed = capsys.readouterr().out
    assert "LlavaForConditionalGeneration on cpu, float32 · VisionZip 5 + 2" in printed and "(7 visual)" in printed

    assert main(["visualize", *model, *budget, "--image", str(file), "--output", str(tmp_path / "figures")]) == 0
    assert len(list((tmp_path / "figures").glob("*.png"))) == 5

    short = ["--temperature", "0", "--max_new_tokens", "3", "--query", "What?", "--image-file", str(file)]
    assert run_llava([*model, *short]) == 0

    times = ["--tokens", "8", "--rounds", "1", "--output", str(output)]
    assert main(["benchmark", "generate", *model, *times, "--max-new-tokens", "3", "--batch-size", "2"]) == 0
    vanilla, zipped, fastv, sparsevlm = json.loads(output.read_text())["results"]
    assert (vanilla["visual_tokens"], zipped["visual_tokens"]) == (16, 8)
    assert vanilla["layer_tokens"] == [76] * 2 and zipped["layer_tokens"] == [68] * 2
    assert fastv["layer_tokens"] == sparsevlm["layer_tokens"] == [76, 68]  # from the cut on
    decode = zipped["seconds"]["decode"]["median"]
    assert zipped["tokens_per_second"]["median"] == pytest.approx(2 * 2 / decode)
    ways = ["--tokens", "8", "--method", "vanilla", "visionzip"]
    assert main(["benchmark", "memory", *model, *ways, "--output", str(output)]) == 0
    vanilla, zipped = json.loads(output.read_text())["results"]
    assert zipped["kv_cache_ratio"] == pytest.approx(68 / 76)


def test_benchmark_of_a_shape(tmp_path: Path):
    """Transformers' LLaVA-NeXT runs its encoder to the end and has a newline in each row of the grid."""
    output = tmp_path / "prefill.json"
    shape = ["--shape", "llava-next-tiny", "--transformers", "--device", "cpu", "--tokens", "20", "--rounds", "2"]
    assert main(["benchmark", "prefill", *shape, "--output", str(output)]) == 0
    vanilla, zipped, *inside = json.loads(output.read_text())["results"]
    assert (vanilla["way"], zipped["way"]) == ("vanilla", "visionzip-20")
    assert [each["way"] for each in inside] == ["fastv-20", "sparsevlm-20"]
    assert all(each["flops"]["vision"] == vanilla["flops"]["vision"] for each in inside)
    assert (vanilla["visual_tokens"], zipped["visual_tokens"]) == (64 + 16 * 17, 20)
    assert vanilla["of_bare"]["median"] == 1 and zipped["of_bare"]["median"] > 0
    assert zipped["flops"]["vision"] < vanilla["flops"]["vision"]
    assert vanilla["tokens_per_second"] is None and "decode" not in vanilla["speed_up"]


@pytest.mark.parametrize("options", LAYOUTS)
def test_eval_gives_the_answers_of_llavas_layout(
    make_checkpoint, converted, scenes_data: Path, tmp_path: Path, options: dict[str, Any]
):
    answers, tokens = [], []
    for name, model in (("llava", make_checkpoint(**options)), ("transformers", converted(**options))):
        out = tmp_path / name
        places = ["--model-path", str(model), "--data", str(scenes_data), "--output", str(out), "--device", "cpu"]
        methods = ["--method", "vanilla", "visionzip", "dominant-only", "fastv", "fastv-average", "sparsevlm"]
        methods += ["--tokens", "9", "--conv-mode", "vicuna_v1"]
        command = ["run", "scenes", *places, *methods, "--batch-size", "8", "--limit", "16"]
        assert eval_command(command) == 0
        rows = json.loads((out / "results.json").read_text())["rows"]
        tokens.append([row["visual_tokens"] for row in rows])
        files = sorted((out / "answers").glob("*.jsonl"))
        answers.append({file.name: [json.loads(line)["text"] for line in file.open()] for file in files})
        assert all(seconds > 0 for row in rows for seconds in row["seconds"].values())
    assert answers[0] == answers[1] and len(answers[1]) == 6
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("options", LAYOUTS)
@pytest.mark.usefixtures("brief_msvd")
def test_eval_on_videos(make_checkpoint, converted, tmp_path: Path, options: dict[str, Any]):
    """Frames are images to these models: the numbers of tokens are those of LLaVA's layout."""
    folder, tokens = write_folder(tmp_path, "msvd"), []
    for name, model in (("llava", make_checkpoint(**options)), ("transformers", converted(**options))):
        places = ["--model-path", str(model), "--data", str(folder), "--output", str(tmp_path / name)]
        methods = ["--method", "vanilla", "visionzip", "--tokens", "6", "--conv-mode", "vicuna_v1", "--judge", "exact"]
        assert eval_command(["run", "msvd", *places, *methods, "--device", "cpu", "--limit", "2"]) == 0
        rows = json.loads((tmp_path / name / "results.json").read_text())["rows"]
        tokens.append([row["visual_tokens"] for row in rows])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(bits: int, converted):
    """Only the language model is; zipped and unzipped again it answers as before."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    folder = str(converted(hidden_size=64, mm_hidden_size=32))
    loaded = load_pretrained_model(folder, device="cpu", **{f"load_{bits}bit": True})[:3]
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    names = {name for name, module in loaded[1].named_modules() if isinstance(module, kind)}
    assert len(names) == 2 * 7 and all(".language_model.layers." in name for name in names)
    before = ask(*loaded)
    visionzip(loaded[1], dominant=5, contextual=2)
    assert ask(*loaded) != before
    unzip(loaded[1])
    assert ask(*loaded) == before


def test_a_checkpoint_says_its_own_layout(converted, monkeypatch: pytest.MonkeyPatch, capsys):
    """Before the model is loaded."""
    monkeypatch.setattr("llava.model.builder.load_transformers_model", None)
    model = ["--model-path", str(converted()), "--device", "cpu", "--tokens", "6"]
    assert main(["benchmark", "prefill", *model, "--transformers"]) == 2
    assert "leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("options", LAYOUTS)
@pytest.mark.parametrize("attach", [lambda model: fastv(model, 1, 0.3), lambda model: sparsevlm(model, (5,), (0,))])
def test_pruned_answers_are_those_of_llavas_layout(both, options: dict[str, Any], attach: Callable[[Any], Any]):
    """On the model in our commands as on the one inside it; a prompt without image in the batch."""
    loaded = both(**options)
    (_, model, processor), (_, own, _) = loaded
    plain = ask(*loaded[0])
    attach(model)
    expected = [ask(*loaded[0], **how) for how in ({}, {"num_beams": 2})]
    assert expected[0] != plain
    for each in (own, own.native):
        assert attach(each) is each and is_pruned(own) and is_pruned(own.native)
        assert [ask(*loaded[1], **how) for how in ({}, {"num_beams": 2})] == expected
    with torch.no_grad():
        one = [torch.tensor([[1, 7, -200, 20, 21]]), process_images(PICTURES[:1], processor, model.config)]
        logits = [each(one[0], images=one[1], image_sizes=[PICTURES[0].size]).logits[0, -1] for each in (model, own)]
    torch.testing.assert_close(logits[1][: len(logits[0])], logits[0], atol=1e-4, rtol=1e-4)
    remove_pruning(own)
    assert not is_pruned(own.native) and ask(*loaded[1]) == plain
