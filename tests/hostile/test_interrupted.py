"""Disks that fill, rights that lack, signals, and two writers: what was there is not lost."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import safetensors.torch

import peftref
from peftref.adapted import Adapted
from peftref.artifact import read
from peftref.errors import ArtifactError
from peftref.training.publish import check_free
from peftref.training.trainer import last_checkpoint
from tests.backbone.tiny import tiny
from tests.hostile.cases import Case, each, tried
from tests.training.assets import bert_folder, write_rows

TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapted() -> Adapted:
    return peftref.attach(tiny("bert"), "ia3")


def _fails(number: int) -> Any:
    def write(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


FAILURES = [
    Case("the disk fills while tensors are written", "No space left",
         (safetensors.torch, "save_file", errno.ENOSPC)),
    Case("the disk fills while peftref.json is written", "No space left",
         (Path, "write_text", errno.ENOSPC)),
    Case("the folder cannot be moved into its place", "Permission denied",
         (Path, "rename", errno.EACCES)),
    Case("no folder may be made", "Permission denied", (Path, "chmod", errno.EACCES)),
]


@each("saving", FAILURES)
def test_a_failed_write_leaves_what_was_there(
    case: Case, adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted.save(tmp_path / "a", version="first")
    before = contents(tmp_path)
    owner, name, number = case.made
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, _fails(number))
        with pytest.raises(ArtifactError, match=case.says):
            adapted.save(tmp_path / "a", version="second")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    adapted.save(tmp_path / "a", version="second")
    assert read(tmp_path / "a").metadata == {"version": "second"}


@tried("saving", "a file where the folder of the artifact should be",
       "refused before any work, and when written; the file stays")
def test_a_file_in_the_place_of_a_folder_stays(adapted: Adapted, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ArtifactError, match="is no artifact"):
        check_free(tmp_path / "a", overwrite=True)
    for place in (tmp_path / "a", tmp_path / "a" / "below"):
        with pytest.raises(ArtifactError):
            adapted.save(place)
    assert (tmp_path / "a").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@tried("saving", "a link to a folder as the output",
       "the folder it leads to is replaced, the link stays")
def test_an_output_that_is_a_link_stays_one(adapted: Adapted, tmp_path: Path) -> None:
    adapted.save(tmp_path / "far" / "a", version="first")
    (tmp_path / "near").symlink_to(tmp_path / "far" / "a")
    adapted.save(tmp_path / "near", version="second")
    assert (tmp_path / "near").is_symlink()
    assert read(tmp_path / "far" / "a").metadata == {"version": "second"}
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["a"]


@tried("saving", "two writers of one folder at once",
       "the folder is at all times one of the two artifacts, whole; a loser gets one error")
def test_two_writers_leave_one_whole_artifact(adapted: Adapted, tmp_path: Path) -> None:
    adapted.save(tmp_path / "a", writer=-1)
    errors: list[Exception] = []

    def write(number: int) -> None:
        for _ in range(5):
            try:
                adapted.save(tmp_path / "a", writer=number)
            except ArtifactError:
                pass
            except Exception as error:  # noqa: BLE001 - any other one fails the test
                errors.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not errors
    assert read(tmp_path / "a").metadata["writer"] in (-1, 0, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@tried("training", "a kill between the files of a checkpoint",
       "the last checkpoint that is whole is gone on from")
def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, files in [(2, ("model.safetensors", "trainer_state.json")),
                        (4, ("model.safetensors",)), (6, ("trainer_state.json",)), (8, ())]:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text('{"global_st')
    (tmp_path / "checkpoint-mine").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


PROGRAM = "import sys; from peftref.cli.app import main; main(sys.argv[1:])"


@tried("training", "Ctrl-C while a run trains",
       "exit code 130, no artifact yet; --resume ends with the bits of an unbroken run")
@pytest.mark.slow
def test_ctrl_c_loses_no_more_than_the_steps_since_a_checkpoint(tmp_path: Path) -> None:
    bert_folder(tmp_path / "bert")
    write_rows(tmp_path / "rows.jsonl", 60)
    (tmp_path / "run.yaml").write_text(
        f"backbone: {tmp_path / 'bert'}\ndata: {tmp_path / 'rows.jsonl'}\ncomposition: ia3\n"
        "steps: 40\nbatch_size: 8\nmax_length: 24\ndevice: cpu\nevaluation: {every: 2}\n")
    command = [sys.executable, "-c", PROGRAM, "train", str(tmp_path / "run.yaml"), "--output"]
    process = subprocess.Popen([*command, str(tmp_path / "a")], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while last_checkpoint(tmp_path / "a.checkpoints") is None and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in said) == (130, False)
    assert not (tmp_path / "a").exists()
    from peftref.cli.app import main

    for words in (["a", "--resume"], ["b"]):
        with pytest.raises(SystemExit) as ended:
            main([*command[3:], str(tmp_path / words[0]), *words[1:]])
        assert ended.value.code == 0
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()
    assert not list(tmp_path.glob("*.checkpoints"))
