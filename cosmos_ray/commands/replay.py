"""``python -m cosmos_ray replay VERB``: list, verify, repair and shrink a replay store, and exchange its episodes."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cosmos_ray.config import RunConfig, SimConfig
from cosmos_ray.config.settings import SETTINGS
from cosmos_ray.config.stored import store_of, stored_config
from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.progress import Progress
from cosmos_ray.replay.exchange.recorded_states import RenderRecorded
from cosmos_ray.replay.format.episode import CLASSES, EpisodeSummary
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.replay.upkeep import retention
from cosmos_ray.uri import is_uri

EXPORTS = ("lerobot", "cosmos", "cosmos-demos", "libero", "aloha", "parquet")
IMPORTS = ("robomimic", "cosmos", "aloha", "lerobot")


@dataclass(frozen=True)
class Verb:
    """One thing to do with a store."""

    help: str
    run: Callable[[argparse.Namespace], tuple[str, int]]  #: returns what to print and the exit code
    options: tuple[tuple[tuple[str, ...], dict], ...] = ()


def add_verbs(parser: argparse.ArgumentParser, parser_class: type) -> None:
    """The verbs, as parsers below ``parser``."""
    verbs: Any = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=parser_class)
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.help, description=verb.help[0].upper() + verb.help[1:] + ".", allow_abbrev=False)
        sub.add_argument("--store", metavar="PATH", help="the store: a folder, or an s3:// or gs:// URI [that of --root and --name]")
        sub.add_argument("--root", default="runs", help="folder that holds runs, or a URI [runs]")
        sub.add_argument("--name", help="run whose store it is; needed unless --store is given")
        sub.add_argument("--quiet", action="store_true", help="no progress lines")
        for flags, keywords in verb.options:
            sub.add_argument(*flags, **keywords)
        if name == "import":
            _add_settings(sub)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """The flags of a new run's settings; the help of the command `import` has their texts."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings of the new run; flags win over it")
    parser.add_argument("--recipe", metavar="NAME", help="settings of a measured table for the new run")
    for name, setting in SETTINGS.items():
        if name not in ("name", "root"):
            parser.add_argument(setting.flag, dest=name, help=argparse.SUPPRESS)
    parser.epilog = "Settings of the new run, such as --model.preset, --model.suite or --sim.task, are flags too: `import --help-all`."


def run_verb(options: argparse.Namespace) -> tuple[str, int]:
    """Do it; what to print and the exit code. StoreError or ConfigError in one line."""
    return VERBS[options.verb].run(options)


# ---------------------------------------------------------------- which store, which episodes


def _root(options: argparse.Namespace) -> str:
    if options.store and options.name:
        raise ConfigError(f"--store {options.store} and --name {options.name} are two stores: give one of them")
    if options.store:
        return options.store
    if not options.name:
        raise ConfigError(f"`replay {options.verb}` needs a store: give --name of a run, or --store")
    if is_uri(options.root):
        from cosmos_ray.bucket_run import fetch_settings

        fetch_settings(options.root, options.name)
    run = stored_config(RunConfig(root=options.root, name=options.name))
    if run is None:
        raise ConfigError(f"there is no run {options.name!r} in {options.root}: give --store, or --root and --name of a run")
    return store_of(run)


def _open(options: argparse.Namespace) -> ReplayStore:
    store = ReplayStore(_root(options), create=False)
    store.update()
    return store


def _load_simulator(options: argparse.Namespace) -> None:
    """Import what the task of the run of --name needs: no stored file decides what is imported."""
    from cosmos_ray.sim.make import load

    if options.name and (run := stored_config(RunConfig(root=options.root, name=options.name))) is not None:
        load(run.sim.task)


def _find(store: ReplayStore, text: str) -> str:
    """The one episode whose name is or contains ``text``. StoreError if there is none or more than one."""
    names = store.keys()
    found = [text] if text in names else [name for name in names if text in name]
    if len(found) == 1:
        return found[0]
    if not found and (record := store.evicted(text)) is not None:
        raise StoreError(f"episode {text} was evicted ({record['reason']}): nothing is left of it but its record")
    if not found:
        raise StoreError(f"{store.root} has no episode {text!r}: `replay ls` lists them")
    raise StoreError(f"{len(found)} episodes of {store.root} match {text!r}, such as {found[0]} and {found[1]}: give more of the name")


