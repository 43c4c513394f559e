"""Class logits of several views, as one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def average_logits(outputs: Sequence[Tensor]) -> Tensor:
    """Logits [..., classes] of one sample from those of its views: the logarithm of their mean softmax.

    No view comes first: the mean is taken in float64, so that their order is lost in rounding. Of a single view its
    logits as they are.
    """
    if len(outputs) == 1:
        return outputs[0]
    logs = torch.log_softmax(torch.stack(list(outputs)).double(), dim=-1)
    return (torch.logsumexp(logs, dim=0) - math.log(len(outputs))).to(outputs[0].dtype)
