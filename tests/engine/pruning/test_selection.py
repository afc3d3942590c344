"""Which heads are chosen: exactly as many as asked for, within the rules, or an error."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from engine.errors import ConfigError
from engine.pruning.scores import LayerScores
from engine.pruning.selection import Rules, Selection, select
from models.head_slices import AttentionHeads


def layer(index: int, values: list[float], kv_heads: int = 3, *pruned: int) -> LayerScores:
    heads = AttentionHeads(index, len(values), kv_heads, 8, 8)
    return LayerScores(heads, torch.tensor(values, dtype=torch.float64), frozenset(pruned))


def smollm2() -> list[LayerScores]:
    """30 layers of 9 heads with 3 key/value heads, scored at random."""
    generator = torch.Generator().manual_seed(0)
    return [layer(i, torch.rand(9, generator=generator).tolist()) for i in range(30)]


def choose(layers: list[LayerScores], fraction: float, **rules: Any) -> Selection:
    return select(layers, Rules(fraction, **rules))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(
    ("fraction", "count"), [(0.1, 27), (0.2, 54), (0.3, 81), (0.25, 68), (1 / 3, 90), (0.002, 1)]
)
def test_exactly_the_fraction_of_heads_goes(scope: str, fraction: float, count: int) -> None:
    chosen = choose(smollm2(), fraction, scope=scope)
    assert chosen.before == 270
    assert chosen.asked == chosen.removed == chosen.removed_heads == count


def test_the_lowest_scores_of_all_layers_go() -> None:
    layers = smollm2()
    chosen = choose(layers, 0.2).heads
    taken = [float(s.values[h]) for s in layers for h in chosen.get(s.heads.layer, ())]
    left = [float(v) for s in layers for h, v in enumerate(s.values)
            if h not in chosen.get(s.heads.layer, ())]  # fmt: skip
    assert max(taken) < min(left)


def test_each_layer_gives_its_share_and_the_remainders_go_to_the_cheapest() -> None:
    layers = [layer(0, [1, 2, 3, 4, 5, 6]), layer(1, [1, 9, 9, 9, 9, 9]), layer(2, [7, 8] * 3)]
    chosen = choose(layers, 4 / 18, scope="layer")
    assert chosen.quotas == {0: 2, 1: 1, 2: 1}
    assert chosen.heads == {0: (0, 1), 1: (0,), 2: (0,)}


def test_equal_scores_are_taken_in_order() -> None:
    layers = [layer(n, [1.0] * 6) for n in (0, 1)]
    assert choose(layers, 0.25).heads == {0: (0, 1, 2)}


def test_protected_layers_count_and_give_nothing() -> None:
    for scope in ("global", "layer"):
        chosen = choose(smollm2(), 0.3, scope=scope, protected=frozenset({0, 29}))
        assert chosen.removed == 81
        assert not {0, 29} & chosen.heads.keys()


def test_heads_that_are_gone_already_are_neither_counted_nor_chosen() -> None:
    layers = [layer(0, [0, 0, 1, 2, 3, 4], 3, 0, 1), layer(1, [5, 6, 7, 8, 9, 9])]
    chosen = choose(layers, 0.3)
    assert chosen.before == 10
    assert chosen.heads == {0: (2, 3, 4)}


@pytest.mark.parametrize(("least", "left"), [(1, 1), (4, 4), (6, 6)])
def test_every_layer_keeps_its_heads(least: int, left: int) -> None:
    layers = [layer(0, [1] * 6), layer(1, [50] * 6)]
    chosen = choose(layers, 0.5, min_heads=least, allow_shortfall=True) if least < 6 else None
    if chosen is None:
        with pytest.raises(ConfigError, match="at its minimum in every layer"):
            choose(layers, 0.5, min_heads=least, allow_shortfall=True)
        return
    assert 6 - len(chosen.heads[0]) == left
    assert chosen.removed == min(6, 2 * (6 - least))


def test_every_layer_keeps_its_key_value_heads() -> None:
    chosen = choose([layer(0, [1, 1, 2, 2, 3, 3])], 0.66, min_kv_heads=2)
    assert chosen.heads == {0: (0, 1, 2, 4)}
    chosen = choose([layer(0, [1, 1, 2, 2, 3, 3])], 0.66)
    assert chosen.heads == {0: (0, 1, 2, 3)}


def test_a_shortfall_is_an_error_that_says_what_can_go() -> None:
    layers = [layer(n, [1, 2, 3, 4, 5, 6]) for n in (0, 1)]
    with pytest.raises(ConfigError) as caught:
        choose(layers, 0.9)
    message = str(caught.value)
    assert "asks for 11 heads" in message and "let 10 go" in message
    assert "--allow-shortfall" in message and "Nothing was written" in message
    chosen = choose(layers, 0.9, allow_shortfall=True)
    assert (chosen.asked, chosen.removed) == (11, 10)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_0_and_1_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Rules(fraction)


def test_a_fraction_of_less_than_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="less than one"):
        choose(smollm2(), 0.0018)


def test_a_model_pruned_to_its_minimum_is_refused() -> None:
    layers = [layer(n, [1] * 6, 3, 0, 1, 2, 3, 4) for n in (0, 1)]
    with pytest.raises(ConfigError, match="at its minimum in every layer"):
        choose(layers, 0.5)
    with pytest.raises(ConfigError, match="pruned already"):
        choose([layer(0, [1] * 6, 3, *range(6))], 0.5)


def test_whole_groups_go_by_the_sum_of_their_heads() -> None:
    layers = [layer(0, [1, 6, 2, 2, 9, 9]), layer(1, [8, 8, 1, 2, 8, 8])]
    chosen = choose(layers, 0.33, granularity="kv-group")
    assert chosen.heads == {0: (2, 3), 1: (2, 3)}
    assert (chosen.before, chosen.asked, chosen.removed, chosen.removed_heads) == (6, 2, 2, 4)


@pytest.mark.parametrize(("fraction", "per_group"), [(1 / 3, 1), (0.3333, 1), (2 / 3, 2)])
def test_a_uniform_choice_takes_the_same_from_every_group(fraction: float, per_group: int) -> None:
    layers = smollm2()
    chosen = choose(layers, fraction, uniform=True)
    assert chosen.removed == chosen.asked == 90 * per_group
    for scored in layers:
        taken = chosen.heads[scored.heads.layer]
        for group in range(3):
            members = list(scored.heads.members(group))
            lowest = sorted(members, key=lambda h: float(scored.values[h]))[:per_group]
            assert sorted(set(taken) & set(members)) == sorted(lowest)


def test_a_uniform_choice_of_groups_takes_as_many_from_every_layer() -> None:
    layers = [layer(0, [1, 1, 5, 5, 9, 9]), layer(1, [9, 9, 5, 5, 1, 1])]
    chosen = choose(layers, 1 / 3, uniform=True, granularity="kv-group")
    assert chosen.heads == {0: (0, 1), 1: (4, 5)}
    assert (chosen.removed, chosen.quotas) == (2, {0: 1, 1: 1})


def test_a_uniform_choice_takes_what_is_dead_first() -> None:
    chosen = choose([layer(0, [1, 9, 1, 9, 1, 9], 3, 1, 3, 5)], 0.5, uniform=True)
    assert chosen.heads == {0: (1, 3, 5)}


def test_a_fraction_that_is_not_uniform_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"1/3, 2/3"):
        choose(smollm2(), 0.2, uniform=True)
    with pytest.raises(ConfigError, match=r"1/3, 2/3"):
        choose(smollm2(), 0.5, uniform=True)
    assert choose(smollm2(), 0.5, uniform=True, allow_shortfall=True).removed == 90
    with pytest.raises(ConfigError, match=r"1/3\."):
        choose(smollm2(), 2 / 3, uniform=True, min_heads=4)
    with pytest.raises(ConfigError, match="no layer can be protected"):
        Rules(0.5, uniform=True, protected=frozenset({0}))


def test_layers_of_different_sizes_have_no_uniform_choice() -> None:
    with pytest.raises(ConfigError, match="4 with 2 key/value heads, 6 with 3"):
        choose([layer(0, [1.0] * 6), layer(1, [1.0] * 4, 2)], 0.5, uniform=True)


@given(
    sizes=st.lists(
        st.sampled_from([(4, 2), (6, 3), (9, 3), (8, 1), (3, 3)]), min_size=1, max_size=5
    ),
    fraction=st.floats(0.02, 0.98),
    scope=st.sampled_from(["global", "layer"]),
    granularity=st.sampled_from(["head", "kv-group"]),
    least=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    seed=st.integers(0, 99),
)
def test_the_rules_hold_and_all_that_can_go_goes(
    sizes: list[tuple[int, int]],
    fraction: float,
    scope: Any,
    granularity: Any,
    least: tuple[int, int],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = [
        layer(n, torch.rand(heads, generator=generator).tolist(), kv_heads)
        for n, (heads, kv_heads) in enumerate(sizes)
    ]
    rules = {"min_heads": least[0], "min_kv_heads": least[1], "allow_shortfall": True}
    refusal = ""
    try:
        chosen = choose(layers, fraction, scope=scope, granularity=granularity, **rules)
    except ConfigError as error:
        refusal = str(error)
    if refusal:
        assert "at its minimum" in refusal or "less than one" in refusal
        return
    possible = 0
    for scored in layers:
        heads, taken = scored.heads, set(chosen.heads.get(scored.heads.layer, ()))
        left = scored.active - taken
        if taken:
            assert len(left) >= least[0] and len(heads.groups(left)) >= least[1]
        if granularity == "kv-group":
            assert all(set(heads.members(h // heads.group_size)) <= taken for h in taken)
            keep = max(least[1], -(-least[0] // heads.group_size))
            possible += max(0, heads.kv_heads - keep)
        elif heads.kv_heads >= least[1]:
            possible += max(0, heads.heads - max(least))
    assert chosen.removed <= chosen.asked
    if scope == "global":
        assert chosen.removed == min(chosen.asked, possible)
    else:
        assert sum(chosen.quotas.values()) == chosen.asked
