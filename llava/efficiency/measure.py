"""Timing of one model with one method after the other: phases of ``generate``, FLOPs, and the KV cache.

What is timed is ``model.generate`` as users call it, from pixels and token ids to new tokens; hooks that wait for the
device mark where its phases begin and end. Everything that is compared takes turns in the same rounds.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llava.benchmark import time_interleaved
from llava.constants import IMAGE_TOKEN_INDEX
from llava.methods import METHODS, detach, per_tile
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.transformers_llava import TransformersLlava, generating_module
from visionzip import VisionZipConfig

# In the order in which they pass. "layout" is what lies between the projector and the language model.
PHASES = ("tower", "compression", "projector", "layout", "prefill", "decode")


@dataclass(frozen=True)
class Way:
    """A method at a budget of T tokens per image (None: all), perhaps with a compiled language model."""

    method: str
    tokens: int | None = None
    compiled: bool = False

    @property
    def name(self) -> str:
        """``vanilla``, ``visionzip-160``, ``visionzip-160-compiled``."""
        parts = [self.method, "" if self.tokens is None else str(self.tokens), "compiled" if self.compiled else ""]
        return "-".join(filter(None, parts))


@dataclass(frozen=True)
class Prompt:
    """What the model is asked, the same text for each of a batch of different images.

    Attributes:
        ids: (B, L) token ids with an image sentinel each.
        images: B of (3, e, e), or of (tiles, 3, e, e) for LLaVA-NeXT; noise.
        size: (width, height) of the images before they were cut into tiles.
        tiles: of each image.
    """

    ids: Tensor
    images: list[Tensor]
    size: tuple[int, int]
    tiles: int

    @property
    def text_tokens(self) -> int:
        """Tokens of each prompt that are not visual."""
        return self.ids.shape[1] - 1


@dataclass
class Timed:
    """One way's rounds.

    Attributes:
        phases: of each of :data:`PHASES`, its seconds in each round.
        totals: seconds of each round, from pixels to the last token.
        prompt_tokens: what reached the language model.
        cache_bytes: KV cache after the prefill.
        lengths: tokens in each layer's cache then.
        setting: VisionZip's, if it was on.
        new_tokens: of each answer.
    """

    phases: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PHASES})
    totals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cache_bytes: int = 0
    lengths: list[int] = field(default_factory=list)
    setting: VisionZipConfig | None = None
    new_tokens: int = 1

    @property
    def first_token(self) -> list[float]:
        """Seconds from pixels to the first token's logits, in each round."""
        before = [self.phases[name] for name in PHASES if name != "decode"]
        return [sum(each) for each in zip(*before, strict=True)]

    def visual_tokens(self, prompt: Prompt) -> int:
        """Visual tokens of each image that reached the language model."""
        return self.prompt_tokens - prompt.text_tokens


def make_prompt(model: Any, text_tokens: int, batch: int) -> Prompt:
    """Random pixels and words for a model; LLaVA-NeXT's images make a grid of 2 x 2 tiles where it has one."""
    tower, config = model.get_vision_tower(), model.config
    edge, device = tower.config.image_size, tower.device
    tiles, size = 1, (edge, edge)
    tiled = isinstance(model, TransformersLlava) and model.kind.tiles
    if tiled or str(getattr(config, "image_aspect_ratio", None)).startswith("anyres"):
        size = (2 * edge, 2 * edge)
        columns, rows = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, edge)
        tiles = columns * rows + 1
    shape = (3, edge, edge) if tiles == 1 else (tiles, 3, edge, edge)
    images = [torch.randn(shape, device=device, dtype=tower.dtype) for _ in range(batch)]
    words = torch.arange(3, config.vocab_size, device=device)
    if isinstance(model, TransformersLlava):  # its vocabulary has placeholders, wherever they are
        for name in ("image_token_id", "video_token_id"):
            words = words[words != getattr(model.native.config, name, -1)]
    words = words[torch.randint(len(words), (text_tokens,), device=device)]
    before = text_tokens * 35 // 60  # about where LLaVA's template has the image
    sentinel = words.new_tensor([IMAGE_TOKEN_INDEX])
    ids = torch.cat([words[:before], sentinel, words[before:]])
    return Prompt(ids.expand(batch, -1).contiguous(), images, size, tiles)


