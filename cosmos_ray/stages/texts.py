"""Text embeddings of a store's instructions, in the checkpoint that training begins from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cosmos_ray.errors import ConfigError
from cosmos_ray.model.checkpoint import read_description
from cosmos_ray.model.exchange.text_embeddings import read_text_embeddings, write_text_embeddings
from cosmos_ray.model.text import HashText, T5Text
from cosmos_ray.run import Run


def embed_instructions(run: Run, text: HashText | T5Text, instructions: Iterable[str]) -> None:
    """Have ``text`` know all ``instructions``, so that the checkpoint carries them to every actor and none computes one again.

    ConfigError when ``text`` comes from a file that lacks some. The run's own instructions are embedded too where that can be done.
    """
    config, wanted = run.config, list(instructions)
    if isinstance(text, T5Text) and (missing := text.missing(wanted)):
        raise ConfigError(f"{config.model.text_path} has no embedding of {len(missing)} of the {len(wanted)} instructions of the "
                          f"demonstrations, such as {missing[0]!r}: `replay embed --name {config.name} --t5 FOLDER --to FILE` computes "
                          "them; then give FILE, or the T5 FOLDER itself, as --model.text-path")
    own = [sim.instruction for sim in config.sim.each()]
    wanted = list(dict.fromkeys([*wanted, *(told for told in own if not (isinstance(text, T5Text) and text.missing([told])))]))
    progress = run.counter("embed", "instructions")
    for number, instruction in enumerate(wanted):
        text(instruction)
        progress(number + 1, len(wanted))


def complete_texts(run: Run, checkpoint: Path, instructions: Iterable[str]) -> None:
    """Add the embeddings that an imported ``checkpoint`` lacks of ``instructions``; ConfigError when they are not to be had."""
    spec, file = read_description(checkpoint)[0], checkpoint / "text.safetensors"
    if spec.preset == "tiny":
        return
    known = read_text_embeddings(file) if file.exists() else {}
    if all(instruction in known for instruction in instructions):
        return
    text = T5Text(run.config.model.text_path, spec.text_tokens, spec.transformer.text_width, known)
    embed_instructions(run, text, instructions)
    write_text_embeddings(text.embeddings, file, overwrite=True)
