"""The quickstart's steps: images → corpora → training → probes → report. In: images or a seed. Out: an `Outcome`.

Every step finds what an earlier call left and goes on from there, so the same call again continues or does nothing.
What is trained and how stands in `configs/quickstart/*.yaml`; this module only fits it to the images that are there.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from eval_probes.bench import Bench
from eval_probes.extraction import How
from eval_probes.features import Collapsed
from eval_probes.protocol import FeatureProtocol, Protocol, find
from eval_probes.report import build_report
from eval_probes.results import ResultsStore, Score
from eval_probes.subject import PIXELS
from selfsight.console import say
from selfsight.corpus import build, procedural, stats, verify
from selfsight.corpus.pool import each
from selfsight.encoders.statistics import feature_spread, rankme
from selfsight.errors import UserError, check_range
from selfsight.files import publish
from selfsight.machine import available_cores
from selfsight.shards.corpus import Corpus
from selfsight.shards.decode import decode_image
from selfsight.shards.manifest import NAME as MANIFEST
from selfsight.training import pretrain, resolve
from selfsight.weights.run import exports, newest_export

N_TRAIN, N_TEST = 8000, 2000  # of the procedural corpus; recipes count their epochs in N_TRAIN images
HELD_OUT = 0.2  # of one's own images
BANK, TESTED = 10_000, 5_000  # images that the probes learn from and are tested on, at most
PHOTO = 48  # pixels: where half of the images have a longer short side, training sees them at twice the size
SMALL = 96  # pixels: the short side of the copies that training reads in place of photographs
PROBES = ("knn", "linear")


@dataclass(frozen=True)
class Settings:
    images: Path | None = None  # None: the procedural corpus
    objective: str = "dino"
    out: Path = Path("quickstart")
    seed: int = 0
    n_train: int = N_TRAIN
    n_test: int = N_TEST
    overrides: tuple[str, ...] = ()  # of the recipe

    @property
    def folder(self) -> Path:
        """What belongs to these images: corpora, and a run per objective and seed."""
        return self.out / (f"procedural-{self.seed}" if self.images is None else self.images.resolve().name)

    @property
    def run(self) -> Path:
        return self.folder / f"{self.objective}-{self.seed}"


@dataclass(frozen=True)
class Corpora:
    train: Path  # trained on
    bank: Path  # what the probes learn from: `train`, or a part of it
    test: Path  # held out


@dataclass(frozen=True)
class Row:
    """One line of the table: an encoder or the pixels, with its scores or, where there are no labels, its figures."""

    name: str
    scores: dict[str, Score] = field(default_factory=dict)  # knn, linear
    figures: dict[str, float] = field(default_factory=dict)  # rankme, feature_spread
    fault: str = ""  # why there are neither


@dataclass(frozen=True)
class Outcome:
    rows: list[Row]
    weights: Path
    report: Path
    run: Path
    pooling: str
    train: Path
    test: Path


def quickstart(settings: Settings) -> Outcome:
    """All steps. Raises UserError for what the user can mend, and what `pretrain` raises."""
    _claim(settings)
    say("1/4 corpus: images become verified shards")
    corpora = _corpora(settings)
    say(f"2/4 pretraining: {settings.objective} on {Corpus.open(corpora.train).n} images, without their labels")
    run = pretrain(_recipe(settings, corpora))
    say("3/4 probes: the frozen encoder on held-out images")
    rows = list(_rows(settings, run, corpora))
    say("4/4 report")
    report = build_report(run, train=corpora.bank, test=corpora.test)
    weights = newest_export(run)
    return Outcome(rows, weights, report, run, POOLING[settings.objective][1], corpora.bank, corpora.test)


def _claim(settings: Settings) -> None:
    """Notes in the folder which images it is about, so that two sources of one name cannot mix."""
    check_range("--seed", settings.seed, 0, 2**63 - 1)
    images, folder = settings.images, settings.folder
    if images is None:
        about = {"images": None, "seed": settings.seed, "train": settings.n_train, "test": settings.n_test}
    elif not images.exists():
        raise UserError(f"{images} does not exist: give a folder or an archive of images")
    elif folder.resolve().is_relative_to(images.resolve()):
        raise UserError(f"{folder} would lie among the images and be taken for some of them: give an --out elsewhere")
    else:
        about = {"images": str(images.resolve())}
    said = (json.dumps(about) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "source.json"
    if not note.exists():
        with publish(note) as f:
            f.write(said)
    elif note.read_bytes() != said:
        raise UserError(f"{folder} is about other images: give another --out, or remove it")


# Images → corpora.


def _corpora(settings: Settings) -> Corpora:
    folder = settings.folder
    if settings.images is None:
        made = procedural.make(
            folder / "images",
            n_train=settings.n_train,
            n_test=settings.n_test,
            seed=settings.seed,
            workers=available_cores(),
        )
        train, test = (_built(made / split, folder / split) for split in ("train", "test"))
        return Corpora(train, train, test)

    train, test = _split(settings.images, folder)
    if _short_side(train) > 2 * SMALL:
        say(f"photographs: training reads copies of {SMALL} px, instead of decoding millions of pixels again and again")
        small = folder / f"images-{SMALL}px"
        for corpus in (train, test):
            _shrink_into(small, corpus)
        train, test = _split(small, folder, f"-{SMALL}px")
    share = BANK * (1 - HELD_OUT) / Corpus.open(train).n
    if share >= 1 - HELD_OUT:
        return Corpora(train, train, test)
    return Corpora(train, _built(train, folder / "bank", (0.0, share)), test)


def _split(source: Path, folder: Path, suffix: str = "") -> tuple[Path, Path]:
    """`train` and `test`, with one list of classes; by content, so that exact copies fall on the same side."""
    train = _built(source, folder / f"train{suffix}", (0.0, 1 - HELD_OUT))
    n = Corpus.open(train).n / (1 - HELD_OUT)
    return train, _built(source, folder / f"test{suffix}", (1 - min(HELD_OUT, TESTED / n), 1.0))


def _built(source: Path, out: Path, hash_range: tuple[float, float] = (0.0, 1.0)) -> Path:
    done = (out / MANIFEST).exists()
    try:
        report = build([source], out, hash_range=hash_range)
    except UserError as e:
        if not done:
            raise
        # `build` would have this corpus alone removed, but the run that was begun on it is as outdated.
        raise UserError(
            f"{source} has changed since an earlier quickstart: give another --out, or remove {out.parent}"
        ) from e
    refused = report.counts["rejected"]
    if refused:
        say(f"{refused} files could not be decoded and were left out: {out}/rejected.jsonl names them")
    faults = verify(out)
    if faults:
        raise UserError(f"{out} is damaged ({faults[0]}): remove {out} and run again")
    return out


def _shrink_into(out: Path, corpus: Path) -> None:
    """Adds the images to `out` as PNG with a short side of `SMALL` pixels, in folders by class if there are any."""
    opened = Corpus.open(corpus)
    # A class may have been named by more than a folder.
    folders = [out / name.replace("/", "∕") for name in opened.classes or [""]]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    tasks = (_Shrink(opened, first, min(first + 64, opened.n), folders) for first in range(0, opened.n, 64))
    for _ in each(_shrink, tasks, available_cores() if opened.n > 256 else 1):
        pass


@dataclass(frozen=True)
class _Shrink:
    corpus: Corpus
    first: int
    stop: int
    folders: list[Path]  # by label


def _shrink(task: _Shrink) -> None:
    for ordinal in range(task.first, task.stop):
        sample = task.corpus.sample(ordinal)
        target = task.folders[sample.label or 0] / f"{task.corpus.name}-{sample.key}.png"
        if target.exists():
            continue
        image = decode_image(sample.data)
        scale = SMALL / min(image.size)
        image = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), reducing_gap=2.0
        )
        temporary = target.with_suffix(".part")
        image.save(temporary, format="PNG", compress_level=1)
        temporary.replace(target)


# Recipe → run.


def _recipe(settings: Settings, corpora: Corpora):
    """The recipe of `configs/quickstart`, with its number of steps kept whatever the number of images."""
    name = f"quickstart/{settings.objective}"
    plain = resolve.load(name, settings.overrides)
    n = Corpus.open(corpora.train).n
    batch = min(plain.batch_size, n)
    stretch = (N_TRAIN // plain.batch_size) / (n // batch)  # epochs of these images in one of the recipe's
    fitted = {
        "corpus": corpora.train,
        "output": settings.run,
        "seed": settings.seed,
        "batch_size": batch,
        "epochs": plain.epochs * stretch,
        "optimizer.warmup_epochs": plain.optimizer.warmup_epochs * stretch,
    }
    # These two are counted in whole epochs.
    for key in ("freeze_last_layer", "warmup_teacher_temp_epochs"):
        if key in plain.objective:
            fitted[f"objective.{key}"] = round(plain.objective[key] * stretch)
    if _photographs(corpora.train):
        patch = plain.encoder.args["patch_size"]
        fitted |= {"encoder.img_size": 2 * plain.encoder.img_size, "encoder.args.patch_size": 2 * patch}
        for key in ("global_crops_size", "local_crops_size", "crop_size"):
            if key in plain.objective:
                fitted[f"objective.{key}"] = 2 * plain.objective[key]
    return resolve.load(name, (*settings.overrides, *(f"{key}={value}" for key, value in fitted.items())))


def _photographs(corpus: Path) -> bool:
    return _short_side(corpus) > PHOTO


def _short_side(corpus: Path) -> int:
    """Pixels that half of the images reach in both directions."""
    sizes = stats(corpus)["quantiles"]
    return min(sizes["width"]["p50"], sizes["height"]["p50"])


# Run → table.

# What each method's features are: DINO trains its class token, MAE leaves it idle and fills its patches.
POOLING = {
    "dino": ("cls", "class token"),
    "mae": ("avg", "mean patch token"),
}


def _rows(settings: Settings, run: Path, corpora: Corpora) -> Iterator[Row]:
    steps = exports(run)
    named = {"raw pixels": PIXELS, "untrained encoder": steps[0], "trained encoder": newest_export(run)}
    labelled = _labelled(corpora.bank)
    store = ResultsStore(run / "results.sqlite")
    how = How(cache=str(settings.folder / "features"))
    protocols = [find(name).override([f"tokens={POOLING[settings.objective][0]}"]) for name in PROBES]
    for name, weights in named.items():
        if not labelled and weights is PIXELS:
            continue
        bench = Bench.open(weights, corpora.bank, corpora.test, how)
        try:
            if labelled:
                yield Row(name, scores={protocol.name: _score(store, protocol, bench) for protocol in protocols})
            else:
                assert isinstance(protocols[0], FeatureProtocol)
                x = bench.features(bench.need("test"), protocols[0].pooling).tensor()[:TESTED]
                yield Row(name, figures={"rankme": rankme(x).item(), "feature_spread": feature_spread(x).item()})
        except Collapsed as e:  # a finding, and no reason to lose the others
            say(f"{name}: {e}")
            yield Row(name, fault="collapsed")


def _labelled(bank: Path) -> bool:
    """Whether probes can learn from these images; says so where they cannot."""
    classes = stats(bank)["classes"]
    if classes is not None and max(classes.values()) > 1:
        return True
    why = "no labels (sub-folders named by class would be)" if classes is None else "one image per class"
    say(f"{why}: kNN and linear probes are left out, label-free figures in")
    return False


def _score(store: ResultsStore, protocol: Protocol, bench: Bench) -> Score:
    """The score of an earlier call, or a new one that is kept."""
    assert bench.train is not None
    assert bench.test is not None
    if kept := store.find(protocol, bench.subject, bench.train.id, bench.test.id):
        return kept[0]
    scores = bench.run([protocol])
    store.add(*scores)
    return scores[0]
