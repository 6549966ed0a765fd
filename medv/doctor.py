"""Versions and devices of this machine, and which profiles run on it."""

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

    from medv.checkpoints.bundled import fetched_towers

    facts = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    facts["cpu cores"] = str(os.cpu_count())
    facts["torch threads"] = str(torch.get_num_threads())
    facts["GPUs"] = "; ".join(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus) or "none"
    facts["free disk"] = f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"
    try:
        fetched_towers("small", default_out("small") / "towers")
        towers = "its towers are there"
    except FileNotFoundError:
        towers = "run `medv towers small` first"
    memory = sum(gpu.total_memory for gpu in gpus) / 2**30
    facts["profile tiny"] = "ready: `medv reproduce`"
    facts["profile small"] = towers + ("" if gpus else "; slow without a GPU") + f": {PROFILES['small'].notes}"
    facts["profile paper"] = (
        "memory fits full fine-tuning; weights and data are yours to download"
        if memory >= 300
        else f"needs about 4 x 80 GB of GPU memory for full fine-tuning, here are {memory:.0f} GiB; generation needs about 20"
    )
    return facts
