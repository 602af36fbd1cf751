"""The one schema of a run. In: a YAML file and `key=value` overrides. Out: a `Recipe`, each value with its origin.

Keys are strict: an unknown one is refused and the nearest known one named. `auto` leaves a value to be chosen from the
corpus, the length of the run and the hardware when training starts; what was chosen and why joins the provenance.
`null` means that there is none, as the key's comment says.
"""

import copy
import difflib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfsight.errors import UserError

AUTO = "auto"
# Keys whose default it is; in Python it is None there. Others may say it, too: `selfsight.training.auto` has the rules.
AUTOMATIC = (
    "encoder.compile",
    "stream.lanes",
    "stream.workers",
    "stream.crops",
    "training.precision",
    "probe.every",
)
NOTES = ("provenance", "asked")  # what a Recipe knows of itself beside its keys
# Taken as they are typed: a folder may be called 007, 1e3 or 2024-01-01.
PATHS = ("corpus", "selection", "output", "weights", "probe.corpus")


@dataclass
class EncoderConfig:
    """A timm Vision Transformer."""

    name: str = "vit_small_patch16_224"  # any timm VisionTransformer, or Eva (vit_small_patch16_dinov3, …)
    img_size: int = 224  # pixels: the size its position table is made for
    drop_path_rate: float = 0.0  # stochastic depth, of the student only
    drop_path_uniform: bool = False  # this rate in every block, as DINOv2; else it grows linearly to the last one's
    checkpointing: str = "none"  # what the backward pass computes again: none, selective (all but products) or full
    compile: bool | None = None  # torch.compile of the blocks, in training; auto = on a GPU
    args: dict[str, Any] = field(default_factory=dict)  # further timm arguments: patch_size, depth, reg_tokens, …


@dataclass
class OptimizerConfig:
    """The optimiser, and its learning rate and weight decay at every step."""

    name: str = "adamw"  # adamw; lamb or lars, for large batches; sgd
    base_lr: float = 5e-4  # the highest, for a global batch of `reference_batch` images
    scaling: str = "linear"  # with the batch: linear, sqrt (of batch_size / reference_batch), or none
    reference_batch: int = 256  # images
    schedule: str = "dino_cosine"  # or mae_cosine, truncated_cosine, linear_warmup_cosine, constant; all warm up first
    warmup_epochs: float = 10.0
    min_lr: float = 1e-6  # where a cosine ends; not scaled
    trunc_extra: float = 0.0  # of truncated_cosine: the share of it that is left out at its end
    cosine_epochs: float | None = None  # of linear_warmup_cosine, then constant; null = to the end
    layer_decay: float = 1.0  # factor on the rate from each block of the encoder to the one below (BEiT, DINOv2)
    patch_embed_lr_mult: float = 1.0  # and once more on the patch embedding's (DINOv2)
    weight_decay: float = 0.04
    weight_decay_end: float | None = None  # cosine towards this; null = constant
    decay_vectors: bool = False  # biases and norms, too
    undecayed: list[str] = field(default_factory=list)  # ends of the names of further parameters, such as pos_embed
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of adamw and lamb
    momentum: float = 0.9  # of lars and sgd
    trust_coefficient: float = 0.001  # of lars
    clip: float = 0.0  # gradient norm to clip at; 0 = never
    clip_per: str = "global"  # global; tensor, as DINO does; module: the encoder and each head, as DINOv2 does


@dataclass
class StreamConfig:
    lanes: int | None = None  # auto = the largest divisor of the batch that the corpus fills, 256 at most
    window: int = 16  # chunks shuffled together in a lane
    workers: int | None = None  # decoding threads per rank; auto = one per core that training leaves over
    crops: str | None = None  # where they are made: cpu or device; auto = on a GPU if there is one
    decode: str = "cpu"  # or device: baseline JPEGs are decoded there, by nvJPEG; needs the crops there
    max_damaged: float = 0.001  # share of the images read that may be replaced before training stops


@dataclass
class PartConfig:
    """One of several corpora to train on."""

    corpus: str = MISSING  # as the recipe's key
    selection: str | None = None  # as the recipe's key
    weight: float = 1.0  # share of its images in blended batches, relative to the other parts
    alone: float = 0.0  # share of the steps whose whole batch is its


@dataclass
class UnindexedConfig:
    """Foreign WebDataset shards, read through the webdataset library: for a try before `selfsight corpus adopt`."""

    shards: list[str] = field(default_factory=list)  # URLs, with {000000..000123}
    images: int | None = None  # how many an epoch counts; needed with shards


