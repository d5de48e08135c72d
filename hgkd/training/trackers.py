"""Weights & Biases and MLflow beside TensorBoard, by the config's key ``tracker``.

mmengine 0.10.7 has backends for both. They drop the number of the step, begin a new run at every resume, fail with settings
that changed since, and MLflow's uses a store that mlflow 3 refuses unless asked; so the two here use the libraries themselves.

A run's id lies in ``tracker.json`` in the work folder, and a training that is resumed there goes on in the same run. Points
are placed at the number of steps done. Once a training runs, a tracker that fails costs its records and never the training.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.visualization.vis_backend import BaseVisBackend, force_init_env
from PIL import Image
from torch import Tensor

from hgkd.errors import InvalidValueError, MissingPackageError, unknown_name_message
from hgkd.writing import write_text

ID_FILE = "tracker.json"
PROJECT = "hgkd"
_MOST = 100  # parameters of a call
_LONGEST = 500  # characters of a parameter's value that every store of MLflow takes


class Tracker(BaseVisBackend):  # type: ignore[misc]
    """Base of the trackers: one run of a training, begun when it is first asked for.

    Args:
        work_dir: of the training; holds the id, and what is recorded without a server.
        resumed: go on in the run that ``work_dir`` names, where there is one.
        position: number of steps done.
    """

    library: str

    def __init__(self, work_dir: str | os.PathLike[str], resumed: bool, position: Callable[[], int]) -> None:
        super().__init__(str(work_dir))
        self._folder = Path(work_dir).absolute()
        self._resumed = resumed
        self._position = position
        self._failures = 0
        self._run: Any = None

    def _init_env(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        before = self._before() if self._resumed else None
        started = self._start(before)
        if self._resumed and (before is None or started["id"] != before["id"]):
            why = f"{ID_FILE} names none" if before is None else f"{before['id']} is not to be found at {started['place']}"
            print_log(f"tracker={self.library}: a new run is begun, as {why}", "current", level=30)
        write_text(self._folder / ID_FILE, json.dumps({"tracker": self.library, **started}) + "\n")
        print_log(f"tracker={self.library}: run {started['id']} at {started['place']}", "current")

    def _before(self) -> dict[str, str] | None:
        """What the work folder says about the run before; None: nothing, or one of another tracker."""
        try:
            found = json.loads((self._folder / ID_FILE).read_text(encoding="utf-8"))
            return found if found["tracker"] == self.library and isinstance(found["id"], str) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @abstractmethod
    def _start(self, before: Mapping[str, str] | None) -> dict[str, str]:
        """Begin a run, or go on in ``before``; its ``id`` and ``place``."""

    @property
    @force_init_env  # type: ignore[untyped-decorator]
    def experiment(self) -> Any:
        """The run, as its library has it."""
        return self._run

    def add_scalar(self, name: str, value: object, step: int = 0, **kwargs: object) -> None:
        self.add_scalars({name: value}, step)

    def _done(self, step: int) -> int:
        """Number of steps done. hgkd's runner counts up after it has logged a step, and logs scores by the epoch."""
        return max(step, self._position())

    def _record(self, write: Callable[[], object]) -> None:
        if self._run is None:  # closed
            return
        try:
            write()
        except Exception as error:
            self._failures += 1
            if self._failures == 1:
                print_log(
                    f"tracker={self.library} does not take a record ({type(error).__name__}: {error}); training goes on, and "
                    "logs and TensorBoard have all of them",
                    "current",
                    level=30,
                )

    def close(self, failed: bool = False) -> None:
        """End the run; ``failed``: the training ended by an error. A second call does nothing."""
        if self._run is None:
            return
        self._record(lambda: self._end(failed))
        self._run = None
        if self._failures:
            print_log(f"tracker={self.library}: {self._failures} records were not taken", "current", level=30)

    @abstractmethod
    def _end(self, failed: bool) -> None:
        """End the run."""


