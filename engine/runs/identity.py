"""Which run a directory holds, by digests of what it reads.

`manifest.json` has the digests of everything that decides the rows and the weights: the data, the
held-out rows, the chat template, the tokenizer, the base model and the teacher. A run goes on only
where all of them are as they were; contents count and not names, so a file may have moved.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.settings import with_present_names
from engine.config.tasks.commands import continued
from engine.config.train_config import TrainConfig
from engine.data.sources.resolve import RowFile
from engine.errors import CheckpointError, ConfigError
from engine.runs.output import CHECKPOINT
from engine.storage import durable
from engine.storage.manifest import read_manifest
from engine.storage.safe_files import MIB, json_object_or_empty, read_json_object
from engine.storage.strict_json import parse_object

log = logging.getLogger(__name__)

_TELLING = {
    "data": "the rows of {c.data}",
    "eval_data": "the held-out rows of {c.eval_data}",
    "template": "the chat template of {c.model}",
    "tokenizer": "the tokenizer of {c.model}",
    "base": "the weights of the base model {c.model}",
    "teacher": "the weights of the teacher {c.teacher}",
    "reference": "the weights of the reference {c.reference}",
}
_CONSTANT = "constant"
_STABLE = "warmup_stable_decay"


@dataclass(frozen=True)
class RunIdentity:
    """What a start of a run finds: its settings, digests by name, and how long it will be."""

    config: TrainConfig
    digests: Mapping[str, str]
    steps_per_epoch: int

    def total_steps(self, epochs: int, max_steps: int | None) -> int:
        """Optimizer steps of a run of this length."""
        return max_steps or epochs * self.steps_per_epoch


def digest_files(files: Iterable[RowFile]) -> str:
    """One SHA-256 of several files' contents and weights, in order."""
    parts = [
        durable.sha256_file(file.path) + ("" if file.weight == 1.0 else f"*{file.weight:g}")
        for file in files
    ]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def check_identity(identity: RunIdentity) -> None:
    """Refuse to go on with a run that is another one. Only reads.

    Raises `CheckpointError` naming what differs and what to do.
    """
    config = identity.config
    assert config.output_dir is not None
    if config.resume is None:
        return
    root = config.output_dir
    state = _newest_state(root, config.resume)
    if state is None:
        return  # nothing to go on from: the run starts over
    recorded, lacking = _recorded_digests(root / "manifest.json")
    if lacking is not None:
        log.warning(
            "%s: whether data, chat template and tokenizer of the run in %s are as they were is "
            "not checked.", lacking, root,
        )  # fmt: skip
    now = identity.digests
    other = [name for name in _TELLING if name in recorded and recorded[name] != now.get(name)]
    if other:
        told = " and ".join(_TELLING[name].format(c=_Names(config)) for name in other)
        raise CheckpointError(
            f"The run in {root} cannot go on: {told} changed since it began, so that its next "
            "steps would not be those of one run. Bring back what it began with, or train on from "
            f"its result in a new run: {continued(config, root)}"
        )
    require_same_run(state, identity, root, names="data" not in recorded)
    _note_threads(root)


def _recorded_digests(manifest: Path) -> tuple[Mapping[str, Any], str | None]:
    """The digests that a run noted as it began, or why there are none."""
    try:
        recorded = read_json_object(manifest).get("digests")
    except CheckpointError as error:
        return {}, f"The digests that the run noted are lost ({str(error).rstrip('.')})"
    if recorded is None:
        return {}, f"An earlier version noted no digests in {manifest}"
    if not isinstance(recorded, dict):
        return {}, f"The digests in {manifest} are no object of names and digests"
    return recorded, None


def require_same_run(
    state: Mapping[str, Any], identity: RunIdentity, source: Path, *, names: bool = False
) -> None:
    """Compare the state of a checkpoint with the run that is to go on from it.

    `names` compares the names of model and data too. Raises `CheckpointError`.
    """
    state = with_present_names(dict(state), TrainConfig.renamed)
    saved = state.get("trajectory") or {}
    other = identity.config.other_trajectory(saved, names)
    differences = [f"{key} was {old!r} and is {new!r}" for key, (old, new) in other.items()]
    if state.get("base") != identity.digests["base"]:
        differences.append("its base model has other weights")
    if differences:
        raise CheckpointError(
            f"{source} belongs to another run: {'; '.join(differences[:4])}. Go on with the "
            f"settings and model it was started with (`engine resume {_run_of(source)}`), or start "
            "a new run in another --output-dir."
        )
    _check_length(state, saved, identity, source)


