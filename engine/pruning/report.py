"""The record in `pruning.json`, and the table that is printed."""

from __future__ import annotations

from typing import Any

from engine.config.choices import Metric
from engine.model_sources.pruning_record import HeadMap, head_map
from engine.pruning.scores import LayerScores
from engine.pruning.selection import Rules, Selection

LOADS_IN = (
    "this engine alone: config.json gives the number of heads layer by layer, in lists that no "
    "other program reads"
)

MASKED_IN = (
    "this engine alone: the mask lies beside the weights, and other programs run the heads that it "
    "takes out"
)


def describe(
    layers: list[LayerScores], rules: Rules, choice: Selection, metric: Metric, mode: str
) -> dict[str, Any]:
    """The record without what only a written model has: source and pruned heads."""
    return {
        "mode": mode,
        "metric": metric,
        "fraction": rules.fraction,
        "scope": rules.scope,
        "granularity": rules.granularity,
        "min_heads": rules.min_heads,
        "min_kv_heads": rules.min_kv_heads,
        "protected": sorted(rules.protected),
        "units": {"before": choice.before, "asked": choice.asked, "removed": choice.removed},
        "heads": {
            "before": sum(len(s.active) for s in layers),
            "removed": choice.removed_heads,
        },
        "chosen": head_map(choice.heads),
        "layers": [_layer(s, choice) for s in layers],
    }


def _layer(scores: LayerScores, choice: Selection) -> dict[str, Any]:
    heads = scores.heads
    chosen = set(choice.heads.get(heads.layer, ()))
    left = scores.active - chosen
    return {
        "layer": heads.layer,
        "heads": heads.heads,
        "kv_heads": heads.kv_heads,
        "head_dim": heads.head_dim,
        "scores": [float(value) for value in scores.values],
        "pruned_before": sorted(scores.pruned),
        "asked": choice.quotas.get(heads.layer),
        "pruned": sorted(chosen),
        "left": len(left),
        "kv_heads_left": len(heads.groups(left)),
    }


def all_pruned(layers: list[LayerScores], chosen: HeadMap) -> HeadMap:
    """The heads that are pruned once `chosen` are: these and those that were before."""
    heads = {s.heads.layer: s.pruned | set(chosen.get(s.heads.layer, ())) for s in layers}
    return {layer: tuple(sorted(pruned)) for layer, pruned in heads.items() if pruned}


def _loses_most(layer: dict[str, Any]) -> bool:
    return bool(2 * len(layer["pruned"]) > layer["heads"] - len(layer["pruned_before"]))


_NAMES = {"mlp": "channels", "experts": "experts"}


def _parts(record: dict[str, Any]) -> str:
    """The record of channels or layers as text."""
    lines = []
    for part in record["parts"]:
        told = f"layer {part['layer']:>3}"
        if "channels" in part:
            told += f"  {len(part['pruned'])} of {part['channels']} channels"
        if "experts" in part:
            told += f"  {len(part['pruned'])} of {part['experts']} experts"
        told += "  mass" if "experts" in part else "  error"
        told += f" {part['error_removed']:.4f}"
        if "error_repaired" in part:
            told += f", repaired {part['error_repaired']:.4f}"
        lines.append(told)
    lines += [
        f"layer {one['layer']:>3} goes ({one['score']:.4f})" for one in record.get("order", ())
    ]
    units, sizes = record["units"], record["parameters"]
    kind = "layers" if record["what"] == "layers" else f"{_NAMES[record['what']]} of every layer"
    share = 100 * (1 - sizes["after"] / sizes["before"])
    lines.append(
        f"Asked for {units['asked']} of {units['before']} {kind}, pruned {units['removed']} "
        f"({record['metric']}, {record['mode']}): {sizes['after']:,} of {sizes['before']:,} "
        f"parameters are left, {share:.2f} % fewer."
    )
    return "\n".join(lines)


def _budget(record: dict[str, Any]) -> str:
    """The record of a budget for several parts as text."""
    budget, sizes = record["budget"], record["parameters"]
    unit = "parameters" if budget["kind"] == "params" else "ms"
    before, asked, after = (
        f"{budget[name]:,.0f}" if unit == "parameters" else f"{budget[name]:.3f}"
        for name in ("before", "asked", "after")
    )
    lines = [table(stage) for stage in record["stages"]]
    for part, losses in record["losses"].items():
        told = ", ".join(f"{loss:.4f} without {count}" for count, loss in losses.items())
        lines.append(f"{part}: {told} (nats a token); {record['counts'][part]} go")
    lines.append(f"{after} {unit} are left of {before}, at most {asked} were asked for.")
    if "timed" in budget:
        took, takes = budget["timed"]["before"], budget["timed"]["after"]
        lines.append(
            f"The whole model took {took:.3f} ms for that pass and takes {takes:.3f} ms, "
            f"{100 * takes / took:.1f} %."
        )
    lines.append(f"{sizes['after']:,} of {sizes['before']:,} parameters are left.")
    return "\n".join(lines)


def table(record: dict[str, Any]) -> str:
    """The record as text: a line a layer, and the totals."""
    if "stages" in record:
        return _budget(record)
    if "parts" in record:
        return _parts(record)
    head = f"{'layer':>5} {'heads':>5} {'asked':>5} {'pruned':>6} {'left':>4} {'kv left':>7}  which"
    lines = [head]
    for layer in record["layers"]:
        before = layer["heads"] - len(layer["pruned_before"])
        asked = "" if layer["asked"] is None else str(layer["asked"])
        which = " ".join(map(str, layer["pruned"]))
        lines.append(
            f"{layer['layer']:>5} {before:>5} {asked:>5} {len(layer['pruned']):>6} "
            f"{layer['left']:>4} {layer['kv_heads_left']:>7}  {which}".rstrip()
        )
    units = record["units"]
    kind = "heads" if record["granularity"] == "head" else "key/value groups"
    total = f"Asked for {units['asked']} of {units['before']} {kind}, pruned {units['removed']}"
    if record["granularity"] != "head":
        total += f" with {record['heads']['removed']} heads"
    done = units["removed"] / units["before"]
    lines.append(f"{total}: {100 * done:.2f} % ({record['metric']}, {record['mode']}).")
    if units["removed"] < units["asked"]:
        lines.append(f"Fewer than asked by {units['asked'] - units['removed']}.")
    emptied = [str(layer["layer"]) for layer in record["layers"] if _loses_most(layer)]
    free = record["mode"] != "structural" or record.get("per_layer", False)
    if emptied and record["scope"] == "global" and free:
        lines.append(
            f"More than half of the heads of layer {', '.join(emptied)} go; --scope layer or a "
            "larger --min-heads spreads them over all layers."
        )
    if "loads_in" in record:
        lines.append(f"Loads in {record['loads_in']}.")
    return "\n".join(lines)
