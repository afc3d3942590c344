"""Which modules of a model an adapter's configuration means, by PEFT's rules.

PEFT gives every module that the configuration means a fresh pair, fills in what the file holds, and
passes over the rest without a word: an adapter of which a half is missing then serves the base.
Here both must agree. A name that means nothing in the model is harmless, and a warning.

Source: `check_target_module_exists` in peft/tuners/tuners_utils.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from engine.errors import CheckpointError, listing
from engine.model_sources.adapter.config import compile_pattern
from engine.model_sources.adapter.experts import EXPERTS
from engine.model_sources.adapter.peft import CONFIG, Adapter

log = logging.getLogger(__name__)

_ALL = "all-linear"
_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
_FIRST_INDEX = r".*?\.[^.]*\.(?P<index>\d+)\."


def check_targets(
    adapter: Adapter, modules: Mapping[str, Collection[str]], path: Callable[[str], str]
) -> None:
    """Compare the modules that have tensors with those the configuration means.

    `modules` maps every module of the model that has a weight to all names that it goes by; `path`
    gives the model's name of one of the adapter's modules. Raises `CheckpointError` where the two
    disagree.
    """
    raw, wrong = _with_sets(adapter.config.raw), list[str]()
    adapted = {path(m) for m in (*adapter.pairs, *adapter.others.embeddings) if EXPERTS not in m}
    targets = adapter.config.raw.get("target_modules") or []
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
    copies = raw.get("modules_to_save") or ()
    if copies and any(_is_named(around, copies) for around in _around(name)):
        return False
    if _is_named(f"{name}.weight", raw.get("target_parameters") or []):
        return True
    if isinstance(targets, str):
        return compile_pattern(targets, "target_modules", where).fullmatch(name) is not None
    if name in targets:
        return _in_layers(raw, name, where)
    return _is_named(name, targets) and _in_layers(raw, name, where)


def _with_sets(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with sets for its lists of names, which may be long: each is asked for every module."""
    lists = {key: raw[key] for key in _LISTS if isinstance(raw.get(key), list)}
    return {**raw, **{key: set(map(str, names)) for key, names in lists.items()}}


def _is_named(name: str, endings: Iterable[Any]) -> bool:
    """Whether `name` ends in one of `endings`, from its beginning or from a dot on."""
    pieces = name.split(".")
    ends = {".".join(pieces[n:]) for n in range(len(pieces))}
    return not ends.isdisjoint(endings if isinstance(endings, set) else map(str, endings))


def _around(name: str) -> list[str]:
    """A module's name, and those of the modules around it."""
    pieces = name.split(".")
    return [".".join(pieces[: n + 1]) for n in range(len(pieces))]


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
    pieces = [name.split(".") for all_names in modules.values() for name in all_names]
    ends = {".".join(parts[n:]) for parts in pieces for n in range(len(parts))}
    unused = sorted(set(map(str, targets)) - ends)
    if unused:
        log.warning("%s: target_modules without a module here: %s", source, listing(unused))


def _missing_copies(
    raw: Mapping[str, Any], modules: Mapping[str, Collection[str]], copied: Collection[str]
) -> list[str]:
    """Trained copies of modules that the configuration promises."""
    present = _listed_around(name for all_names in modules.values() for name in all_names)
    have = _listed_around(copied)
    return [
        f"modules_to_save names {part}, of which no copy is there"
        for part in sorted(raw.get("modules_to_save") or ())
        if f"{part}\n" in present and f"{part}\n" not in have
    ]


def _listed_around(names: Iterable[str]) -> str:
    """Lines of modules and of all that are around them: what one ends in stands before a break."""
    around = dict.fromkeys(one for name in names for one in _around(name))
    return "".join(f"{one}\n" for one in around)
