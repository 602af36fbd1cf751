"""KoLeo: spreads features evenly by pushing each away from its nearest neighbour (Sablayrolles et al. 2019, "Spreading
vectors for similarity search", equation 2; DINOv2, §4, which takes it from there).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.collective import Collective

EPSILON = 1e-8


def koleo(x: Tensor, collective: Collective, *, topk: int = 1, group: int | None = None) -> Tensor:
    """−mean ln d(x_i, nearest neighbours of x_i), x (B, D) being brought to length 1; a scalar, in fp32 or wider.

    Neighbours, `topk` of each, are sought in the joined batch of all ranks, or among the `group` samples in a row of it
    to which one belongs (a remainder belongs to the last group); the mean is over this rank's B, which is the same on
    every rank. The gradient flows through both ends of a distance, not through the choice. DINOv2's own code seeks
    among this rank's samples only, which makes the loss depend on how many GPUs there are: a `group` of so many.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=EPSILON)
        everyone = collective.gather(x)  # (world·B, D)
        with torch.no_grad():
            n, first = len(everyone), collective.rank * len(x)
            group = min(group or n, n)
            belongs = (torch.arange(n, device=x.device) // group).clamp(max=n // group - 1)
            similarity = x @ everyone.T  # (B, world·B)
            similarity.masked_fill_(belongs[first : first + len(x), None] != belongs, -torch.inf)
            similarity.diagonal(first).fill_(-torch.inf)  # nobody is their own neighbour
            nearest = similarity.topk(topk, dim=1).indices  # (B, topk)
        distance = (x.unsqueeze(1) - everyone[nearest] + EPSILON).norm(dim=-1)
        return -(distance + EPSILON).log().mean()
