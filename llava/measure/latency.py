"""Rows, table and plot of ``visionzip benchmark prefill`` and ``generate``: latency by phase and method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.commands.screen import say
from llava.measure.meters.processor import PicturePrompt
from llava.measure.meters.runner import Prompt, Watch, Way, encoder_layers
from llava.measure.meters.timing import Measurement
from llava.measure.report import Columns, Row, ratio, save_figure, show, spread
from visionzip.encoder import reads_of
from visionzip.flops import clip_module_flops, compression_flops, llama_module_flops, prefill_flops, projector_flops
from visionzip.methods import token_counts


def make_rows(
    model: Any,
    prompt: Prompt | PicturePrompt,
    timed: Mapping[Way, Measurement],
    bare: Mapping[int, Measurement],
    new_tokens: int,
) -> list[Row]:
    """Make a row of each way; seconds and ratios as median and quartiles over the rounds.

    Args:
        model: what was timed, with nothing on it now.
        prompt: what it was asked.
        timed: what each way took.
        bare: what the bare language model took in the same rounds, by the prompt's length; may be empty.
        new_tokens: of each answer.

    Returns:
        Of each way ``way, method, budget, compiled``, ``batch`` (prompts at a time), ``visual_tokens`` and
        ``prompt_tokens`` of each prompt as they reached the language model, ``layer_tokens`` (in each layer's KV cache
        after the prefill), ``kv_cache_mib`` then, and

        * ``seconds``: of each phase, ``first_token`` (pixels to the first logits) and ``total`` (to the last token);
        * ``speed_up``: over vanilla: ``prefill`` (the language model's forward, as the paper timed it),
          ``first_token``, ``total``, and ``decode`` where it took any; None where vanilla was not timed;
        * ``tokens_per_second``: of all answers together while they are decoded, after the first token; None for one;
        * ``flops``: operations by :mod:`visionzip.flops`: ``vision`` (tower, compression, projector),
          ``language_model`` (exact, by each layer's length; what a method spends on choosing inside it is left out),
          and ``paper``; None of a model with a processor of its own;
        * ``bare_speed_up``: what the bare language model gains between vanilla's length and this one's;
        * ``of_bare``: the prefill's speed-up as a share of that; None where layers differ in length.
    """
    vanilla = timed.get(Way("vanilla"))
    rows = []
    for way, own in timed.items():
        watch: Watch = own.last
        seconds = {**own.phases, "first_token": _first_token(own), "total": own.total}
        decoded = len(prompt.images) * (new_tokens - 1)
        rows.append(
            {
                "way": way.name,
                "method": way.method,
                "budget": way.tokens,
                "compiled": way.compiled,
                "batch": len(prompt.images),
                "visual_tokens": watch.prompt_tokens - prompt.text_tokens,
                "prompt_tokens": watch.prompt_tokens,
                "layer_tokens": watch.lengths,
                "seconds": {name: spread(found) for name, found in seconds.items()},
                "speed_up": vanilla and _speed_up(vanilla, own, decoded > 0),
                "tokens_per_second": spread([decoded / time for time in own.phases["decode"]]) if decoded else None,
                "kv_cache_mib": watch.cache_bytes / 2**20,
                "flops": _flops(model, prompt, watch) if isinstance(prompt, Prompt) else None,
                **_beside_bare(vanilla, own, bare),
            }
        )
    return rows


def _first_token(own: Measurement) -> list[float]:
    """From pixels to the first token's logits: all phases but the last."""
    return own.sum_of(*(phase for phase in own.phases if phase != "decode"))


def _speed_up(vanilla: Measurement, own: Measurement, decoded: bool) -> dict[str, dict[str, Any]]:
    found = {
        "prefill": ratio(vanilla.phases["prefill"], own.phases["prefill"]),
        "first_token": ratio(_first_token(vanilla), _first_token(own)),
        "total": ratio(vanilla.total, own.total),
    }
    return found | ({"decode": ratio(vanilla.phases["decode"], own.phases["decode"])} if decoded else {})


def _beside_bare(vanilla: Measurement | None, own: Measurement, bare: Mapping[int, Measurement]) -> Row:
    found = {"bare_speed_up": None, "of_bare": None}
    if vanilla is None or not bare:
        return found
    slow, fast = (bare[each.last.prompt_tokens].total for each in (vanilla, own))
    found["bare_speed_up"] = ratio(slow, fast)
    if set(own.last.lengths) == {own.last.prompt_tokens}:
        rounds = zip(vanilla.phases["prefill"], own.phases["prefill"], slow, fast, strict=True)
        found["of_bare"] = spread([(a / b) / (c / d) for a, b, c, d in rounds])
    return found


def _flops(model: Any, prompt: Prompt, own: Watch) -> dict[str, int]:
    config, tower = model.config, model.get_vision_tower()
    images = prompt.tiles * len(prompt.images)
    zipped = own.setting
    layers = encoder_layers(model) if zipped is None else tower.visionzip_layers(zipped)
    vision = sum(clip_module_flops(tower.config, images, layers).values())
    tokens = images * tower.num_patches
    if zipped is not None:
        counts = token_counts(zipped, tower.num_patches_per_side**2, tower.cls_token)
        reads, patches = reads_of(zipped), images * tower.num_patches_per_side**2
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


def print_latency(rows: Sequence[Row], title: str) -> None:
    """Print the rows, and below them what the language model gains of what the bare one does."""
    whole = {row["batch"]: row for row in rows if row["way"] == "vanilla"}

    def gain(name: str, key: str) -> tuple[str, Any]:
        return name, lambda row: f"{row['speed_up'][key]['median']:.2f}" if row["speed_up"] else ""

    def fewer_flops(row: Row) -> str:
        base = whole.get(row["batch"])
        return f"{base['flops']['language_model'] / row['flops']['language_model']:.2f}" if base else ""

    times = [(name.replace("_", " "), name) for name in rows[0]["seconds"]]
    decoding = [gain("decode x", "decode"), ("tokens/s", lambda row: f"{row['tokens_per_second']['median']:.1f}")]
    columns: Columns = [
        ("batch", lambda row: str(row["batch"])),
        ("way", lambda row: row["way"]),
        ("visual", lambda row: str(row["visual_tokens"])),
        *((name, lambda row, key=key: f"{1e3 * row['seconds'][key]['median']:.1f}") for name, key in times),
        *(
            gain(name, key)
            for name, key in (("prefill x", "prefill"), ("first x", "first_token"), ("total x", "total"))
        ),
        *(decoding if rows[0]["tokens_per_second"] else []),
        *([("FLOPs x", fewer_flops)] if rows[0]["flops"] else []),
        ("KV MiB", lambda row: f"{row['kv_cache_mib']:.1f}"),
    ]
    show(title, columns, rows, names=2)
    say("milliseconds, medians; x: times faster than vanilla, median over rounds; first token: from pixels.")
    for row in rows:
        if row["of_bare"] is not None and row["way"] != "vanilla":
            low, high = row["of_bare"]["quartiles"]
            say(
                f"{row['way']}, batch {row['batch']}: prefill {row['speed_up']['prefill']['median']:.2f} times faster, "
                f"the bare language model {row['bare_speed_up']['median']:.2f} times: {row['of_bare']['median']:.1%} "
                f"of it (quartiles {low:.1%}-{high:.1%})"
            )


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Plot latency against visual tokens: of the prefill, and from pixels to the first token; smallest batch size.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    batch = min(row["batch"] for row in rows)
    rows = sorted((row for row in rows if row["batch"] == batch), key=_shown)
    figure = Figure(figsize=(9, 4), layout="constrained")
    kinds = dict.fromkeys((row["method"], row["compiled"]) for row in rows if row["method"] != "vanilla")
    names = {"prefill": "prefill of the language model", "first_token": "pixels to first token"}
    panels = figure.subplots(1, 2, sharex=True)
    for panel, (key, name) in zip(panels, names.items(), strict=True):
        for method, compiled in kinds or {("vanilla", False): None}:
            points = [row for row in rows if (row["method"], row["compiled"]) in {(method, compiled), _VANILLA}]
            medians = [1e3 * row["seconds"][key]["median"] for row in points]
            bounds = [[1e3 * bound for bound in row["seconds"][key]["quartiles"]] for row in points]
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


_VANILLA = ("vanilla", False)


def _shown(row: Row) -> int:
    return row["visual_tokens"] if row["budget"] is None else row["budget"]
