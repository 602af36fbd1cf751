"""`selfsight eval PROTOCOL WEIGHTS --train DIR --test DIR [key=value …]`: a probe on frozen weights, with intervals."""

import argparse
import json
from pathlib import Path


class Keys(argparse.Action):
    """Shows the numbers of a protocol and its digest, as changed by any key=value, and ends; as --help, it asks for
    nothing else."""

    def __init__(self, option_strings, dest, protocol: str) -> None:
        about = "show the numbers and the digest, and stop; no WEIGHTS needed"
        super().__init__(option_strings, dest, nargs="*", metavar="key=value", help=about)
        self.protocol = protocol

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        from eval_probes.protocol import find
        from selfsight.errors import UserError

        try:
            protocol = find(self.protocol).override([*(namespace.overrides or []), *(values or [])])
        except UserError as e:
            parser.error(str(e))
        print(json.dumps({**protocol.numbers(), "digest": protocol.digest}, indent=1))
        parser.exit()


def add(subparsers) -> None:
    from eval_probes.protocol import MODULES

    probes = subparsers.add_parser(
        "eval",
        help="measure weights: kNN, linear and other probes",
        description="Measures frozen weights by a named protocol. key=value changes one of its numbers, and with it "
        "its digest; --keys shows them.",
    )
    verbs = probes.add_subparsers(title="protocols, and what runs several of them", metavar="PROTOCOL", required=True)
    for name, (_, about) in MODULES.items():
        parser = verbs.add_parser(name, help=about)
        parser.add_argument("weights", metavar="WEIGHTS", help="export folder, run (its newest export), or: pixels")
        parser.add_argument("overrides", metavar="key=value", nargs="*", help=f"numbers of {name} to change")
        corpora(parser)
        computing(parser)
        parser.add_argument("--results", metavar="FILE", help="results store to append to; a run's own is always used")
        parser.add_argument("--scene", metavar="DIR", help="folder of views (epipolar)")
        parser.add_argument("--pictures", metavar="DIR", type=Path, help="save pictures of what is found (geometry)")
        parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
        parser.add_argument("--keys", action=Keys, protocol=name)
        parser.set_defaults(run=run, protocol=name)

    _add_suite(verbs)
    _add_watch(verbs)


def _add_suite(verbs) -> None:
    parser = verbs.add_parser("suite", help="several protocols at once; what was measured before is not measured again")
    parser.add_argument("weights", metavar="WEIGHTS", help="export folder, run (its newest export), or: pixels")
    parser.add_argument(
        "--suite", default="quick", metavar="YAML", help="a file, or one that comes along: quick (default)"
    )
    corpora(parser)
    computing(parser)
    parser.add_argument("--results", metavar="FILE", help="results store (default: the run's own)")
    parser.add_argument("--json", action="store_true", help="one JSON array on stdout")
    parser.set_defaults(run=run_suite)


def _add_watch(verbs) -> None:
    parser = verbs.add_parser("watch", help="a suite on every checkpoint of a run as it completes")
    parser.add_argument("run_folder", metavar="RUN", type=Path)
    parser.add_argument(
        "--suite", default="quick", metavar="YAML", help="a file, or one that comes along: quick (default)"
    )
    corpora(parser)
    computing(parser)
    parser.add_argument(
        "--policy", choices=["every", "newest"], default="every", help="which checkpoints (default every)"
    )
    parser.add_argument(
        "--budget", type=float, default=1.0, metavar="SHARE", help="of the time that may go into it (1)"
    )
    parser.add_argument("--poll", type=float, default=10.0, metavar="SECONDS", help="between two looks (default 10)")
    parser.add_argument("--once", action="store_true", help="measure what is there, and stop")
    parser.set_defaults(run=run_watch)


def corpora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", metavar="DIR", help="corpus that the probe learns from")
    parser.add_argument("--test", metavar="DIR", help="corpus that it is tested on")


