"""`medv generate` at LLaDA-8B's shape over 16 questions about phantoms: `python benchmarks/generate.py --out FILE.json`.

Random weights, drawn on the GPU, in bfloat16; the vision tower is SigLIP2-so400m's. The answers go through the runner and the
file of the command; they say nothing, and their seconds are those of any weights. Prompts differ in length, so batches are
padded.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from medv.artifacts import read_jsonl, write_json
from medv.checkpoints.assembly import new_processor, shape_config
from medv.checkpoints.bundled import bundled
from medv.checkpoints.loading import load_tokenizer
from medv.companion.bench.machine import bench_device, machine, peak_memory, timed
from medv.data.chat import SpecialTokens
from medv.data.example import load_image
from medv.diffusion.caching import cache_named
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.evaluation.benchmark import answer_file
from medv.model.modeling import MedVForMaskedDiffusion
from medv.phantoms.sets import description_set
from medv.profiles import get_profile

QUESTIONS = 16


def drawn(profile_name: str, device: torch.device) -> tuple[MedVForMaskedDiffusion, object]:
    """A model of the profile's shape with random weights, drawn on the device, and its processor."""
    profile = get_profile(profile_name)
    tokenizer = load_tokenizer(bundled("tokenizer"))
    config = shape_config(profile.model, SpecialTokens.of(tokenizer))
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = MedVForMaskedDiffusion._from_config(config, dtype=getattr(torch, profile.dtype)).eval()
    return model, new_processor(tokenizer, config, system=profile.system)


def main() -> int:
    """Measure, print, write; 1 where a batch size failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="paper", help="whose model and sampler settings")
    parser.add_argument("--device", help="default: cuda")
    parser.add_argument("--alone", type=int, default=6, help="of the 16 questions, how many are asked one at a time")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    given = parser.parse_args()
    device, profile = bench_device(given.device or "cuda"), get_profile(given.profile)
    started = time.perf_counter()
    answerer = Answerer(*drawn(given.profile, device), name="random weights")
    found = {**machine(device), "drawn_s": time.perf_counter() - started, "questions": QUESTIONS, "runs": [], "errors": {}}
    spec = profile.describe
    config = SamplerConfig(
        spec.gen_length, spec.block_length, spec.steps, cache=cache_named("dual"), stop_tokens=(), min_length=spec.gen_length
    )
    examples = description_set("test", QUESTIONS, image_size=profile.model.image_size)
    pictures = [load_image(example) for example in examples]  # to draw them is no part of the command
    examples = [replace(ex, image=lambda picture=picture: picture) for ex, picture in zip(examples, pictures, strict=True)]
    for tokens in (1, 4):
        for batch in (1, 8):
            name = f"batch of {batch}, {tokens} tokens a forward"
            now = replace(config, steps=max(config.blocks, spec.steps // tokens))
            try:
                row = measured(answerer, now, examples if batch > 1 else examples[: given.alone], batch, device)
            except Exception as error:
                found["errors"][name] = f"{type(error).__name__}: {error}"[:2000]
                print(f"{name} failed: {error}", file=sys.stderr)
                continue
            found["runs"].append({"batch": batch, "tokens_a_forward": tokens, **row})
            print({key: value for key, value in found["runs"][-1].items() if key != "settings"})
    write_json(given.out, found)
    return 1 if found["errors"] else 0


def measured(answerer: Answerer, config: SamplerConfig, examples: list, batch: int, device: torch.device) -> dict:
    """Seconds of the whole command (images read, answers written) and of the sampling alone; tokens a second of the whole."""
    with tempfile.TemporaryDirectory() as folder:
        answer_file(examples[:batch], answerer, config, Path(folder) / "warm.jsonl", batch_size=batch, quiet=True)
        out = Path(folder) / "answers.jsonl"
        with peak_memory(device) as peak:
            seconds, count = timed(lambda: answer_file(examples, answerer, config, out, batch_size=batch, quiet=True), device)
        rows = read_jsonl(out)
    sampled, tokens = sum(row["seconds"] for row in rows), sum(row["tokens"] for row in rows)
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "answers": count,
        "seconds": seconds,
        "seconds_an_answer": seconds / count,
        "sampling_seconds_an_answer": sampled / count,
        "tokens_per_second": tokens / seconds,
        "forwards_an_answer": sum(row["forwards"] for row in rows) / count,
        "peak_bytes": held,
        "own_peak_bytes": peak.bytes,
        "settings": rows[0]["settings"],
    }


if __name__ == "__main__":
    sys.exit(main())
