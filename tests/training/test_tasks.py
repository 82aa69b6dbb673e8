"""Each task from a file to predictions: what is predicted was measured, and it is learnt."""

from __future__ import annotations

import json
import random
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModel

import peftref
from peftref.cli.app import main
from peftref.errors import SpecError, TrainingError
from peftref.training.inference import columns_of, evaluate_artifact, predict_rows
from peftref.training.merged import write_merged
from peftref.training.restore import open_artifact
from peftref.training.session import TrainingSession
from peftref.training.settings import Task
from peftref.training.tasks.base import tasks
from tests.training.assets import WORDS, bert_folder, run_settings, t5_folder, vit_folder

Rows = list[dict[str, Any]]
FILLING = WORDS[30:]


def tagged(draw: random.Random) -> dict[str, Any]:
    """A name is w1 and the word behind it; a place is w2."""
    words = draw.choices(FILLING, k=draw.randint(3, 7))
    tags = ["O"] * len(words)
    at = draw.randrange(len(words))
    words[at:at], tags[at:at] = ["w1", "w3"], ["B-name", "I-name"]
    return {"tokens": ["w2", *words], "tags": ["B-place", *tags]}


def several(draw: random.Random) -> dict[str, Any]:
    """Each label is told by a word of its own."""
    labels = [label for label in ("a", "b", "c") if draw.random() < 0.5]
    words = draw.choices(FILLING, k=4) + [f"w{'abc'.index(label)}" for label in labels]
    return {"text": " ".join(words), "labels": labels}


def choice(draw: random.Random) -> dict[str, Any]:
    """The right choice has w5 in it; rows have two or three."""
    wrong = [" ".join(draw.choices(FILLING, k=2)) for _ in range(draw.randint(1, 2))]
    label = draw.randrange(len(wrong) + 1)
    return {"premise": draw.choice(FILLING), "label": label,
            "choices": [*wrong[:label], "w5 w5", *wrong[label:]]}


def near(draw: random.Random) -> dict[str, Any]:
    """Near where both have w6."""
    same = draw.random() < 0.5
    return {"sentence1": f"w6 {draw.choice(FILLING)}", "score": 1.0 if same else 0.0,
            "sentence2": f"{'w6' if same else 'w7'} {draw.choice(FILLING)}"}


def found(draw: random.Random) -> dict[str, Any]:
    """The pair of a text begins with its second word."""
    number = draw.randrange(60)
    return {"query": f"{draw.choice(FILLING)} w{number} w{number}", "passage": f"w{number}"}


def described(draw: random.Random) -> dict[str, Any]:
    """Every text is described by one of two words."""
    one = draw.random() < 0.5
    word = "w1" if one else "w2"
    return {"mr": f"{word} {draw.choice(FILLING)}", "ref": "w8 w9" if one else "w9 w8"}


CASES: dict[str, tuple[Callable[[random.Random], dict[str, Any]], str, dict[str, Any]]] = {
    "token_classification": (tagged, "bert", {}),
    "multilabel": (several, "bert", {}),
    "multiple_choice": (choice, "bert", {}),
    "similarity": (near, "bert", {"task": "similarity"}),
    "retrieval": (found, "bert", {"task": "retrieval"}),
    "seq2seq": (described, "t5", {"task": "seq2seq"}),
}


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    bert_folder(folder / "bert", dropout=0.0)
    t5_folder(folder / "t5")
    vit_folder(folder / "vit")
    return folder


def settings_of(root: Path, task: str, count: int = 160, **changes: object) -> Any:
    make, backbone, usual = CASES[task]
    draw = random.Random(0)
    path = write(root / f"{task}.jsonl", [make(draw) for _ in range(count)])
    data = {"source": str(path)} | ({"text": "mr", "target": "ref"} if task == "seq2seq" else {})
    return run_settings(root / backbone, data, **{
        "steps": 60, "learning_rate": 3e-2, "batch_size": 16, "evaluation": {"at": [1.0]},
        **usual, **changes,
    })


