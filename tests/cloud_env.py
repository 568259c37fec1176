"""Small gymnasium environments without MuJoCo: their observation is a picture and a vector."""

from __future__ import annotations

import time

import gymnasium
import numpy as np


class Cloud(gymnasium.Env):
    """A dot drifts over the sky; the action pushes it. No state that anybody could restore: where it is stands in a closure."""

    metadata = {"render_modes": [], "render_fps": 10}

    def __init__(self, dice: bool = False):
        self.dice = dice
        self.action_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float64)
        self.observation_space = gymnasium.spaces.Dict({"sky": gymnasium.spaces.Box(0, 255, (24, 24, 3), np.uint8),
                                                        "place": gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        rng = np.random.default_rng(time.time_ns()) if self.dice else self.np_random
        self._walk = self._walking(rng)
        next(self._walk)
        return self._seen(np.zeros(2)), {}

    def step(self, action):
        return self._seen(action), 0.0, False, False, {}

    def _walking(self, rng):
        place = rng.uniform(0, 23, 2)
        action = yield place
        while True:
            place = np.clip(place + 0.5 * action + 0.1 * rng.standard_normal(2), 0, 23)
            action = yield place

    def _seen(self, action):  # (2,)
        place = self._walk.send(np.asarray(action))
        sky = np.zeros((24, 24, 3), np.uint8)
        sky[int(place[0]), int(place[1])] = 255
        return {"sky": sky, "place": place.copy()}


class Told(Cloud):
    """Its action is a dictionary, and its observation has a text, as in RoboCasa."""

    def __init__(self):
        super().__init__()
        half = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float64)
        self.action_space = gymnasium.spaces.Dict({"action.east": half, "action.north": half})
        self.observation_space["said"] = gymnasium.spaces.Text(20)

    def step(self, action):
        return super().step(np.concatenate([action["action.east"], action["action.north"]]))

    def _seen(self, action):
        return {**super()._seen(action), "said": "drift"}


gymnasium.register("tests/Cloud-v0", Cloud)
gymnasium.register("tests/Told-v0", Told)
gymnasium.register("tests/Dice-v0", Cloud, kwargs={"dice": True})
