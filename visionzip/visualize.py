"""Pictures of what VisionZip keeps and merges, and of the attention that decides it (the paper's Figures 1, 2 and 5).

Two steps: :func:`inspect_tokens` (of :mod:`visionzip.token_map`) runs a model's vision tower and notes what happens to
each patch; the functions here draw the notes, one row per image, and return matplotlib figures
(``figure.savefig("tokens.png")``; no display is needed and no setting of matplotlib is touched):

    maps = inspect_tokens(visionzip(model, dominant=54, contextual=10), images)
    overview(maps).savefig("tokens.png")

Needs matplotlib: ``pip install "llava-visionzip[figures]"``. Nothing else in the package imports this file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from visionzip.drawing.tinting import dominant_pixels, group_pixels, overlay_pixels
from visionzip.token_map import TokenMap, inspect_tokens

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import PercentFormatter
except ImportError as error:
    raise ImportError(
        'visionzip.visualize draws with matplotlib, which is not installed: pip install "llava-visionzip[figures]"'
    ) from error

__all__ = [
    "TokenMap",
    "attention_histogram",
    "attention_map",
    "inspect_tokens",
    "layer_panel",
    "overview",
    "token_overlay",
]

_INK, _CURVE, _MARK = "#444444", "#4c72b0", "#d62728"  # captions, histograms, the scored layer and the budget
_COLUMNS = 8  # layers side by side: 24 of them make three rows


def overview(maps: Sequence[TokenMap]) -> Figure:
    """All of the method in four panels: image, attention, the dominant patches that stay, the groups that are merged.

    Args:
        maps: of a zipped model, one row each.

    Raises:
        ValueError: there are none, or the model was not zipped.
    """
    figure, rows = _rows(maps, width=13, height=4)
    for row, tokens in zip(rows, maps, strict=True):
        image, heat, kept, merged = row.subplots(1, 4)
        row.suptitle(_summary(tokens), fontsize=12, color=_INK)
        _draw_image(image, tokens)
        _draw_attention(heat, tokens)
        patches = int(tokens.zipped_roles.dominant.sum())
        title = _count(patches, f"{_kind(tokens)} patch")
        if tokens.keeps_cls:
            title = f"{_count(patches + 1, f'{_kind(tokens)} token')}: {_count(patches, 'patch')} + CLS"
        caption = f"they hold {tokens.kept_share:.0%} of the attention on patches"
        _draw(kept, tokens, dominant_pixels(tokens), title, caption)
        _draw_groups(merged, tokens)
    return figure


def attention_map(maps: Sequence[TokenMap]) -> Figure:
    """Each image beside the attention on its patches in the scored layer (Figures 2, 9 and 10), zipped or not.

    Colours follow the square root of the attention, here and in the other figures: most patches have so little that on
    a linear scale they could not be told from none.

    Args:
        maps: one row each.

    Raises:
        ValueError: there are none.
    """
    figure, rows = _rows(maps, width=8.2, height=3.9)
    for row, tokens in zip(rows, maps, strict=True):
        image, heat = row.subplots(1, 2)
        _draw_image(image, tokens)
        _draw_attention(heat, tokens)
        row.colorbar(heat.images[0], ax=heat, label="attention, mean over heads", shrink=0.85)
    return figure


def token_overlay(maps: Sequence[TokenMap]) -> Figure:
    """What is kept and what is merged in one picture: dominant patches as they are, the others tinted by their group.

    Args:
        maps: of a zipped model, one row each.

    Raises:
        ValueError: there are none, or the model was not zipped.
    """
    figure, rows = _rows(maps, width=5.6, height=6.2)
    for row, tokens in zip(rows, maps, strict=True):
        axes, role = row.subplots(), tokens.zipped_roles
        patches = int(role.dominant.sum())
        title = _count(patches, f"{_kind(tokens)} patch") + " (+ CLS)" * tokens.keeps_cls
        if len(role.targets):
            title += f" and, by colour, {_count(len(role.targets), 'contextual token')}"
        caption = _merged(tokens) + "; numbers: patches stood for" * (role.sizes is not None)
        _draw(axes, tokens, overlay_pixels(tokens), title, caption)
        _outline_targets(axes, tokens)
        if role.sizes is not None:
            _write_sizes(axes, tokens, role.sizes)
    return figure


def attention_histogram(maps: Sequence[TokenMap]) -> Figure:
    """How unequal attention is, over the patches of all images (Figure 2), zipped or not.

    Left its histogram, with a logarithmic number of patches; right the share of it that the k highest patches hold,
    mean over images.

    Args:
        maps: of one model; the more images, the smoother.

    Raises:
        ValueError: there are none, or they have different numbers of patches or budgets.
    """
    figure, (row,) = _rows(maps[:1], width=10, height=3.8)
    if len({(tokens.num_patches, tokens.num_top) for tokens in maps}) > 1:
        raise ValueError("the maps differ in patches or budget: draw those of one model, zipped once, together")
    patches, top = maps[0].num_patches, maps[0].num_top
    attention = torch.stack([tokens.attention[tokens.layer] for tokens in maps])
    histogram, shares = row.subplots(1, 2)

    histogram.hist(attention.flatten().numpy(), bins=50, log=True, color=_CURVE)
    histogram.axvline(float(attention.mean()), color=_INK, linestyle=":", label="if all patches had the same")
    histogram.set(xlabel="attention on a patch, mean over heads", ylabel="patches")
    histogram.set_title(f"{_source(maps[0])}, {_layer_name(maps[0])}, {_count(len(maps), 'image')}", fontsize=10)
    histogram.legend(frameon=False, fontsize=9)

    ranked = attention.sort(dim=1, descending=True).values.cumsum(dim=1)
    curve = torch.cat([torch.zeros(1), (ranked / ranked[:, -1:]).mean(dim=0)])
    shares.plot(range(patches + 1), curve.numpy(), color=_CURVE)
    shares.plot([0, patches], [0, 1], color=_INK, linestyle=":")
    shares.plot([top], [float(curve[top])], "o", color=_MARK)
    name = "a tenth of the patches"
    if maps[0].roles is not None and maps[0].roles.dominant.any():
        by_attention = _kind(maps[0]) == "dominant"  # else others than the highest ones are kept
        name = "the dominant patches" if by_attention else "as many of the highest patches as are kept"
    text = f"{name}, {top} of {patches},\nhold {float(curve[top]):.0%} of the attention"
    # beside the mark and below the curve, which is concave
    shares.annotate(text, (top, float(curve[top])), xytext=(0.97, 0.08), textcoords="axes fraction", ha="right")
    shares.set(xlabel="patches, highest attention first", ylabel="share of the attention", ylim=(0, 1.03))
    shares.set_title("how few patches hold it", fontsize=10)
    shares.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (histogram, shares):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def layer_panel(maps: Sequence[TokenMap]) -> Figure:
    """The attention map of every encoder layer, each on its own scale from 0 (Figures 5, 12 and 13), zipped or not.

    The scored layer is framed. Captions say what share the top patches of each layer hold: attention is spread over
    the image in early layers and gathers on a few patches in the middle.

    Args:
        maps: one block of rows each.

    Raises:
        ValueError: there are none.
    """
    layers = max((len(tokens.attention) for tokens in maps), default=1)
    lines = math.ceil(layers / _COLUMNS)
    columns = math.ceil(layers / lines)
    figure, rows = _rows(maps, width=13, height=lines * (min(13 / columns, 3.2) + 0.45) + 0.4)
    for row, tokens in zip(rows, maps, strict=True):
        held = f"below: the share of the top {_count(tokens.num_top, 'patch')}"
        row.suptitle(f"{_source(tokens)} in each layer, sqrt scale; {held}", fontsize=12, color=_INK)
        panels = row.subplots(lines, columns, squeeze=False).flatten()
        for axes in panels[len(tokens.attention) :]:
            axes.remove()
        for index, axes in enumerate(panels[: len(tokens.attention)]):
            scored = index == tokens.layer
            title = f"layer {index + 1}" + ", scored" * scored
            _draw(axes, tokens, _heat(tokens, index), title, f"{tokens.top_share(index):.0%}")
            if scored:
                axes.title.set(color=_MARK, weight="bold")
                axes.spines[:].set(color=_MARK, linewidth=3)
    return figure


def _heat(tokens: TokenMap, layer: int) -> Tensor:
    return tokens.attention[layer].reshape(tokens.grid)


# --- panels ---


def _rows(maps: Sequence[TokenMap], width: float, height: float) -> tuple[Figure, list[SubFigure]]:
    """A figure with one row per image; width and height of a row in inches."""
    if not maps:
        raise ValueError("there is nothing to draw: give the token maps of at least one image")
    figure = Figure(figsize=(width, height * len(maps)), dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    return figure, list(figure.subfigures(len(maps), 1, squeeze=False)[:, 0])


def _draw(axes: Axes, tokens: TokenMap, pixels: Tensor, title: str, caption: str) -> None:
    """Pixels (h, w, 3) or one value per patch (rows, columns), with the grid of patches as coordinates."""
    rows, columns = tokens.grid
    norm = PowerNorm(0.5, vmin=0) if pixels.ndim == 2 else None
    extent = (0, columns, rows, 0)
    axes.imshow(pixels.numpy(), extent=extent, cmap="inferno", norm=norm, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(caption, fontsize=9, color=_INK)
    axes.spines[:].set(color="#bbbbbb", linewidth=0.8)


def _draw_image(axes: Axes, tokens: TokenMap) -> None:
    height, width, _ = tokens.image.shape
    rows, columns = tokens.grid
    _draw(axes, tokens, tokens.image, "image", f"{width} x {height} pixels, {columns} x {rows} patches")


def _draw_attention(axes: Axes, tokens: TokenMap) -> None:
    heat = _heat(tokens, tokens.layer)
    caption = f"{_layer_name(tokens)}; brightest: {float(heat.max()):.1%}; sqrt scale"
    _draw(axes, tokens, heat, _source(tokens), caption)


def _draw_groups(axes: Axes, tokens: TokenMap) -> None:
    number = len(tokens.zipped_roles.targets)
    title = f"{_count(number, 'contextual token')}, by colour" if number else "no contextual tokens"
    _draw(axes, tokens, group_pixels(tokens), title, f"{_merged(tokens)}; grey: kept")
    _outline_targets(axes, tokens)


def _outline_targets(axes: Axes, tokens: TokenMap) -> None:
    for target in tokens.zipped_roles.targets.tolist():
        row, column = divmod(target, tokens.grid[1])
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="black", linewidth=1.6))


def _write_sizes(axes: Axes, tokens: TokenMap, sizes: Tensor) -> None:
    """How many patches each token stands for, in the middle of its own."""
    for patch in sizes.nonzero().flatten().tolist():
        row, column = divmod(patch, tokens.grid[1])
        outline = [withStroke(linewidth=2, foreground="white")]
        text = f"{sizes[patch]:g}"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, path_effects=outline)


def _kind(tokens: TokenMap) -> str:
    """Tokens that are kept by attention, beside others that are merged, are called dominant."""
    return "dominant" if tokens.method is None or "keys" in tokens.method.reads else "kept"


def _merged(tokens: TokenMap) -> str:
    role = tokens.zipped_roles
    rest = int((~role.dominant).sum())
    if not len(role.targets):
        return f"{_count(rest, 'patch')} dropped" if rest else "nothing is left over"
    return f"{_count(rest, 'patch')} merged; boxes: targets"


def _summary(tokens: TokenMap) -> str:
    before, after = tokens.num_patches + tokens.cls_token, tokens.num_kept
    read = f"{_count(tokens.num_patches, 'patch')}{' + CLS' if tokens.cls_token else ''}"
    by = "" if tokens.method is None or tokens.method.name == "visionzip" else f", {tokens.method.name}"
    return f"{read} become {_count(after, 'visual token')} ({after / before:.0%}){by}"


def _source(tokens: TokenMap) -> str:
    return "attention of the CLS token" if tokens.cls_token else "attention that patches receive"


def _layer_name(tokens: TokenMap) -> str:
    return f"layer {tokens.layer + 1} of {len(tokens.attention)}"


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number} {noun if number == 1 else plural}"
