"""Penn Treebank tokenisation of captions, as COCO does it: lower case, punctuation removed.

Runs the Stanford tokenizer that pycocoevalcap 1.2 ships, with its options and its list of punctuation. The library's
wrapper is not used because it writes into site-packages, lets line-breaking characters shift captions from one image to
the next, and treats a failure of Java as an empty caption.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

from tasks.metrics.coco.java import map_lines

JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
PUNCTUATION = frozenset(ptbtokenizer.PUNCTUATIONS)

# Characters that end a line for the tokenizer (of all code points: \n \x0b \x0c \r U+2028 U+2029) or elsewhere
# (U+0085), the other ASCII control characters, and lone surrogates, which UTF-8 cannot encode.
_NOT_TEXT = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")


def tokenise(captions: Sequence[str]) -> list[str]:
    """Tokenise captions in one run of the tokenizer.

    Control characters, line and paragraph separators and lone surrogates count as spaces; characters that the tokenizer
    does not know, such as emoji, are dropped. A full stop after an abbreviation at the very end of a caption can depend
    on the caption after it (2 of 25,014 captions of COCO val2017), so whole splits are tokenised together, as COCO
    does.

    Args:
        captions: any strings, including empty ones.

    Returns:
        For every caption its tokens, joined by single spaces; empty where it has no words.

    Raises:
        RuntimeError: Java failed, or did not give one line per caption.
    """
    lines = [_NOT_TEXT.sub(" ", caption) for caption in captions]
    arguments = ("-cp", JAR.name, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    tokenised = map_lines("PTB tokenizer", arguments, JAR.parent, lines)
    return [" ".join(word for word in line.split(" ") if word and word not in PUNCTUATION) for line in tokenised]
