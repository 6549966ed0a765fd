"""Where a model computes: the best device there is, or the one asked for; more than one where it does not fit.

One process uses one GPU: the first, or under a launcher the one of its LOCAL_RANK. It knows modules and no files.
"""

import os
import shutil
from importlib.util import find_spec

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import nn

ROOM = 0.9  # of a device's memory, for weights; the rest is for what a forward holds


def device_named(name: str | torch.device | None = None) -> torch.device:
    """That device, or with None the best there is: cuda (of LOCAL_RANK), else mps, else cpu.

    Raises ValueError for a device that is not here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    own = int(os.environ.get("LOCAL_RANK", "0"))
    mps = torch.backends.mps.is_available()
    if name is None:
        name = "cuda" if gpus else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"unknown device {name!r}: use cuda, cuda:1, mps or cpu")
    if device.type == "cuda":
        device = torch.device("cuda", own if device.index is None else device.index)
        if device.index >= gpus:
            raise ValueError(f"there is no device {device}: this machine shows {gpus} CUDA devices; leave --device out")
    if device.type == "mps" and not mps:
        raise ValueError("there is no device mps here: leave --device out")
    return device


def computes_on(module: nn.Module) -> torch.device:
    """Where a module with weights of its own computes: where they are, or where accelerate brings them for a call."""
    hook = getattr(module, "_hf_hook", None)
    return next(module.parameters()).device if hook is None else torch.device(hook.execution_device)


def can_compile() -> bool:
    """Whether `torch.compile` has what it needs for a GPU: Triton, and a C compiler for what starts its kernels."""
    compilers = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    return find_spec("triton") is not None and any(map(shutil.which, compilers))


def place(model: nn.Module, device: str | torch.device | None = None) -> nn.Module:
    """The model on that device; with None on the best, and over all GPUs and then the CPU where it does not fit one.

    A named device gets the whole model, and torch says so where it does not fit.
    """
    chosen = device_named(device)
    if device is None and chosen.type == "cuda":
        free = torch.cuda.mem_get_info(chosen)[0]
        if ROOM * free < sum(value.nbytes for value in model.state_dict().values()):
            return spread(model)
    return model.to(chosen)


def spread(model: nn.Module, max_memory: dict[int | str, int | str] | None = None) -> nn.Module:
    """The layers dealt out over the devices by accelerate, those without room kept on the CPU and brought in for each use.

    max_memory: bytes by device as accelerate takes them; None is what is free. Raises ValueError where it fits nowhere.
    """
    model.tie_weights()
    split = model._no_split_modules
    plan = infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=split)
    if "disk" in plan.values():
        raise ValueError("the model fits neither the GPUs nor the CPU's memory: use a smaller dtype or a larger machine")
    return dispatch_model(model, plan)
