"""Time, memory and forwards of the samplers, side by side in one process on the same random weights.

The baseline is the official algorithm (`medv.experiments.bench_baseline`); the modes are those of `generate`. Weights are
random, so nothing here says how good an answer is: agreement is the share of the baseline's commits (step, position, token)
that a mode makes too, which is all of them for an exact mode up to rounding, and means little for a cached one.
"""

import contextlib
import ctypes
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.table import Table
from transformers import LlamaConfig

from medv.artifacts import versions
from medv.diffusion.caching import NO_CACHE, CachePolicy, DualCache, PrefixCache
from medv.diffusion.settings import SamplerConfig
from medv.experiments.bench_baseline import official_run
from medv.model.configuration import MedVConfig
from medv.model.modeling import MedVForMaskedDiffusion


@dataclass(frozen=True)
class BenchShape:
    """A random language tower and a sampling problem; the vocabulary and its special ids are LLaDA's by default."""

    hidden_size: int = 512
    intermediate_size: int = 1536
    layers: int = 8
    heads: int = 8
    vocab_size: int = 126464
    prompt_length: int = 800
    gen_length: int = 128
    block_length: int = 64
    dtype: str = "float32"

    @property
    def length(self) -> int:
        """Tokens of the canvas."""
        return self.prompt_length + self.gen_length

    def exact_flops(self) -> float:
        """Multiplications and additions of one answer at one token a forward without a cache, as `Decoder` computes it."""
        d, mlp, t = self.hidden_size, 3 * self.hidden_size * self.intermediate_size, self.length
        rows = (self.block_length + 1) / 2  # the mean number of open positions
        body = (self.layers - 1) * (2 * (4 * d * d + mlp) * t + 4 * t * t * d)
        last = 4 * d * d * t + rows * (2 * (2 * d * d + mlp) + 4 * t * d)
        return self.gen_length * (body + last + 2 * d * self.vocab_size * rows)


PRESETS = {
    "cpu": BenchShape(),
    "gpu": BenchShape(4096, 12288, 32, 32, gen_length=256, dtype="bfloat16"),
}


@dataclass(frozen=True)
class Mode:
    """One way to sample: tokens a forward commits, rows of the batch, and what `generate` is told."""

    name: str
    cache: CachePolicy = NO_CACHE
    tokens_a_forward: int = 1
    rows: int = 1
    graphs: bool = False


def modes(on_gpu: bool) -> list[Mode]:
    """The modes that are compared: all there are on a GPU, without batches and graphs elsewhere."""
    found = [
        Mode("exact"),
        Mode("prefix cache, refresh 32", PrefixCache(32), graphs=on_gpu),
        Mode("dual cache, refresh 32", DualCache(32), graphs=on_gpu),
        Mode("dual cache, 4 tokens a forward", DualCache(32), tokens_a_forward=4, graphs=on_gpu),
    ]
    if on_gpu:
        found += [
            Mode("dual cache without graphs", DualCache(32)),
            Mode("dual cache, batch of 8", DualCache(32), rows=8, graphs=True),
            Mode("dual cache, batch of 8, 4 tokens a forward", DualCache(32), 4, rows=8, graphs=True),
        ]
    return found


@dataclass(frozen=True)
class Measurement:
    """One mode. seconds: of all rows' answers; for a baseline that was cut short, that of its forwards times what is
    missing. peak_bytes: memory above what was held before (None where the system does not tell). ratio: tokens a second
    against the first baseline. memory_ratio: its peak over this one. agreement: see the module.
    """

    name: str
    seconds: float
    tokens_per_second: float
    forwards: int
    refreshes: int = 0
    rows: int = 1
    measured_forwards: int | None = None
    peak_bytes: int | None = None
    ratio: float = 1.0
    memory_ratio: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class BenchResult:
    """All measurements of a run and where it was made. roofline: the share of this device's own matrix product speed (of
    the same dtype, measured in the run) at which the exact mode computes what it cannot avoid.
    """

    device: str
    threads: int
    shape: BenchShape
    seed: int
    matmul_tflops: float
    roofline: float
    measurements: list[Measurement]
    versions: dict[str, str | None] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """A JSON-able copy."""
        return asdict(self)

    def table(self) -> Table:
        """The same as a table for a terminal."""
        shape = self.shape
        what = f"prompt {shape.prompt_length}, L = {shape.gen_length}, B = {shape.block_length}, V = {shape.vocab_size}"
        title = f"{what}, hidden {shape.hidden_size} x {shape.layers} layers, {shape.dtype}\n{self.device}"
        caption = (
            f"exact: {100 * self.roofline:.0f} % of {self.matmul_tflops:.2f} TFLOP/s of this device's own products"
        )
        table = Table(title=title, caption=caption)
        for column in (
            "sampler",
            "seconds",
            "tokens/s",
            "ratio",
            "forwards",
            "refreshes",
            "memory",
            "less",
            "agreement",
        ):
            table.add_column(column, justify="left" if column == "sampler" else "right")
        for m in self.measurements:
            cut = "" if m.measured_forwards is None else f" ({m.measured_forwards} measured)"
            table.add_row(
                m.name,
                f"{m.seconds:.2f}",
                f"{m.tokens_per_second:.1f}",
                f"{m.ratio:.2f}x",
                f"{m.forwards}{cut}",
                str(m.refreshes),
                "?" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:.0f} MB",
                "?" if m.memory_ratio is None else f"{m.memory_ratio:.1f}x",
                "" if m.agreement is None else f"{100 * m.agreement:.1f} %",
            )
        return table


