"""A run's metrics: always into ``metrics.jsonl``, and into Weights & Biases where the settings ask for it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any

from cosmos_ray.config import RunConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder

logger = logging.getLogger(__name__)


class Tracker:
    """Records the metrics of a run. Imports ``wandb`` only when the settings ask for it.

    A service that is down, or a missing login, does not end a training run: the tracker logs one warning and goes on with
    ``metrics.jsonl`` alone. ConfigError for environment variables that wandb refuses.
    """

    def __init__(self, config: RunConfig, folder: RunFolder):
        self.folder, self._run = folder, None
        if config.wandb == "off":
            return
        import wandb

        try:
            os.environ.setdefault("WANDB_SILENT", "true")
            self._run = wandb.init(project="cosmos_ray", name=config.name, dir=str(folder.path), mode=config.wandb,
                                   config=dataclasses.asdict(config), settings=wandb.Settings(init_timeout=30))
        except (wandb.errors.Error, OSError) as error:
            logger.warning("wandb is not available (%s): metrics are kept in %s only", error, folder.path / "metrics.jsonl")
        except ValueError as error:  # of pydantic, over several lines
            raise ConfigError(f"wandb refuses what a WANDB_ variable says ({' '.join(str(error).split())[:200]}): mend or unset it, or "
                              "leave --wandb out") from error

    def log(self, stage: str, **values: Any) -> None:
        """Record one row of metrics."""
        self.folder.record(stage, **values)
        if self._run is not None:
            self._guarded(self._run.log, {f"{stage}/{k}": v for k, v in values.items() if isinstance(v, (int, float))})

    def close(self) -> None:
        """Finish the wandb run, if there is one."""
        if self._run is not None:
            self._guarded(self._run.finish)

    def _guarded(self, call: Callable[..., Any], *arguments: Any) -> None:
        import wandb

        try:
            call(*arguments)
        except (wandb.errors.Error, OSError) as error:
            logger.warning("wandb stopped working (%s): metrics go on in %s only", error, self.folder.path / "metrics.jsonl")
            self._run = None