@dataclass
class TrainingConfig:
    zero: int = 1  # DeepSpeed ZeRO stage; shards the optimiser's state (1), gradients too (2), parameters too (3)
    offload: bool = False  # the optimiser's state and step on the CPU; needs zero of 1 or more
    precision: str | None = None  # fp32, or bf16 autocast over fp32 weights; auto = bf16 on a GPU that has it
    accumulation: int = 1  # micro-batches per optimiser step
    log_every: int = 10  # steps
    checkpoint_every: int = 1000  # steps
    keep: int = 2  # the newest checkpoints are kept; exports always are
    keep_every: int | None = None  # steps; checkpoints at its multiples are kept for ever
    keep_best: str | None = None  # "max probe/knn", "min loss": the best by a number of the log is kept, too
    patience: int = 10  # steps in a row that may be refused, as not finite, before training returns to a checkpoint
    returns: int = 3  # to the same checkpoint, before the run ends; 0 ends it at once
    return_on_spike: bool = False  # also when the loss stays far above what it was, which always raises an alarm


@dataclass
class ProbeConfig:
    """A labelled corpus on which the encoder is measured while it trains."""

    corpus: str | None = None  # as the recipe's key; null = no probes. Without labels there are only label-free figures
    every: int | None = None  # steps; auto = as often as 2 % of the time allow. And after the last step
    images: int = 2048  # of the corpus, half of them to learn from and half to be tested on


@dataclass
class LogConfig:
    """Where a run's numbers go beside its metrics.jsonl and TensorBoard."""

    wandb: str | None = None  # a project of Weights & Biases; WANDB_MODE=offline keeps it in the run folder
    mlflow: str | None = None  # an MLflow store: a server's URL, or sqlite:///FILE.db


