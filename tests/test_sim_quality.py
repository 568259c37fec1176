"""Render quality: "full" is robosuite's own renderer, "fast" is not, and a store or a run never mixes the two unnoticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.config.settings import changed, given, new_config
from cosmos_ray.config.tasks import task_spec
from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.fit import check_fits
from cosmos_ray.replay import Episode, EpisodeKey, ReplayStore
from cosmos_ray.replay.sampling.demonstrated import demonstrated
from cosmos_ray.seeds import state_seed
from cosmos_ray.sim import shared_renderer
from cosmos_ray.sim.culling import Culling, Pass
from cosmos_ray.sim.embodiment import simulated
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.resimulate import config_from_fingerprint, make_seed_of
from cosmos_ray.sim.simulation import start

TASKS = ("Lift", "Door", "Wipe")
SIZE = 256

_ROBOSUITE = """
import sys
import numpy as np
from cosmos_ray.sim import gl
_, robosuite = gl.load()
folder, size, cameras, tasks = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(","), sys.argv[4:]
for task in tasks:
    env = robosuite.make(task, robots="Panda", has_renderer=False, has_offscreen_renderer=True, use_camera_obs=True, camera_names=cameras,
                         camera_heights=size, camera_widths=size, hard_reset=False, seed=0)
    env.reset()
    pose = np.load(f"{folder}/{task}.npz")
    model, data = env.sim.model._model, env.sim.data._data
    model.body_pos[:], model.body_quat[:], data.qpos[:] = pose["body_pos"], pose["body_quat"], pose["qpos"]
    env.sim.forward()
    pictures = [env.sim.render(camera_name=camera, width=size, height=size)[::-1] for camera in cameras]
    np.save(f"{folder}/{task}.npy", np.stack(pictures))
"""


@pytest.fixture(scope="module")
def environments():
    made = {task: Environment(SimConfig(task=task, image_size=SIZE, quality="full")) for task in TASKS}
    yield made
    for env in made.values():
        env.close()


def acted(env: Environment, seed: int, steps: int = 8) -> Environment:
    env.reset(seed)
    for action in np.random.default_rng(seed).uniform(-1, 1, (steps, env.action_dim)):
        env.step(action)
    return env


def test_full_quality_is_robosuites_own_pixel_for_pixel(environments, tmp_path):
    ours = {}
    for task, env in environments.items():
        ours[task] = acted(env, 3).render()
        np.savez(tmp_path / f"{task}.npz", body_pos=env.model.body_pos, body_quat=env.model.body_quat, qpos=env.data.qpos)
    subprocess.run([sys.executable, "-c", _ROBOSUITE, str(tmp_path), str(SIZE), ",".join(environments["Lift"].cameras), *TASKS],
                   check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})
    for task, pictures in ours.items():
        theirs = np.load(tmp_path / f"{task}.npy").astype(int)
        assert theirs.std() > 10 and np.abs(theirs - pictures).mean() <= 0.01, task


@pytest.mark.parametrize("task", ["libero_spatial/0", "libero_object/0"])
def test_liberos_first_frames_are_those_that_its_authors_see(task):
    """The frames were recorded where LIBERO's published results were made, robosuite 1.4.0 with MuJoCo 3.3.2, before objects settle."""
    env, data = Environment(SimConfig(task=task)), Path(__file__).parent / "data" / "libero"
    env.reset(state_seed("eval", 7, 0))
    state = env.state()
    with np.load(data / "first_frames.npz") as recorded, np.load(data / "parity.npz") as moves:
        state[1 : 1 + env.model.nq] = moves[f"{task}/qpos"][0]
        assert np.abs(env.render_state(state).astype(int) - recorded[task]).mean() <= 0.01
    env.close()


