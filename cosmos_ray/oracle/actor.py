"""The Ray shell around :class:`OracleCore`."""

from __future__ import annotations

from typing import Any

import ray

from cosmos_ray.config import RunConfig


@ray.remote(max_restarts=3, max_task_retries=3)
class OracleActor:
    """One process with a simulator and a policy. Its answers depend on nothing but what is asked, so a lost one is asked again."""

    def __init__(self, config: RunConfig, checkpoint: str, critic: str = ""):
        self._config, self._checkpoint, self._critic, self._core = config, checkpoint, critic, None

    def play(self, arm: str, indices: list[int]) -> list[dict[str, Any]]:
        """See :meth:`OracleCore.play`."""
        return self._made().play(arm, indices)

    def probe(self, indices: list[int]) -> list[dict[str, Any]]:
        """See :meth:`OracleCore.probe`."""
        return self._made().probe(indices)

    def _made(self):
        if self._core is None:
            import torch

            from cosmos_ray.oracle.core import OracleCore

            torch.set_num_threads(self._config.inference.threads)
            self._core = OracleCore(self._config, self._checkpoint, self._critic)
        return self._core
