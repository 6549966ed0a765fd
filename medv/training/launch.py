"""One process or many: who this one is, DeepSpeed's configurations, and a run that breaks saying so in one sentence.

`torchrun`, the `deepspeed` launcher and Slurm tell each process who it is through RANK, LOCAL_RANK and WORLD_SIZE; without
them there is one process. Processes talk through NCCL on GPUs and gloo on CPUs, by the same code. A launcher runs the command
that would run alone (`--out` must be a folder that every node sees):

    torchrun --nproc_per_node 4 -m medv train instruct --deepspeed zero3 --out runs/s2
    deepspeed --num_gpus 4 --no_local_rank --module medv train instruct --deepspeed zero3 --out runs/s2

benchmarks/slurm.sh starts it on several nodes. This module knows no model and no data.
"""

import os
import re
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from medv.artifacts import disk_is_full

DEEPSPEED = ("zero2", "zero3")
_SHUT = re.compile(r"Read-only file system|Permission denied|os error (13|30)\b", re.I)
_LOST = re.compile(r"gloo|nccl|peer|connection (closed|reset|refused)|broken pipe|timed out", re.I)


class TrainingStopped(RuntimeError):
    """A run that cannot go on: one sentence, or an empty one where another process says it."""


def rank() -> int:
    """The number of this process among all."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def deepspeed_config(name: str) -> Path:
    """The packaged configuration of that name; raises ValueError for another name."""
    if name not in DEEPSPEED:
        raise ValueError(f"unknown DeepSpeed configuration {name!r}: use one of {', '.join(DEEPSPEED)}")
    return Path(__file__).parent / "deepspeed" / f"{name}.json"


def join(deepspeed: str | None) -> None:
    """Make DeepSpeed ready, once in a process; without DeepSpeed the Trainer joins the others by itself.

    One process alone trains on one GPU and says so where there are more. Raises ValueError where DeepSpeed is not installed.
    """
    if processes() == 1 and (count := torch.cuda.device_count()) > 1:
        warnings.warn(
            f"this process uses one of {count} GPUs: for all of them, `torchrun --nproc_per_node {count} -m medv train ...`",
            stacklevel=2,
        )
    if deepspeed is None:
        return
    deepspeed_config(deepspeed)
    try:
        import deepspeed as library
    except ImportError:
        raise ValueError("DeepSpeed is not installed: pip install 'medv[deepspeed]'") from None
    # Without a launcher DeepSpeed would look for MPI.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    library.utils.logger.setLevel("WARNING")
    # DeepSpeed still calls torch's older names, once in every process and place.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not torch.cuda.is_available():
        # Compiling this shared-memory operation would need a C++ compiler; gloo does the same.
        library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():
            library.init_distributed(dist_backend="gloo", verbose=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_all() -> None:
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def gather(values: torch.Tensor) -> torch.Tensor:
    """`values` [n] of every process, on the device they are on: [processes, n]."""
    if not dist.is_initialized():
        return values[None]
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts)


def gather_objects(value: object) -> list:
    """A small object of every process, in their order."""
    if not dist.is_initialized():
        return [value]
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


@contextmanager
def stopping_in_words(going_on: Callable[[], str]) -> Iterator[None]:
    """Turn a full or read-only disk and a lost process into a `TrainingStopped` that says what `going_on` says of the way on.

    Other errors pass. A launcher that takes this process down because another one died counts as that loss.
    """
    who = f"process {rank()} of {processes()}: " if processes() > 1 else ""
    lost = "another process of the run was lost or stopped"

    def asked_to_stop(*_) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise TrainingStopped(f"{who}{lost}; {going_on()}")

    watches = processes() > 1 and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, asked_to_stop) if watches else None
    try:
        yield
    except TrainingStopped:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        line = next(iter(str(error).splitlines()), "")
        if disk_is_full(error):
            raise TrainingStopped(f"{who}the disk is full ({line}): free some space; {going_on()}") from error
        if _SHUT.search(str(error)):
            raise TrainingStopped(f"{who}nothing can be written ({line}): make the folder writable; {going_on()}") from error
        if processes() > 1 and _LOST.search(str(error)):
            raise TrainingStopped(f"{who}{lost}; {going_on()}") from error
        raise
    finally:
        if watches:
            signal.signal(signal.SIGTERM, before if sys.exc_info()[0] is None else signal.SIG_IGN)
