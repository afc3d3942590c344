"""Choose the least important heads, exactly as many as asked for.

n = fraction x (heads that still do something), rounded to the nearest whole number, over all layers
that have attention, protected ones included. Heads are taken in ascending order of their score; one
is passed over where its layer is protected or would be left with too few heads or key/value heads.
What is then missing from n is a shortfall, and an error unless it is allowed.

With scope "layer" each unprotected layer gives its share of n, the remainders going to the layers
that are closest to one more. With granularity "kv-group" what is taken is a key/value head with all
query heads that read it, and its score is their sum.

A uniform choice takes the same number out of every key/value group of every layer (or the same
number of groups), so that one number of heads describes the whole model. A regular choice lets
layers differ, and leaves every key/value head of a layer with the same number of query heads
(`engine.pruning.regular_groups`). Both cut weights out, so they count every head that the weights
have: what does nothing goes first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain

from engine.config.choices import Granularity, Scope
from engine.errors import ConfigError
from engine.model_sources.pruning_record import HeadMap
from engine.pruning.regular_groups import Cut, cheapest, regular_cuts
from engine.pruning.scores import LayerScores


@dataclass(frozen=True)
class Rules:
    """What was asked for, and what must stay. Raises `ConfigError` for what makes no sense."""

    fraction: float
    scope: Scope = "global"
    granularity: Granularity = "head"
    min_heads: int = 1
    min_kv_heads: int = 1
    protected: frozenset[int] = frozenset()
    uniform: bool = False
    regular: bool = False
    allow_shortfall: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ConfigError(
                f"--fraction is {self.fraction:g}; expected a number between 0 and 1, such as 0.2."
            )
        if self.min_heads < 1 or self.min_kv_heads < 1:
            raise ConfigError("--min-heads and --min-kv-heads must be at least 1.")
        if self.uniform and self.protected:
            raise ConfigError(
                "--mode structural takes the same heads out of every layer, so no layer can be "
                "protected. Use --per-layer or --mode zero, or leave out --protect."
            )


@dataclass(frozen=True)
class Selection:
    """The choice: `heads` to prune per layer; of `before` units `asked` were to go, `removed` do.

    A unit is a head, or with granularity "kv-group" a key/value head and what reads it. `quotas`
    are the units each layer was asked for, with scope "layer" or a uniform choice.
    """

    heads: HeadMap
    before: int
    asked: int
    removed: int
    quotas: dict[int, int]

    @property
    def removed_heads(self) -> int:
        """Query heads that go."""
        return sum(map(len, self.heads.values()))


@dataclass(frozen=True)
class _Unit:
    """What is taken as a whole: a head, or the active heads of a group."""

    score: float
    layer: int
    heads: tuple[int, ...]


def select(layers: Sequence[LayerScores], rules: Rules) -> Selection:
    """Choose the heads to prune.

    Raises `ConfigError` for a fraction below one head, for a model with nothing left to prune, and
    for a shortfall that is not allowed.
    """
    if rules.uniform:
        return _uniform(layers, rules)
    if rules.regular:
        return _regular(layers, rules)
    units = {s.heads.layer: _units(s, rules.granularity) for s in layers}
    total = sum(map(len, units.values()))
    count = wanted_units(rules.fraction, total)
    state = {s.heads.layer: _LayerState(s, rules) for s in layers}
    quotas: dict[int, int] = {}
    if rules.scope == "layer":
        quotas = _quotas(units, rules, count)
        for layer, quota in quotas.items():
            _take(units[layer], state, quota)
    else:
        _take(_sorted(chain.from_iterable(units.values())), state, count)
    removed = sum(layer.taken for layer in state.values())
    if removed < count:
        _shortfall(layers, rules, state, count, removed)
    heads = {layer: tuple(sorted(s.pruned)) for layer, s in state.items() if s.pruned}
    return Selection(heads, total, count, removed, quotas)


class _LayerState:
    """What is left of a layer while heads are taken."""

    def __init__(self, scores: LayerScores, rules: Rules) -> None:
        self._heads, self._rules = scores.heads, rules
        self.active = scores.active
        self.pruned: set[int] = set()
        self.taken = 0

    def take(self, unit: _Unit) -> bool:
        """Prune `unit` if the rules let it go."""
        rules, left = self._rules, self.active - set(unit.heads)
        if unit.layer in rules.protected or len(left) < rules.min_heads:
            return False
        if len(self._heads.groups(left)) < rules.min_kv_heads:
            return False
        self.active = left
        self.pruned |= set(unit.heads)
        self.taken += 1
        return True


def _take(units: Iterable[_Unit], state: dict[int, _LayerState], count: int) -> None:
    taken = 0
    for unit in units:
        if taken == count:
            return
        taken += state[unit.layer].take(unit)


def _units(scores: LayerScores, granularity: Granularity) -> list[_Unit]:
    """The units of a layer in ascending order of their scores."""
    layer, active = scores.heads.layer, scores.active
    if granularity == "head":
        return _sorted(_Unit(float(scores.values[h]), layer, (h,)) for h in active)
    result = []
    for group in scores.heads.groups(active):
        members = tuple(h for h in scores.heads.members(group) if h in active)
        result.append(_Unit(float(scores.values[list(members)].sum()), layer, members))
    return _sorted(result)


def _sorted(units: Iterable[_Unit]) -> list[_Unit]:
    return sorted(units, key=lambda unit: (unit.score, unit.layer, unit.heads))


def wanted_units(fraction: float, total: int) -> int:
    """The number of units that `fraction` of `total` means, rounded half up."""
    if total == 0:
        raise ConfigError("Every attention head of this model is pruned already.")
    count = math.floor(Fraction(str(fraction)) * total + Fraction(1, 2))
    if count == 0:
        raise ConfigError(
            f"--fraction {fraction:g} of {total} is less than one. Give at least {0.5 / total:.4f}."
        )
    return count


def _quotas(units: dict[int, list[_Unit]], rules: Rules, count: int) -> dict[int, int]:
    """`count` shared out over the unprotected layers in proportion to what they have.

    Whole numbers by largest remainder; of equal remainders the layer whose next unit scores lowest.
    """
    open_layers = {k: each for k, each in units.items() if each and k not in rules.protected}
    total = sum(map(len, open_layers.values()))
    shares = {k: Fraction(count * len(each), total) for k, each in open_layers.items()}
    quotas = {k: math.floor(share) for k, share in shares.items()}

    def order(layer: int) -> tuple[Fraction, float, int]:
        layer_units = open_layers[layer]
        score = layer_units[min(quotas[layer], len(layer_units) - 1)].score
        return quotas[layer] - shares[layer], score, layer

    for layer in sorted(open_layers, key=order)[: count - sum(quotas.values())]:
        quotas[layer] += 1
    return quotas


def _shortfall(
    layers: Sequence[LayerScores],
    rules: Rules,
    state: dict[int, _LayerState],
    count: int,
    removed: int,
) -> None:
    """Raise `ConfigError` for a shortfall, unless it is allowed and something can go."""
    kind = "key/value groups" if rules.granularity == "kv-group" else "heads"
    limits = f"--min-heads {rules.min_heads}, --min-kv-heads {rules.min_kv_heads}"
    if rules.protected:
        limits += f" and {len(rules.protected)} protected layers"
    if removed == 0:
        raise ConfigError(
            f"Nothing can be pruned: with {limits} this model is at its minimum in every layer "
            "that is asked. Nothing was written."
        )
    if rules.allow_shortfall:
        return
    full = [s.heads.layer for s in layers if len(state[s.heads.layer].active) <= rules.min_heads]
    where = f" Layers at their minimum: {', '.join(map(str, full[:16]))}." if full else ""
    raise ConfigError(
        f"--fraction {rules.fraction:g} asks for {count} {kind}, and {limits} let {removed} go."
        f"{where} Nothing was written. Ask for less, lower what must stay, or take what there is "
        "with --allow-shortfall."
    )


def _uniform(layers: Sequence[LayerScores], rules: Rules) -> Selection:
    """The same number out of every group, or the same number of groups out of every layer."""
    shapes = {(s.heads.heads, s.heads.kv_heads) for s in layers}
    if len(shapes) > 1:
        raise ConfigError(
            "--mode structural needs the same number of heads in every layer, and this model has "
            f"{', '.join(f'{h} with {k} key/value heads' for h, k in sorted(shapes))}. Use "
            "--per-layer, which lets layers differ."
        )
    ((heads, kv_heads),) = shapes
    size, whole = heads // kv_heads, rules.granularity == "kv-group"
    # A piece is what must go everywhere at once: a head of every group, or a group of every layer.
    pieces = kv_heads if whole else size
    total = len(layers) * (kv_heads if whole else heads)
    wanted = wanted_units(rules.fraction, total)
    per_piece = len(layers) * (1 if whole else kv_heads)
    most = _most_pieces(heads, kv_heads, rules)
    count = min(wanted // per_piece, most)
    if count * per_piece != wanted and not (rules.allow_shortfall and count):
        steps = ", ".join(f"{n}/{pieces}" for n in range(1, most + 1))
        what = "key/value groups of every layer" if whole else "heads of every key/value group"
        raise ConfigError(
            f"--fraction {rules.fraction:g} is no whole number of {what}, and --mode structural "
            f"takes the same from each. "
            + (f"It can take {steps}. " if steps else "Nothing can go. ")
            + "Nothing was written. Ask for one of these, take less with --allow-shortfall, or use "
            "--mode zero, which takes any number; --per-layer lets layers differ."
        )
    chosen = {s.heads.layer: _lowest(s, count, whole) for s in layers}
    quota = count * per_piece // len(layers)
    quotas = dict.fromkeys((s.heads.layer for s in layers), quota)
    return Selection(chosen, total, wanted, count * per_piece, quotas)


def _regular(layers: Sequence[LayerScores], rules: Rules) -> Selection:
    """The least important heads that leave every layer regular, exactly as many as asked for."""
    whole = rules.granularity == "kv-group"
    # Cut weights count every head there is, as if none were pruned.
    units = {
        s.heads.layer: _units(replace(s, pruned=frozenset()), rules.granularity) for s in layers
    }
    total = sum(map(len, units.values()))
    count = wanted_units(rules.fraction, total)
    quotas = _quotas(units, rules, count) if rules.scope == "layer" else {}
    cuts = [
        {0: Cut()}
        if s.heads.layer in rules.protected
        else regular_cuts(s, whole, rules.min_heads, rules.min_kv_heads)
        for s in layers
    ]
    wanted = [quotas.get(s.heads.layer, 0) for s in layers] if quotas else None
    taken = cheapest(cuts, count, wanted)
    removed = sum(taken)
    if removed < count and not (rules.allow_shortfall and removed):
        kind = "key/value groups" if whole else "heads"
        limits = f"--min-heads {rules.min_heads}, --min-kv-heads {rules.min_kv_heads}"
        if rules.protected:
            limits += f", {len(rules.protected)} protected layers"
        raise ConfigError(
            f"--fraction {rules.fraction:g} asks for {count} {kind}; with {limits} and the same "
            f"number of query heads for every key/value head of a layer, {removed or 'nothing'} "
            "can go. Nothing was written. Ask for another fraction, lower what must stay, or take "
            "what there is with --allow-shortfall."
        )
    pairs = zip(layers, cuts, taken, strict=True)
    heads = {s.heads.layer: layer_cuts[number].heads for s, layer_cuts, number in pairs if number}
    return Selection(heads, total, count, removed, quotas)


def _most_pieces(heads: int, kv_heads: int, rules: Rules) -> int:
    """How many pieces may go with enough heads and key/value heads left."""
    size = heads // kv_heads
    if rules.granularity == "kv-group":
        fewest = max(1, rules.min_kv_heads, math.ceil(rules.min_heads / size))
        return max(0, kv_heads - fewest)
    if kv_heads < rules.min_kv_heads:
        return 0
    return max(0, size - max(1, math.ceil(rules.min_heads / kv_heads)))


def _lowest(scores: LayerScores, count: int, whole: bool) -> tuple[int, ...]:
    """The heads of a layer that go: pruned ones first, then the lowest scores."""
    heads = scores.heads

    def rank(head: int) -> tuple[bool, float, int]:
        return head not in scores.pruned, float(scores.values[head]), head

    groups = [list(heads.members(group)) for group in range(heads.kv_heads)]
    if not whole:
        return tuple(sorted(h for group in groups for h in sorted(group, key=rank)[:count]))

    def group_rank(group: list[int]) -> tuple[float, int]:
        scores_left = [float(scores.values[h]) for h in group if h not in scores.pruned]
        return sum(scores_left), group[0]

    return tuple(sorted(h for group in sorted(groups, key=group_rank)[:count] for h in group))
