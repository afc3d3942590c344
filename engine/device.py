"""Choose the device and the compute type of a run."""

import os
from typing import TYPE_CHECKING

from engine.config.numbers import is_count
from engine.config.spelling import DTYPES
from engine.errors import ConfigError

if TYPE_CHECKING:
    import torch

DEVICE_VARIABLE = "ENGINE_DEVICE"


def check_threads(threads: int | None) -> None:
    """Refuse more threads than a machine of this size can start, which would end the process."""
    most = max(64, 8 * (os.cpu_count() or 1))
    if threads is not None and threads > most:
        raise ConfigError(
            f"--threads is {threads}, and this machine has {os.cpu_count()} processors: at most "
            f"{most} are started here. More threads than processors make nothing faster."
        )


def resolve_device(name: str) -> "torch.device":
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that exists.

    `auto` takes the environment variable ENGINE_DEVICE if it is set, else CUDA if there is any.
    Raises `ConfigError` for CUDA where torch finds none, and for a number that there is no GPU of.
    """
    import torch

    _check_kernel_variables()
    source = "--device"
    if name == "auto" and os.environ.get(DEVICE_VARIABLE):
        name, source = os.environ[DEVICE_VARIABLE], DEVICE_VARIABLE
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not is_count(number)):
        raise ConfigError(f"{source} is {name!r}; it should be auto, cpu, cuda or cuda:N.")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = (
            f"this torch ({torch.__version__}) was built without CUDA"
            if built is None
            else f"torch {torch.__version__} was built for CUDA {built} and finds no usable GPU"
        )
        raise ConfigError(
            f"{source} asks for {name}, but {reason}. Use --device cpu, or see `engine doctor`."
        )
    count = torch.cuda.device_count()
    if number and int(number) >= count:
        raise ConfigError(f"{source} asks for {name}, but there are {count} GPUs, counted from 0.")
    return torch.device(name)


def _check_kernel_variables() -> None:
    """Refuse names in the environment that choose no kernel, before any work is done."""
    from kernels.attention.choice import forced_backend
    from kernels.runtime.dispatch import check_reference

    try:
        check_reference()
        forced_backend()
    except ValueError as error:
        raise ConfigError(
            f"{error}. Correct this variable of the environment, or unset it."
        ) from error


def resolve_dtype(name: str, device: "torch.device") -> "torch.dtype":
    """The compute type: `auto` is bfloat16 where the GPU has it, float16 on older ones, else fp32.

    On a CPU `auto` is float32: most CPUs multiply bfloat16 matrices many times more slowly.
    Raises `ConfigError` for float16 on a CPU, whose range training on it would leave.
    """
    import torch

    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float16
    dtype = named_dtype(name, device)
    if dtype == torch.float16 and device.type == "cpu":
        raise ConfigError("--dtype float16 does not work on a CPU; use float32 or bfloat16.")
    return dtype


def named_dtype(dtype: "torch.dtype | str", device: "torch.device") -> "torch.dtype":
    """A compute type by itself or by one of its names; `auto` is as `resolve_dtype` has it."""
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    given = str(dtype).lower().removeprefix("torch.")
    name = DTYPES.get(given, given)
    if name == "auto":
        return resolve_dtype("auto", device)
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise ConfigError(f"--dtype is {dtype!r}; it should be auto, {', '.join(names)}.")
    return names[name]


def multiplies_bfloat16(device: "torch.device") -> bool:
    """Whether this GPU has bfloat16 matrix products: from compute capability 8.0 on.

    torch's `is_bf16_supported` also counts emulation, which makes bfloat16 tensors on a T4, an RTX
    20xx or a GTX 16xx and multiplies them many times more slowly than float16.
    """
    import torch

    if torch.version.hip is not None:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.cuda.get_device_capability(device) >= (8, 0)
