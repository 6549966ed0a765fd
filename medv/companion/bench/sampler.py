"""Time, memory and forwards of the samplers, side by side in one process on the same random weights.

The baseline is the official algorithm (`medv.companion.bench.baseline`); the modes are those of `generate`. Weights are
random, so nothing here says how good an answer is: agreement is the share of the baseline's commits (step, position, token)
that a mode makes too, which is all of them for an exact mode up to rounding, and means little for a cached one.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.table import Table
from transformers import LlamaConfig

from medv.artifacts import append_jsonl, read_jsonl
from medv.companion.bench.baseline import official_run
from medv.companion.bench.machine import bench_device, copy_speed, machine, matmul_speed, peak_memory, timed
from medv.diffusion.blockwise import SamplerOutput
from medv.diffusion.caching import NO_CACHE, CachePolicy, DualCache, PrefixCache
from medv.diffusion.config import SamplerConfig
from medv.model.configuration import MedVConfig
from medv.model.decoding import forget_decoders
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

    def forward_seconds(self, window: float, rows: int, flops_a_second: float, bytes_a_second: float) -> float:
        """The least time of a forward over `window` columns of `rows` canvases: its operations, or its weights and keys."""
        d, t = self.hidden_size, self.length
        body, head = self.layers * (4 * d * d + 3 * d * self.intermediate_size), d * self.vocab_size
        flops = rows * (2 * body * window + 4 * self.layers * window * t * d + 2 * head * self.block_length)
        numbers = body + head + 2 * rows * self.layers * t * d
        size = getattr(torch, self.dtype).itemsize
        return max(flops / flops_a_second, size * numbers / bytes_a_second)


PRESETS = {"cpu": BenchShape(), "gpu": BenchShape(4096, 12288, 32, 32, gen_length=256, dtype="bfloat16")}


@dataclass(frozen=True)
class Mode:
    """One way to sample: tokens a forward commits, rows of the batch, and what `generate` is told. `measured`: so many
    forwards are run and their seconds scaled, where all cost the same; None runs all.
    """

    name: str
    cache: CachePolicy = NO_CACHE
    tokens_a_forward: int = 1
    rows: int = 1
    graphs: bool = False
    compiled: bool = False
    measured: int | None = None


def modes(on_gpu: bool) -> list[Mode]:
    """The modes that are compared: all there are on a GPU, without batches and graphs elsewhere."""
    prefix, dual = PrefixCache(32), DualCache(32)
    if not on_gpu:
        return [
            Mode("exact"),
            Mode("prefix cache, refresh 32", prefix),
            Mode("dual cache, refresh 32", dual),
            Mode("dual cache, 4 tokens a forward", dual, tokens_a_forward=4),
        ]
    found = []
    for rows in (1, 8):
        for name, cache in (("exact", NO_CACHE), ("dual cache", dual), ("prefix cache", prefix)):
            for tokens in (1, 4):
                full = name + (", 4 tokens a forward" if tokens > 1 else "") + (f", batch of {rows}" if rows > 1 else "")
                cut = 6 if cache == NO_CACHE and rows > 1 else None
                found.append(Mode(full, cache, tokens, rows, graphs=True, compiled=True, measured=cut))
    found += [
        Mode("exact, neither graphs nor compiled", measured=16),
        Mode("dual cache, graphs, not compiled", dual, graphs=True),
        Mode("dual cache, compiled, no graphs", dual, compiled=True, measured=32),
        Mode("dual cache, neither", dual, measured=32),
    ]
    first = ("exact", "dual cache", "prefix cache", "dual cache, 4 tokens a forward")
    then = ("dual cache, batch of 8", "dual cache, 4 tokens a forward, batch of 8")
    order = {name: place for place, name in enumerate((*first, *then))}
    return sorted(found, key=lambda mode: order.get(mode.name, len(order)))


BASELINES = {"official algorithm, float16 autocast": True, "official algorithm": False}
"""Name -> whether float16 autocast casts the weights at each forward, as it does on a GPU."""


@dataclass(frozen=True)
class Measurement:
    """One mode. seconds: of all rows' answers, the median of the repeats; where a run was cut short, that of the forwards
    measured times what is missing. peak_bytes: memory above what was held before (None where the system does not tell).
    ratio: tokens a second against the first baseline. memory_ratio: its peak over this one. agreement: see the module.
    floor_seconds: what the machine's own speed allows at best for these forwards, of_floor its share of the seconds.
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
    repeats: int = 1
    floor_seconds: float | None = None
    of_floor: float | None = None