@dataclass
class Recipe:
    corpus: str | None = None  # folder or URL of what `selfsight corpus build` made; training needs it, or a mixture
    selection: str | None = None  # name of one of its selections, or a Parquet file; null = all images once
    mixture: list[PartConfig] = field(default_factory=list)  # several corpora, instead of `corpus` and `selection`
    unindexed: UnindexedConfig = field(default_factory=UnindexedConfig)  # shards without an index, instead of both
    output: str | None = None  # run folder; training needs it
    weights: str | None = None  # start from these: an export (its encoder), a run or a checkpoint (all); null = anew
    weights_sha256: str | None = None  # of their file; null = whatever it is
    seed: int = 0
    batch_size: int = 256  # global: over all ranks and micro-batches
    epochs: float = 100.0
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    objective: Any = None  # {name: …} and the keys of that objective's Config
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    log: LogConfig = field(default_factory=LogConfig)
    provenance: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # "a.b" → origin
    asked: list[str] = field(default_factory=list, compare=False, repr=False)  # beyond AUTOMATIC, keys that say "auto"

    @property
    def objective_name(self) -> str:
        return self.objective["name"]

    @property
    def autos(self) -> list[str]:
        """The keys that say "auto", until a value is set."""
        return [*(key for key in AUTOMATIC if self.get(key) is None), *self.asked]

    def get(self, key: str) -> Any:
        """The value of the dotted `key`; None for one that the objective does not have."""
        node: Any = self
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else getattr(node, part)
        return node

    def set(self, key: str, value: Any, reason: str) -> None:
        """Resolves the dotted `key` to `value` and notes why."""
        *path, leaf = key.split(".")
        node = self
        for part in path:
            node = getattr(node, part)
        if isinstance(node, dict):  # the objective's section
            node[leaf] = value
        else:
            setattr(node, leaf, value)
        self.provenance[key] = f"{AUTO}: {reason}"
        if key in self.asked:
            self.asked.remove(key)

    def chosen(self) -> Iterator[tuple[str, Any, str]]:
        """(key, value, reason) of what said "auto"; the value is "auto" where it will be chosen later."""
        for key, origin in sorted(self.provenance.items()):
            word, _, reason = origin.partition(f"{AUTO}: ")
            if not word and reason:
                yield key, AUTO if key in self.autos else self.get(key), reason

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, without provenance; `load` reads it back."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NOTES}
        plain["mixture"] = [asdict(part) for part in self.mixture]
        if isinstance(self.objective, dict):
            plain["objective"] = dict(self.objective)
        nested = {k: (asdict(v) if is_dataclass(v) and not isinstance(v, type) else v) for k, v in plain.items()}
        for key in self.autos:
            _put(nested, key, AUTO)
        return nested

    def to_yaml(self) -> str:
        """YAML in which every line says in a comment where its value came from."""
        lines = list(_yaml_lines(self.to_dict(), self.provenance))
        width = min(max(len(text) for text, _ in lines), 60)
        return "".join(f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def _yaml_lines(node: dict, provenance: dict[str, str], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield f"{'  ' * depth}{key}:", ""
            yield from _yaml_lines(value, provenance, f"{dotted}.", depth + 1)
        else:
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
            text = text.removesuffix("...\n").strip()  # the end mark that follows a bare scalar
            yield f"{'  ' * depth}{key}: {text}", provenance.get(dotted, "default")


def configs_dir() -> Path:
    """The recipes that come with selfsight: in the wheel, or in the checkout."""
    packaged = Path(str(resources.files("selfsight"))) / "configs"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "configs"


def find(source: str) -> Path:
    """`source` as a path, or else below the recipes that come with selfsight, with or without `.yaml`."""
    for path in (Path(source), configs_dir() / source, configs_dir() / f"{source}.yaml"):
        if path.is_file():
            return path
    known = sorted(p.relative_to(configs_dir()).with_suffix("").as_posix() for p in configs_dir().rglob("*.yaml"))
    raise UserError(f"there is no recipe {source!r}: give a YAML file or one of {', '.join(known)}")


def load(source: str, overrides: list[str] | tuple[str, ...] = (), *, objective: Callable[[str], type]) -> Recipe:
    """Reads a recipe. `objective` maps an objective's name to its Config dataclass.

    Raises UserError for a missing file, an unknown key, a value of the wrong type or a malformed override.
    """
    path = find(source)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(given, dict):
        raise UserError(f"{path} is not a recipe: it should be a mapping of keys to values")
    provenance = {key: str(path) for key, _ in _leaves(given)}
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise UserError(f"cannot read {override!r}: overrides look like optimizer.base_lr=1e-3")
        try:
            _put(given, key, text if key in PATHS and text != "null" else _scalar(text))
        except yaml.YAMLError as e:
            raise UserError(f"cannot read {override!r}: the value is not YAML") from e
        provenance[key] = "command line"
    return from_dict(given, provenance, objective=objective)


def from_dict(given: dict[str, Any], provenance: dict[str, str], *, objective: Callable[[str], type]) -> Recipe:
    """A Recipe from a plain nested dict, checked against the schema. Raises UserError as `load` does."""
    section = given.get("objective")
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise UserError("the recipe names no objective: set objective.name, for example objective.name=dino")
    schema = OmegaConf.structured(Recipe(objective=None))
    config = OmegaConf.structured(objective(section["name"]))
    known: dict[str, Any] = OmegaConf.to_container(schema)  # type: ignore[assignment]
    known["objective"] = {"name": "", **OmegaConf.to_container(config)}  # type: ignore[dict-item]
    for note in NOTES:
        known.pop(note)
    _refuse_unknown(given, known)
    autos = [key for key, value in _leaves(given) if value == AUTO and key not in PATHS]
    given = copy.deepcopy(given)
    for key in autos:
        _drop(given, key)
    section = given["objective"]
    rest = {k: v for k, v in given.items() if k != "objective"}
    try:
        merged = OmegaConf.merge(schema, rest)
        merged_objective = OmegaConf.merge(config, {k: v for k, v in section.items() if k != "name"})
        recipe: Recipe = OmegaConf.to_object(merged)  # type: ignore[assignment]
        recipe.objective = {"name": section["name"], **OmegaConf.to_container(merged_objective)}  # type: ignore[dict-item]
    except OmegaConfBaseException as e:
        key = getattr(e, "full_key", None) or "a value"
        raise UserError(f"{key}: {str(e).splitlines()[0]}") from e
    recipe.provenance, recipe.asked = provenance, [key for key in autos if key not in AUTOMATIC]
    return recipe


def _leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _scalar(text: str) -> Any:
    if not text or (text[0] not in "[{'\"" and (": " in text or " #" in text)):
        return text  # a path with YAML's own marks in it is still a path
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 takes 1e-3 for a string; a user means the number
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _put(node: dict, key: str, value: Any) -> None:
    *path, leaf = key.split(".")
    for part in path:
        child = node.get(part)
        if not isinstance(child, dict):
            child = node[part] = {}
        node = child
    node[leaf] = value


def _drop(node: dict, key: str) -> None:
    *path, leaf = key.split(".")
    for part in path:
        node = node[part]
    del node[leaf]


def _refuse_unknown(given: dict, known: dict, prefix: str = "") -> None:
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise UserError(f"unknown recipe key {prefix}{key}: {hint}")
        inner = known[key]
        # An empty mapping in the schema (encoder.args) is open: timm checks those names.
        if isinstance(inner, dict) and inner:
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{key} should be a mapping with keys {', '.join(inner)}")
            _refuse_unknown(value, inner, f"{prefix}{key}.")
