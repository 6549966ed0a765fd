"""Which rows of a batch are still open, as the host learns it: on a GPU some steps late, so that nobody waits."""

import torch


class Ends:
    """Reads a few booleans from the device without waiting for it: on CUDA they are those of an earlier step.

    A row that has ended stays so and is not written to, so that late news costs forwards and changes nothing.
    """

    def __init__(self, device: torch.device):
        self.on_gpu, self.host, self.event = device.type == "cuda", None, None

    def read(self, still_open: torch.Tensor) -> list[bool] | None:
        """Which rows are open, or None where no news has come; a list has one entry for each row of `still_open`."""
        if not self.on_gpu:
            return still_open.tolist()
        news = None
        if self.event is not None and self.event.query():
            news = self.host.tolist() if len(self.host) == len(still_open) else None
            self.event = None
        if self.event is None:
            self.host = torch.empty(len(still_open), dtype=torch.bool, pin_memory=True)
            self.host.copy_(still_open, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        return news
