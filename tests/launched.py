"""Real training processes for the tests, as a launcher would start them, forked from a server that has imported everything."""

import gc
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tiny import examples, model, processor

from medv.cli import main
from medv.data.example import Example, Turn
from medv.model.devices import rank
from medv.profiles import StageRecipe, get_profile
from medv.training.launch import RunOptions, TrainingStopped
from medv.training.lora import LoraRecipe
from medv.training.stages import train_stage

RECIPE = StageRecipe(
    ("projector", "language_model"), samples=0, epochs=2, batch_size=4, learning_rate=1e-3, max_length=100, padding="none"
)
SHORT = replace(RECIPE, epochs=1.2)
THREE_STEPS = {
    "sample": (SHORT, None),
    "masked": (replace(SHORT, padding="batch", normalization="masked", times="stratified"), None),
    "token": (replace(SHORT, padding="batch", normalization="token"), None),
    "lora": (replace(SHORT, normalization="masked_sample"), LoraRecipe(rank=4, alpha=8)),
}
"""Recipes of three steps, the third of them across the end of an epoch of ten examples, between them every normalization;
"token" is on examples with and without images."""


def train(out: Path, recipe: StageRecipe = RECIPE, *, data=None, base=None, **options):
    """Train a fresh copy of the tiny model."""
    return train_stage(model(), processor(), recipe, data or examples(10), out, RunOptions(quiet=True, **options), base=base)


def with_corrupt(folder: Path) -> list[Example]:
    """Ten examples; the image of "broken" is a file that is no image."""
    (folder / "broken.png").write_bytes(b"this is no image")
    turns = (Turn("user", "What is shown?"), Turn("assistant", "chest"))
    return [*examples(9), Example("broken", folder / "broken.png", turns)]


def with_and_without_images() -> list[Example]:
    """Ten examples, every second one of them text alone."""
    return [replace(example, image=None) if i % 2 else example for i, example in enumerate(examples(10))]


def lengthened(example: Example, times: int) -> Example:
    """The example with an answer that is repeated."""
    question, answer = example.turns
    return replace(example, turns=(question, replace(answer, text=" ".join([answer.text] * times))))


# What the processes do. Each is named to `launch`.


def three_steps(out: Path, **options) -> None:
    """Every recipe of THREE_STEPS."""
    for name, (recipe, lora) in THREE_STEPS.items():
        data = with_and_without_images() if name == "token" else None
        train(out / name, recipe, lora=lora, data=data, **options)


def five_steps(out: Path, **options) -> None:
    """Five steps, with a checkpoint after each."""
    train(out, **options)


def long_texts(out: Path, **options) -> None:
    """The paper's recipes on texts of which some are cut for the output head, and others are not."""
    data = [lengthened(example, 1 + 400 * (i % 4 == 0)) for i, example in enumerate(examples(10))]
    for stage, recipe in get_profile("paper").stages.items():
        recipe = replace(recipe, epochs=1.2, batch_size=4, learning_rate=1e-3)
        train(out / stage, recipe, data=data, **options)


def struck(out: Path, **options) -> None:
    """The last process is killed within the third forward."""
    network, calls = model(), []

    def kill(module, inputs, output):
        calls.append(1)
        if len(calls) == 3 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    network.model.projector.register_forward_hook(kill)
    train_stage(network, processor(), RECIPE, examples(10), out, RunOptions(quiet=True, **options))


def corrupt(out: Path, images: Path, **options) -> None:
    """Training on `with_corrupt`."""
    train(out, data=with_corrupt(images), **options)


def command_line(out: Path, deepspeed: str) -> None:
    """`medv train align` as a person starts it."""
    sys.argv = ["medv", "train", "align", "--profile", "smoke", "--deepspeed", deepspeed, "--json", "--out", str(out)]
    main()


def generate(out: Path, arguments: list[str]) -> None:
    """`medv generate` as a person starts it."""
    sys.argv = ["medv", "generate", *arguments]
    main()


def gone_wrong(out: Path) -> None:
    """From the fourth forward on the projector of the last process gives no numbers."""
    network, calls = model(), []

    def spoil(module, inputs, output):
        calls.append(1)
        return output * float("nan") if len(calls) > 3 and rank() == 1 else output

    network.model.projector.register_forward_hook(spoil)
    train_stage(network, processor(), RECIPE, examples(10), out, RunOptions(quiet=True))


def no_room(out: Path, **options) -> None:
    """The first process may write no file larger than 64 KiB."""
    if rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
    train(out, **options)


# Starting them.


def forked(target, *arguments) -> BaseProcess:
    """A process that runs this function, without the seconds that its imports take."""
    context = multiprocessing.get_context("forkserver")
    muon = "deepspeed.runtime.zero.muon.muon_optimizer"  # DeepSpeed's engine imports it, and with it torch's compiler
    context.set_forkserver_preload(["deepspeed", "transformers", "medv.training.stages", "accelerate.utils", muon])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def start_command(said: Path, *arguments, **environment: str) -> BaseProcess:
    """`medv` with these arguments in a process of its own; the file `said` gets its standard output, `said`.err its errors."""
    return forked(_command, os.environ | environment, said, [str(argument) for argument in arguments])


class Launched:
    """Processes 0 ... n - 1 that share a job; `said` is what each wrote, once they have ended."""

    def __init__(self, job: str, out: Path, *, count: int = 2, **options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.logs = [out.with_name(f"{out.name}-{job}-{number}.log") for number in range(count)]
        self.processes: list[BaseProcess] = []
        for number, log in enumerate(self.logs):
            names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_PORT": port}
            self.processes.append(forked(_run, job, names, log, out, options))

    def wait(self, seconds: float = 400) -> list[int | None]:
        """The exit codes; a process that does not end is killed."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    @property
    def said(self) -> list[str]:
        """What each process wrote to standard output and standard error."""
        return [log.read_text() if log.exists() else "" for log in self.logs]


def launch(job: str, out: Path, **options) -> list[str]:
    """Run a job to its good end; what each process said."""
    launched = Launched(job, out, **options)
    codes = launched.wait()
    assert set(codes) == {0}, "\n".join(launched.said)
    return launched.said


def _run(job: str, names: dict[str, int], log: Path, out: Path, options: dict) -> None:
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    _prepare(log, log)
    try:
        globals()[job](out, **options)
    except (TrainingStopped, ValueError) as error:
        print(f"medv: {error}" if str(error) else "", file=sys.stderr, flush=True)
        sys.exit(1)


def _command(environment: dict[str, str], said: Path, arguments: list[str]) -> None:
    os.environ.update(environment)
    _prepare(said, said.with_name(f"{said.name}.err"))
    sys.argv = ["medv", *arguments]
    main()


def _prepare(out: Path, errors: Path) -> None:
    """Standard output and errors to files, one thread, Ctrl-C as in a terminal."""
    streams = {path: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in {out, errors}}
    os.dup2(streams[out], 1)
    os.dup2(streams[errors], 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    gc.freeze()  # no garbage collection has to walk through what the server has imported