def _chosen(store: ReplayStore, options: argparse.Namespace) -> list[EpisodeSummary]:
    """The episodes that --class and --task select, oldest first."""
    known = store.summaries()
    episodes = [s for s in known if (not options.classes or s.episode_class in options.classes)
                and (not options.task or s.task == options.task)]  # fmt: skip
    if not episodes:
        classes, tasks = sorted({s.episode_class for s in known}), sorted({s.task for s in known})
        raise StoreError(f"no episode of {store.root} has the class and task asked for; there are classes "
                         f"{', '.join(classes) or '(none)'} and tasks {', '.join(tasks) or '(none)'}")
    return sorted(episodes, key=lambda s: (s.created, s.name))


def _progress(options: argparse.Namespace, what: str, unit: str) -> Callable[[int, int], None]:
    """A progress line for functions that report (done, total)."""
    line = Progress(what, 1, unit=unit, quiet=options.quiet)  # now: the first unit takes time, too

    def show(done: int, total: int) -> None:
        line.total = max(1, total)
        (line.finish if done >= total else line.update)(done)

    return show


# ---------------------------------------------------------------- the verbs


def _ls(options: argparse.Namespace) -> tuple[str, int]:
    episodes = _chosen(_open(options), options)[-options.last :]
    if options.json:
        return "\n".join(json.dumps(_described(s)) for s in episodes), 0
    width = max(len(s.name) for s in episodes)
    lines = [f"{'episode':<{width}}  {'class':<10} {'steps':>5} {'frames':>6} {'score':>5} {'version':>7} {'MB':>7}  committed"]
    for s in episodes:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(s.created)) if s.created else "?"
        lines.append(f"{s.name:<{width}}  {s.episode_class:<10} {s.length:5d} {len(s.frame_steps):6d} {s.score:5.2f} "
                     f"{s.policy_version:7d} {s.size / 1e6:7.2f}  {when}")
    return "\n".join(lines), 0


def _described(s: EpisodeSummary) -> dict:
    plain = {k: v for k, v in asdict(s).items() if k not in ("key", "frame_ranges")}
    return {**asdict(s.key), **plain, "class": s.episode_class, "frames": len(s.frame_steps)}


def _show(options: argparse.Namespace) -> tuple[str, int]:
    from cosmos_ray.report.episode_strip import save_episode

    store = _open(options)
    name = _find(store, options.episode)
    episode, summary = store.read(name), store.view(name).summary
    target = Path(options.to or f"{name}.png")
    save_episode(episode, target)
    end = "succeeded" if episode.success else "timed out" if episode.timed_out else "failed"
    text = " / ".join(episode.instructions)
    lines = [f"{name}: {text!r}, {end} after {episode.length} steps, {len(episode.frames)} of {episode.length + 1} with "
             "frames",
             f"  in {summary.path}, {summary.size / 1e6:.2f} MB, policy version {episode.policy_version}"]
    if episode.invalid:
        lines.append(f"  invalid: {episode.invalid}")
    lines += [f"  {key}: {_short(value)}" for key, value in episode.info.items()]
    return "\n".join([*lines, f"wrote {target}"]), 0


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _stats(options: argparse.Namespace) -> tuple[str, int]:
    store = _open(options)
    episodes = store.summaries()
    rows: dict[tuple[str, str], Counter] = {}
    for s in episodes:
        row = rows.setdefault((s.task, s.episode_class), Counter())
        row.update(episodes=1, steps=s.length, frames=len(s.frame_steps), bytes=s.size)
    versions = sorted({s.policy_version for s in episodes if s.source == "rollout"})
    total: dict[str, Any] = {"episodes": len(episodes), "steps": sum(s.length for s in episodes), "bytes": sum(s.size for s in episodes),
             "quarantined": len(store.quarantine.entries()), "versions": versions}
    if options.json:
        return json.dumps({**total, "by_task_and_class": [{"task": t, "class": c, **row} for (t, c), row in sorted(rows.items())]}), 0
    lines = [f"{'task':<20} {'class':<10} {'episodes':>8} {'steps':>9} {'frames':>9} {'MB':>10}"]
    lines += [f"{task:<20} {name:<10} {row['episodes']:8d} {row['steps']:9d} {row['frames']:9d} {row['bytes'] / 1e6:10.1f}"
              for (task, name), row in sorted(rows.items())]
    span = f"policy versions {versions[0]} to {versions[-1]}" if versions else "no rollouts"
    return "\n".join([*lines, f"{len(episodes)} episodes, {total['bytes'] / 1e6:.1f} MB; {span}; "
                              f"{total['quarantined']} files were quarantined so far"]), 0


