"""One process or many: how a training is run, DeepSpeed's configurations, and failures that end in one sentence.

Launchers set RANK, LOCAL_RANK and WORLD_SIZE; without them there is one process. The Trainer makes the process group (NCCL on
GPUs, gloo on CPUs), and accelerate uses it. A launcher runs the command that would run alone (every node must see `--out`):

    torchrun --nproc_per_node 4 -m medv train instruct --deepspeed zero3 --out runs/s2
    deepspeed --num_gpus 4 --no_local_rank --module medv train instruct --deepspeed zero3 --out runs/s2

benchmarks/slurm.sh starts it on several nodes.
"""

import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from medv import limits
from medv.artifacts import disk_is_full
from medv.model.devices import processes, rank
from medv.training.lora import LoraRecipe

DEEPSPEED = ("zero2", "zero3")
_READ_ONLY = re.compile(r"Read-only file system|Permission denied|os error (13|30)\b", re.I)
_LOST_PROCESS = re.compile(r"gloo|nccl|peer|connection (closed|reset|refused)|broken pipe|timed out", re.I)


@dataclass(frozen=True)
class RunOptions:
    """How a training is run. `seed`, `lora` and `skip_corrupt` affect the result; the others only its cost.

    accumulation: parts into which each process cuts its share of a batch. deepspeed: None, "zero2" or "zero3". device: None is
    the best there is. skip_corrupt: skip and count examples whose image cannot be read. workers: further processes, of each
    process, that prepare images. checkpoints=False: a stopped run begins anew, and a short one spends no time on saving.
    stop_after: end after so many steps, with a checkpoint and no result.
    """

    seed: int = 0
    lora: LoraRecipe | None = None
    accumulation: int = 1
    deepspeed: str | None = None
    device: str | None = None
    skip_corrupt: bool = False
    workers: int = 0
    checkpoints: bool = True
    stop_after: int | None = None
    quiet: bool = False


class TrainingStopped(RuntimeError):
    """A run that cannot go on: one sentence, or an empty one where another process says it."""


def deepspeed_config(name: str) -> Path:
    """The packaged configuration of that name; raises ValueError for another name."""
    limits.named("DeepSpeed configuration", name, DEEPSPEED)
    return Path(__file__).parent / "deepspeed" / f"{name}.json"


def join(deepspeed: str | None) -> None:
    """Prepare DeepSpeed, and warn where a single process leaves GPUs unused; raises ValueError without DeepSpeed."""
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
    # Without a launcher DeepSpeed would look for MPI. Port 0 is any free one.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    library.utils.logger.setLevel("WARNING")
    # DeepSpeed still calls torch's older names, once in every process and place.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not torch.cuda.is_available():
        # Compiling this shared-memory operation would need a C++ compiler; gloo does the same.
        library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():
            library.init_distributed(dist_backend="gloo", verbose=False)


@contextmanager
def clear_failures(how_to_resume: Callable[[], str]) -> Iterator[None]:
    """Turn a full or read-only disk and a lost process into a `TrainingStopped` that ends with `how_to_resume()`.

    Other errors pass. A launcher that terminates this process because another one died counts as that loss.
    """
    who = f"process {rank()} of {processes()}: " if processes() > 1 else ""
    lost = "another process of the run was lost or stopped"

    def on_terminate(*_) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise TrainingStopped(f"{who}{lost}; {how_to_resume()}")

    handles = processes() > 1 and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, on_terminate) if handles else None
    try:
        yield
    except TrainingStopped:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        line = next(iter(str(error).splitlines()), "")
        if disk_is_full(error):
            said = f"the disk is full ({line}): free some space"
        elif _READ_ONLY.search(str(error)):
            said = f"nothing can be written ({line}): make the folder writable"
        elif processes() > 1 and _LOST_PROCESS.search(str(error)):
            said = lost
        else:
            raise
        raise TrainingStopped(f"{who}{said}; {how_to_resume()}") from error
    finally:
        if handles:
            signal.signal(signal.SIGTERM, before if sys.exc_info()[0] is None else signal.SIG_IGN)
