"""Timing of ``model.generate`` as users call it, with one method after the other; hooks mark where its phases end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llava.constants import IMAGE_TOKEN_INDEX
from llava.measure.meters.timing import Clock, Measurement, time_interleaved
from llava.methods import METHODS, detach, per_tile
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.stock.transformers_llava import TransformersLlava, generating_module
from visionzip import VisionZipConfig

# In the order in which they pass. "layout" is what lies between the projector and the language model.
PHASES = ("tower", "compression", "projector", "layout", "prefill", "decode")
FIRST_TOKEN = PHASES[:-1]  # from pixels to the first token's logits


@dataclass(frozen=True)
class Way:
    """A method, at a budget of T tokens per image or on some frames of a video.

    Attributes:
        method: its name.
        tokens: T; None where it is all, or the method's own default.
        compiled: whether the language model is.
        frames: of a video; None for images.
    """

    method: str
    tokens: int | None = None
    compiled: bool = False
    frames: int | None = None

    @property
    def name(self) -> str:
        """``vanilla``, ``visionzip-160``, ``visionzip-160-compiled``, or of a video's frames ``visionzip-120``."""
        numbers = [str(number) for number in (self.tokens, self.frames) if number is not None]
        return "-".join([self.method, *numbers, *(["compiled"] if self.compiled else [])])


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

    def once(self) -> Watch:
        """Answer the prompt; its phases are marked."""
        with marks(self.model) as watch:
            generating_module(self.model).generate(
                **self._inputs, do_sample=False, max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens
            )
            watch.mark("decode")
        return watch


class Watch(Clock):
    """The moments at which the phases of one call of ``generate`` end, and what the language model was given.

    Attributes:
        setting: VisionZip's, if it was on.
        prompt_tokens: what reached the language model.
        cache_bytes: KV cache after the prefill.
        lengths: tokens in each layer's cache then.
    """

    def __init__(self, device: torch.device, setting: VisionZipConfig | None) -> None:
        super().__init__(device)
        self.setting = setting
        self.prompt_tokens = 0
        self.cache_bytes = 0
        self.lengths: list[int] = []

    def mark(self, phase: str) -> None:
        """End a phase now. The first time counts; of the projector, which may run to choose, the last."""
        again = phase in ("compression", "projector") and "layout" not in self.ends
        if again or phase not in self.ends:
            super().mark(phase)

    def before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the prompt's length before the language model's prefill."""
        if "layout" not in self.ends:
            embeds = kwargs.get("inputs_embeds")
            self.prompt_tokens = (kwargs["input_ids"] if embeds is None else embeds).shape[1]
            self.mark("layout")

    def after_forward(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Note the cache that the prefill filled."""
        if "prefill" not in self.ends:
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
    watch = Watch(tower.device, tower.visionzip)
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
    """Make a prompt as transformers' processor does: as many placeholders as the unzipped model has visual tokens."""
    sizes = [prompt.size] * len(prompt.images)
    with torch.inference_mode():
        run = len(model.visual_tokens(prompt.images[:1], sizes[:1])[0])
    repeats = torch.where(prompt.ids[0] == IMAGE_TOKEN_INDEX, run, 1)
    ids = prompt.ids.masked_fill(prompt.ids == IMAGE_TOKEN_INDEX, model.native.config.image_token_id)
    ids = ids.repeat_interleave(repeats, dim=1)  # the same text in all rows
    pixels = model.pixel_inputs(prompt.images, sizes)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}


def time_ways(
    runner: Runner, ways: Sequence[Way], rounds: int, bare: bool
) -> tuple[dict[Way, Measurement], dict[int, Measurement]]:
    """Time some ways, and the bare language model at the same lengths, all interleaved after a warm-up each.

    Args:
        runner: the model and its prompt.
        ways: what to time.
        rounds: how often.
        bare: time the bare language model too.

    Returns:
        What each way took, with a :class:`Watch` as its last pass; and what the bare model took, by the length of its
        prompt.

    Raises:
        ValueError: a method refuses the model, the budget or the batch; before anything is timed.
    """
    try:
        lengths = set()
        for way in ways:  # a pass of each: what a method refuses it refuses now
            runner.attach(way)
            with torch.inference_mode():
                lengths.add(runner.once().prompt_tokens)
        by_name = {way.name: way for way in ways}
        todo: dict[str, Callable[[], Any]] = dict.fromkeys(by_name, runner.once)
        plain = {f"bare-{length}": length for length in sorted(lengths)} if bare else {}
        runner.detach()
        model = bare_language_model(runner.model) if plain else None
        todo |= {name: partial(model, **_bare_prompt(runner, length)) for name, length in plain.items()}

        def before(name: str) -> None:
            runner.attach(by_name[name]) if name in by_name else runner.detach()

        device = runner.model.get_input_embeddings().weight.device
        measured = time_interleaved(todo, device, rounds, "time", before)
    finally:
        runner.detach()
    timed = {way: measured[name] for name, way in by_name.items()}
    return timed, {length: measured[name] for name, length in plain.items()}


def _bare_prompt(runner: Runner, length: int) -> dict[str, Any]:
    weight = runner.model.get_input_embeddings().weight
    shape = (len(runner.prompt.ids), length, weight.shape[1])
    embeds = torch.randn(shape, device=weight.device, dtype=weight.dtype)
    mask = torch.ones(shape[:2], dtype=torch.long, device=weight.device)
    return {"inputs_embeds": embeds, "attention_mask": mask, "use_cache": True, "logits_to_keep": 1}


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
