"""``harness export`` and ``harness predict``: use what a trial has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harness.core.errors import UserError

console, errors = Console(), Console(stderr=True)
Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="A Python file with plugins that the trial used; repeatable.")
]


def export(
    trial: Annotated[Path, typer.Argument(metavar="TRIAL", help="Folder of a finished trial: RUN/trials/ID.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    peft: Annotated[bool, typer.Option("--peft", help="Also write a checkpoint of the peft library.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also write the language model with the adapters in its weights.")
    ] = False,
    push: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Upload it to this hub repository.")] = None,
) -> None:
    """Write what a trial has trained into a folder: adapters, projectors, and a card with its scores.

    The language model and the encoders are named, not copied.
    """
    from harness.trained.export import export_trial

    _quiet()
    with console.status("exporting"):
        folder = export_trial(trial, out, peft=peft, merge=merge, push_to_hub=push)
    files = sorted(path.name for path in folder.iterdir())
    console.print(f"{folder}: {', '.join(files)}", highlight=False, markup=False, soft_wrap=True)


def predict(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `harness export` wrote.")],
    files: Annotated[list[Path] | None, typer.Argument(metavar="FILE", help="Inputs: a text for each.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="CONTEXT=TEXT", help="Goes with every file: question='What is it?'."),
    ] = None,
    member: Annotated[str, typer.Option(help="Of a mixture: the task.")] = "",
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of each text; default: as in the trial.")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="1 is greedy; default: as in the trial.")] = None,
    plugin: Plugins = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the models' own repositories.")
    ] = False,
) -> None:
    """Caption a picture, answer a question, transcribe a recording: one line for each file."""
    from harness.trained.model import load_trained

    _quiet()
    texts = [_pair(one) for one in text or ()]
    with console.status("loading"):
        trained = load_trained(folder, plugins=plugin or (), trust_remote_code=trust_remote_code)
    if len(trained.files) > 1:
        needed = ", ".join(trained.files)
        raise UserError(f"{folder}: it takes files of {needed}; harness.load_trained in Python gives them by context")
    if bool(files) != bool(trained.files):
        contexts = ", ".join(trained.task.contexts)
        raise UserError(f"FILE: {'needed' if trained.files else 'not used'} with the contexts {contexts}")
    inputs: list[list[tuple[str, str | Path]]] = [[(trained.files[0], file), *texts] for file in files or ()]
    with console.status("generating"):
        found = trained.predict(inputs or [texts], member=member, max_new_tokens=max_new_tokens, num_beams=num_beams)
    for number, line in enumerate(found):
        typer.echo(f"{files[number]}\t{line}" if files and len(files) > 1 else line)


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # one for every model
    transformers_logging.set_verbosity_error()


def _pair(given: str) -> tuple[str, str]:
    context, equals, value = given.partition("=")
    if not (context and equals):
        raise UserError(f"--text: found {given!r}; allowed: CONTEXT=TEXT, such as question='What is it?'")
    return context, value
