"""metrics.jsonl is read on while it grows, whatever happens to it meanwhile."""

import json
from pathlib import Path

import numpy as np
import pytest

from engine.monitoring.metrics_tail import MetricsTail
from engine.monitoring.series import MOST_POINTS, downsampled, series
from tests.support.pages.written_runs import step_line, write_lines


def steps_of(tail: MetricsTail) -> list[int]:
    tail.update()
    return tail.steps.tolist()


def test_only_what_is_new_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert steps_of(tail) == []
    write_lines(path, [step_line(1), step_line(2)])
    assert steps_of(tail) == [1, 2]
    # What was read is not read again: were it, this spoilt first line would be counted as damaged.
    content = path.read_bytes()
    path.write_bytes(b"x" * 100 + content[100:])
    write_lines(path, [step_line(3)])
    assert (steps_of(tail), tail.damaged) == ([1, 2, 3], 0)


def test_a_torn_last_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = (json.dumps(step_line(2, loss=0.25)) + "\n").encode()
    write_lines(path, [step_line(1)])
    before, tail = path.read_bytes(), MetricsTail(path)
    for cut in range(len(whole) + 1):
        path.write_bytes(before + whole[:cut])
        # Without the newline the line is whole, and is taken at once.
        assert steps_of(tail) == ([1] if cut < len(whole) - 1 else [1, 2]), cut
    write_lines(path, [step_line(3)])
    assert (steps_of(tail), tail.columns["loss"][1], tail.damaged) == ([1, 2, 3], 0.25, 0)


def test_a_run_that_goes_on_from_before_drops_what_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [step_line(step, loss=1.0) for step in range(1, 9)])
    tail = MetricsTail(path)
    assert steps_of(tail) == list(range(1, 9))
    # Written anew under the same name, as long as before, as going on from step 4 does.
    path.unlink()
    write_lines(path, [step_line(step, loss=1.0 if step < 5 else 3.0) for step in range(1, 9)])
    assert steps_of(tail) == list(range(1, 9))
    assert tail.columns["loss"].tolist() == [1.0] * 4 + [3.0] * 4
    # Appended without cutting, as a copy of logs may be.
    write_lines(path, [step_line(6, loss=7.0)])
    assert steps_of(tail) == [1, 2, 3, 4, 5, 6]
    path.unlink()
    assert steps_of(tail) == []


@pytest.mark.parametrize(
    "line",
    [
        b"{", b"[]", b'{"step": "1"}', b'{"step": -1}', b'{"step": true}', b"\xff\xfe", b"null",
        b'{"loss": 1}', b"[" * 100_000, b'{"step": 1' + b"0" * 5000 + b"}",
    ],
)  # fmt: skip
def test_lines_that_are_no_metrics_are_counted(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [step_line(1)])
    with path.open("ab") as file:
        file.write(line + b"\n")
    write_lines(path, [step_line(2)])
    tail = MetricsTail(path)
    assert (steps_of(tail), tail.damaged) == ([1, 2], 1)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "null", '"high"', "true", "[1]"])
def test_a_figure_that_is_no_number_is_a_gap(tmp_path: Path, value: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": {value}}}\n{{"step": 2, "loss": 4}}\n')
    told = series(MetricsTail(path))
    assert told["figures"]["loss"] == {"steps": [2], "values": [4.0]}
    assert told["not_finite"] == {"count": 1, "steps": [1]}
    json.dumps(told, allow_nan=False)


def test_a_link_out_of_the_run_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_lines(tmp_path / "elsewhere.jsonl", [step_line(1)])
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    assert steps_of(MetricsTail(tmp_path / "run" / "metrics.jsonl")) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [0, 1, 5, 1000, 1001, 4000, 100_000])
def test_downsampling_keeps_the_extremes_and_the_ends(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(count)
    if count:
        values[np.random.default_rng(seed).integers(count)] = 99.0
        values[np.random.default_rng(seed + 50).integers(count)] = -99.0
    index = downsampled(values, MOST_POINTS)
    assert len(index) == len(set(index.tolist())) == min(count, len(index)) <= MOST_POINTS
    assert (np.diff(index) > 0).all()
    if count:
        assert (index[0], index[-1]) == (0, count - 1)
        assert values[index].max() == values.max()
        assert values[index].min() == values.min()


def test_a_long_run_is_few_points_and_its_spike_is_among_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [step_line(step, loss=1000.0 if step == 7777 else 1.0) for step in range(1, 20_001)]
    write_lines(path, lines)
    tail = MetricsTail(path)
    told = series(tail, smoothing=0.9)
    loss = told["figures"]["loss"]
    assert told["steps"] == 20_000 and len(loss["steps"]) <= MOST_POINTS
    assert loss["values"][loss["steps"].index(7777)] == 1000.0
    # The mean is over all steps, not over the points that are left: a spike of one step adds a
    # tenth of itself, whatever stands around it.
    smooth = told["figures"]["loss_smooth"]
    assert max(smooth["values"]) == pytest.approx(1.0 + 0.1 * 999.0, rel=1e-6)
    part = series(tail, first=7770, last=7780)["figures"]["loss"]
    assert part["steps"] == list(range(7770, 7781)) and max(part["values"]) == 1000.0
