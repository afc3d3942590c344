"""Callbacks: a Python program's own code at the steps of a run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, listing

EVENTS = ("on_step", "on_eval", "on_save", "on_end")


class Callback:
    """What `engine.train(..., callbacks=[...])` calls; every method may be left out.

    Either subclass this and write the methods that are wanted, or pass any object that has some of
    them. `on_step` and `on_eval` end the run after the present step where they return True: its
    checkpoint and its result are then written as at the end. What a callback raises ends the run as
    any failure does, and the checkpoints before it stand.
    """

    def on_step(self, step: int, line: Mapping[str, Any]) -> bool | None:
        """After every optimizer step, with its line of metrics.jsonl."""

    def on_eval(self, step: int, figures: Mapping[str, float]) -> bool | None:
        """After every evaluation of the held-out rows; that before the first step is of step 0.

        It comes before `on_step`, whose line has these figures too.
        """

    def on_save(self, step: int, path: Path) -> None:
        """After a checkpoint stands on the disk, in the folder `path`."""

    def on_end(self, result: Any) -> None:
        """At the end of a run that went well, with its `TrainResult`."""


class CallbackList:
    """The callbacks of a run as one. Raises `ConfigError` for an object without any of the methods.

    `ended` says whether one of them has asked for the end.
    """

    def __init__(self, callbacks: Sequence[object] = ()) -> None:
        for callback in callbacks:
            _check(callback)
        self._callbacks = tuple(callbacks)
        self.ended = False

    def refuse(self, why: str) -> None:
        """Raise `ConfigError` where there are any, for they could not be told."""
        if self._callbacks:
            raise ConfigError(
                f"{len(self._callbacks)} callbacks were given with {why}. Leave them out, or start "
                "the program itself with torchrun."
            )

    def on_step(self, step: int, line: Mapping[str, Any]) -> None:
        """Tell a step."""
        self._ask("on_step", step, line)

    def on_eval(self, step: int, figures: Mapping[str, float]) -> None:
        """Tell an evaluation."""
        self._ask("on_eval", step, figures)

    def on_save(self, step: int, path: Path) -> None:
        """Tell a checkpoint."""
        self._call("on_save", step, path)

    def on_end(self, result: Any) -> None:
        """Tell the end."""
        self._call("on_end", result)

    def _ask(self, event: str, *values: Any) -> None:
        if any(answer is True for answer in self._call(event, *values)):
            self.ended = True

    def _call(self, event: str, *values: Any) -> list[Any]:
        methods = [getattr(callback, event, None) for callback in self._callbacks]
        return [method(*values) for method in methods if method is not None]


def _check(callback: object) -> None:
    name = type(callback).__name__
    if isinstance(callback, type):
        raise ConfigError(
            f"callbacks has the class {callback.__name__} where an object was expected: write "
            f"{callback.__name__}()."
        )
    own = [method for method in dir(callback) if method.startswith("on_")]
    unknown = [method for method in own if method not in EVENTS]
    if own and not unknown:
        return
    near = {method: difflib.get_close_matches(method, EVENTS, 1, 0.6) for method in unknown}
    told = [f"{m} (did you mean {near[m][0]}?)" if near[m] else m for m in unknown]
    raise ConfigError(
        f"A callback has some of the methods {', '.join(EVENTS)} and no other on_ method, and "
        f"{name} has {listing(told) or 'none of them'}."
    )