@dataclass(frozen=True)
class BenchResult:
    """All measurements of a run and where it was made. roofline: the share of this device's own matrix product speed (of
    the same dtype, measured in the run) at which the exact mode computes what it cannot avoid (None where that failed).
    errors: what failed, and why.
    """

    device: str
    threads: int
    shape: BenchShape
    seed: int
    matmul_tflops: float
    roofline: float | None
    measurements: list[Measurement]
    copy_tb_per_second: float | None = None
    machine: dict = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """A JSON-able copy."""
        return asdict(self)

    def table(self) -> Table:
        """The same as a table for a terminal."""
        shape = self.shape
        what = f"prompt {shape.prompt_length}, L = {shape.gen_length}, B = {shape.block_length}, V = {shape.vocab_size}"
        title = f"{what}, hidden {shape.hidden_size} x {shape.layers} layers, {shape.dtype}\n{self.device}"
        share = "failed" if self.roofline is None else f"{100 * self.roofline:.0f} %"
        caption = f"exact: {share} of {self.matmul_tflops:.2f} TFLOP/s of this device's own products"
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
            "of floor",
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
                "" if m.of_floor is None else f"{100 * m.of_floor:.0f} %",
            )
        return table


def bench_sampler(
    shape: BenchShape,
    *,
    device: str | torch.device | None = None,
    baseline_forwards: int | None = 8,
    seed: int = 0,
    journal: Path | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> BenchResult:
    """Measure everything. `baseline_forwards` cuts the official algorithm short (None runs it to the end): its steps all
    cost the same, and its seconds are scaled. `progress` hears what is measured next. `journal` is a file to which every
    measurement is added as a JSON line and from which those of a stopped run of the same are taken; with it a mode that
    fails is told in `errors`, and the next one is measured.
    """
    device = bench_device(device)
    network = random_network(shape, device, seed)
    prompts = _prompts(shape, 8, device, seed)
    progress("matrix products and copies")
    speed, copies = matmul_speed(device, getattr(torch, shape.dtype)), copy_speed(device)
    where, written = machine(device), ()
    run = json.loads(json.dumps({"shape": asdict(shape), "seed": seed, "device": where["device"]}))
    known = {} if journal is None else {row["name"]: row for row in read_jsonl(journal) if row["run"] == run}
    found, errors = [], {}

    def measured(mode: Mode) -> Measurement:
        nonlocal written
        if mode.name in BASELINES:
            one, written = _baseline(network, prompts[:1], shape, mode, BASELINES[mode.name])
            return one
        one = _measure(network, prompts[: mode.rows], shape, mode, written)
        floor = _floor(shape, mode, one, speed, copies)
        return replace(one, floor_seconds=floor, of_floor=floor / one.seconds)

    for mode in _plan(device.type == "cuda", baseline_forwards):
        progress(mode.name)
        if mode.name in known:
            found.append(Measurement(**known[mode.name]["found"]))
            continue
        try:
            found.append(measured(mode))
        except Exception as error:
            if journal is None:
                raise
            errors[mode.name] = f"{type(error).__name__}: {error}"[:2000]
            continue
        if journal is not None:
            append_jsonl(journal, {"name": mode.name, "run": run, "found": asdict(found[-1])})
    exact = next((m for m in found if m.name == "exact"), None)
    return BenchResult(
        device=where["device"],
        threads=torch.get_num_threads(),
        shape=shape,
        seed=seed,
        matmul_tflops=speed / 1e12,
        roofline=exact and shape.exact_flops() / exact.seconds / speed,
        measurements=_beside(found),
        copy_tb_per_second=copies / 1e12,
        machine=where,
        errors=errors,
    )


def _plan(on_gpu: bool, baseline_forwards: int | None) -> list[Mode]:
    """What is measured, in order: on a CPU the baseline first, on a GPU what matters most, as time may run out there."""
    rest = modes(on_gpu)
    known = [Mode(name, measured=baseline_forwards) for name in BASELINES]
    return [*rest[:4], *known, *rest[4:]] if on_gpu else [known[1], *rest]


def _beside(found: list[Measurement]) -> list[Measurement]:
    """The measurements with their ratios to the baseline, which comes first."""
    first = next((m for m in found if m.name in BASELINES), None)
    if first is None:
        return found
    found = [first, *(m for m in found if m is not first)]
    return [
        replace(
            m,
            ratio=m.tokens_per_second / first.tokens_per_second,
            memory_ratio=first.peak_bytes / max(m.peak_bytes, 1) if m.peak_bytes and first.peak_bytes else None,
        )
        for m in found
    ]


def _floor(shape: BenchShape, mode: Mode, found: Measurement, speed: float, copies: float) -> float:
    """The least seconds of the forwards of a mode on a device of that speed."""
    full = shape.forward_seconds(shape.length, mode.rows, speed, copies)
    if mode.cache == NO_CACHE:
        return found.forwards * full
    starts = range(shape.prompt_length, shape.length, shape.block_length)
    parts = [mode.cache.window(slice(start, start + shape.block_length), shape.length) for start in starts]
    window = statistics.mean(part.stop - part.start for part in parts)
    some = shape.forward_seconds(window, mode.rows, speed, copies)
    return found.refreshes * full + (found.forwards - found.refreshes) * some


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
    network: MedVForMaskedDiffusion, prompt: torch.Tensor, shape: BenchShape, mode: Mode, half: bool
) -> tuple[Measurement, tuple]:
    config = SamplerConfig(shape.gen_length, shape.block_length, shape.gen_length)
    official_run(network, prompt, config, forwards=1, half=half)  # warm
    with peak_memory(prompt.device) as peak:
        how = {"forwards": mode.measured, "half": half}
        seconds, run = timed(lambda: official_run(network, prompt, config, **how), prompt.device)
    seconds *= shape.gen_length / run.forwards
    return (
        Measurement(
            name=mode.name,
            seconds=seconds,
            tokens_per_second=shape.gen_length / seconds,
            forwards=shape.gen_length,
            measured_forwards=run.forwards if run.forwards < shape.gen_length else None,
            peak_bytes=peak.bytes,
            agreement=1.0,
        ),
        run.written,
    )


