"""From timings to figures: rows for JSON, a table, and a plot of latency against visual tokens."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llava import screen
from llava.efficiency.measure import PHASES, Prompt, Timed, Way, encoder_layers
from llava.files import write_atomically
from visionzip.flops import clip_module_flops, compression_flops, llama_module_flops, prefill_flops, projector_flops
from visionzip.methods import method_of, token_counts

Spread = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One way at one batch size; seconds and ratios as median and quartiles over the rounds.

    Attributes:
        way, method, budget, compiled: what it is.
        batch: prompts at a time.
        visual_tokens, prompt_tokens: of each prompt, as they reached the language model.
        layer_tokens: tokens in each layer's KV cache after the prefill.
        seconds: of each phase, ``first_token`` (pixels to the first logits) and ``total`` (to the last token).
        speed_up: over vanilla in the same rounds: ``prefill`` (the language model's forward, as the paper timed it),
            ``first_token``, ``total``, and ``decode`` where it took any; None where vanilla was not timed.
        tokens_per_second: of all answers together while they are decoded, after the first token; None for one token.
        kv_cache_mib: KV cache after the prefill.
        flops: operations by :mod:`visionzip.flops`: ``vision`` (tower, compression, projector), ``language_model``
            (exact, by each layer's length; what a method spends on choosing inside it is left out), and ``paper``.
        bare_speed_up: what the bare language model gains between vanilla's length and this one's, in the same rounds.
        of_bare: the prefill's speed-up as a share of that; None where layers differ in length.
    """

    way: str
    method: str
    budget: int | None
    compiled: bool
    batch: int
    visual_tokens: int
    prompt_tokens: int
    layer_tokens: list[int]
    seconds: dict[str, Spread]
    speed_up: dict[str, Spread] | None
    tokens_per_second: Spread | None
    kv_cache_mib: float
    flops: dict[str, int]
    bare_speed_up: Spread | None
    of_bare: Spread | None


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """How many times faster, round by round."""
    return spread([one / other for one, other in zip(slow, fast, strict=True)])


def make_rows(model: Any, prompt: Prompt, timed: Mapping[Way, Timed], bare: Mapping[int, Sequence[float]]) -> list[Row]:
    """A row for each way.

    Args:
        model: what was timed, with nothing on it now.
        prompt: what it was asked.
        timed: each way's rounds.
        bare: seconds of the bare language model in the same rounds, by the prompt's length; may be empty.
    """
    vanilla = timed.get(Way("vanilla"))
    rows = []
    for way, own in timed.items():
        seconds = {**own.phases, "first_token": own.first_token, "total": own.totals}
        speed_up = bare_speed_up = of_bare = rate = None
        decoded = len(prompt.images) * (own.new_tokens - 1)
        if decoded:
            rate = spread([decoded / elapsed for elapsed in own.phases["decode"]])
        if vanilla is not None:
            prefills = ratio(vanilla.phases["prefill"], own.phases["prefill"])
            speed_up = {
                "prefill": prefills,
                "first_token": ratio(vanilla.first_token, own.first_token),
                "total": ratio(vanilla.totals, own.totals),
            }
            if decoded:
                speed_up["decode"] = ratio(vanilla.phases["decode"], own.phases["decode"])
            if bare:
                bare_speed_up = ratio(bare[vanilla.prompt_tokens], bare[own.prompt_tokens])
            if bare and set(own.lengths) == {own.prompt_tokens}:
                slow, fast = bare[vanilla.prompt_tokens], bare[own.prompt_tokens]
                rounds = zip(vanilla.phases["prefill"], own.phases["prefill"], slow, fast, strict=True)
                of_bare = spread([(a / b) / (c / d) for a, b, c, d in rounds])
        rows.append(
            Row(
                way=way.name,
                method=way.method,
                budget=way.tokens,
                compiled=way.compiled,
                batch=len(prompt.images),
                visual_tokens=own.visual_tokens(prompt),
                prompt_tokens=own.prompt_tokens,
                layer_tokens=own.lengths,
                seconds={name: spread(found) for name, found in seconds.items()},
                speed_up=speed_up,
                tokens_per_second=rate,
                kv_cache_mib=own.cache_bytes / 2**20,
                flops=_flops(model, prompt, own),
                bare_speed_up=bare_speed_up,
                of_bare=of_bare,
            )
        )
    return rows