def bench_sampler(
    shape: BenchShape,
    *,
    device: str | torch.device | None = None,
    baseline_forwards: int | None = 8,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> BenchResult:
    """Measure everything once. `baseline_forwards` cuts the official algorithm short (None runs it to the end): its steps
    all cost the same, and its seconds are scaled. `progress` hears what is measured next.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is here: use the preset cpu, or run this where there is one")
    network = random_network(shape, device, seed)
    prompts = _prompts(shape, 8, device, seed)
    progress("matrix products")
    speed = matmul_speed(device, getattr(torch, shape.dtype))
    found = []
    for half in (True, False) if device.type == "cuda" else (False,):
        name = "official algorithm" + (", float16 autocast" if half else "")
        progress(name)
        one, written = _baseline(network, prompts[:1], shape, name, baseline_forwards, half)
        found.append(one)
    for mode in modes(device.type == "cuda"):
        progress(mode.name)
        found.append(_measure(network, prompts[: mode.rows], shape, mode, written))
    exact = next(m for m in found if m.name == "exact")
    first = found[0]
    found = [
        replace(
            m,
            ratio=m.tokens_per_second / first.tokens_per_second,
            memory_ratio=first.peak_bytes / max(m.peak_bytes, 1) if m.peak_bytes and first.peak_bytes else None,
        )
        for m in found
    ]
    return BenchResult(
        device=device_name(device),
        threads=torch.get_num_threads(),
        shape=shape,
        seed=seed,
        matmul_tflops=speed / 1e12,
        roofline=shape.exact_flops() / exact.seconds / speed,
        measurements=found,
        versions=versions(),
    )


def measure_mode(shape: BenchShape, mode: Mode, *, device: str | torch.device = "cpu", seed: int = 0) -> Measurement:
    """One mode alone on random weights, without a baseline: its ratio and agreement say nothing."""
    device = torch.device(device)
    network = random_network(shape, device, seed)
    prompts = _prompts(shape, mode.rows, device, seed)
    return _measure(network, prompts, shape, mode, ())


def _prompts(shape: BenchShape, rows: int, device: torch.device, seed: int) -> torch.Tensor:
    """Random ids [rows, prompt length], below all special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, shape.vocab_size - 400, (rows, shape.prompt_length), generator=generator).to(device)


def random_network(shape: BenchShape, device: torch.device, seed: int) -> MedVForMaskedDiffusion:
    """A model of a shape with random weights; its vision tower is as small as can be, as no image is looked at."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.length,
        is_causal=False,
    )
    ids, last = {}, shape.vocab_size - 1
    if last < 126463:  # LLaDA's special ids do not fit
        ids = {"image_token_id": last, "mask_token_id": last - 1, "fill_token_id": last - 2}
        ids |= {"stop_token_ids": [last - 3], "suppress_token_ids": [last - 1, last - 2]}
    config = MedVConfig(vision_config={"model_type": "siglip_vision_model", **small}, text_config=text, **ids)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return MedVForMaskedDiffusion._from_config(config, dtype=getattr(torch, shape.dtype)).eval()


def _baseline(
    network: MedVForMaskedDiffusion,
    prompt: torch.Tensor,
    shape: BenchShape,
    name: str,
    forwards: int | None,
    half: bool,
) -> tuple[Measurement, tuple]:
    config = SamplerConfig(shape.gen_length, shape.block_length, shape.gen_length)
    official_run(network, prompt, config, forwards=1, half=half)  # warm
    with peak_memory(prompt.device) as peak:
        seconds, run = timed(lambda: official_run(network, prompt, config, forwards=forwards, half=half), prompt.device)
    seconds *= shape.gen_length / run.forwards
    cut = run.forwards if run.forwards < shape.gen_length else None
    return (
        Measurement(
            name=name,
            seconds=seconds,
            tokens_per_second=shape.gen_length / seconds,
            forwards=shape.gen_length,
            measured_forwards=cut,
            peak_bytes=peak.bytes,
            agreement=1.0,
        ),
        run.written,
    )


def _measure(
    network: MedVForMaskedDiffusion, prompts: torch.Tensor, shape: BenchShape, mode: Mode, written: tuple
) -> Measurement:
    config = SamplerConfig(
        shape.gen_length, shape.block_length, shape.gen_length // mode.tokens_a_forward, cache=mode.cache
    )
    blocks = replace(config, steps=config.blocks)
    network.generate(prompts, config=blocks, graphs=mode.graphs)  # warm: one forward a block
    with peak_memory(prompts.device) as peak:
        seconds, output = timed(lambda: network.generate(prompts, config=config, graphs=mode.graphs), prompts.device)
    own = {(c.step, c.position, c.token) for c in output.trace.commits if c.row == 0}
    comparable = mode.tokens_a_forward == 1 and bool(written)
    return Measurement(
        name=mode.name,
        seconds=seconds,
        tokens_per_second=sum(output.lengths) / seconds,
        forwards=max(output.forwards),
        refreshes=output.refreshes,
        rows=mode.rows,
        peak_bytes=peak.bytes,
        agreement=len(own & set(written)) / len(written) if comparable else None,
    )


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
