"""The largest memory of a stretch of work: allocated by torch on a GPU, resident in the process elsewhere."""

import re
from pathlib import Path

import torch


def forget_peak(device: torch.device) -> None:
    """From here on `peak_memory` counts anew. Linux resets the peak of a process where 5 is written to clear_refs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes at most since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "Linux says how much memory a process had at most"
    return int(found[1]) * 1024