def _flops(model: Any, prompt: Prompt, own: Timed) -> dict[str, int]:
    config, tower = model.config, model.get_vision_tower()
    images = prompt.tiles * len(prompt.images)
    zipped = own.setting
    layers = encoder_layers(model) if zipped is None else tower.visionzip_layers(zipped)
    vision = sum(clip_module_flops(tower.config, images, layers).values())
    tokens = images * tower.num_patches
    if zipped is not None:
        counts = token_counts(zipped, tower.num_patches_per_side**2, tower.cls_token)
        reads, patches = method_of(zipped).reads, images * tower.num_patches_per_side**2
        extra = compression_flops(tower.config, images, *counts[:2])
        vision += extra["score"] if "scores" in reads else 0
        vision += extra["similarity"] + extra["merge"] if "keys" in reads else 0
        vision += projector_flops(tower.hidden_size, config.hidden_size, patches) if "projected" in reads else 0
        tokens = images * counts.total
    vision += projector_flops(tower.hidden_size, config.hidden_size, tokens)
    # The paper's formula layer by layer, which is the formula itself where all layers see the same.
    paper = sum(prefill_flops(length, 1, config.hidden_size, config.intermediate_size) for length in own.lengths)
    language_model = sum(llama_module_flops(config, own.lengths).values())
    batch = len(prompt.images)
    return {"vision": vision, "language_model": batch * language_model, "paper": batch * paper}


def print_table(rows: Sequence[Row], title: str) -> None:
    """Print the rows, and below them what the language model gains of what the bare one does."""
    whole = {row.batch: row for row in rows if row.way == "vanilla"}
    answers = any(row.tokens_per_second is not None for row in rows)
    columns = ["batch", "way", "visual", *PHASES, "first token", "total", "prefill x", "first x", "total x"]
    columns += [*(("decode x", "tokens/s") if answers else ()), "FLOPs x", "KV MiB"]
    lines = []
    for row in rows:
        times = [f"{1e3 * row.seconds[name]['median']:.1f}" for name in (*PHASES, "first_token", "total")]
        keys = _GAINS if answers else _GAINS[:-1]
        gains = ["" if row.speed_up is None else f"{row.speed_up[key]['median']:.2f}" for key in keys]
        gains += [f"{row.tokens_per_second['median']:.1f}"] if answers else []
        base = whole.get(row.batch)
        flops = "" if base is None else f"{base.flops['language_model'] / row.flops['language_model']:.2f}"
        kv_cache = f"{row.kv_cache_mib:.1f}"
        lines.append((str(row.batch), row.way, str(row.visual_tokens), *times, *gains, flops, kv_cache))
    screen.print_table(title, columns, lines, left=("way",), names=2)
    screen.say("milliseconds, medians; x: times faster than vanilla, median over rounds; first token: from pixels.")
    for row in rows:
        if row.of_bare is not None and row.way != "vanilla":
            low, high = row.of_bare["quartiles"]
            screen.say(
                f"{row.way}, batch {row.batch}: prefill {row.speed_up['prefill']['median']:.2f} times faster, the bare "
                f"language model {row.bare_speed_up['median']:.2f} times: {row.of_bare['median']:.1%} of it "
                f"(quartiles {low:.1%}-{high:.1%})"
            )


_GAINS = ("prefill", "first_token", "total", "decode")


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Latency against visual tokens: of the prefill, and from pixels to the first token; the smallest batch size.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    batch = min(row.batch for row in rows)
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    whole = [row for row in rows if row.batch == batch and row.method == "vanilla"]
    kinds = dict.fromkeys((row.method, row.compiled) for row in rows if row.batch == batch and row.method != "vanilla")
    for panel, (key, name) in zip(
        panels, (("prefill", "prefill of the language model"), ("first_token", "pixels to first token")), strict=True
    ):
        for method, compiled in kinds or {("vanilla", False): None}:
            found = [row for row in rows if row.batch == batch and (row.method, row.compiled) == (method, compiled)]
            points = sorted({id(row): row for row in [*found, *whole]}.values(), key=_shown)
            medians = [1e3 * row.seconds[key]["median"] for row in points]
            bounds = [[1e3 * bound for bound in row.seconds[key]["quartiles"]] for row in points]
            errors = [
                [middle - low for middle, (low, _) in zip(medians, bounds, strict=True)],
                [high - middle for middle, (_, high) in zip(medians, bounds, strict=True)],
            ]
            label = f"{method}, compiled" if compiled else method
            panel.errorbar([_shown(row) for row in points], medians, errors, marker="o", capsize=3, label=label)
        panel.set(title=name, xlabel="visual tokens (budget)", ylabel="ms", ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib's, whole or not at all."""
    write_atomically(path, partial(figure.savefig, format=path.suffix[1:]))


def _shown(row: Row) -> int:
    return row.visual_tokens if row.budget is None else row.budget
