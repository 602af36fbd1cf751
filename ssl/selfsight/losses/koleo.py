"""KoLeo: spreads features evenly by pushing each away from its nearest neighbour (Sablayrolles et al. 2019, "Spreading
vectors for similarity search", equation 2; DINOv2, §4, which takes it from there).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.collective import Collective

EPSILON = 1e-8


def koleo(x: Tensor, collective: Collective) -> Tensor:
    """−mean ln d(x_i, nearest neighbour of x_i), x (B, D) being brought to length 1; a scalar, in fp32 or wider.

    Neighbours are sought in the joined batch of all ranks; the mean is over this rank's B, which is the same on every
    rank. The gradient flows through both ends of a distance, not through the choice. DINOv2's own code seeks among
    this rank's samples only, which makes the loss depend on how many GPUs there are; on one they are the same.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=EPSILON)
        everyone = collective.gather(x)  # (world·B, D)
        with torch.no_grad():
            similarity = x @ everyone.T  # (B, world·B)
            similarity.diagonal(collective.rank * len(x)).fill_(-1)  # nobody is their own neighbour
            nearest = similarity.argmax(dim=1)
        distance = (x - everyone[nearest] + EPSILON).norm(dim=-1)
        return -(distance + EPSILON).log().mean()
