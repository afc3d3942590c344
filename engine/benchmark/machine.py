"""What a measurement was taken on, for every row of results."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent


def describe(device: torch.device) -> dict[str, str | int | float | None]:
    """Device, versions, commit, time and, for a CPU, how busy it was."""
    facts: dict[str, str | int | float | None] = {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "commit": commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
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
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def installed(distribution: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout this runs from; None where it is none, or git is not there."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
