"""Time, memory and forwards of the samplers, side by side in one process on the same random weights.

The baseline is the official algorithm (`medv.companion.bench.baseline`); the modes are those of `generate`. Random weights say
nothing about answers: agreement is the share of the baseline's commits (step, position, token) that a mode makes too, which is
all of them for an exact mode up to rounding, and means little for a cached one.
"""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.table import Table
from transformers import LlamaConfig

from medv.artifacts import append_jsonl
from medv.companion.bench.baseline import official_run
from medv.companion.bench.machine import (
    Report,
    bench_device,
    copy_speed,
    here,
    matmul_speed,
    megabytes,
    peak_memory,
    percent,
    timed,
    times,
)
from medv.diffusion.blockwise import SamplerOutput
from medv.diffusion.caching import NO_CACHE, CachePolicy, DualCache, PrefixCache
from medv.diffusion.config import SamplerConfig
from medv.model.configuration import MedVConfig
from medv.model.decoding import forget_decoders
from medv.model.modeling import MedVForMaskedDiffusion
from medv.ownership import claim_file, owned

OFFICIAL = {"official algorithm, float16 autocast": True, "official algorithm": False}
"""The baselines: name -> whether float16 autocast casts the weights at each forward, as it does on a GPU."""


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

    def floor_seconds(self, mode: "Mode", forwards: int, refreshes: int, flops_a_second: float, bytes_a_second: float) -> float:
        """The least time of the forwards of a mode: of each its operations, or the reading of its weights and keys."""
        d, t = self.hidden_size, self.length
        body, head = self.layers * (4 * d * d + 3 * d * self.intermediate_size), d * self.vocab_size
        size = getattr(torch, self.dtype).itemsize * (body + head + 2 * mode.rows * self.layers * t * d)

        def forward(window: float) -> float:
            flops = mode.rows * (2 * body * window + 4 * self.layers * window * t * d + 2 * head * self.block_length)
            return max(flops / flops_a_second, size / bytes_a_second)

        if mode.cache == NO_CACHE:
            return forwards * forward(t)
        starts = range(self.prompt_length, t, self.block_length)
        windows = [mode.cache.window(slice(start, start + self.block_length), t) for start in starts]
        mean = statistics.mean(window.stop - window.start for window in windows)
        return refreshes * forward(t) + (forwards - refreshes) * forward(mean)


PRESETS = {"cpu": BenchShape(), "gpu": BenchShape(4096, 12288, 32, 32, gen_length=256, dtype="bfloat16")}


@dataclass(frozen=True)
class Mode:
    """One way to sample: its cache, tokens committed a forward, rows of the batch, and options of `generate`. `measured`: only
    that many forwards are run, as all cost the same, and their seconds are scaled; None runs all.
    """

    name: str
    cache: CachePolicy = NO_CACHE
    tokens_a_forward: int = 1
    rows: int = 1
    graphs: bool = False
    compiled: bool = False
    measured: int | None = None


def modes(on_gpu: bool, baseline_forwards: int | None) -> list[Mode]:
    """The modes in the order in which they are measured: on a GPU the most important first, as time may run out there."""
    caches = {"exact": NO_CACHE, "dual cache": DualCache(32), "prefix cache": PrefixCache(32)}

    def graphed(name: str, tokens: int = 1, rows: int = 1) -> Mode:
        full = name + (", 4 tokens a forward" if tokens > 1 else "") + (f", batch of {rows}" if rows > 1 else "")
        cut = 6 if name == "exact" and rows > 1 else None
        return Mode(full, caches[name], tokens, rows, graphs=True, compiled=True, measured=cut)

    official, dual = [Mode(name, measured=baseline_forwards) for name in OFFICIAL], caches["dual cache"]
    if not on_gpu:
        prefix, both = (Mode(f"{name}, refresh 32", caches[name]) for name in ("prefix cache", "dual cache"))
        return [official[1], Mode("exact"), prefix, both, Mode("dual cache, 4 tokens a forward", dual, tokens_a_forward=4)]
    batches = [graphed("exact", 1, 8), graphed("exact", 4, 8), graphed("prefix cache", 1, 8), graphed("prefix cache", 4, 8)]
    return [
        *(graphed("exact"), graphed("dual cache"), graphed("prefix cache"), graphed("dual cache", 4)),
        *official,
        *(graphed("dual cache", 1, 8), graphed("dual cache", 4, 8), graphed("exact", 4), graphed("prefix cache", 4)),
        *batches,
        Mode("exact, neither graphs nor compiled", measured=16),
        Mode("dual cache, graphs, not compiled", dual, graphs=True),
        Mode("dual cache, compiled, no graphs", dual, compiled=True, measured=32),
        Mode("dual cache, neither", dual, measured=32),
    ]