class WandbTracker(Tracker):
    """Weights & Biases, offline unless the user's WANDB_MODE says otherwise; project ``hgkd`` unless WANDB_PROJECT does."""

    library = "wandb"

    def _start(self, before: Mapping[str, str] | None) -> dict[str, str]:
        import wandb

        mode = os.environ.get("WANDB_MODE") or "offline"
        options = {} if before is None else {"id": before["id"]}
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                name=os.environ.get("WANDB_NAME") or self._folder.name,
                dir=str(self._folder),
                mode=mode,
                # offline it says nothing but a warning: the id alone makes it one run
                resume=None if mode == "offline" else "allow",
                settings=wandb.Settings(console="off", login_timeout=30),  # the log is ours; nobody may sit at a prompt
                **options,
            )
        except wandb.Error as error:
            raise InvalidValueError(
                "tracker-not-started",
                f"tracker=wandb does not start with WANDB_MODE={mode}: {' '.join(str(error).split())}. Log in with "
                "`wandb login`, or leave WANDB_MODE unset: it records into the work folder then, for `wandb sync` later",
            ) from error
        self._run.define_metric("*", step_metric="iter")
        return {"id": str(self._run.id), "place": str(self._run.url or self._run.dir)}

    @force_init_env  # type: ignore[untyped-decorator]
    def add_config(self, config: Config, **kwargs: object) -> None:
        self._record(lambda: self._run.config.update(_plain(config.to_dict()), allow_val_change=True))

    @force_init_env  # type: ignore[untyped-decorator]
    def add_scalars(self, scalar_dict: Mapping[str, object], step: int = 0, file_path: str | None = None, **_: object) -> None:
        self._record(lambda: self._run.log({**_numbers(scalar_dict), "iter": self._done(step)}))

    @force_init_env  # type: ignore[untyped-decorator]
    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs: object) -> None:
        import wandb

        self._record(lambda: self._run.log({name: wandb.Image(image), "iter": self._done(step)}))

    def _end(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflowTracker(Tracker):
    """MLflow, in the work folder's ``mlruns`` unless the user's MLFLOW_TRACKING_URI says otherwise; experiment ``hgkd`` unless
    MLFLOW_EXPERIMENT_NAME does."""

    library = "mlflow"

    def _start(self, before: Mapping[str, str] | None) -> dict[str, str]:
        place = os.environ.get("MLFLOW_TRACKING_URI") or (self._folder / "mlruns").as_uri()
        if place.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow 3 wants to be asked for its folders of files
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            self._run = client = MlflowClient(tracking_uri=place)
            self._id = self._found(client, before, MlflowException) or self._begin(client)
        except (MlflowException, OSError) as error:
            raise InvalidValueError(
                "tracker-not-started",
                f"tracker=mlflow does not start at {place}: {' '.join(str(error).split())}. Correct MLFLOW_TRACKING_URI, or "
                "leave it unset: it records into the work folder then",
            ) from error
        return {"id": self._id, "place": place}

    def _begin(self, client: Any) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = client.get_experiment_by_name(name)
        number = client.create_experiment(name) if experiment is None else experiment.experiment_id
        return str(client.create_run(number, run_name=self._folder.name).info.run_id)

    @staticmethod
    def _found(client: Any, before: Mapping[str, str] | None, absent: type[Exception]) -> str | None:
        if before is None:
            return None
        try:
            client.update_run(before["id"], status="RUNNING")
        except absent:  # of another store, or deleted
            return None
        return before["id"]

    @force_init_env  # type: ignore[untyped-decorator]
    def add_config(self, config: Config, **kwargs: object) -> None:
        """Values that a run holds cannot be changed in MLflow: of a resumed one ``config.py`` has those in force."""
        from mlflow.entities import Param

        def write() -> None:
            self._run.log_text(self._id, config.pretty_text, "config.py")
            held = self._run.get_run(self._id).data.params
            values = {_mlflow_name(key): str(value)[:_LONGEST] for key, value in _flat(_plain(config.to_dict()))}
            params = [Param(key, value) for key, value in values.items() if key not in held]
            for first in range(0, len(params), _MOST):
                self._run.log_batch(self._id, params=params[first : first + _MOST])

        self._record(write)

    @force_init_env  # type: ignore[untyped-decorator]
    def add_scalars(self, scalar_dict: Mapping[str, object], step: int = 0, file_path: str | None = None, **_: object) -> None:
        from mlflow.entities import Metric

        now, done = int(1e3 * time.time()), self._done(step)
        metrics = [Metric(_mlflow_name(key), value, now, done) for key, value in _numbers(scalar_dict).items()]
        self._record(lambda: self._run.log_batch(self._id, metrics=metrics))

    @force_init_env  # type: ignore[untyped-decorator]
    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs: object) -> None:
        file = f"{_mlflow_name(name)}/step_{self._done(step)}.png"
        self._record(lambda: self._run.log_image(self._id, Image.fromarray(image), file))

    def _end(self, failed: bool) -> None:
        self._run.set_terminated(self._id, "FAILED" if failed else "FINISHED")


TRACKERS: Mapping[str, type[Tracker]] = {kind.library: kind for kind in (WandbTracker, MLflowTracker)}


def check_tracker(name: object) -> None:
    """Refuse a tracker that is unknown, or whose library is not installed; None: TensorBoard alone.

    Raises:
        ValueError: unknown.
        MissingPackageError: not installed; the message has the line that installs it.
    """
    if name is None:
        return
    if not isinstance(name, str) or name not in TRACKERS:
        raise InvalidValueError(
            "tracker-unknown",
            f"tracker={name!r}: {unknown_name_message('tracker', str(name), TRACKERS)}; None: TensorBoard alone",
        )
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # a folder of that name, as wandb leaves, is no library
        raise MissingPackageError(
            "tracker-not-installed",
            f"tracker={name} needs the package {name}, which is not installed: pip install 'hgkd[{name}]'. Without tracker the "
            "run is recorded for TensorBoard",
        )


def _numbers(values: Mapping[str, object]) -> dict[str, float]:
    """What is a number; of a mapping that also holds texts."""
    single = {k: v.item() if isinstance(v, (Tensor, np.ndarray, np.generic)) and v.ndim == 0 else v for k, v in values.items()}
    return {key: float(value) for key, value in single.items() if isinstance(value, (int, float))}


def _plain(value: object) -> object:
    """A config's values as texts, numbers, lists and mappings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _flat(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Dotted paths and values; a list of mappings counts its entries."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{path}.{index}")
    else:
        yield path, value


def _mlflow_name(name: str) -> str:
    """A name with the characters that MLflow takes only."""
    return re.sub(r"[^\w\-. /]", "_", name)[:250]
