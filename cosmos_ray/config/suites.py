"""The three suites with released weights: dimensions and evaluation settings of each (method 1.1 to 1.3, 2.7, 5.3)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """The setting of a released checkpoint. The latent layout follows from the cameras alone."""

    wrist_cameras: tuple[str, ...]  #: in latent order
    third_cameras: tuple[str, ...]
    chunk: int  #: actions per chunk K
    open_loop: int  #: how many of them are executed before the next query
    action_dim: int
    proprio_dim: int
    gamma: float  #: discount per control step
    steps: int  #: network evaluations per chunk
    jpeg: bool  #: frames go through JPEG at quality 95
    warmup: int  #: learning-rate warm-up in steps
    cycle: int  #: steps of the first learning-rate cycle
    refine_warmup: int
    refine_cycle: int
    rendered: int  #: pixels a side of the simulator's frames
    image_size: int = 224  #: of the frames that the network sees

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.wrist_cameras + self.third_cameras


SUITES = {
    "libero": Suite(("wrist",), ("primary",), chunk=16, open_loop=16, action_dim=7, proprio_dim=9, gamma=0.99, steps=5, jpeg=True,
                    warmup=1000, cycle=30_000, refine_warmup=1000, refine_cycle=30_000, rendered=256),
    "robocasa": Suite(("wrist",), ("primary", "secondary"), chunk=32, open_loop=16, action_dim=7, proprio_dim=9, gamma=0.99, steps=5,
                      jpeg=True, warmup=1000, cycle=30_000, refine_warmup=1000, refine_cycle=30_000, rendered=224),
    "aloha": Suite(("left_wrist", "right_wrist"), ("primary",), chunk=50, open_loop=50, action_dim=14, proprio_dim=14, gamma=0.998,
                   steps=10, jpeg=False, warmup=2000, cycle=20_000, refine_warmup=1500, refine_cycle=15_000, rendered=224),
}
