"""What this machine and installation can do, one finding per line.

A `problem` keeps the engine from training at all; a `note` is something to know. Nothing is changed
and nothing is downloaded.
"""

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.device import multiplies_bfloat16
from engine.provenance import ROOT, installed, version

Status = Literal["ok", "note", "problem"]

_REQUIRED = {
    "numpy": "numpy",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface-hub",
    "tokenizers": "tokenizers",
    "sentencepiece": "sentencepiece",
    "jinja2": "jinja2",
    "yaml": "pyyaml",
    "pydantic": "pydantic",
    "typer": "typer",
    "rich": "rich",
    "psutil": "psutil",
}
_EXTRAS = {
    "cpu": ("numba",),
    "gguf": ("gguf",),
    "plot": ("matplotlib",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}
_GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, how it stands, and what was found."""

    name: str
    status: Status
    detail: str


def examine() -> list[Check]:
    """Every finding about this machine; a check that fails itself is a problem, not an error."""
    probes: list[Callable[[], Iterator[Check]]] = [
        _python,
        _torch,
        _triton,
        _cuda,
        _memory,
        _disk,
        _packages,
        _name_clash,
        _extras,
    ]
    checks: list[Check] = []
    for probe in probes:
        try:
            checks.extend(probe())
        except Exception as error:
            name = probe.__name__.strip("_")
            checks.append(Check(name, "problem", f"{type(error).__name__}: {error}"))
    return checks


def _python() -> Iterator[Check]:
    recent = sys.version_info >= (3, 11)
    text = f"{platform.python_version()} on {platform.platform()}"
    yield Check("engine", "ok", f"{version()} in {ROOT}")
    yield Check("python", "ok" if recent else "problem", text + ("" if recent else "; needs 3.11"))


def _torch() -> Iterator[Check]:
    import torch

    recent = _at_least(torch.__version__, (2, 7))
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    text = f"{torch.__version__}, {built}, {torch.get_num_threads()} CPU threads"
    yield Check("torch", "ok" if recent else "problem", text + ("" if recent else "; needs 2.7"))
    level = torch.backends.cpu.get_cpu_capability()
    yield Check("cpu", "ok", f"{os.cpu_count()} cores, {level}")


def _triton() -> Iterator[Check]:
    if importlib.util.find_spec("triton") is None:
        yield Check("triton", "note", "not installed; the torch reference is used everywhere")
        return
    text = installed("triton") or "unknown"
    # Triton 3.2 aborts the process as it compiles two of the kernels.
    if not _at_least(text, (3, 3)):
        yield Check("triton", "problem", f"{text}; needs 3.3")
    elif not _at_least(text, (3, 4)):
        cost = "right, but Gated DeltaNet spills registers, NF4 decoding takes more instructions"
        yield Check(
            "triton", "note", f"{text}; {cost}: take a torch with Triton 3.4 or later if you can"
        )
    else:
        yield Check("triton", "ok", text)


def _at_least(text: str, least: tuple[int, int]) -> bool:
    """Whether a version's first two numbers are at least these."""
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= least


def _cuda() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        yield Check("cuda", "note", "no usable GPU; training runs on the CPU (--device cpu)")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        has_bf16 = multiplies_bfloat16(torch.device("cuda", index))
        bf16 = "bfloat16" if has_bf16 else "no bfloat16 products: trains in float16"
        yield Check(
            f"cuda:{index}",
            "ok",
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, "
            f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free, {bf16}",
        )


def _memory() -> Iterator[Check]:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB available"
    yield Check("memory", "ok" if memory.available > 2 * _GIB else "note", text)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip() != "max":
        yield Check("memory limit", "note", f"cgroup: {int(limit.read_text()) / _GIB:.1f} GiB")


def _disk() -> Iterator[Check]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free / _GIB
    writable = os.access(here, os.W_OK)
    text = f"{free:.1f} GiB free in {here}" + ("" if writable else ", which is read-only")
    yield Check("disk", "ok" if free > 2 and writable else "note", text)


def _packages() -> Iterator[Check]:
    for module, distribution in _REQUIRED.items():
        if importlib.util.find_spec(module) is None:
            yield Check(distribution, "problem", f"missing: pip install {distribution}")
        else:
            yield Check(distribution, "ok", str(installed(distribution)))


def _name_clash() -> Iterator[Check]:
    """Hugging Face publishes a package that is named `kernels` too."""
    spec = importlib.util.find_spec("kernels")
    paths = list(spec.submodule_search_locations or []) if spec else []
    ours = ROOT / "kernels"
    if not any(Path(path).resolve() == ours for path in paths):
        yield Check(
            "kernels",
            "problem",
            f"`import kernels` finds {paths[0] if paths else 'nothing'} and should find {ours}: "
            "pip uninstall kernels, then install engine-trainer again",
        )
        return
    foreign = installed("kernels")
    if foreign is None:
        yield Check("kernels", "ok", "this program's own")
        return
    yield Check(
        "kernels",
        "note",
        f"Hugging Face's package `kernels` {foreign} is installed as well; this program's own wins "
        "here, and may be found by transformers in its place",
    )


def _extras() -> Iterator[Check]:
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            yield Check(
                f"extra {extra}", "note", f"not installed: pip install 'engine-trainer[{extra}]'"
            )
        else:
            yield Check(f"extra {extra}", "ok", "installed")