class Runner:
    """A model whose methods take turns.

    Args:
        model: a LLaVA with nothing on it.
        prompt: what it is asked.
        new_tokens: how many it answers.
    """

    def __init__(self, model: Any, prompt: Prompt, new_tokens: int) -> None:
        self.model, self.prompt, self.new_tokens = model, prompt, new_tokens
        if isinstance(model, TransformersLlava):  # timed as its users call it
            self._inputs = processor_inputs(model, prompt)
        else:
            sizes = [prompt.size] * len(prompt.images)
            self._inputs = {"inputs": prompt.ids, "images": prompt.images, "image_sizes": sizes}
        self._compiled: Callable[..., Any] | None = None

    def attach(self, way: Way) -> None:
        """Put a way on the model, in the place of the one that is there.

        Raises:
            ValueError: the budget leaves nothing to compress, or the method refuses it or the model.
        """
        self.detach()
        visual = self.prompt.tiles * self.model.get_vision_tower().num_patches
        if way.tokens is not None and way.tokens >= visual:
            raise ValueError(f"--tokens {way.tokens}: this model has {visual} visual tokens per image; give fewer")
        if way.tokens is not None:
            METHODS[way.method].attach(self.model, per_tile(way.tokens, self.prompt.tiles), 0)
        if way.compiled:
            backbone = self.model.get_model()
            self._compiled = self._compiled or torch.compile(backbone.forward)
            backbone.forward = self._compiled  # of this object; the class keeps its own

    def detach(self) -> None:
        """Leave the model as it was."""
        self.model.get_model().__dict__.pop("forward", None)
        detach(self.model)

    def once(self, timed: Timed) -> None:
        """Answer the prompt and add the times of its phases."""
        with marks(self.model) as watch:
            generating_module(self.model).generate(
                **self._inputs, do_sample=False, max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens
            )
            watch.mark("decode")
        for name in PHASES:
            timed.phases[name].append(watch.seconds(name))
        timed.new_tokens = self.new_tokens
        timed.totals.append(sum(watch.seconds(name) for name in PHASES))
        timed.prompt_tokens = watch.prompt_tokens
        timed.setting = self.model.get_vision_tower().visionzip
        timed.cache_bytes, timed.lengths = watch.cache_bytes, watch.lengths


class Watch:
    """The moments at which the phases of one call of ``generate`` ended."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends = {"start": self._now()}
        self.prompt_tokens = 0
        self.cache_bytes = 0
        self.lengths: list[int] = []

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def mark(self, phase: str) -> None:
        """The phase ends now. The first time counts; of the projector, which may run to choose, the last."""
        again = phase in ("compression", "projector") and "layout" not in self._ends
        if again or phase not in self._ends:
            self._ends[phase] = self._now()

    def seconds(self, phase: str) -> float:
        """From the end of the phase before to that of this one."""
        order = ["start", *PHASES]
        return self._ends[phase] - self._ends[order[order.index(phase) - 1]]

    def before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the language model's prefill."""
        if "layout" not in self._ends:
            embeds = kwargs.get("inputs_embeds")
            self.prompt_tokens = (kwargs["input_ids"] if embeds is None else embeds).shape[1]
            self.mark("layout")

    def after_forward(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """After it, with the cache that it filled."""
        if "prefill" not in self._ends:
            self.mark("prefill")
            layers = output.past_key_values.layers
            self.cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
            self.lengths = [layer.keys.shape[-2] for layer in layers]


@contextmanager
def marks(model: Any, tower: Any = None) -> Iterator[Watch]:
    """Watch one call of ``generate`` on the model, with whatever method is on it; None is the tower of images."""
    tower, module = tower or model.get_vision_tower(), generating_module(model)
    layers = tower.encoder.encoder.layers[: encoder_layers(model, tower)]
    projector = (model if isinstance(model, TransformersLlava) else model.get_model()).mm_projector
    watch = Watch(tower.device)
    handles = [
        layers[-1].register_forward_hook(lambda *_: watch.mark("tower")),
        projector.register_forward_pre_hook(lambda *_: watch.mark("compression")),
        projector.register_forward_hook(lambda *_: watch.mark("projector")),
        module.register_forward_pre_hook(watch.before_forward, with_kwargs=True),
        module.register_forward_hook(watch.after_forward),
    ]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def encoder_layers(model: Any, tower: Any = None) -> int:
    """How many layers of a tower (None: of images) a model runs, with what is on it now; stock transformers run all."""
    tower = tower or model.get_vision_tower()
    if tower.visionzip is not None:
        return tower.visionzip_layers(tower.visionzip)
    if isinstance(model, TransformersLlava):
        return tower.config.num_hidden_layers
    return tower.feature_layers(tower.select_layer)


def processor_inputs(model: TransformersLlava, prompt: Prompt) -> dict[str, Tensor]:
    """A prompt as transformers' processor makes it: as many placeholders as the model, not zipped, has visual tokens.

    Args:
        model: with nothing on it.
        prompt: all of whose images are of one size.
    """
    sizes = [prompt.size] * len(prompt.images)
    with torch.inference_mode():
        run = len(model.visual_tokens(prompt.images[:1], sizes[:1])[0])
    repeats = torch.where(prompt.ids[0] == IMAGE_TOKEN_INDEX, run, 1)
    ids = prompt.ids.masked_fill(prompt.ids == IMAGE_TOKEN_INDEX, model.native.config.image_token_id)
    ids = ids.repeat_interleave(repeats, dim=1)  # the same text in all rows
    pixels = model.pixel_inputs(prompt.images, sizes)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}


