"""Other people's logs: Weights & Biases and MLflow, when a recipe asks for them.

In: the numbers that metrics.jsonl gets. Out: a run of the same name there, which a continued run goes on with; its id
lies in the run folder. They raise what their packages raise: that none of it ends a training is the log's business.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

from selfsight.errors import UserError
from selfsight.files import publish
from selfsight.recipe import LogConfig

FILE = "trackers.json"  # the name of a tracker → the run's id there
PROJECT = "selfsight"  # MLflow's experiment


class Tracker(Protocol):
    name: str

    def record(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class WandB:
    """A run of Weights & Biases. WANDB_MODE=offline keeps it in the run folder, for `wandb sync` later."""

    name = "wandb"

    def __init__(self, project: str, run: Path, recipe: dict[str, Any], known: str | None) -> None:
        import wandb

        self.id = known or token_hex(4)
        self._run = wandb.init(
            project=project,
            name=run.name,
            id=self.id,
            resume="allow",
            dir=str(run),
            config=recipe,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="step")  # W&B's own counter cannot go back to a checkpoint

    def record(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run in MLflow's store at `uri`: a server, or sqlite:///FILE.db."""

    name = "mlflow"

    def __init__(self, uri: str, run: Path, recipe: dict[str, Any], known: str | None) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=uri)
        if known is None:
            found = self._client.get_experiment_by_name(PROJECT)
            experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
            self.id = self._client.create_run(experiment, run_name=run.name).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in _flat(recipe).items()]
            self._client.log_batch(self.id, params=params[:100])  # as many as one call may have
            for begin in range(100, len(params), 100):
                self._client.log_batch(self.id, params=params[begin : begin + 100])
        else:
            self.id = known
            self._client.update_run(self.id, status="RUNNING")

    def record(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[self._metric(k, float(v), now, step) for k, v in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self.id)


def check(config: LogConfig) -> None:
    """Raises UserError where the package of a tracker that is asked for is missing."""
    for kind in (WandB, MLflow):
        if getattr(config, kind.name) is not None and find_spec(kind.name) is None:
            raise UserError(f"log.{kind.name} needs a package that is not there: pip install 'selfsight[{kind.name}]'")


def wanted(config: LogConfig, run: Path, recipe: dict[str, Any]) -> dict[str, Callable[[], Tracker]]:
    """What begins each tracker that `config` asks for, by its name."""
    kinds = {kind.name: kind for kind in (WandB, MLflow) if getattr(config, kind.name) is not None}
    return {name: partial(_begin, kind, getattr(config, name), run, recipe) for name, kind in kinds.items()}


def _begin(kind: type[WandB] | type[MLflow], target: str, run: Path, recipe: dict[str, Any]) -> Tracker:
    path = run / FILE
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tracker = kind(target, run, recipe, known.get(kind.name))
    with publish(path) as file:
        file.write(json.dumps({**known, kind.name: tracker.id}).encode())
    return tracker


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
