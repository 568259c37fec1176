"""Settings of the simulator."""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_ray.config.libero import LIBERO_IMAGE_SIZE, libero_task
from cosmos_ray.config.option import fill, option
from cosmos_ray.config.tasks import ActionSpace, task_instruction, task_spec
from cosmos_ray.errors import ConfigError


@dataclass(frozen=True)
class SimConfig:
    """Which environment of robosuite or LIBERO runs, and what is seen of it.

    ``horizon``, ``actions`` and ``instruction`` are the task's own unless they are given. ``dataclasses.replace`` keeps them when it
    changes the task: make a new object instead.
    """

    task: str = option("Lift", "task of robosuite, or of LIBERO as libero_spatial/3; Lift, Stack, PickPlaceCan, NutAssemblySquare and Door "
                       "have a scripted expert. Empty = no simulation, as in a run of imported demonstrations that name no task")
    robots: tuple[str, ...] = option(("Panda",), "robot arms by robosuite name; two-arm tasks need two", rare=True)
    controller: str = option("OSC_POSE", "robosuite part controller of the arms: OSC_POSE, OSC_POSITION, IK_POSE, JOINT_POSITION or "
                             "JOINT_TORQUE", rare=True)
    wrist_cameras: tuple[str, ...] = option(("robot0_eye_in_hand",), "wrist cameras; their order is that of the latent frames")
    third_cameras: tuple[str, ...] = option(("agentview",), "third-person cameras; their order is that of the latent frames")
    image_size: int = option(None, "height and width of a rendered and stored frame in pixels; the network sees it at model.image_size",
                             low=16, high=1024, follows="model.image_size")
    actions: ActionSpace = option(None, "action space, 'position' or 'pose'; 'position' is (dx, dy, dz, gripper), 'pose' adds the "
                                  "rotation", follows="sim.task")
    horizon: int = option(None, "control steps before an episode times out", low=1, follows="sim.task")
    control_freq: int = option(20, "control steps per simulated second", low=1, high=500, rare=True)
    instruction: str = option(None, "instruction that the policy is given", follows="sim.task", rare=True)
    placement: float = option(0.0, "half-width of object placement in m, 0 = robosuite's; the initial place of an object is drawn "
                              "within it", low=0, high=0.3)
    mesh_cell: float = option(0.008, "vertex-clustering cell of rendered meshes in m, 0 = none; larger cells render faster",
                              low=0, high=0.05, rare=True)
    fast_step: bool = option(True, "fuse the substeps of OSC; about 3x faster, and robosuite's own steps where the fused ones are not "
                             "valid", rare=True)

    def __post_init__(self):
        own = task_spec(self.task)
        actions = "pose" if self.controller.startswith("JOINT_") else own.actions
        image_size = LIBERO_IMAGE_SIZE if libero_task(self.task) else 64
        fill(self, {"horizon": own.horizon, "actions": actions, "image_size": image_size})
        if self.instruction is None:
            fill(self, {"instruction": task_instruction(self.task)})

    @property
    def cameras(self) -> tuple[str, ...]:
        """Every camera in latent-frame order: wrist cameras, then third-person cameras."""
        return tuple(self.wrist_cameras) + tuple(self.third_cameras)

    def check(self) -> None:
        """Raise :class:`ConfigError` for settings of the simulator that do not go together."""
        if not self.cameras:
            raise ConfigError("sim.wrist_cameras and sim.third_cameras are both empty: the policy needs at least one camera")
        if len(set(self.cameras)) != len(self.cameras):
            raise ConfigError(f"sim.wrist_cameras and sim.third_cameras name a camera twice: {', '.join(self.cameras)}")
        if libero_task(self.task):
            for name, value, only in (("robots", self.robots, ("Panda",)), ("controller", self.controller, "OSC_POSE"),
                                      ("control_freq", self.control_freq, 20), ("placement", self.placement, 0.0)):
                if value != only:
                    raise ConfigError(f"sim.{name} = {_text(value)} does not go with {self.task}: LIBERO's tasks are made for "
                                      f"{_text(only)}")


def _text(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