def agreement(task: str, given: Rows, said: Rows) -> dict[str, float]:
    """The metrics that predictions alone tell, by their definition."""
    pairs = list(zip(given, said, strict=True))
    if task == "token_classification":
        same = [x == y for a, b in pairs for x, y in zip(a["tags"], b["labels"], strict=True)]
        return {"accuracy": sum(same) / len(same)}
    if task == "multilabel":
        hits = sum(len({*a["labels"]} & {*b["labels"]}) for a, b in pairs)
        sizes = sum(len(a["labels"]) + len(b["labels"]) for a, b in pairs)
        same = [sorted(a["labels"]) == b["labels"] for a, b in pairs]
        return {"micro_f1": 2 * hits / sizes, "subset_accuracy": sum(same) / len(same)}
    if task == "multiple_choice":
        assert all(b["choice"] == a["choices"][b["label"]] for a, b in pairs)
        return {"accuracy": sum(a["label"] == b["label"] for a, b in pairs) / len(pairs)}
    if task == "similarity":
        loss = sum((a["score"] - b["similarity"]) ** 2 for a, b in pairs) / len(pairs)
        return {"loss": loss}
    texts = {a["mr"]: a["ref"] == b["completion"] for a, b in pairs}  # each text counts once
    return {"exact_match": sum(texts.values()) / len(texts)}


@pytest.mark.parametrize("task", [name for name in CASES if name != "retrieval"])
def test_what_is_predicted_is_what_was_measured(root: Path, task: str, tmp_path: Path) -> None:
    session = TrainingSession(settings_of(root, task))
    assert session.task.name == task  # told by the columns, except where the case names it
    before = session.evaluate(_bare(session), "validation")
    result = session.fit("lora(site='*.{query,key,value,output}')", output=tmp_path / "a")
    assert result.loss < 0.8 * before["loss"]
    opened = open_artifact(tmp_path / "a", device="cpu")
    # Batches decide nothing.
    again = evaluate_artifact(opened, None, "validation", batch_size=3).metrics
    for name, value in result.metrics.items():
        assert again[name] == pytest.approx(value, rel=1e-4, abs=1e-6)
    other = [CASES[task][0](random.Random(n)) for n in range(900, 924)]
    path = write(tmp_path / "other.jsonl", other)
    measured = evaluate_artifact(opened, str(path), None).metrics
    said = list(predict_rows(opened, other, tokens=4, batch_size=7))
    columns = columns_of(opened)
    learnt = (columns.label, columns.target)
    unlabelled = [{k: v for k, v in row.items() if k not in learnt} for row in other]
    for with_label, without in zip(said, predict_rows(opened, unlabelled, tokens=4), strict=True):
        for name, value in without.items():
            assert with_label[name] == pytest.approx(value, abs=1e-5) or isinstance(value, list)
    for name, value in agreement(task, other, said).items():
        assert measured[name] == pytest.approx(value, rel=1e-4, abs=1e-6)


def _bare(session: TrainingSession) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(model=session.model)


