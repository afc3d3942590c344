"""Which modules of a model an adapter's configuration means, by PEFT's rules.

PEFT gives every module that the configuration means a fresh pair, fills in what the file holds, and
passes over the rest without a word: an adapter of which a half is missing then serves the base.
Here both must agree. A name that means nothing in the model is harmless, and a warning.

Source: `check_target_module_exists` in peft/tuners/tuners_utils.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from engine.errors import CheckpointError, listing
from engine.model_sources.adapter.config import compile_pattern
from engine.model_sources.adapter.experts import EXPERTS
from engine.model_sources.adapter.peft import CONFIG, Adapter

log = logging.getLogger(__name__)

_ALL = "all-linear"
_FIRST_INDEX = r".*?\.[^.]*\.(?P<index>\d+)\."


def check_targets(
    adapter: Adapter, modules: Mapping[str, Collection[str]], path: Callable[[str], str]
) -> None:
    """Compare the modules that have tensors with those the configuration means.

    `modules` maps every module of the model that has a weight to all names that it goes by; `path`
    gives the model's name of one of the adapter's modules. Raises `CheckpointError` where the two
    disagree.
    """
    raw, wrong = adapter.config.raw, list[str]()
    adapted = {path(m) for m in (*adapter.pairs, *adapter.others.embeddings) if EXPERTS not in m}
    targets = raw.get("target_modules") or []
    if targets != _ALL and (targets or raw.get("target_parameters")):
        where = f"{adapter.path}: target_modules"
        meant = {m for m, names in modules.items() if any(is_meant(raw, n, where) for n in names)}
        strays = adapted - meant - _tied(raw, meant)
        missing = {m for m in meant - adapted if EXPERTS not in m}
        wrong += [f"without a target {listing(sorted(strays))}"] if strays else []
        wrong += [f"without a tensor {listing(sorted(missing))}"] if missing else []
        if not wrong and isinstance(targets, list):
            _warn_of_unused(targets, modules, str(adapter.path))
    copied = [path(name).rpartition(".")[0] for name in adapter.others.copies]
    wrong += _missing_copies(raw, modules, copied)
    if wrong:
        raise CheckpointError(
            f"{adapter.path}: the tensors do not fit the modules of the model that the "
            f"configuration names (target_modules {_shown(targets)}): {'; '.join(wrong)}. The two "
            "files belong to different adapters, or the adapter to another model. Where modules "
            f"are meant to stay as they are, let target_modules or layers_to_transform in {CONFIG} "
            "name only the others."
        )


def _shown(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) else f"[{listing(sorted(map(str, targets)))}]"


def is_meant(raw: Mapping[str, Any], name: str, where: str) -> bool:
    """Whether `raw` asks for a pair on the module `name`."""
    excluded, targets = raw.get("exclude_modules"), raw.get("target_modules") or []
    if isinstance(excluded, str):
        if compile_pattern(excluded, "exclude_modules", where).fullmatch(name) is not None:
            return False
    elif excluded and _is_named(name, excluded):
        return False
    copies = [re.escape(str(part)) for part in raw.get("modules_to_save") or []]
    if any(re.match(rf"(^|.*\.){part}($|\..*)", name) for part in copies):
        return False
    if _is_named(f"{name}.weight", raw.get("target_parameters") or []):
        return True
    if isinstance(targets, str):
        return compile_pattern(targets, "target_modules", where).fullmatch(name) is not None
    if name in targets:
        return _in_layers(raw, name, where)
    return _is_named(name, targets) and _in_layers(raw, name, where)


def _is_named(name: str, endings: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


def _in_layers(raw: Mapping[str, Any], name: str, where: str) -> bool:
    """Whether the module lies in a layer of `layers_to_transform`, if that is given."""
    layers, patterns = raw.get("layers_to_transform"), raw.get("layers_pattern")
    if layers is None or layers == [] or name in (raw.get("target_modules") or []):
        return True
    listed = [patterns] if isinstance(patterns, str) else patterns or []
    regexes = [rf"(?:^|.*?\.){p}\.(?P<index>\d+)\." for p in listed] or [_FIRST_INDEX]
    compiled = (compile_pattern(regex, "layers_pattern", where) for regex in regexes)
    match = next((m for m in (one.match(name) for one in compiled) if m is not None), None)
    wanted = layers if isinstance(layers, list) else [layers]
    return match is not None and int(match["index"] or -1) in wanted


def _tied(raw: Mapping[str, Any], meant: set[str]) -> set[str]:
    """The head, where PEFT was told to give it the pair of the embedding."""
    embedded = any(module.endswith("embed_tokens") for module in meant)
    return {"lm_head"} if raw.get("ensure_weight_tying") and embedded else set()


def _warn_of_unused(
    targets: list[str], modules: Mapping[str, Collection[str]], source: str
) -> None:
    names = [name for all_names in modules.values() for name in all_names]
    unused = sorted(t for t in targets if not any(_is_named(name, [t]) for name in names))
    if unused:
        log.warning("%s: target_modules without a module here: %s", source, listing(unused))


def _missing_copies(
    raw: Mapping[str, Any], modules: Mapping[str, Collection[str]], copied: Collection[str]
) -> list[str]:
    """Trained copies of modules that the configuration promises."""
    names = [name for all_names in modules.values() for name in all_names]
    return [
        f"modules_to_save names {part}, of which no copy is there"
        for part in map(str, raw.get("modules_to_save") or [])
        if any(_has_part(name, part) for name in names)
        and not any(_has_part(module, part) for module in copied)
    ]


def _has_part(module: str, part: str) -> bool:
    """Whether `module`, or a module around it, ends in `part`."""
    pieces = module.split(".")
    return any(".".join(pieces[: n + 1]).endswith(part) for n in range(len(pieces)))
