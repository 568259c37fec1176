"""Settings of the simulator."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

from cosmos_ray.config.libero import LIBERO_IMAGE_SIZE, libero_task
from cosmos_ray.config.option import fill, option
from cosmos_ray.config.tasks import GYM, ActionSpace, Quality, TaskSuite, suite_tasks, task_instruction, task_spec
from cosmos_ray.errors import ConfigError


@dataclass(frozen=True)
class SimConfig:
    """Which environments of robosuite or LIBERO run, and what is seen of them: one ``task``, or the ``tasks`` of a ``suite``.

    ``horizon``, ``actions``, ``instruction`` and ``quality`` are the task's own unless they are given, ``mesh_cell`` is the quality's.
    ``dataclasses.replace`` keeps them when it changes the task: make a new object instead. With a suite, ``task`` is empty, ``horizon`` 0
    and ``instruction`` empty, which stand for each task's own. What builds an environment takes a config of one task: :meth:`each`.
    """

    task: str = option("Lift", "task of robosuite, of LIBERO as libero_spatial/3, or of gymnasium as gym:ID or gym:MODULE:ID; Lift, "
                       "Stack, PickPlaceCan, NutAssemblySquare, Door, libero_spatial and libero_object have scripted experts. Empty = no "
                       "simulation, as in a run of imported demonstrations that name no task")
    suite: TaskSuite = option("", "suite of tasks that the run holds instead of one sim.task; 'robosuite' has the five tasks with a "
                              "scripted expert")
    tasks: tuple[str, ...] = option((), "tasks of sim.suite, empty = all; names for robosuite, numbers for LIBERO")
    robots: tuple[str, ...] = option(None, "robot arms by robosuite name; two-arm tasks need two", follows="sim.task", rare=True)
    controller: str = option("OSC_POSE", "robosuite part controller of the arms: OSC_POSE, OSC_POSITION, IK_POSE, JOINT_POSITION or "
                             "JOINT_TORQUE", rare=True)
    wrist_cameras: tuple[str, ...] = option(None, "wrist cameras; their order is that of the latent frames", follows="sim.task")
    third_cameras: tuple[str, ...] = option(None, "third-person cameras; their order is that of the latent frames", follows="sim.task")
    image_size: int = option(None, "height and width of a rendered and stored frame in pixels; the network sees it at model.image_size",
                             low=16, high=1024, follows="model.image_size")
    actions: ActionSpace = option(None, "action space, 'position' or 'pose'; 'position' is (dx, dy, dz, gripper), 'pose' adds the "
                                  "rotation", follows="sim.task")
    horizon: int = option(None, "control steps before an episode times out; 0 with sim.suite = each task's own", low=0,
                          follows="sim.task")
    control_freq: int = option(20, "control steps per simulated second", low=1, high=500, rare=True)
    instruction: str = option(None, "instruction that the policy is given", follows="sim.task", rare=True)
    expert: str = option("", "MODULE:FUNCTION of your own expert for demonstrations; empty = the task's scripted one", rare=True)
    placement: float = option(0.0, "half-width of object placement in m, 0 = robosuite's; the initial place of an object is drawn "
                              "within it", low=0, high=0.3)
    quality: Quality = option(None, "render quality, 'fast' or 'full'; 'full' is robosuite's own, with shadows, reflections and 4 samples "
                              "a pixel, as released policies know it. A store holds frames of one quality", follows="sim.task")
    mesh_cell: float = option(None, "vertex-clustering cell of rendered meshes in m, 0 = none; larger cells render faster",
                              low=0, high=0.05, follows="sim.quality", rare=True)
    fast_step: bool = option(True, "fuse the substeps of OSC; about 3x faster, and robosuite's own steps where the fused ones are not "
                             "valid", rare=True)

    def __post_init__(self):
        if self.suite and self.task not in ("", SimConfig.task):
            raise ConfigError(f"sim.suite = {self.suite!r} and sim.task = {self.task!r} both name tasks: leave one of them out")
        if self.suite:
            object.__setattr__(self, "task", "")
        first, *others = self.names or ("",)
        own = task_spec(first)
        turns = any(task_spec(name).actions == "pose" for name in (first, *others))
        actions = "pose" if turns or self.controller.startswith("JOINT_") else "position"
        image_size = LIBERO_IMAGE_SIZE if libero_task(first) else 64
        fill(self, {"horizon": 0 if self.suite else own.horizon, "actions": actions, "image_size": image_size,
                    "quality": own.quality,
                    "robots": own.robots, "wrist_cameras": own.wrist_cameras, "third_cameras": own.third_cameras})
        fill(self, {"mesh_cell": 0.008 if self.quality == "fast" else 0.0})
        if self.instruction is None:
            fill(self, {"instruction": "" if self.suite else task_instruction(first)})

    @property
    def cameras(self) -> tuple[str, ...]:
        """Every camera in latent-frame order: wrist cameras, then third-person cameras."""
        return tuple(self.wrist_cameras) + tuple(self.third_cameras)

    @property
    def names(self) -> tuple[str, ...]:
        """Every task by its name, in order; none without a simulation. ConfigError for a task that the suite has not."""
        return suite_tasks(self.suite, self.tasks) if self.suite else (self.task,) if self.task else ()

    @property
    def title(self) -> str:
        """The tasks in a word or two, for messages and pages; empty without a simulation."""
        return f"{self.suite} ({len(self.names)} task{'s' * (len(self.names) > 1)})" if self.suite else self.task

    def each(self) -> tuple[SimConfig, ...]:
        """A config of one task for every task, in the order of :attr:`names`; a run without a suite is its own."""
        return _each(self)

    def check(self) -> None:
        """Raise :class:`ConfigError` for settings of the simulator that do not go together."""
        if self.tasks and not self.suite:
            raise ConfigError(f"sim.tasks = {','.join(self.tasks)} are tasks of a suite: give sim.suite, or sim.task for one task")
        if self.suite and self.instruction:
            raise ConfigError(f"sim.instruction = {self.instruction!r} would be that of every task of sim.suite: leave it out")
        if not self.suite and not self.horizon:
            raise ConfigError("sim.horizon = 0 is out of range: it must be at least 1")
        if not self.cameras:
            raise ConfigError("sim.wrist_cameras and sim.third_cameras are both empty: the policy needs at least one camera")
        if len(set(self.cameras)) != len(self.cameras):
            raise ConfigError(f"sim.wrist_cameras and sim.third_cameras name a camera twice: {', '.join(self.cameras)}")
        if libero_task(next(iter(self.names), "")):
            for name, value, only in (("robots", self.robots, ("Panda",)), ("controller", self.controller, "OSC_POSE"),
                                      ("control_freq", self.control_freq, 20), ("placement", self.placement, 0.0)):
                if value != only:
                    raise ConfigError(f"sim.{name} = {_text(value)} does not go with {self.title}: LIBERO's tasks are made for "
                                      f"{_text(only)}")
        if self.task.startswith(GYM):
            usual = SimConfig(task=self.task)
            for name in ("robots", "controller", "actions", "control_freq", "placement", "quality", "mesh_cell", "fast_step"):
                if getattr(self, name) != getattr(usual, name):
                    raise ConfigError(f"sim.{name} is of robosuite and does nothing in {self.task}: leave it out")


def _text(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


@functools.cache
def _each(sim: SimConfig) -> tuple[SimConfig, ...]:
    if not sim.suite:
        return (sim,) if sim.task else ()
    shared = {item.name: getattr(sim, item.name) for item in fields(sim) if item.name not in ("task", "suite", "tasks", "instruction")}
    return tuple(SimConfig(**{**shared, "task": name, "horizon": sim.horizon or None}) for name in sim.names)
