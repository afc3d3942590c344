"""The choice that lets layers differ: against every choice there is, and its rules."""

from collections.abc import Sequence
from itertools import chain, combinations, product
from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from engine.pruning.scores import LayerScores
from engine.pruning.selection import Rules, Selection, select
from models.head_slices import AttentionHeads


def layer(index: int, values: Sequence[float], kv_heads: int, *pruned: int) -> LayerScores:
    heads = AttentionHeads(index, len(values), kv_heads, 8, 8)
    return LayerScores(heads, torch.tensor(values, dtype=torch.float64), frozenset(pruned))


def random_layers(seed: int, shapes: Sequence[tuple[int, int]]) -> list[LayerScores]:
    generator = torch.Generator().manual_seed(seed)
    return [
        layer(n, torch.rand(heads, generator=generator).tolist(), kv_heads)
        for n, (heads, kv_heads) in enumerate(shapes)
    ]


def choose(layers: list[LayerScores], fraction: float, **rules: Any) -> Selection:
    return select(layers, Rules(fraction, regular=True, **rules))


def regular(scores: LayerScores, pruned: set[int]) -> bool:
    """Whether what stays has as many heads in every group that has any; something stays."""
    left = [
        sum(head not in pruned for head in scores.heads.members(group))
        for group in range(scores.heads.kv_heads)
    ]
    return len({count for count in left if count}) == 1


def lost(layers: list[LayerScores], chosen: dict[int, tuple[int, ...]]) -> float:
    return sum(float(s.values[h]) for s in layers for h in chosen.get(s.heads.layer, ()))


def all_choices(layers: list[LayerScores], count: int) -> list[dict[int, tuple[int, ...]]]:
    each = [
        [
            pruned
            for pruned in chain.from_iterable(
                combinations(range(s.heads.heads), n) for n in range(s.heads.heads)
            )
            if regular(s, set(pruned))
        ]
        for s in layers
    ]
    matches = [choice for choice in product(*each) if sum(map(len, choice)) == count]
    return [dict(enumerate(choice)) for choice in matches]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 9])
def test_of_all_regular_choices_it_is_the_one_that_loses_least(seed: int, count: int) -> None:
    layers = random_layers(seed, [(6, 2), (4, 2), (4, 4)])
    best = min(lost(layers, choice) for choice in all_choices(layers, count))
    chosen = choose(layers, count / 14)
    assert chosen.removed == chosen.asked == chosen.removed_heads == count
    assert lost(layers, chosen.heads) == pytest.approx(best, abs=1e-12)
    assert all(regular(s, set(chosen.heads.get(s.heads.layer, ()))) for s in layers)


def test_without_shared_keys_it_is_the_choice_of_mode_zero() -> None:
    layers = random_layers(5, [(6, 6)] * 5)
    for scope in ("global", "layer"):
        rules: dict[str, Any] = {"scope": scope, "min_heads": 2}
        assert choose(layers, 0.4, **rules).heads == select(layers, Rules(0.4, **rules)).heads


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_whole_groups_are_those_of_mode_zero(scope: Any) -> None:
    layers = random_layers(6, [(6, 3)] * 6)
    rules: dict[str, Any] = {"granularity": "kv-group", "scope": scope}
    for fraction in (0.2, 0.5, 0.6):
        assert (
            choose(layers, fraction, **rules).heads
            == select(layers, Rules(fraction, **rules)).heads
        )


def test_by_layers_it_strays_least_from_each_layer_s_share() -> None:
    """Of 9 heads with 3 key/value heads 0, 3 or 5 to 8 can go; a fifth of 9 is 1.8."""
    layers = random_layers(7, [(9, 3)] * 30)
    chosen = choose(layers, 0.2, scope="layer")
    assert chosen.removed == 54
    assert {len(heads) for heads in chosen.heads.values()} == {3}
    assert sum(chosen.quotas.values()) == 54


def test_the_rules_hold_and_a_shortfall_is_told() -> None:
    layers = random_layers(8, [(6, 3)] * 3)
    chosen = choose(layers, 0.5, min_heads=2, min_kv_heads=2, protected=frozenset({1}),
                    allow_shortfall=True)  # fmt: skip
    assert (chosen.asked, chosen.removed) == (9, 8)
    assert 1 not in chosen.heads
    for s in layers:
        stay = set(range(6)) - set(chosen.heads.get(s.heads.layer, ()))
        assert len(s.heads.groups(stay)) >= 2
    with pytest.raises(ConfigError, match=r"asks for 9 heads; .*1 protected layers .* 8 can go"):
        choose(layers, 0.5, min_heads=2, min_kv_heads=2, protected=frozenset({1}))
    with pytest.raises(ConfigError, match="nothing can go"):
        choose(layers, 0.5, min_heads=6, allow_shortfall=True)


def test_heads_that_do_nothing_go_first() -> None:
    layers = [layer(0, [9, 9, 1, 2, 3, 4], 3, 0, 1), layer(1, [0.5, 0.6, 7, 8, 9, 9], 3)]
    chosen = choose(layers, 2 / 12)
    assert chosen.heads == {0: (0, 1)}
    chosen = choose(layers, 4 / 12)
    assert chosen.heads == {0: (0, 1), 1: (0, 1)}
