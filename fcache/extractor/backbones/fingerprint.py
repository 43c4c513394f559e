"""What a machine computes with: recorded beside stored features, no part of their identity."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from timm.layers import use_fused_attn

from fcache.extractor.backbones.attention import REVISION, STEPWISE_TOKENS
from fcache.extractor.backbones.products import has_bf16_products

_PACKAGES = ("torch", "timm", "torchvision", "Pillow", "numpy")


def fingerprint(device: torch.device | str, *, precision: str = "bf16") -> dict[str, Any]:
    """Versions, device model, threads, TF32, attention path and autocast type as JSON data.

    Equal fingerprints promise equal bytes for equal inputs, batches and weights; `precision` is the backbone's.
    """
    device = torch.device(device)
    return {
        "versions": {name: version(name) for name in _PACKAGES},
        "device": _cuda_model(device) if device.type == "cuda" else _cpu_model(device),
        "threads": torch.get_num_threads(),
        # Every forward of a backbone runs with it off, whatever the process has set.
        "tf32": False,
        "attention": _attention_path(device, precision),
        "autocast": "bfloat16" if precision == "bf16" else "off",
    }


def _cuda_model(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "model": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _cpu_model(device: torch.device) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {"type": device.type, "model": name, "capability": torch.backends.cpu.get_cpu_capability()}


def _attention_path(device: torch.device, precision: str) -> dict[str, Any]:
    """Whether plain ViTs call the fused attention, which kernels torch may choose for it, and what Swin V2 does."""
    kernels = []
    if device.type == "cuda":
        switches = {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        }
        kernels = [name for name, enabled in switches.items() if enabled]
    rounded = precision == "bf16" and not has_bf16_products(device)
    swinv2 = {
        "revision": REVISION,
        "stepwise_tokens": STEPWISE_TOKENS if precision == "fp32" else 0,
        "products": "bfloat16 in float32" if rounded else "own",
    }
    return {"fused": bool(use_fused_attn()), "kernels": kernels, "swinv2": swinv2}
