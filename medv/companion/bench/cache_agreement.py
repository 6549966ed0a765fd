"""How much a cache changes what is written and predicted, against how often it is refreshed.

Two questions. Written tokens: the share on which a cached run and the exact one agree, and the first forward that writes
something else. Predictions: the divergence KL(exact || cached) at the open positions while both see the same canvas, that of
the exact run, so that one early difference is not counted again at every later forward.
"""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch

from medv.data.example import Example
from medv.diffusion.caching import NO_CACHE, DualCache, PrefixCache
from medv.diffusion.config import SamplerConfig
from medv.diffusion.sampler import sample
from medv.evaluation.answering import Answerer
from medv.model.decoding import Decoder
from medv.model.modeling import MedVForMaskedDiffusion

INTERVALS = (1, 4, 8, 16, 32, None)
KINDS = {"prefix": PrefixCache, "dual": DualCache}


def cache_agreement(
    answerer: Answerer,
    examples: Sequence[Example],
    config: SamplerConfig,
    *,
    intervals: Sequence[int | None] = INTERVALS,
    kinds: Sequence[str] = tuple(KINDS),
) -> pd.DataFrame:
    """One row for each kind of cache and refresh interval, on the first questions of the examples as one batch.

    Columns: kind, interval (None refreshes at block starts alone), identity (the share of equal tokens, up to the longer
    answer's end), same_answers (the share of equal answers), first_divergence (mean number of forwards before the first that
    writes something else; all of them where none does), kl (mean over open positions and forwards, in nats), refreshes (the
    share of forwards that were full ones).
    """
    model, inputs = answerer.model, answerer.inputs(examples)
    exact = model.generate(**inputs, config=replace(config, cache=NO_CACHE))
    rows = []
    for kind in kinds:
        for interval in intervals:
            cached = replace(config, cache=KINDS[kind](interval))
            output = model.generate(**inputs, config=cached)
            equal = exact.sequences == output.sequences  # [B, L]; both hold the same fill after their ends
            ends = torch.tensor([max(pair) for pair in zip(exact.lengths, output.lengths, strict=True)], device=equal.device)
            counted = torch.arange(equal.shape[1], device=equal.device)[None] < ends.clamp_min(1)[:, None]
            first = []  # for each row, the first forward that writes something else; the last plus one where none does
            for row in range(len(exact.lengths)):
                mine, theirs = (
                    {(c.step, c.position, c.token) for c in run.trace.of_row(row).commits} for run in (exact, output)
                )
                last = max(step for step, _, _ in mine) + 1
                first.append(min((step for step, _, _ in mine ^ theirs), default=last))
            rows.append(
                {
                    "kind": kind,
                    "interval": interval,
                    "identity": float((equal & counted).sum() / counted.sum()),
                    "same_answers": float(equal.all(dim=1).float().mean()),
                    "first_divergence": float(torch.tensor(first).float().mean()),
                    "kl": prediction_divergence(model, inputs, cached),
                    "refreshes": output.refreshes / len({commit.step for commit in output.trace.commits}),
                }
            )
    return pd.DataFrame(rows).astype({"interval": "Int64"})  # with a place for None


@torch.inference_mode()
def prediction_divergence(model: MedVForMaskedDiffusion, inputs: dict, config: SamplerConfig) -> float:
    """Mean KL(exact || cached) in nats at the open positions along the exact run, with the cache of `config`."""
    features = None
    if "pixel_values" in inputs:
        features = model.model.get_image_features(inputs["pixel_values"], inputs.get("image_layouts"))
    prompt, own = inputs["input_ids"], model.config
    given = {"attention_mask": inputs["attention_mask"], "image_features": features}
    both = _Both(*(Decoder(model, prompt, config.gen_length, cache=c, **given) for c in (NO_CACHE, config.cache)))
    settings = model.settings(config)
    sample(both, prompt, settings, mask_token_id=own.mask_token_id, fill_token_id=own.fill_token_id)
    return both.total / both.count


class _Both:
    """A denoiser that returns the exact logits and sums up the divergence of the cached ones."""

    static, compiled = False, False

    def __init__(self, exact: Decoder, cached: Decoder):
        self.exact, self.cached = exact, cached
        self.total, self.count = 0.0, 0

    def __call__(
        self, canvas: torch.Tensor, columns: slice, *, unconditional: bool = False, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The exact logits."""
        how = {"unconditional": unconditional, "positions": positions}
        logits, other = (decoder(canvas, columns, **how) for decoder in (self.exact, self.cached))
        p, q = logits.double().log_softmax(dim=-1), other.double().log_softmax(dim=-1)  # [B, K, V]
        divergence = (p.exp() * (p - q)).sum(dim=-1)  # [B, K]
        self.total += float(divergence.sum())
        self.count += divergence.numel()
        return logits

    def keep(self, rows: torch.Tensor) -> None:
        """Both go on with these rows."""
        self.exact.keep(rows)
        self.cached.keep(rows)
