"""The table that weights are measured on: whatever a protocol may ask of them, each loaded or computed once."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import or_
from pathlib import Path

import torch

from eval_probes.extraction import How, extract
from eval_probes.features import Features, check_corpora
from eval_probes.geometry.scenes import Scene
from eval_probes.pooling import Pooling
from eval_probes.protocol import FeatureProtocol, Protocol
from eval_probes.results import Score
from eval_probes.subject import Subject, pick_device
from selfsight.console import say
from selfsight.errors import UserError
from selfsight.shards.corpus import Corpus
from selfsight.weights import PretrainedEncoder


@dataclass
class Bench:
    """`subject` under test; `train` is what probes learn from, `test` what is held out. Either may be missing."""

    subject: Subject
    train: Corpus | None = None
    test: Corpus | None = None
    how: How = field(default_factory=How)
    scene: Scene | None = None  # views, for protocols of more than one
    pictures: Path | None = None  # a folder for pictures of what was measured, by protocols that draw some

    @classmethod
    def open(
        cls,
        weights: str | Path,
        train: str | Path | None = None,
        test: str | Path | None = None,
        how: How | None = None,
    ) -> "Bench":
        """Raises UserError for weights or corpora that cannot be opened."""
        corpora = [None if c is None else Corpus.open(c) for c in (train, test)]
        return cls(Subject.open(weights), *corpora, how=how or How())

    @cached_property
    def device(self) -> torch.device:
        return pick_device(self.how.device)

    @cached_property
    def encoder(self) -> PretrainedEncoder:
        """On `device`, in evaluation mode."""
        return self.subject.load(self.device)

    def features(self, corpus: Corpus, pooling: Pooling | None = None, *, resize: int | None = None) -> Features:
        return extract(self.subject, corpus, pooling, self.how, resize=resize)

    def pair(self, protocol: FeatureProtocol) -> tuple[Features, Features]:
        """(train, test) features as `protocol` wants them. Raises UserError for corpora that do not go together."""
        train, test = self.labelled()
        return (
            self.features(train, protocol.pooling, resize=protocol.resize),
            self.features(test, protocol.pooling, resize=protocol.resize),
        )

    def labelled(self) -> tuple[Corpus, Corpus]:
        """(train, test), found to go together: labelled alike, and apart. What they share is said, once."""
        train, test = self.need("train"), self.need("test")
        if not self._checked:
            if share := check_corpora(train, test):
                say(f"{share:.1%} of the images of {test.path} are in {train.path} as well: the scores flatter")
            self._checked = True
        return train, test

    _checked: bool = field(default=False, init=False)

    def need(self, which: str) -> Corpus:
        corpus = self.train if which == "train" else self.test
        if corpus is None:
            raise UserError(f"this protocol needs a {which} corpus: give --{which} DIR")
        return corpus

    def need_scene(self) -> Scene:
        if self.scene is None:
            raise UserError("this protocol needs views of a scene: give --scene DIR, a folder of images")
        return self.scene

    def run(self, protocols: Iterable[Protocol]) -> list[Score]:
        """All scores of the protocols, in their order, from as few passes over the images as they allow."""
        protocols = list(protocols)
        self.prepare(protocols)
        return [score for protocol in protocols for score in protocol.run(self)]

    def prepare(self, protocols: Iterable[Protocol]) -> None:
        """Extracts what several protocols want in one pass."""
        shared: dict[int | None, list[Pooling]] = {}
        for protocol in protocols:
            shared.setdefault(getattr(protocol, "resize", None), []).extend(protocol.poolings())
        for resize, poolings in shared.items():
            if len(set(poolings)) > 1:
                for corpus in filter(None, (self.train, self.test)):
                    self.features(corpus, reduce(or_, poolings), resize=resize)
