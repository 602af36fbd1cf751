"""`selfsight eval knn | linear WEIGHTS --train DIR --test DIR`: a probe on frozen weights, with a 95 % interval."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path


def add(subparsers) -> None:
    probes = subparsers.add_parser("eval", help="measure weights: kNN and a linear probe")
    verbs = probes.add_subparsers(metavar="PROBE", required=True)

    knn = verbs.add_parser("knn", help="DINO's weighted k-nearest-neighbour vote")
    knn.add_argument("--k", type=int, default=20, help="neighbours of the reported figure (default 20)")
    knn.add_argument("--temperature", type=float, default=0.07, metavar="T", help="default 0.07")
    _common(knn)
    knn.set_defaults(run=run, score=_knn)

    linear = verbs.add_parser("linear", help="logistic regression on frozen features")
    linear.add_argument(
        "--protocol",
        choices=["linear", "mae-linprobe"],
        default="linear",
        help="linear: SGD, learning rate chosen on a tenth of the training images; mae-linprobe: MAE's head and LARS",
    )
    _common(linear)
    linear.set_defaults(run=run, score=_linear)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="WEIGHTS", help="export folder, run folder (its newest export), or: pixels")
    parser.add_argument("--train", required=True, metavar="DIR", help="labelled corpus that the probe learns from")
    parser.add_argument("--test", required=True, metavar="DIR", help="labelled corpus that it is tested on")
    parser.add_argument(
        "--blocks", type=int, default=1, metavar="N", help="class tokens of the last N blocks (default 1)"
    )
    parser.add_argument("--avgpool", action="store_true", help="append the mean patch token (alone with --blocks 0)")
    parser.add_argument(
        "--batch-size", type=int, default=256, metavar="N", help="images per forward pass (default 256)"
    )
    parser.add_argument("--device", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the forward pass")
    parser.add_argument("--workers", type=int, metavar="N", help="decoding processes (default: one per core)")
    parser.add_argument("--results", metavar="FILE", help="results store to append to; a run's own is always used")
    parser.add_argument("--cache", metavar="DIR", help="where features are kept (default: $SELFSIGHT_CACHE)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    from eval_probes.features import check_corpora, extract
    from eval_probes.results import ResultsStore
    from selfsight.console import say
    from selfsight.errors import UserError
    from selfsight.shards.corpus import Corpus
    from selfsight.weights.run import run_of

    if args.batch_size < 1 or (args.workers is not None and args.workers < 0):
        raise UserError("--batch-size must be at least 1 and --workers at least 0")
    check_corpora(Corpus.open(args.train), Corpus.open(args.test))  # before the hours that features may take
    train, test = (
        extract(
            args.weights,
            corpus,
            n_last_blocks=args.blocks,
            avgpool=args.avgpool,
            batch_size=args.batch_size,
            device=args.device,
            cache=args.cache,
            workers=args.workers,
            precision=args.precision,
        )
        for corpus in (args.train, args.test)
    )
    score = args.score(args, train, test)
    print(json.dumps(asdict(score)) if args.json else _line(score), flush=True)
    stores = [Path(args.results)] if args.results else []
    if owner := run_of(Path(args.weights)):
        stores.append(owner / "results.sqlite")
    for store in dict.fromkeys(stores):
        ResultsStore(store).add(score)
        say(f"written to {store}")
    return 0


def _knn(args: argparse.Namespace, train, test):
    from eval_probes.knn import KNN, evaluate

    return evaluate(
        train,
        test,
        KNN(ks=tuple(sorted({*KNN.ks, args.k})), k=args.k, temperature=args.temperature),
        device=args.device,
    )


def _linear(args: argparse.Namespace, train, test):
    from eval_probes import linear, linprobe

    return (linprobe if args.protocol == "mae-linprobe" else linear).evaluate(train, test, device=args.device)


def _line(score) -> str:
    chosen = f"k={score.details['k']}" if "k" in score.details else f"lr {score.details['lr']:g}"
    return (
        f"{score.protocol}  {100 * score.value:.2f} %  (95 % interval {100 * score.low:.2f}–{100 * score.high:.2f}, "
        f"n={score.n}, {chosen})  {score.weights}"
    )
