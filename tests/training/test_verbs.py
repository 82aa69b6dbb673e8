"""The verbs train, evaluate, predict and merge, from a labelled file to a plain checkpoint."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from peftref.cli.app import main
from peftref.training.restore import open_artifact
from tests.training.assets import bert_folder, llama_folder, write_rows

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command and give its exit code, output and messages."""

    def called(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return called


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verbs")
    bert_folder(folder / "bert")
    bert_folder(folder / "pooled", pooler=True)
    llama_folder(folder / "llama")
    write_rows(folder / "rows.jsonl", 90)
    (folder / "run.yaml").write_text(
        f"backbone: {folder / 'bert'}\ndata: {folder / 'rows.jsonl'}\nsteps: 4\nbatch_size: 8\n"
        "max_length: 24\ndevice: cpu\nevaluation: {at: [1.0]}\n"
    )
    return folder


def train(run: Run, root: Path, output: Path, *words: object) -> dict[str, object]:
    code, out, err = run("train", *words, "--run", root / "run.yaml", "--output", output, "--json")
    assert code == 0, err
    return json.loads(out)


def test_from_a_file_to_predictions(run: Run, root: Path, tmp_path: Path) -> None:
    result = train(run, root, tmp_path / "a", "lora")
    assert result["trainable_parameters"] == 2 * 2 * 2 * 8 * 32  # layers, q and v, down and up
    assert (tmp_path / "a" / "run.yaml").is_file()
    # Validation as training saw it, the held-out test, and the whole of another file.
    code, out, _ = run("evaluate", tmp_path / "a", "--split", "validation", "--json")
    assert (code, json.loads(out)["metrics"]) == (0, result["metrics"])
    code, out, _ = run("evaluate", tmp_path / "a")
    assert (code, out.splitlines()[0]) == (0, "9 rows (test)")
    other = write_rows(tmp_path / "other.jsonl", 12, seed=5)
    code, out, _ = run("evaluate", tmp_path / "a", "--data", other, "--json")
    found = json.loads(out)
    assert (code, found["rows"], found["split"]) == (0, 12, "all")
    # The accuracy of the predictions is the accuracy that evaluation gives.
    code, _, err = run("predict", tmp_path / "a", "--input", other, "--output",
                       tmp_path / "p.jsonl")
    assert (code, err) == (0, "12 rows predicted\n")
    given = [json.loads(line) for line in other.read_text().splitlines()]
    said = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["text"] for row in said] == [row["text"] for row in given]
    right = sum(a["label"] == b["label"] for a, b in zip(given, said, strict=True))
    assert right / 12 == found["metrics"]["accuracy"]
    # The run file that was saved gives the run again.
    code, out, _ = run("train", "--run", tmp_path / "a" / "run.yaml", "--output", tmp_path / "b",
                       "--json")
    assert (code, json.loads(out)["metrics"]) == (0, result["metrics"])


def test_a_run_file_is_an_argument_of_its_own(run: Run, root: Path, tmp_path: Path) -> None:
    """The file that ``init run`` writes is started as its first line says."""
    file = tmp_path / "mine.yaml"
    assert run("init", "run", file)[0] == 0
    flags = ("--backbone", root / "bert", "--data", root / "rows.jsonl", "--steps", 2,
             "--output", tmp_path / "a", "--set", "max_length=24", "--set", "device=cpu")
    code, out, err = run("train", file, *flags, "--json")
    assert code == 0, err
    assert json.loads(out)["trainable_parameters"] == 2 * 2 * 2 * 8 * 32
    code, _, err = run("train", tmp_path / "absent.yaml")
    assert code == 2
    assert "absent.yaml" in err
    code, _, err = run("train", file, "--run", root / "run.yaml")
    assert code == 2
    assert "two run files" in err
    code, _, err = run("train", "lora")
    assert code == 2
    assert "--backbone and --data" in err


def scores(artifact: Path, rows: list[str]) -> torch.Tensor:
    opened = open_artifact(artifact, device="cpu")
    with torch.no_grad():
        return opened.model(**opened.tokenizer(rows, padding=True, return_tensors="pt")).logits


