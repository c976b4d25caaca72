"""What the families of transformers share: where VisionZip is plugged in, and what a family has to say.

Its models take ``mm_encoder_outputs``, what their own ``get_image_features`` returned, beside the ids. So a zipped
model encodes first: it runs the family's encoder, chooses tokens, shortens the runs of placeholders that the stock
processor wrote (:mod:`visionzip.integrations.placeholders`), and hands both to the stock forward, without the pixels.
``visionzip(model)`` puts these things on this one model object, and ``unzip`` takes them off; no class is changed and
no forward is typed again:

- a forward pre-hook on the model, and one on its base model for who calls that, which finds nothing left to do where
  the model has done it (:mod:`visionzip.integrations.calls`);
- ``generate``, which does the same once for the whole answer (:mod:`visionzip.integrations.generation`);
- ``get_image_features`` (and ``get_video_features``) of the base model, which return the chosen tokens;
- ``save_pretrained`` of LLaVA's families, which writes names of weights that inference engines read
  (:mod:`visionzip.integrations.saving`).

A family is a :class:`Family`: how long each run of placeholders is before and after (from shapes and the config alone,
nothing is computed), and how its encoder's tokens are made and chosen among. Everything else is here.

What ``generate`` returns begins with the user's own prompts. Everything else that a call returns has the length of the
short ones: logits, hidden states and attentions, and the KV cache. So a Trainer's ``compute_metrics``,
``compute_loss_func`` and ``label_smoothing_factor``, which compare logits with labels outside the model, do not fit.

Refused, each with an error that names the cure: pixels beside ``inputs_embeds`` or ``mm_encoder_outputs``, and features
of images in the latter; ``logits_to_keep`` as positions and ``cu_seq_lens_*``, which point at tokens of the long
prompts; masks of four dimensions beside pixels; a zipped ``assistant_model`` for prompts with images; a second turn
with the cache of the
first whose mask has the long prompts' length, or, in a batch of unequal prompts, that is padded anew or has a cache
that ``generate`` has not filled; encoders and projectors that the family's functions do not know.

To know: PEFT saves an adapter without the model's config, so say ``visionzip(model, …)`` again after loading one (a
merged model keeps its setting). ``model.forward(…)`` called by that name, as old versions of PEFT do, runs no hooks of
the model, so that ``labels`` are not shortened and the loss fails; ``model(…)`` it is. ``DataParallel`` runs the
encoder of all replicas on the first device. ``torch.compile(model, fullgraph=True)`` fails on prompts with images, as
it does without VisionZip; decoding steps are one graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip.config import VisionZipConfig
from visionzip.integrations.encoders import Encoder
from visionzip.integrations.held import Held
from visionzip.integrations.runs import Run
from visionzip.methods import positions_of

Arguments = Mapping[str, Any]
_STOCK: ContextVar[bool] = ContextVar("stock", default=False)


@dataclass
class DeepstackOutput(BaseModelOutputWithPooling):
    """As each of transformers' families with deepstack has one: ``deepstack_features`` of each layer that gets some."""

    deepstack_features: list[list[Tensor]] | None = None


class Encoded(NamedTuple):
    """The chosen visual tokens of all images, or all videos, of a call: T of each run of placeholders.

    Attributes:
        tokens: (T, hidden_size) of each run, as the language model gets them.
        places: (T,) int64 of each, from 0 in the run of the whole image: where the patch that a token keeps would be.
        sizes: (T,) float32 of each, patches that a token stands for; None without a size bias.
        hidden: what they were before the projector, as ``last_hidden_state`` of the model's own output.
        deepstack: for each layer of the language model that gets some, (T, hidden_size) of each run.
        stock: the model's own output, whose other fields are passed on; None where the family needs none.
    """

    tokens: list[Tensor]
    places: list[Tensor]
    sizes: list[Tensor] | None = None
    hidden: Tensor | None = None
    deepstack: list[list[Tensor]] | None = None
    stock: Any = None

    def of_runs(self, chosen: list[int]) -> Encoded:
        """Those of some runs alone."""

        def pick(values: list[Tensor]) -> list[Tensor]:
            return [values[index] for index in chosen]

        deepstack = self.deepstack and [pick(layer) for layer in self.deepstack]
        sizes = self.sizes and pick(self.sizes)
        return self._replace(tokens=pick(self.tokens), places=pick(self.places), sizes=sizes, deepstack=deepstack)

    def in_pieces(self, counts: list[int]) -> Encoded:
        """The same tokens and deepstack, so many runs of them joined to one; other values are left out."""

        def join(runs: list[Tensor]) -> list[Tensor]:
            values = iter(runs)
            return [torch.cat([next(values) for _ in range(count)]) for count in counts if count]

        deepstack = self.deepstack and list(map(join, self.deepstack))
        return self._replace(tokens=join(self.tokens), places=[], sizes=None, deepstack=deepstack)


