"""Continual refinement in rounds: the learner trains on demonstrations and rollouts while workers act with its newest weights.

:class:`_RefineLoop` is the driver's event loop. Three things happen at once: the learner trains a burst of steps, the workers run
episodes against the pool, and the pool serves the weights that were pushed last.
"""

from __future__ import annotations

import dataclasses

from cosmos_ray.asks import learner_ask
from cosmos_ray.config import LearnerConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.inference.pool import InferencePool
from cosmos_ray.learner.group import LearnerGroup
from cosmos_ray.learner.mixture import Mixture
from cosmos_ray.model.checkpoint import read_description
from cosmos_ray.replay.sampling.limiter import SamplesPerInsert, resume_counters, steps_stored
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.rollout.fleet import Fleet
from cosmos_ray.rollout.ticket import EpisodeTicket, own_rollouts
from cosmos_ray.rounds import Rounds
from cosmos_ray.run import Run
from cosmos_ray.stages.acting import acting_fleet
from cosmos_ray.stages.rollout import act, forget_old_rollouts
from cosmos_ray.stages.round import Round
from cosmos_ray.stages.training import start_learner, train_alone

BURST = 10  #: learner steps per call: short, so that pacing and pushes are prompt


def refine(run: Run, from_round: int | None = None) -> dict:
    """Train checkpoint ``refined`` from ``base`` in ``config.rounds`` rounds. Continues an interrupted refinement.

    Every round after the first starts with rollouts of the policy that the round before trained, and trains that policy on. With
    ``from_round``, the rounds after that one are left and trained anew. The same call continues what it began.
    """
    if not run.folder.has_policy("base"):
        raise ConfigError("there is no base policy to refine: run `pretrain` first")
    base_version = read_description(run.folder.checkpoint("base"))[1]
    rounds = [Round(run, number, base_version) for number in range(1, run.config.rounds + 1)]
    Rounds(run.folder).settle(base_version)
    if from_round is not None:
        _go_back(rounds, from_round)
    results = []
    for round in rounds:
        if not round.done("refined", run.config.refine_steps):
            results.append(_refine_round(round))
            round.end()
    train_planning_network(rounds[-1])  # again, for more steps than it had
    rounds[-1].end()
    if not results:
        return {"steps": run.config.refine_steps, "new": 0, "version": read_description(run.folder.checkpoint("refined"))[1]}
    return {**results[-1], "new": sum(result["new"] for result in results)}


def _go_back(rounds: list[Round], from_round: int) -> None:
    """Have the rounds after ``from_round`` trained anew, unless that is under way. ConfigError when it cannot be."""
    run, base_version, kept = rounds[0].run, rounds[0].base_version, Rounds(rounds[0].run.folder)
    if from_round >= len(rounds):
        raise ConfigError(f"--from-round {from_round} leaves no round to train with --rounds {len(rounds)}: give --rounds {from_round + 1} "
                          "or more")
    if from_round not in kept.numbers():
        kept.networks(from_round)  # says which rounds there are
        raise ConfigError(f"round {from_round} was trained from another base policy than the present one: `evaluate` and `plan` take it, "
                          "`refine` cannot go on from it")
    newest, line_from = kept.behind("refined", base_version), kept.present(base_version).from_round
    done = all(round.done("refined", run.config.refine_steps) for round in rounds)
    if newest > from_round and (done or line_from != from_round):
        run.tracker.log("from_round", round=from_round, newest=newest)
        kept.go_back(from_round, base_version)


def _refine_round(round: Round) -> dict:
    """Rollouts, planning network and policy of a round. The rollouts of the first round come from `rollout`."""
    run, config = round.run, round.run.config
    round.begin()
    start = run.folder.checkpoint(round.start("refined"))
    before, beside = round.tickets()
    if round.number > 1:
        act(run, run.of_round("rollout", round.number), start, before)
    train_planning_network(round)
    store = run.folder.store()
    stored = own_rollouts(store, run.folder.identity.key, config.sim.names)
    if not acted(run) and not config.refine_rollouts:
        raise ConfigError("there is no rollout to refine on: run `rollout` first, or set --refine-rollouts" if config.sim.names else
                          "there is no rollout to refine on, and no simulation to collect one in: `replay import` rollouts first")
    mixture = Mixture.refinement(config.learner, config.replay)
    planning = "planning" if config.learner.advantage_temperature else ""
    if not config.sim.names:  # nobody acts: on the stored rollouts alone
        learner = start_learner(run, schedule(config.learner), round.state("refined"), round.start("refined"), mixture,
                                config.learner.refine_lr, config.refine_steps, planning=planning)
        done = train_alone(run, "refine", learner, config.refine_steps, "refined", round.description())
        return {**done, "version": read_description(run.folder.checkpoint("refined"))[1]}
    with acting_fleet(run, start, learner_ask(config.learner)) as (pool, fleet):
        learner = start_learner(run, schedule(config.learner), round.state("refined"), round.start("refined"), mixture,
                                config.learner.refine_lr, config.refine_steps, planning=planning)
        loop: _RefineLoop | None = None
        try:
            learner.start(meanwhile=lambda: (fleet.poll(0.1), pool.poll()))
            loop = _RefineLoop(round, beside, pool, fleet, learner,
                               mean_length=sum(s.length for s in stored) / len(stored) if stored else 50.0)
            result = loop.run_to_end()
            run.folder.fetch(run.folder.checkpoint("refined"))
        except KeyboardInterrupt:
            if (step := learner.save_now()) is not None and loop is not None:
                loop.note_point(step)
            raise
        finally:
            learner.close()
    run.tracker.log("refine_result", round=round.number, **result)
    forget_old_rollouts(run, run.folder.store())
    return result


