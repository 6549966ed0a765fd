"""The official sampler with everything that it computes at each step: the baseline for time and memory.

`generate_with_embeds` of LLaDA-MedV (the file of LLaDA-V), rewritten from its behavior: the head on every row of the canvas, a
float64 softmax of the whole vocabulary at every position of which one number a row is kept, a scan for the stop token position
by position, one row at a time. On CUDA its float16 autocast casts bfloat16 weights anew at every forward; here that is an
option. Greedy decoding without guidance only; `medv.diffusion.official` is the sampler that reproduces all its tokens.
"""

import torch

from medv.diffusion.config import SamplerConfig
from medv.diffusion.schedules import transfer_counts
from medv.model.modeling import MedVForMaskedDiffusion


@torch.inference_mode()
def official_run(
    model: MedVForMaskedDiffusion,
    prompt: torch.Tensor,
    config: SamplerConfig,
    *,
    forwards: int | None = None,
    half: bool = False,
) -> tuple[tuple[tuple[int, int, int], ...], int]:
    """Sample after a prompt [1, P]; `forwards` ends early, `half` is the official code's float16 autocast.

    Returns (step, position in the response, token) of every commit, and the number of network calls.
    """
    own, width = model.config, prompt.shape[1]
    canvas = torch.cat([prompt, prompt.new_full((1, config.gen_length), own.mask_token_id)], dim=1)
    stop = torch.tensor(own.stop_token_ids[:1], device=prompt.device)
    written, step, stopped = [], 0, False
    for block in range(config.blocks):
        end = width + (block + 1) * config.block_length
        for count in transfer_counts(config.block_length, config.steps // config.blocks):
            if count == 0 or step == forwards:
                break
            masked = canvas == own.mask_token_id  # [1, T]
            with torch.autocast(canvas.device.type, dtype=torch.float16, enabled=half):
                logits = model(canvas).logits.float()  # [1, T, V]
            for never in own.suppress_token_ids:
                logits[..., never].masked_fill_(masked, -torch.inf)
            tokens = logits.argmax(dim=-1)
            confidence = logits.to(torch.float64).softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]  # [1, T]
            confidence[:, end:] = -torch.inf
            confidence = confidence.masked_fill(~masked, -torch.inf)
            chosen = confidence[0].topk(count).indices
            canvas[0, chosen] = tokens[0, chosen]
            written += [(step, column - width, int(canvas[0, column])) for column in sorted(chosen.tolist())]
            step += 1
            if not stopped:
                for position in range(width, width + config.gen_length):
                    if torch.all(canvas[0, position : position + 1] == stop):
                        stopped = True
                        break
    return tuple(written), step
