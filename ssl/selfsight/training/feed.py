"""Recipe → the parts it trains on, and the account of what each epoch of them delivered."""

from collections import Counter
from fractions import Fraction

import torch

from selfsight.errors import UserError
from selfsight.recipe import PartConfig, Recipe
from selfsight.shards import Corpus
from selfsight.shards.selection import read_selection
from selfsight.stream.mixture import Mixture, Part
from selfsight.training.cluster import Cluster


def open_parts(recipe: Recipe) -> list[Part]:
    """Opens the corpora and selections of a recipe. Raises UserError where one is missing, or too small for a batch."""
    if bool(recipe.corpus) == bool(recipe.mixture):
        raise UserError("training needs corpus=DIR or a mixture of several, not both: set one of the two keys")
    if recipe.mixture and recipe.selection:
        raise UserError("selection goes with corpus: in a mixture, give each part its own")
    named = recipe.mixture or [PartConfig(str(recipe.corpus), recipe.selection)]
    parts = []
    for given in named:
        corpus = Corpus.open(given.corpus)
        chosen = None if given.selection is None else read_selection(corpus, given.selection)
        # Through text: 0.1 means a tenth, not the float next to it.
        part = Part(corpus, chosen, Fraction(str(given.weight)), Fraction(str(given.alone)))
        if part.n < recipe.batch_size:
            raise UserError(
                f"{given.corpus} has fewer images ({part.n}) than a batch ({recipe.batch_size}): "
                f"lower batch_size to {part.n} or less"
            )
        parts.append(part)
    return parts


class Account:
    """What every epoch of every part delivered, over all ranks and restarts, held against the manifest."""

    def __init__(self, mixture: Mixture, start: int, restored: list[list[int]]) -> None:
        self.mixture = mixture
        self._before = Counter({(part, epoch): count for part, epoch, count in restored})
        self._told = [least for least, _ in mixture.epochs_over(start)]

    def open(self, cluster: Cluster, delivered: Counter, step: int) -> list[list[int]]:
        """(part, epoch, samples) of the epochs that are not over at `step`, for the checkpoint. All ranks call it."""
        over = enumerate(self.mixture.epochs_over(step))
        keys = [(part, epoch) for part, (least, most) in over for epoch in range(least, most + 1)]
        return [[*key, count] for key, count in zip(keys, self._sum(cluster, delivered, keys), strict=True) if count]

    def finished(self, cluster: Cluster, delivered: Counter, step: int) -> list[tuple[bool, str]]:
        """Whether all was delivered, and a sentence, for each epoch that ended since last asked. All ranks call it."""
        over = [least for least, _ in self.mixture.epochs_over(step)]
        ended = [(part, e) for part, last in enumerate(over) for e in range(self._told[part], last)]
        self._told = over
        if not ended:
            return []
        found = []
        for (part, epoch), count in zip(ended, self._sum(cluster, delivered, ended), strict=True):
            n = self.mixture.parts[part].n
            which = f"epoch {epoch + 1}" + (f" of part {part + 1}" if len(over) > 1 else "")
            found.append((count == n, f"{which} is over: {count} of its {n} images were delivered"))
        return found

    def _sum(self, cluster: Cluster, delivered: Counter, keys: list[tuple[int, int]]) -> list[int]:
        own = torch.tensor([delivered[key] for key in keys], dtype=torch.float64, device=cluster.device)
        return [int(total) + self._before[key] for key, total in zip(keys, cluster.sum(own).tolist(), strict=True)]