def time_ways(runner: Runner, ways: Sequence[Way], rounds: int, bare: bool) -> tuple[dict[Way, Timed], dict]:
    """Time some ways, and the bare language model at the same lengths, all interleaved after a warm-up each.

    Args:
        runner: the model and its prompt.
        ways: what to time.
        rounds: how often.
        bare: time the bare language model too.

    Returns:
        Each way's rounds, and the bare model's seconds in each round by the length of its prompt.

    Raises:
        ValueError: a method refuses the model, the budget or the batch; before anything is timed.
    """
    timed = {way: Timed() for way in ways}
    try:
        for way in ways:  # a pass of each: what a method refuses it refuses now, and the lengths are known
            runner.attach(way)
            with torch.inference_mode():
                runner.once(timed[way])
        by_name = {way.name: way for way in ways}
        todo: dict[str, Callable[[], Any]] = {name: partial(runner.once, timed[way]) for name, way in by_name.items()}
        lengths = sorted({each.prompt_tokens for each in timed.values()}) if bare else []
        plain = bare_language_model(runner.model) if lengths else None
        weight = runner.model.get_input_embeddings().weight
        for length in lengths:
            shape = (len(runner.prompt.ids), length, weight.shape[1])
            embeds = torch.randn(shape, device=weight.device, dtype=weight.dtype)
            mask = torch.ones(shape[:2], dtype=torch.long, device=weight.device)
            todo[f"bare-{length}"] = partial(
                plain, inputs_embeds=embeds, attention_mask=mask, use_cache=True, logits_to_keep=1
            )

        def before(name: str) -> None:
            if name in by_name:
                runner.attach(by_name[name])
            else:
                runner.detach()

        seconds = time_interleaved(todo, weight.device, rounds, "time", before)
    finally:
        runner.detach()
    for each in timed.values():  # the passes before the timed rounds
        each.totals = each.totals[2:]
        each.phases = {name: found[2:] for name, found in each.phases.items()}
    return timed, {length: seconds[f"bare-{length}"] for length in lengths}


def bare_language_model(model: Any) -> PreTrainedModel:
    """Transformers' own class of the language model inside a LLaVA, on the same weights."""
    if isinstance(model, TransformersLlava):
        with torch.device("meta"):
            bare = AutoModelForCausalLM.from_config(copy.deepcopy(model.native.config.get_text_config()))
        bare.model, bare.lm_head = model.get_model(), model.native.lm_head
        return bare.eval()
    own = next(
        base
        for base in type(model).__mro__
        if issubclass(base, PreTrainedModel) and not issubclass(base, LlavaMetaForCausalLM)
    )
    with torch.device("meta"):
        bare = own(copy.deepcopy(model.config))
    weights = model.state_dict()
    bare.load_state_dict({name: weights[name] for name in bare.state_dict()}, assign=True)
    bare.model.rotary_emb = model.get_model().rotary_emb  # its frequencies are in no state
    return bare.eval()