def train_planning_network(round: Round) -> None:
    """Train checkpoint ``planning`` for ``config.planning_steps`` steps; the paper, too, keeps a planning model beside the policy.

    Training starts from ``base`` in the first round and from the last round's planning network later. Continues an interrupted training.
    """
    run, config, total = round.run, round.run.config, round.run.config.planning_steps
    if not total or round.done("planning", total):
        return
    if not acted(run):
        raise ConfigError("there is no rollout to train the planning network on: run `rollout` first")
    mixture = Mixture.for_planning_network(config.learner, config.replay)
    learner = start_learner(run, schedule(config.learner), round.state("planning"), round.start("planning"), mixture,
                            config.learner.refine_lr, total, world_weight=config.learner.planning_world_weight)
    train_alone(run, "planning", learner, total, "planning", round.description())


def schedule(learner: LearnerConfig) -> LearnerConfig:
    """The settings with the warm-up and cycle of refinement."""
    return dataclasses.replace(learner, warmup=learner.refine_warmup, cycle=learner.refine_cycle)


def acted(run: Run) -> bool:
    """Whether the store holds a policy's rollout on the run's tasks, on any task where the run has no simulation."""
    tasks = run.config.sim.names
    return any(s.of_policy and (not tasks or s.task in tasks) for s in run.folder.store().summaries())


