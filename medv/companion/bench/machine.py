"""What a bench needs of the machine: clocks, peaks of memory, its own speed, and its name."""

import contextlib
import ctypes
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from medv import __version__
from medv.artifacts import versions

TIMING = "wall clock between synchronizations of the device after a warm-up, the median of the repeats"


def machine(device: torch.device) -> dict:
    """Name, memory in bytes, versions and the method of timing, JSON-able."""
    facts = {
        "device": device_name(device),
        "timing": TIMING,
        "versions": versions() | {"torch": torch.__version__, "medv": __version__},
    }
    if device.type != "cuda":
        return facts
    free, total = torch.cuda.mem_get_info(device)
    return facts | {"memory_bytes": total, "memory_free_bytes": free, "cuda": torch.version.cuda}


def bench_device(wanted: str | torch.device | None) -> torch.device:
    """That device, or the GPU where there is one; ValueError where a GPU is wanted and none is here."""
    device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is here: use the preset cpu, or run this where there is one")
    return device


def timed(call: Callable, device: torch.device) -> tuple[float, object]:
    """Seconds of a call with all the work that it left to the device, and what it returned."""
    _wait(device)
    started = time.perf_counter()
    result = call()
    _wait(device)
    return time.perf_counter() - started, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large product of two matrices here, the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = [timed(lambda: a @ a, device)[0] for _ in range(6)]
    return 2 * size**3 / min(times[1:])


def copy_speed(device: torch.device) -> float:
    """Bytes read and written a second by a large copy on the device, the best of five."""
    source = torch.empty(2**31 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source), device)[0] for _ in range(6)]
    return 2 * source.nbytes / min(times[1:])


def device_name(device: torch.device) -> str:
    """What the numbers were made on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


class Peak:
    """The answer of `peak_memory`, in bytes above the start; None where the system does not tell."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """The most memory that the block held at once: of the allocator on CUDA, resident in the process on Linux."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps of freed memory would hide what the block takes
    before = _resident("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    yield peak
    if before is not None:
        peak.bytes = max(_resident("VmHWM") - before, 0)


def _resident(name: str) -> int | None:
    """Bytes of this process in memory now (VmRSS) or at most so far (VmHWM), on Linux."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return 1024 * int(line.split()[1])
    return None
