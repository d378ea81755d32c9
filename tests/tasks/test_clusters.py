"""Which examples are one cluster: by name, by file, and through one another."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile

from tasks.audio_captions import AudioCaptions
from tasks.base import Example, Part, Split, Task
from tasks.clusters import clusters_of
from tasks.formats.audio_tables import write_tone
from tasks.mixture import Mixture
from tasks.speech import Speech
from tasks.text import Text
from tasks.vqa import VQA


def example(key: str, *files: str, cluster: str | None = None, member: str = "") -> Example:
    return Example(key, tuple(Part("file", Path(file)) for file in files), ("yes",), member=member, cluster=cluster)


def groups(examples: Iterable[Example]) -> list[str]:
    """The clusters with several examples, their ids joined."""
    examples = list(examples)
    found: dict[str, list[str]] = {}
    for one, cluster in zip(examples, clusters_of(examples), strict=True):
        found.setdefault(cluster, []).append(one.id)
    assert all(cluster == ids[0] for cluster, ids in found.items())
    return [" ".join(ids) for ids in found.values() if len(ids) > 1]


def test_examples_share_a_name_a_file_or_what_another_shares() -> None:
    assert groups([example("a"), example("b")]) == []
    assert groups([example("a", cluster="x"), example("x"), example("c", cluster="x")]) == ["a c"]
    assert groups([example("a", "1"), example("b", "2"), example("c", "1"), example("d", "3")]) == ["a c"]
    assert groups([example("a", "1"), example("b", "2", cluster="x"), example("c", "1", "2")]) == ["a b c"]
    assert groups([example("a", "1"), example("b", "1")]) == ["a b"]
    assert clusters_of([]) == []


def test_a_file_of_every_example_is_a_prompt_where_the_task_names_clusters() -> None:
    named = [example(key, "prompt", cluster=key[0], member="m") for key in ("a1", "a2", "b1", "b2")]
    assert groups(named) == ["a1 a2", "b1 b2"]
    assert groups([*named, example("c", "prompt", member="n")]) == ["a1 a2", "b1 b2"]
    assert groups([*named, example("c", "prompt", member="m")]) == ["a1 a2 b1 b2 c"]


def test_many_examples_take_no_time_and_no_recursion() -> None:
    chain = [example(str(number), str(number), str(number + 1)) for number in range(5000)]
    assert set(clusters_of(chain)) == {"0"}
    assert set(clusters_of(chain[::-1])) == {"4999"}


def of(task: type[Task], split: Split, **options: object) -> list[Example]:
    return list(task(task.Config.model_validate(options)).examples(split))


def test_questions_about_one_picture_are_a_cluster(tmp_path: Path) -> None:
    asked = of(VQA, "train", **VQA.sample(tmp_path))
    assert [one.cluster for one in asked] == ["1", "1", "2", "2", "3", "3", "4", "4"]
    assert groups(asked) == ["1000 1001", "2000 2001", "3000 3001", "4000 4001"]


def test_several_speakers_are_clusters_and_one_alone_is_none(tmp_path: Path) -> None:
    root = Speech.sample(tmp_path)["root"]
    assert groups(of(Speech, "train", root=root)) == [
        " ".join(f"{digit}_{speaker}_0" for digit in range(4)) for speaker in ("ann", "bob")
    ]
    assert {one.cluster for one in of(Speech, "test", root=root)} == {None}  # dee
    both = of(Speech, "test", root=root, validation_speakers=["ann"], test_speakers=["bob", "dee"])
    assert {one.cluster for one in both} == {"bob", "dee"}


def test_speakers_of_librispeech_and_of_a_table(tmp_path: Path) -> None:
    for name in ("train-clean-100", "dev-clean", "test-clean"):
        for speaker in ("84", "85"):
            chapter = tmp_path / name / speaker / "7"
            chapter.mkdir(parents=True)
            ids = [f"{name[:3]}{speaker}-7-{n}" for n in range(2)]
            (chapter / f"{speaker}-7.trans.txt").write_text("".join(f"{i} GO\n" for i in ids), encoding="utf-8")
            for one in ids:
                soundfile.write(chapter / f"{one}.flac", np.zeros(800), 16_000)
    assert [one.cluster for one in of(Speech, "test", root=tmp_path)] == ["84", "84", "85", "85"]
    table = tmp_path / "table"
    table.mkdir()
    rows = ["file_name,transcription,who"]
    for number in range(40):
        write_tone(table / f"{number}.wav", 300 + number)
        rows.append(f"{number}.wav,go,p{number % 20}")
    (table / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    assert {one.cluster for one in of(Speech, "train", root=table)} == {None}
    spoken = of(Speech, "train", root=table, speaker_column="who")
    assert {one.cluster for one in spoken} == {f"p{int(Path(one.id).stem) % 20}" for one in spoken}


def test_clips_of_one_video_are_a_cluster(tmp_path: Path) -> None:
    options = AudioCaptions.sample(tmp_path)
    rows = (tmp_path / "test.csv").read_text(encoding="utf-8").splitlines()
    number, video, _, caption = rows[1].split(",", 3)
    rows.append(f"9{number},{video},60,{caption}")
    write_tone(tmp_path / "test" / f"{video}_60.wav", 500)
    (tmp_path / "test.csv").write_text("\n".join(rows), encoding="utf-8")
    assert groups(of(AudioCaptions, "test", **options)) == [f"{video}_30 {video}_60"]


def test_turns_of_one_conversation_are_a_cluster(tmp_path: Path) -> None:
    def line(*texts: str, system: str = "") -> str:
        turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        return json.dumps({"messages": [*([{"role": "system", "content": system}] if system else []), *turns]})

    lines = [
        line("hi", "hello", "what is 2 + 2?", "4", "and 3 + 3?", "6"),
        line("hi", "hello"),
        line("hi", "hey", "how are you?", "fine"),  # another answer: another conversation
        line("hi", "hello", "what is 2 + 2?", "4"),
        line("hi", "hello", system="Be brief."),
        line("1 + 1?", "2"),
        line("1 + 1?", "two"),  # the same prompt
    ]
    for name, content in (("test", lines), ("train", [line("a", "b")]), ("validation", [line("c", "d")])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(content), encoding="utf-8")
    found = of(Text, "test", root=tmp_path, validation="validation.jsonl", test="test.jsonl")
    assert groups(found) == [
        "test.jsonl:1 test.jsonl:2 test.jsonl:4",
        "test.jsonl:6 test.jsonl:7",
    ]


def test_a_mixture_passes_clusters_on_and_joins_tasks_by_their_files(tmp_path: Path) -> None:
    root = VQA.sample(tmp_path)["root"]
    tasks = [{"name": "vqa", "root": root}, {"name": "vqa", "as": "again", "root": root}]
    mixture = Mixture(Mixture.Config.model_validate({"tasks": tasks}))
    assert [one.cluster for one in mixture.examples("train")][::4] == ["vqa/1", "vqa/3", "again/1", "again/3"]
    assert groups(mixture.examples("train"))[0] == "vqa/1000 vqa/1001 again/1000 again/1001"