def _verify(options: argparse.Namespace) -> tuple[str, int]:
    from cosmos_ray.replay.upkeep.repair import verify

    store = ReplayStore(_root(options), create=False)
    found = verify(store, decode=options.decode, threads=options.threads, progress=_progress(options, "verify", "files"))
    lines = [f"{p.fault}: {p.path}: {p.reason}" for p in found.problems]
    lines.append(f"{found.episodes} episodes, {found.size / 1e6:.1f} MB read, {len(found.problems)} problems"
                 + (": `replay repair` repairs what it can" if found.problems else "") + f"; {found.quarantined} files in quarantine")
    return "\n".join(lines), 1 if found.problems else 0


def _repair(options: argparse.Namespace) -> tuple[str, int]:
    from cosmos_ray.replay.upkeep.repair import repair

    done = repair(_root(options), threads=options.threads, progress=_progress(options, "repair", "files"))
    lines = [f"quarantined {p.path}: {p.reason}" for p in done.quarantined]
    lines += [f"restored {name}" for name in done.restored]
    lines += [f"salvaged {name} without the frames of {steps} steps" for name, steps in done.salvaged.items()]
    lines.append(f"{len(done.quarantined)} quarantined, {len(done.restored)} restored, {len(done.salvaged)} salvaged, "
                 f"{done.leftovers} files of evicted episodes deleted")
    return "\n".join(lines), 0


def _evict(options: argparse.Namespace) -> tuple[str, int]:
    policy = retention.Retention(tuple(options.keep), options.newest, options.max_staleness,
                                 None if options.max_gb is None else int(options.max_gb * 1e9))
    store = _open(options)
    summaries = store.summaries()
    names = policy.expired(summaries)
    size = sum(s.size for s in summaries if s.name in set(names)) / 1e6
    if options.dry_run:
        return "\n".join([*names, f"{len(names)} of {len(summaries)} episodes, {size:.1f} MB, would be deleted"]), 0
    store.evict(names, f"retention: {asdict(policy)}")
    return f"{len(names)} of {len(summaries)} episodes, {size:.1f} MB, deleted", 0


def _export(options: argparse.Namespace) -> tuple[str, int]:
    from cosmos_ray.replay.exchange.aloha import export_aloha
    from cosmos_ray.replay.exchange.cosmos_demos import export_demonstrations
    from cosmos_ray.replay.exchange.cosmos_hdf5 import export_rollouts
    from cosmos_ray.replay.exchange.lerobot import export_lerobot
    from cosmos_ray.replay.exchange.libero import export_libero
    from cosmos_ray.replay.exchange.parquet import export_parquet

    store = _open(options)
    episodes, progress = _chosen(store, options), _progress(options, "export", "episodes")
    if options.actions and options.format != "libero":
        raise ConfigError(f"--actions is of --format libero alone, and the export is --format {options.format}: leave it out")
    renderer = simulator = None
    if options.render or options.format == "libero":
        from cosmos_ray.sim.state_render import StateRenderer

        _load_simulator(options)
        simulator = StateRenderer()
        renderer = simulator if options.render else None
    if options.format == "lerobot":
        done = export_lerobot(store, episodes, options.to, frames=options.frames, render=renderer, progress=progress)
    elif options.format == "cosmos":
        done = export_rollouts(store, episodes, options.to, render=renderer, progress=progress)
    elif options.format == "cosmos-demos":
        done = export_demonstrations(store, episodes, options.to, suite=options.suite, render=renderer, progress=progress)
    elif simulator is not None and options.format == "libero":
        from cosmos_ray.sim.libero.models import LiberoModels

        done = export_libero(store, episodes, options.to, LiberoModels(simulator), actions=options.actions or "label", render=renderer,
                             progress=progress)
    elif options.format == "aloha":
        done = export_aloha(store, episodes, options.to, render=renderer, progress=progress)
    elif options.format == "parquet":
        done = export_parquet(store, episodes, options.to, progress=progress)
    else:
        raise NotImplementedError(f"EXPORTS has the format {options.format!r}, which nothing here writes")
    return _exchanged(f"{done.episodes} of {len(episodes)} episodes written to {options.to}", done.skipped)


