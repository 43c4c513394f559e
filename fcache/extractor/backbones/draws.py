"""Random weights of an architecture whose blocks all do something, a pure function of the seed on one torch."""

import torch
from torch import Tensor, nn

from fcache.extractor.backbones.architecture import Architecture, build

# Bounds of uniform numbers with the standard deviation 0.02 of timm's initial weights.
_BOUND = 0.02 * 3**0.5


def draw_weights(architecture: Architecture, seed: int) -> dict[str, Tensor]:
    """Weights of `architecture` drawn with `seed`; the process's generator stays as it is.

    A giant's are drawn one after the other as bfloat16 numbers, so that they take no more memory than they need.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return _giant(architecture) if "norm_period" in architecture.creation else _initialised(architecture)


def _initialised(architecture: Architecture) -> dict[str, Tensor]:
    """timm's own initialisation, but for what it starts at zero or one."""
    with torch.device("cpu"):
        model = build(architecture, None)
        for name, parameter in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            owner = _owner(model, name)
            if "Norm" in owner:
                # Swin V2 starts with norms of zero, and so as the identity.
                if last == "bias":
                    parameter.normal_(0, 0.05)
                else:
                    parameter.uniform_(0.5, 1.5)
            elif last.startswith("gamma") or owner.startswith("LayerScale"):
                parameter.uniform_(0.5, 1.5)
            elif "cpb_mlp" in name or "meta_mlp" in name:
                parameter.normal_(0, 0.3)
            elif architecture.windowed and last.endswith("bias"):
                parameter.normal_(0, 0.05)
        return model.state_dict()


def _giant(architecture: Architecture) -> dict[str, Tensor]:
    """A Swin V2's weights, drawn without the model."""
    with torch.device("meta"):
        model = build(architecture, None)
    state: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        drawn = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cpu")
        if name.endswith("logit_scale"):
            drawn.fill_(2.3)  # timm starts at the logarithm of 10
        elif name.endswith("bias"):
            drawn.normal_(0, 0.05)
        elif "cpb_mlp" in name:
            drawn.normal_(0, 0.3)
        elif "Norm" in _owner(model, name):
            drawn.uniform_(0.5, 1.5)
        else:
            drawn.uniform_(-_BOUND, _BOUND)
        state[name] = drawn
    return state


def _owner(model: nn.Module, name: str) -> str:
    return type(model.get_submodule(name.rpartition(".")[0])).__name__
