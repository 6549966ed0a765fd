"""What this machine has and what each profile can do on it."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

from medv.artifacts import default_out
from medv.profiles import PROFILES

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "deepspeed", "papermill", "jupyterlab", "ipywidgets")


def examine() -> dict[str, str]:
    """Versions, devices and a verdict per profile, as plain strings."""
    import torch

    facts = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    facts |= {name: _version(name) for name in PACKAGES}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    facts["cpu cores"] = str(os.cpu_count())
    facts["torch threads"] = str(torch.get_num_threads())
    facts["GPUs"] = "; ".join(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus) or "none"
    facts["free disk"] = f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"
    memory = sum(gpu.total_memory for gpu in gpus) / 2**30
    facts["profile tiny"] = "ready: `medv reproduce`"
    facts["profile small"] = _towers() + ("" if gpus else "; slow without a GPU") + f": {PROFILES['small'].notes}"
    facts["profile paper"] = (
        "memory fits full fine-tuning; weights and data are yours to download"
        if memory >= 300
        else f"needs about 4 x 80 GB of GPU memory for full fine-tuning, here are {memory:.0f} GiB; generation needs about 20"
    )
    return facts


def _towers() -> str:
    from medv.checkpoints.bundled import fetched_towers

    try:
        fetched_towers("small", default_out("small") / "towers")
    except FileNotFoundError:
        return "run `medv towers small` first"
    return "its towers are there"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