def computing(parser: argparse.ArgumentParser) -> None:
    """How features are computed; `how` reads it."""
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="per forward pass (default 256)")
    parser.add_argument("--device", help="cpu, cuda, … (default: every GPU there is, or else the CPU)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the forward pass")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="features are kept as this")
    parser.add_argument("--workers", type=int, metavar="N", help="decoding threads (default: one per core)")
    parser.add_argument("--cache", metavar="DIR", help="where features are kept (default: $SELFSIGHT_CACHE)")


def how(args: argparse.Namespace):
    from eval_probes.extraction import How

    return How(args.batch_size, args.device, args.precision, args.dtype, args.workers, args.cache)


def run(args: argparse.Namespace) -> int:
    from eval_probes.bench import Bench
    from eval_probes.geometry.scenes import Scene
    from eval_probes.protocol import find
    from selfsight.weights.run import run_of

    protocol = find(args.protocol).override(args.overrides)
    bench = Bench.open(args.weights, args.train, args.test, how(args))
    bench.scene = Scene.open(args.scene) if args.scene else None
    if args.pictures is not None:
        args.pictures.mkdir(parents=True, exist_ok=True)
        bench.pictures = args.pictures
    scores = bench.run([protocol])
    tell(scores, as_json=args.json)
    stores = [Path(args.results)] if args.results else []
    if owner := run_of(Path(args.weights)):
        stores.append(owner / "results.sqlite")
    keep(scores, stores)
    return 0


def run_suite(args: argparse.Namespace) -> int:
    from eval_probes import suite
    from eval_probes.bench import Bench
    from eval_probes.results import ResultsStore
    from selfsight.console import say
    from selfsight.weights.run import run_of

    protocols = suite.load(args.suite)
    bench = Bench.open(args.weights, args.train, args.test, how(args))
    owner = run_of(Path(args.weights))
    place = args.results or (owner / "results.sqlite" if owner else None)
    outcomes = []
    for outcome in suite.run(bench, protocols, ResultsStore(place) if place else None):
        outcomes.append(outcome)
        if outcome.fault:
            say(f"selfsight: {outcome.protocol.name}: {outcome.fault}")
        if not args.json:
            tell(outcome.scores, as_json=False)
    if args.json:
        print(json.dumps([score.to_dict() for outcome in outcomes for score in outcome.scores]))
    return 2 if any(outcome.fault for outcome in outcomes) else 0


def run_watch(args: argparse.Namespace) -> int:
    from eval_probes import suite
    from eval_probes.watch import Watcher
    from selfsight.console import say
    from selfsight.shards.corpus import Corpus

    train, test = (None if c is None else Corpus.open(c) for c in (args.train, args.test))
    watcher = Watcher(args.run_folder, suite.load(args.suite), train, test, how(args), args.policy, args.budget)
    faults = 0
    for step, outcome in watcher.watch(poll=args.poll, follow=not args.once):
        if outcome.fault:
            faults += 1
            say(f"selfsight: step {step}, {outcome.protocol.name}: {outcome.fault}")
        for score in outcome.scores:
            print(f"step {step}  {score.protocol}  {score.metric}  {score.said()}", flush=True)
    return 2 if faults else 0


def tell(scores, *, as_json: bool) -> None:
    """The first score as one JSON object, the others inside it; or a line for each."""
    if as_json:
        first, *others = (score.to_dict() for score in scores)
        print(json.dumps({**first, "others": others} if others else first), flush=True)
        return
    for score in scores:
        chosen = f", k={score.details['k']}" if "k" in score.details else ""
        chosen = f", lr {score.details['lr']:g}" if "lr" in score.details else chosen
        print(f"{score.protocol}  {score.metric}  {score.said()}{chosen}  {score.weights}", flush=True)


def keep(scores, stores: list[Path]) -> None:
    from eval_probes.results import ResultsStore
    from selfsight.console import say

    for store in dict.fromkeys(stores):
        ResultsStore(store).add(*scores)
        say(f"written to {store}")
