"""How the trainings of a notebook run: in its own process, or by torchrun over as many processes as the configuration says.

A training is a request, plain data that holds everything that decides its result, so that other processes can read it. The
training code, which takes seconds to import, is imported when one begins.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medv import limits
from medv.artifacts import as_json, write_json
from medv.profiles import Profile, get_profile

if TYPE_CHECKING:
    from medv.training.examples import TrainingData
    from medv.training.lora import LoraRecipe

DEEPSPEED = ("zero2", "zero3")


@dataclass(frozen=True)
class Machine:
    """processes: of a training, one for each GPU; deepspeed: None, "zero2" or "zero3"; accumulation: parts into which each
    process cuts its share of a batch; workers: of each process, which prepare images.
    """

    processes: int = 1
    deepspeed: str | None = None
    accumulation: int = 1
    workers: int = 0

    def __post_init__(self):
        for name, least in {"processes": 1, "accumulation": 1, "workers": 0}.items():
            limits.whole(name, getattr(self, name), least)
        if self.deepspeed not in (None, *DEEPSPEED):
            raise ValueError(f"unknown DeepSpeed configuration {self.deepspeed!r}: use one of {', '.join(DEEPSPEED)}")

    def train(
        self,
        stage: str,
        profile: Profile,
        out: Path,
        *,
        seed: int = 0,
        init: Path | None = None,
        data: "TrainingData | None" = None,
        lora: "LoraRecipe | None" = None,
        subset: tuple[int, int, int] | None = None,
        checkpoints: bool = True,
        quiet: bool = False,
    ) -> dict[str, Any]:
        """Train a stage into the folder `out` and return its facts, as `run_stage` does; a stopped training continues.

        subset: (pool, size, seed) draws `size` of the first `pool` training examples. Raises RuntimeError with the last line of
        the log where the processes of torchrun fail.
        """
        from medv.training.examples import PHANTOMS
        from medv.training.stages import summary

        data = data or PHANTOMS
        request = {
            "stage": stage,
            "profile": profile.to_dict(),
            "out": str(out),
            "options": {"seed": seed, "checkpoints": checkpoints, "quiet": quiet, "lora": lora and asdict(lora)}
            | {"accumulation": self.accumulation, "deepspeed": self.deepspeed, "workers": self.workers},
            "init": init and str(init),
            "data": [data.name, data.folder and str(data.folder), data.protocol, [str(root) for root in data.roots]],
            "subset": subset,
        }
        if self.processes == 1:
            facts = carry_out(request)
        else:
            started = time.perf_counter()
            log, file = (out.with_name(f"torchrun-{out.name.strip('.')}.{end}") for end in ("log", "json"))
            write_json(file, as_json(request))
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
            with log.open("w", encoding="utf-8") as stream:
                command = [sys.executable, *launcher, "-m", __name__, str(file)]
                how = {"env": {"OMP_NUM_THREADS": "1"} | os.environ, "preexec_fn": _end_with_parent}
                code = subprocess.run(command, stdout=stream, stderr=stream, **how).returncode
            if code:
                lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
                said = next((line for line in lines if line.startswith("medv: ")), lines[-1] if lines else "it said nothing")
                raise RuntimeError(
                    f"the training of {self.processes} processes failed: {said.removeprefix('medv: ')} (see {log})"
                )
            facts = summary(out) | {"seconds": time.perf_counter() - started}
            for done in (log, file):
                done.unlink()
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        return facts


def _end_with_parent() -> None:
    """In the launcher: ask Linux to end it, and with it all processes, when the thread that started it is gone (kill -9)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def carry_out(request: Mapping[str, Any]) -> dict[str, Any]:
    """The training of a request, in this process."""
    from medv.training.examples import TrainingData, drawn, stage_examples
    from medv.training.launch import RunOptions
    from medv.training.lora import LoraRecipe
    from medv.training.stages import run_stage

    stage, options, (name, folder, protocol, roots) = request["stage"], dict(request["options"]), request["data"]
    profile = adjusted(get_profile(request["profile"]["name"]), request["profile"])
    options["lora"] = options["lora"] and LoraRecipe(**options["lora"])
    data = TrainingData(name, folder and Path(folder), protocol, tuple(map(Path, roots)))
    examples = None
    if request["subset"]:
        pool, size, seed = request["subset"]
        examples = drawn(stage_examples(stage, profile.with_recipe(stage, samples=pool), data)[0], size, seed)
    init = request["init"] and Path(request["init"])
    return run_stage(stage, profile, Path(request["out"]), RunOptions(**options), data=data, init=init, examples=examples)


def adjusted(value: Any, changes: Mapping[str, Any], where: str = "the profile") -> Any:
    """A profile, or a part of one, with other values: {"describe": {"steps": 8}, "seeds": [0]}; the inverse of `to_dict`.

    Raises ValueError for a name that it does not have, and for a value of another type.
    """
    found = {item.name: getattr(value, item.name) for item in fields(value)} if is_dataclass(value) else dict(value)
    for name, new in changes.items():
        if name not in found:
            raise ValueError(f"{where} has no {name!r}: choose from {', '.join(found)}")
        old, place = found[name], f"{name} of {where}"
        parts = is_dataclass(old) or (isinstance(old, Mapping) and old and all(map(is_dataclass, old.values())))
        if isinstance(new, list):
            new = tuple(new)
        if isinstance(new, Mapping) and parts:
            new = adjusted(old, new, place)
        elif isinstance(new, Mapping) and isinstance(old, Mapping) and old:
            new = {type(next(iter(old)))(key): item for key, item in new.items()}  # names of a file are text
        kinds = {int: (int, float), float: (int, float), dict: Mapping}.get(type(old), type(old))
        if None not in (old, new) and (not isinstance(new, kinds) or isinstance(new, bool) != isinstance(old, bool)):
            raise ValueError(f"{place} is {new!r}: it must be like {old!r}")
        found[name] = new
    return replace(value, **found) if is_dataclass(value) else found


if __name__ == "__main__":
    try:
        carry_out(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"medv: {error}")