@dataclass(frozen=True)
class Measurement:
    """One mode. seconds: of all rows' answers, the median of the repeats; where a run was cut short, that of the forwards
    measured, scaled to all. peak_bytes: memory above what was held before (None where the system does not report it).
    ratio: tokens a second over the first baseline's. memory_ratio: its peak over this one. agreement: see the module.
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
class BenchResult(Report):
    """All measurements of a run. roofline: the share of this device's own matrix product speed (of the same dtype, measured in
    the run) at which the exact mode computes what it cannot avoid (None where that failed). errors: what failed, and why.
    """

    shape: BenchShape
    seed: int
    matmul_tflops: float
    roofline: float | None
    measurements: list[Measurement]
    copy_tb_per_second: float | None = None
    errors: dict[str, str] = field(default_factory=dict)

    def table(self) -> Table:
        """The most important columns for a terminal."""
        s = self.shape
        title = f"prompt {s.prompt_length}, L = {s.gen_length}, B = {s.block_length}, V = {s.vocab_size}"
        share = "failed" if self.roofline is None else percent(self.roofline)
        rows = []
        for m in self.measurements:
            forwards = str(m.forwards) if m.measured_forwards is None else f"{m.measured_forwards} of {m.forwards}"
            memory = (megabytes(m.peak_bytes), times(m.memory_ratio), percent(m.agreement, 1), percent(m.of_floor))
            rows.append((m.name, f"{m.seconds:.2f}", times(m.ratio, 2), forwards, *memory))
        return self.comparison(
            f"{title}, hidden {s.hidden_size} x {s.layers} layers, {s.dtype}",
            f"exact: {share} of {self.matmul_tflops:.2f} TFLOP/s, this device's own products; floor: share of the seconds",
            "sampler seconds ratio forwards memory less agrees floor",
            rows,
        )


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
    cost the same, and its seconds are scaled. `progress` is called with the name of the next mode. `journal` is a file to which
    every measurement is added as a JSON line and from which a stopped run of the same resumes; with it a mode that fails is
    recorded in `errors`, and the next one is measured. Raises ValueError, with nothing changed, for a journal of anything else.
    """
    device = bench_device(device)
    network, prompts = random_network(shape, device, seed), _prompts(shape, 8, device, seed)
    progress("matrix products and copies")
    speed, copies = matmul_speed(device, getattr(torch, shape.dtype)), copy_speed(device)
    where, written, found, errors = here(device), (), [], {}
    run = {"made_by": "medv bench sampler", "shape": asdict(shape), "seed": seed, "device": where["device"]}
    run |= {"threads": where["threads"], "baseline_forwards": baseline_forwards}
    with nullcontext([]) if journal is None else claim_file(journal, run) as rows:
        known = {row["name"]: row["found"] for row in rows}
        for mode in modes(device.type == "cuda", baseline_forwards):
            progress(mode.name)
            if mode.name in known:
                found.append(Measurement(**known[mode.name]))
                continue
            try:
                if mode.name in OFFICIAL:
                    one, written = _official(network, prompts[:1], shape, mode)
                else:
                    one = _measure(network, prompts[: mode.rows], shape, mode, written)
                    floor = shape.floor_seconds(mode, one.forwards, one.refreshes, speed, copies)
                    one = replace(one, floor_seconds=floor, of_floor=floor / one.seconds)
            except Exception as error:
                if journal is None:
                    raise
                errors[mode.name] = f"{type(error).__name__}: {error}"[:2000]
                continue
            found.append(one)
            if journal is not None:
                append_jsonl(journal, owned(run, {"name": mode.name, "found": asdict(one)}))
    first = next((m for m in found if m.name in OFFICIAL), None)
    if first is not None:  # the baseline comes first, and all have their ratios to it
        for place, m in enumerate(found):
            memory = first.peak_bytes / max(m.peak_bytes, 1) if m.peak_bytes and first.peak_bytes else None
            found[place] = replace(m, ratio=m.tokens_per_second / first.tokens_per_second, memory_ratio=memory)
        found.sort(key=lambda m: m.name != first.name)
    exact = next((m for m in found if m.name == "exact"), None)
    return BenchResult(
        shape=shape,
        seed=seed,
        matmul_tflops=speed / 1e12,
        roofline=exact and shape.exact_flops() / exact.seconds / speed,
        measurements=found,
        copy_tb_per_second=copies / 1e12,
        errors=errors,
        **where,
    )


