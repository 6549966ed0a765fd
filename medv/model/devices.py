"""Device placement: the best available device or a named one; several devices where a model does not fit on one.

One process uses one GPU: the first, or under a launcher that of its LOCAL_RANK.
"""

import os
import shutil
from importlib.util import find_spec

import torch
from torch import nn

ROOM = 0.9  # share of a device's memory for weights; activations take the rest


def rank() -> int:
    """The number of this process among those of a launcher, known before there is a process group; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes a launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_named(name: str | torch.device | None = None) -> torch.device:
    """The device of that name; None: the best available, cuda (of LOCAL_RANK), else mps, else cpu.

    Raises ValueError for a device that this machine does not have.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
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
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index)
        if device.index >= gpus:
            raise ValueError(f"there is no device {device}: this machine shows {gpus} CUDA devices; leave --device out")
    if device.type == "mps" and not mps:
        raise ValueError("there is no device mps here: leave --device out")
    return device


def computes_on(module: nn.Module) -> torch.device:
    """The device of a module's computation: that of its weights, or the one to which accelerate moves them for a call."""
    hook = getattr(module, "_hf_hook", None)
    return next(module.parameters()).device if hook is None else torch.device(hook.execution_device)


def can_compile() -> bool:
    """Whether `torch.compile` works for a GPU: it needs Triton, and a C compiler for the code that launches kernels."""
    compilers = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    return find_spec("triton") is not None and any(map(shutil.which, compilers))


def place(model: nn.Module, device: str | torch.device | None = None) -> nn.Module:
    """Move the model to that device. None: the best available, or all GPUs and then the CPU where it does not fit on one.

    A named device gets the whole model; torch raises where it does not fit.
    """
    chosen = device_named(device)
    if device is None and chosen.type == "cuda":
        free = torch.cuda.mem_get_info(chosen)[0]
        if ROOM * free < sum(value.nbytes for value in model.state_dict().values()):
            return spread(model)
    return model.to(chosen)


def spread(model: nn.Module, max_memory: dict[int | str, int | str] | None = None) -> nn.Module:
    """Distribute the layers over the devices by accelerate; those that do not fit stay on the CPU and are moved for each use.

    max_memory: bytes by device as accelerate takes them; None: the free memory. Raises ValueError where it fits nowhere.
    """
    from accelerate import dispatch_model, infer_auto_device_map  # here, so that a model on one device does without

    model.tie_weights()
    plan = infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=model._no_split_modules)
    if "disk" in plan.values():
        raise ValueError("the model fits neither the GPUs nor the CPU's memory: use a smaller dtype or a larger machine")
    return dispatch_model(model, plan)