class _RefineLoop:
    """A round's event loop.

    Args:
        tickets: rollouts to run beside training.
        mean_length: expected episode length in control steps, for pacing.
    """

    def __init__(self, round: Round, tickets: list[EpisodeTicket], pool: InferencePool, fleet: Fleet, learner: LearnerGroup,
                 mean_length: float):
        self.run, self.config, self.pool, self.fleet, self.learner = round.run, round.run.config, pool, fleet, learner
        self.round, self.number, self.version = round, round.number, round.version
        self.published = self.exported = False  #: the weights of the learner's present step; the refined policy
        self.metrics: dict[str, float] = {}
        self.finished: list = []
        self.first_step = self.sampled_to = learner.step  #: where training began; up to which step the limiter counts windows
        self.state, self.batch = learner.folder.name, self.config.learner.batch_size
        self.running: set[str] = set()  # names of the tickets that were handed out and have not finished
        store = self.run.folder.store()
        self.keys = [t.key for t in tickets]
        self.to_run = [t for t in tickets if t.key.name not in store and t.key not in self.run.quarantine]
        self.to_run.reverse()
        self.planned = len(self.to_run)
        self.stored = steps_stored(store, [t.key.name for t in tickets])
        self.known = sum(key.name in store for key in self.keys)  # episodes of this refinement in the store
        self._say_where(self._acknowledge([t.key.name for t in tickets], store))
        point = self.run.folder.manifest.point(self.state, learner.step)
        self.account = resume_counters(point if point and "inserted" in point else None, self.stored, learner.step, self.batch)
        self.limiter = self._make_limiter(mean_length)
        self.mean_length = mean_length
        self.note_point(learner.step)

    def run_to_end(self) -> dict:
        """Loop until the learner has done its steps and the running episodes are over, and the refined policy is written."""
        progress = self.run.progress(self.run.of_round("refine", self.number), self.config.refine_steps, self.learner.step, "steps")
        self.published = self.learner.step == 0
        while not self.exported:
            if self.learner.step < self.config.refine_steps:
                self._feed_fleet()
            self._drive_learner()
            self._take(self.fleet.poll(timeout=0.1))
            self.run.quarantine.take(self.fleet.quarantined, self.keys)
            self.running -= self.fleet.quarantined.keys()
            self.pool.poll()
            progress.update(self.learner.step, self._note())
        progress.finish(self.learner.step, self._note())
        return {"steps": self.learner.step, "new": self.learner.step - self.first_step, "version": self.version,
                "episodes": len(self.finished), "successes": sum(e.success for e in self.finished), "loss": self.metrics.get("loss"),
                "workers_replaced": self.fleet.replaced, "quarantined": len(self.fleet.quarantined),
                "inference_restarts": self.pool.restarts, "learner_restarts": self.learner.restarts}

    # ---------------------------------------------------------------- the three activities

    def _feed_fleet(self) -> None:
        """Hand out episodes as far as the limiter of samples per insert allows."""
        while self.to_run and self.fleet.outstanding < self.fleet.capacity:
            ahead = int(self.mean_length * (self.fleet.outstanding + 1))
            if self.limiter is not None and not self.limiter.can_insert(ahead):
                break
            ticket = self.to_run.pop()
            self.running.add(ticket.key.name)
            self.fleet.submit([ticket])

    def _drive_learner(self) -> None:
        """Take what the learner has done; publish and save when due, and begin a burst when the limiter allows one.

        A learner that had to be restarted goes on from an earlier step. The limiter then takes back the windows of the steps since, and
        the pool gets the weights of that step: it acts with what the learner goes on from.
        """
        learner, config = self.learner, self.config
        idle = not self.fleet.outstanding  # then nothing else in the loop waits
        for kind, value in learner.poll(0.1 if idle and learner.busy else 0.0):
            if kind == "start":
                self._count_windows(value)
                self.published = value == 0
                self.run.tracker.log("resume", what="refine", round=self.number, step=value)
            elif kind == "train":
                self.metrics = value
                self.run.tracker.log("refine", **value, round=self.number, version=self.version, episodes=len(self.finished))
                self.published = learner.step % config.publish_every != 0 and learner.step < config.refine_steps
            elif kind == "publish":
                self.version = value.version
                self.pool.push(value)
            elif kind == "save":
                self.note_point(value)
            elif kind == "export":
                self.exported = True
        if not learner.started or learner.training:
            return
        if not self.published:
            self.published = True
            learner.publish(self.run.folder.next_version())
        if learner.save_due(config.learner.checkpoint_every):
            learner.save()
        if learner.step < config.refine_steps:
            burst = min(BURST, config.refine_steps - learner.step, -learner.step % config.publish_every or BURST)
            starved = self.limiter is not None and not self.limiter.can_sample(burst * self.batch)
            if not starved or not (self.to_run or self.fleet.outstanding):
                learner.train(burst)
                self._count_windows(learner.step + burst)
        elif not learner.busy and not self.fleet.outstanding and not self.exported:
            learner.export(self.run.folder.checkpoint("refined"), self.version, {"stage": "refine", **self.round.description()})

    def _count_windows(self, step: int) -> None:
        """Have the limiter count the windows of the steps up to ``step``, no more and no fewer."""
        if self.limiter is not None:
            self.limiter.count_sample((step - self.sampled_to) * self.batch)
        self.sampled_to = step

    def _take(self, episodes: list) -> None:
        for episode in episodes:
            self.finished.append(episode)
            self.running.discard(episode.name)
            self.known, self.stored = self.known + 1, self.stored + episode.length
            if self.limiter is not None:
                self.limiter.count_insert(episode.length)
            self.run.tracker.log("refine_episode", success=int(episode.success), length=episode.length, version=episode.policy_version,
                                 step=self.learner.step, name=episode.name)

    def _make_limiter(self, mean_length: float) -> SamplesPerInsert | None:
        """The limiter, or None when there is nothing to collect. For a ratio of 0 the limiter paces learning and collecting so that both
        end together."""
        config, batch = self.config, self.batch
        if not self.to_run:
            return None
        expected = self.account["inserted"] + self.planned * mean_length
        windows = self.account["sampled"] + (config.refine_steps - self.learner.step) * batch
        ratio = config.replay.samples_per_insert or max(windows / expected, 1e-3)
        horizon = 2 * mean_length * self.fleet.capacity
        limiter = SamplesPerInsert(ratio, min_inserts=1, error_buffer=max(ratio * horizon + BURST * batch, 1.0))
        limiter.load_state_dict(self.account)
        return limiter

    def note_point(self, step: int) -> None:
        """Note in the manifest what a resume from the learner's state of ``step`` needs."""
        account = resume_counters(self.account, self.stored, step, self.batch)
        self.run.folder.manifest.saved(self.state, stage="refine", round=self.number, episodes=self.known, tickets=sorted(self.running),
                                       **account)

    def _acknowledge(self, names: list[str], store: ReplayStore) -> int:
        """Log the episodes that were committed while nobody counted them, because the driver was killed; returns how many."""
        counted = {row.get("name") for row in self.run.folder.metrics("refine_episode")}
        summaries = {s.name: s for s in store.summaries()}
        late = [summaries[name] for name in names if name in summaries and name not in counted]
        for s in late:
            self.run.tracker.log("refine_episode", success=int(s.success), length=s.length, version=s.policy_version,
                                 step=self.learner.step, name=s.name, late=True)
        return len(late)

    def _say_where(self, late: int) -> None:
        point = self.run.folder.manifest.point(self.state, self.learner.step) or {}
        again = [name for name in point.get("tickets", []) if name in {t.key.name for t in self.to_run}]
        parts = [f"{self.known - point['episodes']} episodes stored since" if "episodes" in point else f"{self.known} episodes stored"]
        parts += [f"{late} of them not counted before"] if late else []
        parts += [f"{len(again)} that were running start again, such as {again[0]}"] if again else []
        self.run.goes_on("refine", self.number, self.state, self.learner.step, self.config.refine_steps, "".join(f", {p}" for p in parts))

    def _note(self) -> str:
        wins = sum(e.success for e in self.finished)
        loss = f"loss {self.metrics['loss']:.3f}  " if "loss" in self.metrics else ""
        return f"{loss}version {self.version}  episodes {len(self.finished)}/{self.planned} ({wins} succeeded)"
