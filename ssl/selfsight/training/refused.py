"""refused.jsonl: the batches that no step was made of, because the loss or a gradient was not finite, image by image.

One line per micro-batch and rank: {"step", "batch", "rank", "loss", "images"}. "batch" counts the batches of the stream
from 1, "loss" is the micro-batch's own (null: not finite), and "images" say where each sample lies: those of a line
whose loss is null are the ones to look at. Only rank 0 writes.
"""

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from torch import Tensor

from selfsight.stream.foreign import ForeignLoader
from selfsight.stream.loader import StepLoader
from selfsight.training.cluster import Cluster
from selfsight.training.log import cut

FILE = "refused.jsonl"


class Refused:
    """Appends to the list of `run`, from which batches after those that the stream goes on from are cut first."""

    def __init__(self, run: Path, loader: StepLoader | ForeignLoader, cluster: Cluster) -> None:
        self.path, self.loader, self.cluster = run / FILE, loader, cluster
        if cluster.rank == 0:
            cut(self.path, loader.start_step, by="batch")

    def add(self, step: int, batch: int, batches: Sequence[dict[str, Tensor]], losses: Tensor) -> None:
        """The micro-batches of this rank, as the loader gave them, and their losses (accumulation,). All ranks call
        it."""
        own = [(loss, self.loader.whereabouts(b)) for loss, b in zip(losses.tolist(), batches, strict=True)]
        everyone = self.cluster.gather_objects(own)
        if self.cluster.rank == 0:
            with self.path.open("a", encoding="utf-8") as file:
                for rank, found in enumerate(everyone):
                    for loss, images in found:
                        line = {"step": step, "batch": batch, "rank": rank}
                        line |= {"loss": loss if isfinite(loss) else None, "images": images}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