def test_a_text_finds_its_pair(root: Path, tmp_path: Path) -> None:
    session = TrainingSession(settings_of(root, "retrieval", 240, learning_rate=1e-2))
    result = session.fit("lora(site='*.{query,key,value,output,up,down}')", output=tmp_path / "a")
    opened = open_artifact(tmp_path / "a", device="cpu")
    rows = [{"query": row.text, "passage": row.pair} for row in session.data.split("validation")]
    first = vectors(opened, [{"query": row["query"]} for row in rows])
    second = vectors(opened, [{"query": row["passage"]} for row in rows])
    cosines = first @ second.T
    # Equal passages are equal answers.
    hits = [rows[int(row.argmax())]["passage"] == rows[n]["passage"]
            for n, row in enumerate(cosines)]
    assert result.metrics["recall_at_1"] == pytest.approx(sum(hits) / len(hits))
    loss = torch.nn.functional.cross_entropy(20 * cosines, torch.arange(len(rows)))
    assert result.loss == pytest.approx(float(loss), rel=1e-3)
    said = list(predict_rows(opened, rows))
    assert [row["similarity"] for row in said] == pytest.approx(
        cosines.diagonal().tolist(), abs=1e-4
    )
    model, tokenizer = peftref.from_pretrained(tmp_path / "a", device="cpu")
    with torch.no_grad():
        alone = model(**tokenizer([rows[0]["query"]], return_tensors="pt")).embeddings[0]
    torch.testing.assert_close(alone / alone.norm(), first[0].float(), rtol=1e-3, atol=1e-4)
    write_merged(opened, tmp_path / "merged")
    plain = AutoModel.from_pretrained(tmp_path / "merged", add_pooling_layer=False).eval()
    with torch.no_grad():
        hidden = plain(**tokenizer([rows[0]["query"]], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(hidden.mean(1)[0], alone, rtol=1e-3, atol=1e-4)
    with pytest.raises(TrainingError, match="this model gives vectors"):
        session.fit("adamix")


def vectors(opened: Any, rows: Rows) -> torch.Tensor:
    return torch.tensor([row["embedding"] for row in predict_rows(opened, rows)])


def test_pictures_are_told_apart(root: Path, tmp_path: Path) -> None:
    session = TrainingSession(run_settings(
        root / "vit", "digits", steps=100, learning_rate=1e-2, batch_size=32,
        evaluation={"at": [1.0]},
    ))
    assert session.task.name == "image_classification"
    assert sum(len(rows) for rows in session.data.splits.values()) == 1797
    result = session.fit("lora(site='*.{query,key,value,output,up,down}')", output=tmp_path / "a")
    assert result.score > session.fit("none").score + 0.1
    opened = open_artifact(tmp_path / "a", device="cpu")
    rows = [{"image": [[0] * 8] * 8}, {"image": _file(tmp_path)}]
    said = list(predict_rows(opened, rows))
    assert [set(row) for row in said] == [{"image", "label", "probability"}] * 2
    # An empty picture is the same from a file as from numbers.
    assert said[0]["label"] == said[1]["label"]
    assert said[0]["probability"] == pytest.approx(said[1]["probability"], abs=1e-5)


def _file(folder: Path, colour: tuple[int, int, int] = (0, 0, 0)) -> str:
    from PIL import Image

    path = folder / f"{colour[0]}.png"
    Image.new("RGB", (11, 5), colour).save(path)
    return str(path)


def test_a_folder_of_pictures_has_a_class_a_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, shade in (("dark", 0), ("light", 120)):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for number in range(20):
            _file(folder, (shade + number, 0, 0))
    session = TrainingSession(run_settings(root / "vit", tmp_path / "pictures", steps=2))
    assert session.data.label_names == ("dark", "light")
    assert session.fit("bitfit").steps == 2


def test_written_metrics_are_measured_where_a_run_is_judged_by_them(root: Path) -> None:
    session = TrainingSession(settings_of(
        root, "seq2seq", steps=1, evaluation={"at": [1.0], "metric": "rouge_l"}
    ))
    result = session.fit("lora")
    assert result.score == result.metrics["rouge_l"]
    with pytest.raises(SpecError, match=r"Unknown seq2seq metric 'bleux'. Did you mean 'bleu'"):
        TrainingSession(settings_of(root, "seq2seq", evaluation={"metric": "bleux"}))


@pytest.mark.parametrize("task", ["token_classification", "multiple_choice", "retrieval"])
def test_a_search_screens_for_the_task(root: Path, task: str) -> None:
    from peftref.search.screen import BackboneScreen
    from peftref.search.settings import SearchRun

    run = settings_of(root, task).model_dump(exclude_none=True, mode="json")
    run.pop("composition", None)
    screen = BackboneScreen(SearchRun.model_validate({**run, "search": {"trials": 1}}))
    assert screen("lora").parameters == 2 * 2 * 2 * 8 * 32  # layers, q and v, down and up


def test_the_commands_of_the_document_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With tiny models and data of the names that the document takes, and one step."""
    monkeypatch.chdir(tmp_path)
    for name in ("bert", "vit", "t5"):
        (tmp_path / name).symlink_to(root / name)
    draw = random.Random(0)
    for name, make in (("snips", tagged), ("e2e_nlg", described)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", [make(draw) for _ in range(40)])
    write(tmp_path / "pairs.jsonl", [found(draw) for _ in range(40)])
    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    peftref (train .*)$", text, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command.replace("minilm", "bert"))
        with pytest.raises(SystemExit) as ended:
            main([*words, "--steps", "1", "--set", "max_length=24", "--set", "device=cpu"])
        assert ended.value.code in (None, 0), (command, capsys.readouterr().err)
        assert (Path(words[words.index("--output") + 1]) / "peftref.json").is_file()


def test_a_run_file_knows_every_task() -> None:
    assert {*get_args(Task)} == {"auto", *tasks.names()}
