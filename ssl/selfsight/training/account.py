"""What the stream delivered and training took in, held against what the manifests say."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from selfsight.stream.loader import StepLoader
from selfsight.stream.quarantine import read_quarantine
from selfsight.training.cluster import Cluster


class Account:
    """Over all ranks and restarts: what each epoch of each part delivered, and the samples that could not be had.

    `restored` is what `open` gave for the checkpoint at position `start` of the stream. The loader may begin after it:
    what lies between is passed over. All ranks call every method at the same positions.
    """

    def __init__(self, loader: StepLoader, cluster: Cluster, start: int, restored: dict[str, Any]) -> None:
        self.loader, self.cluster = loader, cluster
        self._before = _counter(restored.get("delivered", []))
        self._passed_before = _counter(restored.get("passed_over", []))
        self._passed = loader.counts(start, loader.start_step)
        self._told = [least for least, _ in loader.epochs_over(start)]
        self._findings = self._replaced = 0
        path = loader.quarantine.path
        if path is not None and cluster.rank == 0:  # what was found before the checkpoint has been told
            self._replaced = sum(finding.step < start for finding in read_quarantine(path.parent))

    def open(self, position: int) -> dict[str, list[list[int]]]:
        """(part, epoch, samples) of the epochs that are not over at `position`, for the checkpoint."""
        over = enumerate(self.loader.epochs_over(position))
        keys = [(part, epoch) for part, (least, most) in over for epoch in range(least, most + 1)]
        counts = {"delivered": self._delivered(keys), "passed_over": self._passed_over(keys)}
        return {
            name: [[*key, count] for key, count in zip(keys, found, strict=True) if count]
            for name, found in counts.items()
        }

    def look(self, position: int) -> list[tuple[bool, str]]:
        """(whether it is an alarm, sentence) for what has happened since it last looked."""
        return [*self._lost(), *self._finished(position)]

    def _finished(self, position: int) -> Iterator[tuple[bool, str]]:
        over = [least for least, _ in self.loader.epochs_over(position)]
        ended = [(part, e) for part, last in enumerate(over) for e in range(self._told[part], last)]
        self._told = over
        counts = zip(ended, self._delivered(ended), self._passed_over(ended), strict=True)
        for (part, epoch), count, passed in counts:
            n = self.loader.mixture.parts[part].n
            which = f"epoch {epoch + 1}" + (f" of part {part + 1}" if len(over) > 1 else "")
            if count == n:
                yield False, f"{which} is over: all of its {n} images were delivered"
            elif count + passed == n:
                yield False, f"{which} is over: {count} of its {n} images were delivered and {passed} passed over"
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

    def _passed_over(self, keys: list[tuple[int, int]]) -> list[int]:
        own = self._sum([self._passed[key] for key in keys])
        return [total + self._passed_before[key] for key, total in zip(keys, own, strict=True)]

    def _sum(self, counts: list[int]) -> list[int]:
        if not counts:
            return []
        return self.cluster.sum(torch.tensor(counts, dtype=torch.int64, device=self.cluster.device)).tolist()


def _counter(rows: list[list[int]]) -> Counter[tuple[int, int]]:
    return Counter({(part, epoch): count for part, epoch, count in rows})
