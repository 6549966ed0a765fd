"""A computation as a CUDA graph: captured once, replayed with new inputs at the cost of one launch. It knows no model."""

from collections.abc import Callable
from functools import cache

import torch


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a device: every stream has a workspace of its own for matrix products."""
    return torch.cuda.Stream(device)


class Graph:
    """The same kernels on the same addresses, with new inputs of the same shapes.

    The function must have run before with inputs like these, so that no kernel is compiled, loaded or chosen in the capture.
    What it returns is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor):
        self.inputs = tuple(part.clone() for part in inputs)
        device = inputs[0].device
        self.graph, side, main = torch.cuda.CUDAGraph(), _capture_stream(device), torch.cuda.current_stream(device)
        side.wait_stream(main)
        # Not torch.cuda.graph: it would hand all cached memory back to the driver, which the next forward needs again.
        with torch.cuda.stream(side):
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.output = function(*self.inputs)
            finally:
                self.graph.capture_end()
        main.wait_stream(side)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The output for these inputs."""
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.output