def test_a_merged_checkpoint_needs_no_peftref(run: Run, root: Path, tmp_path: Path) -> None:
    rows = ["w1 w2 w3 w4", "w9"]
    train(run, root, tmp_path / "model", "lora + bitfit", "--backbone", root / "pooled",
          "--set", "learning_rate=0.1")
    code, out, _ = run("merge", tmp_path / "model", "--output", tmp_path / "plain")
    assert (code, "BertForSequenceClassification" in out) == (0, True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    opened = open_artifact(tmp_path / "model", device="cpu")
    batch = opened.tokenizer(rows, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(
            merged(**batch).logits, scores(tmp_path / "model", rows), rtol=1e-4, atol=1e-5
        )
    assert merged.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert not [name for name in load_file(tmp_path / "plain" / "model.safetensors")
                if "peftref" in name or "lora" in name]


def test_a_mean_pooled_merge_says_how_to_apply_its_head(
    run: Run, root: Path, tmp_path: Path
) -> None:
    train(run, root, tmp_path / "a", "lora", "--set", "learning_rate=0.1")
    code, out, _ = run("merge", tmp_path / "a", "--output", tmp_path / "plain")
    assert (code, "mean-pooled head" in out) == (0, True)
    text = (tmp_path / "plain" / "README.md").read_text()
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    code_lines = found[1].replace('folder = "."', f"folder = {str(tmp_path / 'plain')!r}")
    names: dict[str, torch.Tensor] = {}
    exec(code_lines.replace('"a text"', '"w1 w2 w3 w4", "w9"'), names)
    torch.testing.assert_close(
        names["scores"], scores(tmp_path / "a", ["w1 w2 w3 w4", "w9"]), rtol=1e-4, atol=1e-5
    )


def test_a_language_model_writes_on(run: Run, root: Path, tmp_path: Path) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(
        json.dumps({"text": f"w{n} w{n + 1}", "target": "w7"}) + "\n" for n in range(40)
    ))
    train(run, root, tmp_path / "a", "lora", "--backbone", root / "llama", "--data", rows,
          "--set", "data.target=target", "--set", "learning_rate=0.05", "--steps", 30)
    code, _, err = run("predict", tmp_path / "a", "--input", rows, "--output",
                       tmp_path / "said.jsonl", "--tokens", 3)
    assert code == 0, err
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    opened = open_artifact(tmp_path / "a", device="cpu")
    for row in said[:4]:
        tokens = opened.tokenizer(row["text"])["input_ids"]
        start = len(tokens)
        for _ in range(3):  # greedily, without a cache, until the end token
            with torch.no_grad():
                tokens.append(int(opened.model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == opened.tokenizer.eos_token_id:
                break
        written = opened.tokenizer.decode(tokens[start:], skip_special_tokens=True)
        assert row["completion"] == written.strip()
    assert sum(row["completion"] == "w7" for row in said) > 20


def test_mistakes_end_with_code_2_and_one_message(run: Run, root: Path, tmp_path: Path) -> None:
    train(run, root, tmp_path / "a", "prefix_tuning", "--steps", 1)
    kept = (tmp_path / "a" / "peftref.json").read_bytes()
    (tmp_path / "bad.jsonl").write_text('{"text": "w1"}\n{"txt": "w1"}\n')
    (tmp_path / "said.jsonl").write_text("mine")
    file, new = root / "run.yaml", tmp_path / "b"
    for words, message in [
        (["train", "lora", "--run", file], "Give --output"),
        (["train", "--run", file, "--output", new], "Give a composition"),
        (["train", "loraa", "--run", file, "--output", new], "Did you mean 'lora'"),
        (["train", "lora", "--run", file, "--output", tmp_path / "a"], "already holds an artifact"),
        (["train", "lora", "--run", file, "--output", root], "is no artifact"),
        (["train", "lora", "--run", tmp_path / "no.yaml", "--output", tmp_path / "b"], "no.yaml"),
        (["train", "lora", "--run", file, "--output", new, "--set", "stps=3"], "steps"),
        (["train", "lora", "--run", file, "--output", new, "--data", "no.csv"], "no.csv"),
        (["train", "lora", "--run", file, "--output", new, "--backbone", "./no"], "./no"),
        (["evaluate", tmp_path / "none"], "no such folder"),
        (["evaluate", tmp_path / "a", "--data", tmp_path / "bad.jsonl"], "no column 'label'"),
        (["predict", tmp_path / "a", "--input", tmp_path / "bad.jsonl", "--output",
          tmp_path / "new.jsonl"], "row 2: no text in column 'text'"),
        (["predict", tmp_path / "a", "--output", tmp_path / "said.jsonl"], "--overwrite"),
        (["merge", tmp_path / "a", "--output", tmp_path / "m"], "prefix_tuning"),
        (["merge", tmp_path / "a", "--output", tmp_path], "not empty"),
    ]:
        code, out, err = run(*words)
        assert (code, out) == (2, ""), (words, err)
        last = err.strip().splitlines()[-1]
        assert last.startswith("error: "), (words, err)
        assert message in last, (words, err)
        assert "Traceback" not in err
    assert (tmp_path / "a" / "peftref.json").read_bytes() == kept
    assert (tmp_path / "said.jsonl").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "bad.jsonl", "said.jsonl"]


def test_a_killed_run_resumes_to_the_same_bits(run: Run, root: Path, tmp_path: Path) -> None:
    usual = ["adamix", "--run", str(root / "run.yaml"), "--steps", "24", "--set",
             "evaluation.every=2"]
    program = "import sys; from peftref.cli.app import main; main(sys.argv[1:])"
    killed = subprocess.Popen(
        [sys.executable, "-c", program, "train", *usual, "--output", str(tmp_path / "a")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    wanted = tmp_path / "a.checkpoints" / "checkpoint-4" / "trainer_state.json"
    until = time.monotonic() + 120
    while not wanted.exists() and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "a").exists()
    code, _, err = run("train", *usual, "--output", tmp_path / "a")
    assert (code, "--resume" in err) == (2, True)
    code, _, err = run("train", *usual, "--output", tmp_path / "a", "--resume")
    assert code == 0, err
    steps = [int(step) for step in re.findall(r"step (\d+) of 24", err)]
    assert steps[0] >= 4, "started anew"
    code, _, whole = run("train", *usual, "--output", tmp_path / "b")
    assert code == 0
    first, second = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b")
    )
    assert first == second
    # Every score after the kill is the score of the run that was never killed.
    assert set(re.findall(r"step .*", err)) <= set(re.findall(r"step .*", whole))
    assert not (tmp_path / "a.checkpoints").exists()
