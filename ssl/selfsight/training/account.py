"""What the stream delivered, held against what the manifests say."""

from collections import Counter
from collections.abc import Iterator

import torch

from selfsight.stream.loader import StepLoader
from selfsight.stream.quarantine import read_quarantine
from selfsight.training.cluster import Cluster


class Account:
    """Over all ranks and restarts: what each epoch of each part delivered, and the samples that could not be had.

    `restored` is what `open` gave for the checkpoint at step `start`. All ranks call every method at the same steps.
    """

    def __init__(self, loader: StepLoader, cluster: Cluster, start: int, restored: list[list[int]]) -> None:
        self.loader, self.cluster = loader, cluster
        self._before = Counter({(part, epoch): count for part, epoch, count in restored})
        self._told = [least for least, _ in loader.epochs_over(start)]
        self._findings = self._replaced = 0
        path = loader.quarantine.path
        if path is not None and cluster.rank == 0:  # what was found before the checkpoint has been told
            self._replaced = sum(finding.step < start for finding in read_quarantine(path.parent))

    def open(self, step: int) -> list[list[int]]:
        """(part, epoch, samples) of the epochs that are not over at `step`, for the checkpoint."""
        over = enumerate(self.loader.epochs_over(step))
        keys = [(part, epoch) for part, (least, most) in over for epoch in range(least, most + 1)]
        return [[*key, count] for key, count in zip(keys, self._delivered(keys), strict=True) if count]

    def look(self, step: int) -> list[tuple[bool, str]]:
        """(whether it is an alarm, sentence) for what has happened since it last looked."""
        return [*self._lost(), *self._finished(step)]

    def _finished(self, step: int) -> Iterator[tuple[bool, str]]:
        over = [least for least, _ in self.loader.epochs_over(step)]
        ended = [(part, e) for part, last in enumerate(over) for e in range(self._told[part], last)]
        self._told = over
        for (part, epoch), count in zip(ended, self._delivered(ended), strict=True):
            n = self.loader.mixture.parts[part].n
            which = f"epoch {epoch + 1}" + (f" of part {part + 1}" if len(over) > 1 else "")
            if count == n:
                yield False, f"{which} is over: all of its {n} images were delivered"
            else:
                yield True, f"{which} is over, but {count} and not {n} images were delivered: report this as a bug"

    def _lost(self) -> Iterator[tuple[bool, str]]:
        (findings,) = self._sum([len(self.loader.quarantine)])
        path = self.loader.quarantine.path
        if findings > self._findings and path is not None and self.cluster.rank == 0:
            new = sum(1 for _ in read_quarantine(path.parent)) - self._replaced  # several ranks may have met one sample
            self._replaced += new
            if new:
                images = "1 image" if new == 1 else f"{new} images"
                yield True, f"{images} could not be read and others stood in: {path.parent} lists them"
        self._findings = findings

    def _delivered(self, keys: list[tuple[int, int]]) -> list[int]:
        own = self._sum([self.loader.delivered[key] for key in keys])
        return [total + self._before[key] for key, total in zip(keys, own, strict=True)]

    def _sum(self, counts: list[int]) -> list[int]:
        if not counts:
            return []
        return self.cluster.sum(torch.tensor(counts, dtype=torch.int64, device=self.cluster.device)).tolist()
