"""Renders the frames of a stored episode from its simulator states, so that an episode need not store every frame."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from cosmos_ray.config import SimConfig
from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.replay.format.codec import decode_jpeg, encode_cameras
from cosmos_ray.replay.format.episode import Episode
from cosmos_ray.sim.make import make
from cosmos_ray.sim.resimulate import compare_fingerprints, config_from_fingerprint, make_seed_of, stored_fingerprint
from cosmos_ray.sim.simulation import Simulation

if TYPE_CHECKING:
    from cosmos_ray.replay.format.view import EpisodeView

DECISIVE = ("task", "robots", "robosuite", "mujoco", "model", "cameras", "render", "gl")
"""Fingerprint entries that decide what a state looks like."""



class StateRenderer:
    """Renders states of stored episodes as JPEG, byte for byte as the store keeps the frames of a live episode.

    Call it as ``renderer(view, steps)``. The first use of a configuration makes an environment (about two seconds); the renderer keeps the
    ``environments`` used last. Like every renderer of this package, it belongs to the thread that renders first.

    ``strict`` refuses an episode whose pictures may differ here. There are two checks. The decisive entries of the fingerprint must be
    equal: task, robots, model, cameras, picture size, versions of MuJoCo and robosuite, OpenGL backend. And a stored frame of the first
    episode of each fingerprint must come out byte for byte; another graphics driver fails this. Without ``strict`` there is no check.
    """

    def __init__(self, strict: bool = True, environments: int = 4):
        if environments < 1:
            raise ConfigError(f"environments = {environments}: a state renderer needs at least 1")
        self.strict, self.limit = strict, environments
        self._environments: OrderedDict[tuple[SimConfig, int], Simulation] = OrderedDict()
        self._proven: set[tuple] = set()  # fingerprints of which a stored frame came out the same

    def __call__(self, view: EpisodeView | Episode, steps: Iterable[int]) -> dict[int, list[bytes]]:
        """:meth:`render`."""
        return self.render(view, steps)

    def render(self, view: EpisodeView | Episode, steps: Iterable[int]) -> dict[int, list[bytes]]:
        """One JPEG per camera, in the order of ``view.cameras``, for each of ``steps`` (0..T).

        Raises:
            StoreError: this machine cannot render the episode (the message says why), or the episode has no such step.
            SimulationError: no OpenGL backend works, or the call is from another thread than the first call.
        """
        steps = [int(step) for step in steps]
        name, info, states = _parts(view)
        for step in steps:
            if not 0 <= step <= view.length:
                raise StoreError(f"episode {name} has no step {step}: its steps are 0..{view.length}")
        env = self.simulation(view)
        if self.strict:
            self._compare(view, name, stored_fingerprint(info, name), states, env)
        # Copied, because a view's rows are read-only, which MuJoCo's bindings refuse.
        return {step: encode_cameras(env.render_state(states[step].copy())) for step in steps}

    def simulation(self, view: EpisodeView | Episode) -> Simulation:
        """The environment that restores the episode's states, until another episode is asked for. StoreError as :meth:`render`."""
        name, info, states = _parts(view)
        try:
            fingerprint = stored_fingerprint(info, name)
            env = self._environment(config_from_fingerprint(fingerprint, name), make_seed_of(fingerprint, name))
        except ConfigError as error:
            raise StoreError(f"cannot render from states: {error}") from error
        self._check(name, view.cameras, states, env)
        return env

    def close(self) -> None:
        """Release the simulators. The next call makes new ones."""
        while self._environments:
            self._environments.popitem()[1].close()
        self._proven.clear()

    def _environment(self, config: SimConfig, make_seed: int) -> Simulation:
        key = config, make_seed
        env = self._environments.get(key)
        if env is None:
            env = self._environments[key] = make(config, make_seed)
        self._environments.move_to_end(key)
        while len(self._environments) > self.limit:
            self._environments.popitem(last=False)[1].close()
        return env

    def _check(self, name: str, cameras: tuple[str, ...], states: np.ndarray, env: Simulation) -> None:
        """StoreError when the episode cannot be rendered by ``env``, strictly or not."""
        if not env.restorable:
            raise StoreError(f"episode {name} cannot be rendered from its states: {env.task} has none that can be restored")
        if cameras != env.cameras:
            raise StoreError(
                f"episode {name} stores cameras {', '.join(cameras)} but was simulated with {', '.join(env.cameras)}: it cannot be "
                "rendered from its states"
            )
        if states.shape[1] != env.state_dim:
            raise StoreError(
                f"episode {name} has {states.shape[1]} numbers per state, the environment of {env.task} here {env.state_dim}: it was "
                "recorded with another task, robot or version, and cannot be rendered"
            )

    def _compare(self, view: EpisodeView | Episode, name: str, fingerprint: dict[str, str], states: np.ndarray, env: Simulation) -> None:
        """StoreError when the fingerprint, or a stored frame of the first episode that has it, says that pictures differ here."""
        simulated = env.config, *(fingerprint.get(entry) for entry in (*DECISIVE, "make_seed"))
        if simulated in self._proven:
            return
        differing = [item for item in compare_fingerprints(fingerprint, env.fingerprint)[0].items() if item[0] in DECISIVE]
        if differing:
            text = ", ".join(f"{entry} was {stored}, here {here}" for entry, (stored, here) in differing)
            raise StoreError(
                f"episode {name} would look different rendered here ({text}): render it where it was recorded, or not strictly"
            )
        episode = view if isinstance(view, Episode) else view.episode()  # a copy of it all, but once per fingerprint
        if not episode.frames:
            return
        step, stored = min(episode.frames.items())
        made = encode_cameras(env.render_state(states[step].copy()))
        if made != stored:
            changed = max(_changed(a, b) for a, b in zip(made, stored, strict=True))
            raise StoreError(
                f"episode {name} looks different rendered here: at step {step}, {100 * changed:.2g} % of the pixels differ from the stored "
                "frame (another graphics driver?); render it where it was recorded, or not strictly"
            )
        self._proven.add(simulated)


def _changed(made: bytes, stored: bytes) -> float:
    """Share of pixels that differ between two JPEGs."""
    left, right = decode_jpeg(made), decode_jpeg(stored)
    return float(np.any(left != right, axis=-1).mean()) if left.shape == right.shape else 1.0


def _parts(view: EpisodeView | Episode) -> tuple[str, dict, np.ndarray]:
    """Name, ``info`` and states (T + 1, S) float64 of an episode in memory or in the store."""
    if isinstance(view, Episode):
        return view.key.name, view.info, view.states
    return view.summary.name, view.header.get("info") or {}, view.column("state")