def _measure(
    network: MedVForMaskedDiffusion, prompts: torch.Tensor, shape: BenchShape, mode: Mode, written: tuple
) -> Measurement:
    steps, device = shape.gen_length // mode.tokens_a_forward, prompts.device
    config = SamplerConfig(shape.gen_length, shape.block_length, steps, cache=mode.cache)
    how = {"graphs": mode.graphs, "compiled": mode.compiled}
    warm = replace(config, steps=min(4 * config.blocks, shape.gen_length))  # every shape as often as makes a graph
    forget_decoders(network)

    def run() -> SamplerOutput | None:
        if mode.measured is None:
            return network.generate(prompts, config=config, **how)
        steps = network.stream(prompts, config=config, tell=False, **how)
        for _ in range(mode.measured):
            next(steps)
        return None

    with peak_memory(device) as peak:
        network.generate(prompts, config=warm, **how)
        seconds, output = timed(run, device)
    times = [seconds]
    if device.type == "cuda" and seconds < 4:
        times += [timed(run, device)[0] for _ in range(2)]
    seconds = statistics.median(times) * steps / (mode.measured or steps)
    events = output.trace.commits if output else ()
    own = {(c.step, c.position, c.token) for c in events if c.row == 0}
    comparable = mode.tokens_a_forward == 1 and bool(written) and output is not None
    return Measurement(
        name=mode.name,
        seconds=seconds,
        tokens_per_second=(sum(output.lengths) if output else mode.rows * shape.gen_length) / seconds,
        forwards=max(output.forwards) if output else steps,
        refreshes=output.refreshes if output else 0,
        rows=mode.rows,
        measured_forwards=mode.measured,
        peak_bytes=peak.bytes,
        agreement=len(own & set(written)) / len(written) if comparable else None,
        repeats=len(times),
    )
