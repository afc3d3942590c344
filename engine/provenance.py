"""Version, library versions, machine and git commit."""

from __future__ import annotations

import os
import platform
import subprocess
import tomllib
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DISTRIBUTION = "engine-trainer"
ROOT = Path(__file__).resolve().parents[1]

_REPORTED = ("torch", "triton", "numpy", "safetensors", "tokenizers", "sentencepiece", "jinja2")


@cache
def version() -> str:
    """The engine's version: that of the checkout's pyproject.toml, else of the installation."""
    project = ROOT / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if table.get("name") == DISTRIBUTION:
            return str(table["version"])
    return installed(DISTRIBUTION) or "unknown"


def installed(distribution: str) -> str | None:
    """Version of an installed distribution; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """The versions that decide a run's numbers; a package that is not installed is left out."""
    known = {name: installed(name) for name in _REPORTED}
    libraries = {name: text for name, text in known.items() if text is not None}
    return {"engine": version(), "python": platform.python_version(), **libraries}


def git_commit() -> str | None:
    """The commit of the checkout that this program runs from, with `+` if it was changed since."""
    if not (ROOT / ".git").exists():
        return None
    answers = []
    for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:
            return None
        answers.append(done.stdout.strip())
    return answers[0] + ("+" if answers[1] else "")


def machine() -> dict[str, Any]:
    """The machine, as far as it bears on speed and on bit-equal results."""
    import torch

    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpus"] = [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ]
        facts["cuda"] = torch.version.cuda
    return facts


def measured_on(device: torch.device) -> dict[str, str | int | float | None]:
    """What a row of measurements carries: device, versions, commit, time, and a CPU's load."""
    import torch

    facts: dict[str, str | int | float | None] = {
        "device": device_name(device),
        "engine": version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "commit": git_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["cuda"] = torch.version.cuda
        facts["memory_bytes"] = int(properties.total_memory)
        facts["multiprocessors"] = int(properties.multi_processor_count)
        facts["capability"] = f"{properties.major}.{properties.minor}"
    else:
        facts["threads"] = torch.get_num_threads()
        if hasattr(os, "getloadavg"):
            facts["load_average"] = round(os.getloadavg()[0], 2)
    return facts


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


__version__ = version()
