"""The picture of head importance: it is there, and it shows what was pruned."""

import struct
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from engine.pruning.heat_map import draw
from engine.pruning.scores import LayerScores
from models.head_slices import AttentionHeads


def scores(layers: int, *pruned: int) -> list[LayerScores]:
    return [
        LayerScores(AttentionHeads(n, 9, 3, 8, 8), torch.rand(9).double(), frozenset(pruned))
        for n in range(layers)
    ]


def differ(folder: Path, one: str, other: str) -> bool:
    """Whether a reader sees that two pictures differ: a tenth of a colour's range somewhere."""
    first, second = (imread(folder / name, "png") for name in (one, other))
    return first.shape == second.shape and float(abs(first - second).max()) > 0.1


def test_a_picture_grows_with_the_model_and_shows_the_choice(tmp_path: Path) -> None:
    sizes = {}
    for name, layers, pruned in (("few", 4, {}), ("crossed", 4, {1: (2, 3)}), ("many", 30, {})):
        torch.manual_seed(1)
        assert draw(scores(layers), pruned, "l2", tmp_path / name)
        data = (tmp_path / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        sizes[name] = struct.unpack(">II", data[16:24])
    assert sizes["many"][1] > sizes["few"][1] == sizes["crossed"][1]
    assert differ(tmp_path, "few", "crossed")


def test_a_picture_leaves_out_what_was_gone(tmp_path: Path) -> None:
    for name, pruned in (("whole", ()), ("gone", (4,))):
        torch.manual_seed(1)
        draw(scores(3, *pruned), {}, "l2", tmp_path / name)
    assert differ(tmp_path, "whole", "gone")


def test_one_head_that_matters_most_does_not_hide_the_others(tmp_path: Path) -> None:
    """Two heads of a hundredth and a thousandth differ in colour beside one of 1."""
    for name, value in (("same", 1e-3), ("tenfold", 1e-2)):
        layers = scores(3)
        for layer in layers:
            layer.values[:] = 1e-3
        layers[0].values[0], layers[1].values[5] = 1.0, value
        draw(layers, {}, "l2", tmp_path / name)
    assert differ(tmp_path, "same", "tenfold")


def test_no_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw(scores(2), {}, "l2", tmp_path / "none")
    assert not list(tmp_path.iterdir())
