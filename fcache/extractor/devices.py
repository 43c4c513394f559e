"""Devices by the names that a command line takes, and whether they can do what a cache asks for."""

import torch

from fcache.cache_spec import SpecError


def parse_devices(text: str) -> tuple[str, ...]:
    """ "0,1" as ("cuda:0", "cuda:1"), "cpu,cpu" as it stands: one process of an extraction each.

    Raises SpecError for what is no list of devices.
    """
    names = [name.strip() for name in text.split(",")]
    found = tuple(f"cuda:{name}" if name.isdecimal() else name for name in names)
    for name in found:
        _parse(name)
    return found


def check_device(name: str, precision: str) -> None:
    """Raises SpecError if a device is not there, or if `precision` is "bf16" and it has no arithmetic for that."""
    device = _parse(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            have = f"the GPUs here are 0 to {count - 1}" if count else "torch can use no GPU here (`fcache doctor`)"
            raise SpecError(f"there is no {name}: {have}; name others with --devices, or cpu")
        if precision == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
            model = torch.cuda.get_device_name(device)
            raise SpecError(
                f"{name} ({model}) has no bfloat16 arithmetic, which this cache's features are computed in; leave it "
                "out of --devices, or make a cache with --precision fp32"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise SpecError(f"there is no {name}: torch can use no Apple GPU here; use cpu")


def _parse(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise SpecError(f"a device is cpu, a GPU's number (0), cuda, cuda:1 or mps, got {name!r}")
    return device
