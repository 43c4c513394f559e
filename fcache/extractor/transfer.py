"""Between host and device: through pinned memory and beside the computation on CUDA, as it is elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class HostCopies:
    """Arrays on their way to the host; `event` is None where they are there already."""

    tensors: Mapping[str, Tensor]
    event: Any

    def wait(self) -> None:
        """Returns when they have arrived."""
        if self.event is not None:
            self.event.synchronize()

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays, when they have arrived. They share memory with nothing that is used again."""
        self.wait()
        return {name: x.numpy() for name, x in self.tensors.items()}


def to_host(tensors: Mapping[str, Tensor]) -> HostCopies:
    """Begins to copy tensors of one device; on CUDA in a stream of its own, beside the next batch.

    The pinned memory comes from torch, which uses it again once the arrays are gone.
    """
    device = next(iter(tensors.values())).device
    if device.type != "cuda":
        return HostCopies({name: x.cpu() for name, x in tensors.items()}, None)
    stream = _copies_of(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    found: dict[str, Tensor] = {}
    with torch.cuda.stream(stream):
        for name, x in tensors.items():
            found[name] = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            found[name].copy_(x, non_blocking=True)
            # Its memory is not given to another batch before it is copied.
            x.record_stream(stream)
        event = torch.cuda.Event()
        event.record(stream)
    return HostCopies(found, event)


def to_device(image: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; on CUDA the caller goes on while it is copied."""
    if device.type != "cuda":
        return image.to(device)
    return image.pin_memory().to(device, non_blocking=True)


@cache
def _copies_of(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