def _import(options: argparse.Namespace) -> tuple[str, int]:
    from cosmos_ray.commands.data_run import DataRun
    from cosmos_ray.replay.exchange.aloha import read_aloha
    from cosmos_ray.replay.exchange.cosmos_hdf5 import read_rollouts
    from cosmos_ray.replay.exchange.importing import ImportOptions, import_episodes
    from cosmos_ray.replay.exchange.lerobot_import import read_lerobot
    from cosmos_ray.replay.exchange.robomimic import read_demonstrations

    if absent := [path for path in options.paths if not Path(path).exists()]:
        raise ConfigError(f"{absent[0]} does not exist: give the path of a file or folder on this machine")
    for name, format in (("filter", "robomimic"), ("render", "robomimic"), ("key", "lerobot")):
        if getattr(options, name) and options.format != format:
            raise ConfigError(f"--{name} is of --format {format} alone, and the files are read as --format {options.format}: leave it out")
    readers = {"cosmos": read_rollouts, "lerobot": read_lerobot, "robomimic": read_demonstrations, "aloha": read_aloha}
    run = DataRun(options) if options.name and not options.store else None
    said = ImportOptions(
        task=options.task, instruction=options.instruction, flip=None if options.flip == "auto" else options.flip == "yes",
        control_freq=options.control_freq, keys=_pairs(options.key, "--key", "NEW=OLD"), cameras=tuple(options.cameras),
        rename_camera=_pairs(options.rename_camera, "--rename-camera", "OLD=NEW"), resize=options.resize, filter=options.filter,
        render=_renderer_of_recordings((run.config if run else RunConfig()).sim, options.resize) if options.render else None,
    )  # fmt: skip
    read, progress = readers[options.format], _progress(options, "import", "episodes")
    root = run.store if run else _root(options)
    done = import_episodes(read, options.paths, root, said, progress, run.accept if run else None)
    return "\n".join([done.text(root), *([run.text()] if run and done.episodes else [])]), 1 if done.skipped else 0


def _renderer_of_recordings(sim: SimConfig, size: int) -> RenderRecorded:
    """Draws what the simulation sees, in frames of ``size`` (``--resize``) or of its own size for 0."""
    from cosmos_ray.sim.recorded_render import RecordedStateRenderer

    return RecordedStateRenderer(replace(sim, image_size=size or sim.image_size))


def _pairs(texts: Sequence[str], flag: str, form: str) -> dict[str, str]:
    """``A=B`` texts of a flag as a table from A to B."""
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, (left, _, right) in zip(texts, pairs, strict=True) if not left or not right]
    if wrong:
        raise ConfigError(f"{flag} {wrong[0]!r} is not of the form {form}")
    return {left: right for left, _, right in pairs}


def _exchanged(text: str, skipped: Sequence[tuple[str, str]]) -> tuple[str, int]:
    """The result with what was left out; exit code 1 if anything was."""
    return "\n".join([*(f"skipped {which}: {why}" for which, why in skipped), text]), 1 if skipped else 0


def _embed(options: argparse.Namespace) -> tuple[str, int]:
    from cosmos_ray.commands.embed import embed

    return embed(_open(options), options, _progress(options, "embed", "instructions"))


def _resimulate(options: argparse.Namespace) -> tuple[str, int]:
    from cosmos_ray.sim.resimulate import resimulate

    store = _open(options)
    _load_simulator(options)
    result = resimulate(store.read(_find(store, options.episode)))
    return result.text(), 0 if result.identical else 1


_CHOOSE = (
    (("--class",), {"nargs": "+", "dest": "classes", "choices": CLASSES, "help": "only episodes of these classes"}),
    (("--task",), {"help": "only episodes of this task"}),
)
_THREADS = (("--threads",), {"type": int, "default": os.cpu_count() or 1, "metavar": "N", "help": "threads that read [one per core]"})
_JSON = (("--json",), {"action": "store_true", "help": "machine-readable"})
_EPISODE = (("episode",), {"metavar": "EPISODE", "help": "name of the episode, or a part of the name that no other episode has"})