@dataclass(frozen=True)
class Modality:
    """Images or videos of a family.

    Attributes:
        pixels: the argument of the model's forward that has them.
        runs: ``(base, config, arguments) -> [Run, …]``, one for each run of placeholders in order. ``base`` is the
            model without its head (``model.model``), ``arguments`` are the forward's by name, with the pixels. Checks
            the pixels' shape. Nothing may be computed that needs the pixels' values.
        encode: ``(base, config, arguments) -> Encoded``: runs the encoder and chooses; T of a run is its ``short``.
        stacked: the model takes ``pooler_output`` as one tensor (runs, T, hidden_size), not as a list.
        former_pixels: an older name of that argument, which the stock processor still uses.
        pooled_patches: ``(base) -> int``, patches of one frame that is pooled before it is compressed.
    """

    pixels: str
    runs: Callable[[nn.Module, VisionZipConfig, Arguments], list[Run]]
    encode: Callable[[nn.Module, VisionZipConfig, Arguments], Encoded]
    stacked: bool = False
    former_pixels: str | None = None
    pooled_patches: Callable[[nn.Module], int] | None = None

    def stacks(self, encoded: Encoded) -> bool:
        """Whether the model takes these tokens as one tensor."""
        return self.stacked

    def output(self, encoded: Encoded) -> BaseModelOutputWithPooling:
        """What the base model's own ``get_image_features`` would return of these tokens."""
        tokens = torch.stack(encoded.tokens) if self.stacked and encoded.tokens else encoded.tokens
        if encoded.deepstack is None:
            return BaseModelOutputWithPooling(last_hidden_state=encoded.hidden, pooler_output=tokens)
        return DeepstackOutput(
            last_hidden_state=encoded.hidden, pooler_output=tokens, deepstack_features=encoded.deepstack
        )


@dataclass(frozen=True)
class Family:
    """One model family of transformers.

    Attributes:
        modalities: by name, ``"image"`` and ``"video"``: the model's config has ``<name>_token_id`` and its base model
            ``get_<name>_features``.
        rotary: positions have three axes (M-RoPE).
    """

    modalities: Mapping[str, Modality]
    rotary: bool = False

    def check(self, model: nn.Module, config: VisionZipConfig) -> None:
        """Check that this is a model as the family's functions know it, and that the setting fits it.

        Raises:
            TypeError: the model is built differently, or is of another version of transformers.
            ValueError: the setting does not fit.

        Warns:
            UserWarning: of an untested version, of a budget that compresses nothing, and of an unfit layer.
        """
        check_attributes(model, ("model", "config", "generate", "generation_config"))
        check_attributes(model.model, [f"get_{name}_features" for name in self.modalities])
        check_attributes(model.config, [f"{name}_token_id" for name in self.modalities])
        taken = [*(modality.pixels for modality in self.modalities.values()), "mm_encoder_outputs"]
        if missing := [name for name in taken if name not in inspect.signature(type(model).forward).parameters]:
            raise TypeError(
                f"{type(model).__name__}.forward of transformers {transformers.__version__} takes no {missing}"
            )

    def default_config(self, model: nn.Module) -> VisionZipConfig:
        """The setting where the user gives none."""
        return VisionZipConfig()

    def encoders(self, model: nn.Module) -> dict[str, Encoder]:
        """What images and videos go through, for :mod:`visionzip.token_map`.

        Raises:
            ValueError: that module cannot look into this family's encoder.
        """
        raise ValueError(
            f"this reads encoders of a fixed size, CLIP and SigLIP, and {type(model).__name__} has another one: use "
            "visionzip.integrations.seam_maps.inspect_picture, or visionzip visualize"
        )

    def has_original_positions(self, config: VisionZipConfig) -> bool:
        """Whether kept tokens stand where their patches would be: what the setting says."""
        return positions_of(config) == "original"

    def positions(self, base: nn.Module, arguments: Arguments) -> Tensor | None:
        """Positions (3, B, L) of the prompts as they are; None if they are counted by the mask."""
        return None

    def with_axes(self, positions: Tensor) -> Tensor:
        """Positions of text (B, L) as the language model takes them."""
        return positions

    def note(self, base: nn.Module, held: Held, arguments: Arguments) -> None:
        """Leave with the base model what it keeps of a call's positions, if it does."""

    def language_model(self, model: nn.Module) -> nn.Module:
        """The text backbone."""
        return model.model.language_model

    def image_tokens(self, model: nn.Module) -> int | None:
        """Tokens of each image or tile before any is left out; None where it depends on the picture's size."""
        return None


@dataclass(eq=False)
class Zipped:
    """What hangs on a zipped model as ``model._visionzip``.

    Attributes:
        family: how it is zipped.
        config: the setting.
        handles: of the hooks.
        replaced: module and name of each function that was put on it, and what the user had put there before, if
            anything.
    """

    family: Family
    config: VisionZipConfig
    handles: list[RemovableHandle] = field(default_factory=list)
    replaced: list[tuple[nn.Module, str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.original = self.family.has_original_positions(self.config)
        modalities = self.family.modalities.values()
        names = [name for modality in modalities for name in (modality.pixels, modality.former_pixels)]
        self.pixels = tuple(filter(None, names))  # arguments that have images or videos


TESTED = "5.23"  # of transformers; other versions warn


def check_attributes(holder: Any, names: Iterable[str]) -> None:
    """Check that an object has attributes, whose names may be dotted.

    Raises:
        TypeError: some are missing.
    """
    if missing := [name for name in names if not _has(holder, name)]:
        raise TypeError(
            f"{type(holder).__name__} of transformers {transformers.__version__} has no {', '.join(missing)}: "
            f"VisionZip was tested with {TESTED}.x"
        )


def _has(holder: Any, name: str) -> bool:
    """``hasattr`` with dotted names."""
    try:
        attrgetter(name)(holder)
    except AttributeError:
        return False
    return True


def stock_features(base: nn.Module, name: str, given: Arguments) -> Any:
    """What the class's own ``get_image_features`` or ``get_video_features`` returns; one may call the other."""
    token = _STOCK.set(True)
    try:
        return getattr(type(base), f"get_{name}_features")(base, **given)
    finally:
        _STOCK.reset(token)


def runs_stock() -> bool:
    """Whether this is inside of :func:`stock_features`."""
    return _STOCK.get()