def measure_mode(shape: BenchShape, mode: Mode, *, device: str | torch.device = "cpu", seed: int = 0) -> Measurement:
    """One mode alone on random weights, without a baseline to compute its ratio and agreement from."""
    device = torch.device(device)
    return _measure(random_network(shape, device, seed), _prompts(shape, mode.rows, device, seed), shape, mode, ())


def _prompts(shape: BenchShape, rows: int, device: torch.device, seed: int) -> torch.Tensor:
    """Random ids [rows, prompt length], below all special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, shape.vocab_size - 400, (rows, shape.prompt_length), generator=generator).to(device)


def random_network(shape: BenchShape, device: torch.device, seed: int) -> MedVForMaskedDiffusion:
    """A model of a shape with random weights; its vision tower is minimal, as no image is encoded."""
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
    forked = [device] if device.type == "cuda" else []  # other GPUs are not touched
    with torch.random.fork_rng(devices=forked), torch.device(device):
        torch.manual_seed(seed)
        return MedVForMaskedDiffusion._from_config(config, dtype=getattr(torch, shape.dtype)).eval()


def _official(
    network: MedVForMaskedDiffusion, prompt: torch.Tensor, shape: BenchShape, mode: Mode
) -> tuple[Measurement, tuple]:
    """The baseline on one row, and its commits."""
    length, half = shape.gen_length, OFFICIAL[mode.name]
    config = SamplerConfig(length, shape.block_length, length)
    official_run(network, prompt, config, forwards=1, half=half)  # warm
    with peak_memory(prompt.device) as peak:
        how = {"forwards": mode.measured, "half": half}
        seconds, (written, forwards) = timed(lambda: official_run(network, prompt, config, **how), prompt.device)
    seconds *= length / forwards
    cut = forwards if forwards < length else None
    facts = {"measured_forwards": cut, "peak_bytes": peak.bytes, "agreement": 1.0}
    return Measurement(mode.name, seconds, length / seconds, length, **facts), written


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
        forwards = network.stream(prompts, config=config, tell=False, **how)
        for _ in range(mode.measured):
            next(forwards)
        return None

    with peak_memory(device) as peak:
        network.generate(prompts, config=warm, **how)
        seconds, output = timed(run, device)
    repeats = [seconds]
    if device.type == "cuda" and seconds < 4:
        repeats += [timed(run, device)[0] for _ in range(2)]
    seconds = statistics.median(repeats) * steps / (mode.measured or steps)
    agreement = None
    if output is not None and mode.tokens_a_forward == 1 and written:
        own = {(c.step, c.position, c.token) for c in output.trace.commits if c.row == 0}
        agreement = len(own & set(written)) / len(written)
    return Measurement(
        name=mode.name,
        seconds=seconds,
        tokens_per_second=(sum(output.lengths) if output else mode.rows * shape.gen_length) / seconds,
        forwards=max(output.forwards) if output else steps,
        refreshes=output.refreshes if output else 0,
        rows=mode.rows,
        measured_forwards=mode.measured,
        peak_bytes=peak.bytes,
        agreement=agreement,
        repeats=len(repeats),
    )