@pytest.mark.parametrize("task", [*TASKS, "NutAssemblySquare", "libero_goal/3"])
def test_what_is_left_out_at_full_quality_changes_no_pixel(environments, task, monkeypatch):
    """Lift and its like have a floor that mirrors faintly, the nuts mirror and must not once there is a floor, and so does a stove."""
    env = environments.get(task) or Environment(SimConfig(task=task, image_size=SIZE, quality="full"))
    for seed in (5, 6):
        culled = acted(env, seed, 20).render()
        if task == "libero_goal/3":  # a floor that mirrors shows nearly everything
            renderer = env._shared.get()
            passes = [renderer.culling.passes(renderer.data, camera, SIZE) for camera in env._camera_ids]
            assert passes[0][0].geoms.mean() < 0.9 and 2 in map(len, passes), "the mirror's part is drawn by itself"

        def everything(self: Culling, data: object, camera: int, pixels: int) -> list[Pass]:
            mirror = next((int(self.model.geom_matid[geom]) for geom in self.mirrors), -1)
            return [Pass(np.ones(self.model.ngeom, bool), mirror)]

        with monkeypatch.context() as patched:
            patched.setattr(Culling, "passes", everything)
            assert np.array_equal(env.render(), culled)
    if task not in environments:
        env.close()


def test_renderers_of_a_process_are_capped_and_made_again(environments, monkeypatch):
    one, other = environments["Lift"], environments["Door"]
    first, second = acted(one, 3).render(), acted(other, 3).render()
    monkeypatch.setattr(shared_renderer, "MOST_MB", one._shared.get().megabytes * 1.5)
    for shared in shared_renderer._shared.values():
        shared._renderer = None
    for _ in range(2):
        for env, picture in ((one, first), (other, second)):
            assert np.array_equal(env.render(), picture)
            held = [shared for shared in shared_renderer._shared.values() if shared._renderer is not None]
            assert env._shared in held and sum(shared._megabytes for shared in held) <= shared_renderer.MOST_MB


def test_fast_frames_are_other_frames(environments):
    env = acted(environments["Lift"], 3)
    fast = Environment(SimConfig(image_size=SIZE))
    fast.restore(env.state())
    assert 0.5 < np.abs(fast.render().astype(int) - env.render()).mean() < 12
    fast.close()


def test_the_fingerprint_has_the_quality(environments):
    env = environments["Door"]
    again = config_from_fingerprint(env.fingerprint)
    assert (again.quality, again.mesh_cell) == ("full", 0.0) and make_seed_of(env.fingerprint) == 0
    old = env.fingerprint | {"render": "64px cell 0.008 no-shadow no-reflection no-msaa"}
    assert (config_from_fingerprint(old).quality, config_from_fingerprint(old).mesh_cell) == ("fast", 0.008)


def test_the_quality_follows_the_task_and_the_suite_and_meshes_follow_the_quality():
    assert (SimConfig().quality, SimConfig().mesh_cell) == ("fast", 0.008) == (task_spec("Lift").quality, SimConfig().mesh_cell)
    assert (SimConfig(quality="full").mesh_cell, SimConfig(quality="full", mesh_cell=0.002).mesh_cell) == (0.0, 0.002)
    released = new_config({"model.suite": "libero"})
    assert (released.sim.quality, released.sim.mesh_cell) == ("full", 0.0)
    full = changed(new_config({"sim.task": ""}), {"sim.quality": "full"})
    assert (full.sim.quality, full.sim.mesh_cell) == ("full", 0.0) and new_config(given(full)) == full
    door = changed(full, {"sim.task": "Door"})
    assert (door.sim.quality, door.sim.mesh_cell) == ("full", 0.0), "it was given"


def demonstration(env: Environment, seed: int) -> Episode:
    trajectory = start(env, seed)
    env.execute(np.zeros((2, env.action_dim)), trajectory, (1, 2))
    trajectory.success = True
    return Episode.from_trajectory(trajectory, EpisodeKey("run", env.task, "demo", seed), policy_version=-1,
                                   info={"fingerprint": env.fingerprint})


def test_a_store_of_both_qualities_is_refused(tmp_path):
    store = ReplayStore(tmp_path / "store")
    for seed, quality in enumerate(("fast", "full")):
        env = Environment(SimConfig(quality=quality))
        store.commit(demonstration(env, seed))
        env.close()
        if not seed:
            assert demonstrated(store).embodiment.quality == "fast"
    with pytest.raises(StoreError, match="has fast render quality, .* has full: .* one render quality") as caught:
        demonstrated(store)
    assert "\n" not in str(caught.value)


def test_demonstrations_of_one_quality_do_not_go_with_a_simulation_of_the_other():
    with pytest.raises(ConfigError, match="of fast render quality cannot be used in a simulation of full render quality"):
        check_fits("the demonstrations", simulated(SimConfig()), SimConfig(quality="full"))