VERBS = {
    "ls": Verb("list episodes, oldest first", _ls,
               (*_CHOOSE, _JSON, (("--last",), {"type": int, "default": 0, "metavar": "N", "help": "only the newest N"}))),
    "show": Verb("describe an episode and draw it as a filmstrip or a video", _show, (
        _EPISODE, (("--to",), {"metavar": "FILE", "help": ".png for a filmstrip, .mp4 for a video [EPISODE.png]"}))),
    "stats": Verb("count episodes, steps and bytes by task and class", _stats, (_JSON,)),
    "verify": Verb("read every byte and report damaged, misplaced, foreign and left-behind files; changes nothing", _verify, (
        (("--decode",), {"action": "store_true", "help": "decode every JPEG as well"}), _THREADS)),
    "repair": Verb("quarantine damaged files, bring back the episodes that can be read, rewrite the manifest", _repair, (_THREADS,)),
    "evict": Verb("delete episodes by a retention policy; their keys stay taken", _evict, (
        (("--keep",), {"nargs": "*", "default": ("demo", "evaluation"), "choices": CLASSES,
                       "help": "classes of episodes that stay for ever [demo evaluation]"}),
        (("--newest",), {"type": int, "metavar": "M", "help": "keep the newest M of the other episodes"}),
        (("--max-staleness",), {"type": int, "metavar": "V", "help": "keep the others that are at most V policy versions old"}),
        (("--max-gb",), {"type": float, "metavar": "GB", "help": "keep the newest of the others, as many as fit into GB"}),
        (("--dry-run",), {"action": "store_true", "help": "only list the episodes that would be deleted"}))),
    "export": Verb("write episodes in another project's format", _export, (
        (("--format",), {"required": True, "choices": EXPORTS, "help": "LeRobot v3; rollouts, demonstrations or ALOHA episodes (HDF5) for "
                         "cosmos-policy; LIBERO's own HDF5; Parquet"}),
        (("--to",), {"required": True, "metavar": "FOLDER", "help": "folder to write; it must not exist yet"}),
        (("--frames",), {"default": "h264", "choices": ("h264", "av1", "image"), "help": "lerobot: videos, or the stored JPEGs [h264]"}),
        (("--suite",), {"default": "libero_goal", "help": "cosmos-demos: name of the suite's folder [libero_goal]"}),
        (("--actions",), {"choices": ("label", "executed"),
                          "help": "libero: the actions to imitate, or those executed, for scripts that play files again [label]"}),
        (("--render",), {"action": "store_true", "help": "render the frames that are not stored from the simulator states"}), *_CHOOSE)),
    "import": Verb("commit episodes of another project's files; makes the run if there is none of this name", _import, (
        (("paths",), {"nargs": "+", "metavar": "PATH", "help": "HDF5 files or folders of them; for lerobot dataset folders"}),
        (("--format",), {"required": True, "choices": IMPORTS,
                         "help": "demonstrations of LIBERO, robomimic, RoboCasa and robosuite; rollouts of cosmos-policy; ALOHA; LeRobot"}),
        (("--task",), {"default": "", "help": "name of the task [as the files say]"}),
        (("--instruction",), {"default": "", "help": "instruction of every episode [as the files say]"}),
        (("--flip",), {"default": "auto", "choices": ("auto", "yes", "no"), "help": "turn pictures upside down [as the files say]"}),
        (("--cameras",), {"nargs": "+", "default": (), "metavar": "CAMERA", "help": "take only these, by their names in the files [all]"}),
        (("--rename-camera",), {"nargs": "+", "default": (), "metavar": "OLD=NEW", "help": "names of cameras in the store"}),
        (("--resize",), {"type": int, "default": 0, "metavar": "N", "help": "make frames N x N pixels [as they are]"}),
        (("--filter",), {"default": "", "metavar": "MASK", "help": "robomimic: only the demonstrations of this list of the file [all]"}),
        (("--render",), {"action": "store_true", "help": "robomimic: render states that have no pictures, as the run's simulation"}),
        (("--key",), {"nargs": "+", "default": (), "metavar": "NEW=OLD",
                      "help": "lerobot: where the files keep what the format calls NEW, as in observation.state=state"}),
        (("--control-freq",), {"type": float, "default": 0.0, "metavar": "HZ", "help": "control steps per second [as the files say]"}))),
    "embed": Verb("compute the T5 embeddings of every instruction into a file for --model.text-path", _embed, (
        (("--t5",), {"required": True, "metavar": "FOLDER", "help": "the T5 encoder as transformers keeps it (google-t5/t5-11b)"}),
        (("--to",), {"required": True, "metavar": "FILE", "help": "a .safetensors; or a .pkl, which the public cosmos-policy code reads "
                                                                 "too. Embeddings in it are kept"}))),
    "replay-episode": Verb("simulate an episode again and compare the states bit by bit", _resimulate, (_EPISODE,)),
}
