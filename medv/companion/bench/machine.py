"""Clocks, peaks of memory, speed and name of a device, and the report of a comparison: shared by all benchmarks."""

import contextlib
import ctypes
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.table import Table

from medv.artifacts import versions

TIMING = "wall clock between synchronizations of the device after a warm-up, the median of the repeats"


@dataclass(frozen=True)
class Report:
    """Where a benchmark ran; each adds what it measured."""

    device: str
    threads: int
    machine: dict = field(default_factory=dict, kw_only=True)

    def to_dict(self) -> dict:
        """A JSON-able copy."""
        return asdict(self)

    def comparison(self, title: str, caption: str, columns: str, rows: Iterable[Sequence[str]]) -> Table:
        """One row a measurement. Numbers are never cut and names break at blanks, so that the table fits 80 columns."""
        table = Table(title=f"{title}\n{self.device}", caption=caption, box=None, pad_edge=False)
        for number, column in enumerate(columns.split()):
            table.add_column(column, justify="right" if number else "left", no_wrap=bool(number))
        for row in rows:
            table.add_row(*row)
        return table


def here(device: torch.device) -> dict[str, Any]:
    """The fields of `Report` for this device."""
    facts = machine(device)
    return {"device": facts["device"], "threads": torch.get_num_threads(), "machine": facts}


def megabytes(count: int | None) -> str:
    """Bytes as a cell of a table; "?" where the system does not report them."""
    return "?" if count is None else f"{count / 2**20:.0f} MB"


def times(ratio: float | None, digits: int = 1) -> str:
    """A ratio as a cell of a table."""
    return "?" if ratio is None else f"{ratio:.{digits}f}x"


def percent(share: float | None, digits: int = 0) -> str:
    """A share as a cell of a table; empty where it was not measured."""
    return "" if share is None else f"{100 * share:.{digits}f} %"


def machine(device: torch.device) -> dict:
    """Name, memory in bytes, versions and the method of timing, JSON-able."""
    facts = {"device": device_name(device), "timing": TIMING, "versions": versions()}
    if device.type != "cuda":
        return facts
    free, total = torch.cuda.mem_get_info(device)
    return facts | {"memory_bytes": total, "memory_free_bytes": free, "cuda": torch.version.cuda}


def bench_device(wanted: str | torch.device | None) -> torch.device:
    """That device, or the GPU if there is one; ValueError if a GPU is wanted and there is none."""
    device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is here: use the preset cpu, or run this where there is one")
    return device


def device_name(device: torch.device) -> str:
    """The model of the GPU, or of the CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def timed(call: Callable, device: torch.device) -> tuple[float, Any]:
    """Seconds of a call, including the work that it queued on the device, and its result."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    started = time.perf_counter()
    result = call()
    wait()
    return time.perf_counter() - started, result


def best(calls: Sequence[Callable], device: torch.device, repeats: int) -> list[tuple[float, int | None]]:
    """For each call the least seconds and peak bytes; calls take turns, so that other work on the machine slows all."""
    runs: list[list[tuple[float, int | None]]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, found in zip(calls, runs, strict=True):
            with peak_memory(device) as peak:
                seconds, _ = timed(call, device)
            found.append((seconds, peak.bytes))
    return [(min(s for s, _ in found), min((b for _, b in found if b is not None), default=None)) for found in runs]


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large product of two matrices, the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = [timed(lambda: a @ a, device)[0] for _ in range(6)]
    return 2 * size**3 / min(seconds[1:])


def copy_speed(device: torch.device) -> float:
    """Bytes read and written a second by a large copy on the device, the best of five."""
    source = torch.empty(2**31 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device)[0] for _ in range(6)]
    return 2 * source.nbytes / min(seconds[1:])


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[SimpleNamespace]:
    """Yield an object whose `bytes` becomes the most memory that the block held at once, above the start: of the allocator on
    CUDA, resident in the process on Linux, None elsewhere.
    """
    peak = SimpleNamespace(bytes=None)
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