def _check_length(
    state: Mapping[str, Any], saved: Mapping[str, Any], identity: RunIdentity, source: Path
) -> None:
    """More, or fewer, steps are those of one run only where the rate does not depend on them."""
    config = identity.config
    before = identity.total_steps(int(saved.get("epochs", 1)), saved.get("max_steps"))
    after = identity.total_steps(config.epochs, config.max_steps)
    done = int((state.get("progress") or {}).get("step", 0))
    if after == before:
        return
    root = _run_of(source)
    if config.lr_schedule == _STABLE and done <= min(
        total - config.decay_steps(total) for total in (before, after)
    ):
        return
    if config.lr_schedule != _CONSTANT:
        raise ConfigError(
            f"The run in {root} was planned for {before} steps and is asked for {after}: its "
            f"{config.lr_schedule} schedule ends at step {before}, so the steps that are left "
            "would have another learning rate than it began with (only --lr-schedule constant can "
            "be prolonged, and warmup_stable_decay until it decays). Finish it as it is, then "
            "train on from its result: "
            f"{continued(config, root, max(after - before, 1))}"
        )
    if after < done:
        raise ConfigError(
            f"The run in {root} has done {done} steps and is asked for {after}. Ask for at least "
            f"{done}, or start a new run in another --output-dir."
        )


def warmup_of(state: Mapping[str, Any], identity: RunIdentity) -> int:
    """The warm-up of the run as it was first planned, which a prolonged run keeps."""
    if "warmup_steps" in state:
        return int(state["warmup_steps"])
    saved = with_present_names(dict(state), TrainConfig.renamed).get("trajectory") or {}
    total = identity.total_steps(int(saved.get("epochs", 1)), saved.get("max_steps"))
    return identity.config.warmup(total)


class _Names:
    """The names in `_TELLING`, lists as words."""

    def __init__(self, config: TrainConfig) -> None:
        self.model, self.teacher = config.model, config.teacher
        self.reference = config.reference
        self.data = ", ".join(config.data)
        self.eval_data = ", ".join(config.eval_data) or ", ".join(config.data)


def _run_of(source: Path) -> Path:
    return source.parent if CHECKPOINT.fullmatch(source.name) else source


def _newest_state(root: Path, choice: str) -> dict[str, Any] | None:
    """`state.json` of the checkpoint that a resume would begin with; None without one."""
    if choice != "auto":
        return _state_of(Path(choice))
    steps = [CHECKPOINT.fullmatch(p.name) for p in root.iterdir()] if root.is_dir() else []
    for step in sorted((int(match[1]) for match in steps if match), reverse=True):
        state = _state_of(root / f"checkpoint-{step}")
        if state is not None and state.get("trajectory"):
            return state
    return None


def _state_of(checkpoint: Path) -> dict[str, Any] | None:
    """The state of a checkpoint, None where it is not as it was written.

    The resume sets such a checkpoint aside, so what its state says decides nothing.
    """
    try:
        manifest, path = read_manifest(checkpoint), checkpoint / "state.json"
        if durable.sha256_file(path) != manifest["files"].get(path.name, {}).get("sha256"):
            return None
        return read_json_object(path, limit=64 * MIB) or None
    except CheckpointError:
        return None


def _note_threads(root: Path) -> None:
    import torch

    machine = json_object_or_empty(root / "manifest.json").get("machine")
    before = machine.get("threads") if isinstance(machine, dict) else None
    now = torch.get_num_threads()
    if isinstance(before, int) and before != now:
        log.warning(
            "The run was begun with %d threads and goes on with %d: sums may round differently. "
            "Give --threads %d for the same bits.", before, now, before,
        )  # fmt: skip


def tokenizer_digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 of a model's tokenizer files; the chat template among them is left out."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        if name.endswith((".jinja", "chat_template.json")):
            continue
        if name == "tokenizer_config.json":
            data = _without_template(data)
        digest.update(f"\0{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def _without_template(data: bytes) -> bytes:
    value = parse_object(data, "tokenizer_config.json")
    rest = {key: item for key, item in value.items() if key != "chat_template"}
    return json.dumps(rest, sort_keys=True).encode()
