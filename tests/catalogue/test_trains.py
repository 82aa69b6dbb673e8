"""Every entry trains through peftref's own session, is saved, and comes back the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftref.cli.facts import shipped
from peftref.training.session import TrainingSession
from tests.training.assets import bert_folder, llama_folder, run_settings, write_rows

NAMES = tuple(entry.name for entry in shipped())
# Default sizes that a width of 32 does not take.
SMALLER = {"miss": "miss(rank=8)", "road": "road(group=8)", "shira": "shira(rank=4)",
           "vblora": "vblora(length=16)"}
DECODERS = ("pema", "pema_decoder")  # read the norm at the end of a decoder


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainingSession]:
    folder = tmp_path_factory.mktemp("trains")
    rows = write_rows(folder / "rows.jsonl", 48)
    bert = bert_folder(folder / "bert", dropout=0.0, layers=4)
    llama = llama_folder(folder / "llama")
    return {name: TrainingSession(run_settings(path, rows, evaluation={"at": [1.0]}))
            for name, path in (("bert", bert), ("llama", llama))}


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_is_restored(
    name: str, sessions: dict[str, TrainingSession], tmp_path: Path
) -> None:
    session = sessions["llama" if name in DECODERS else "bert"]
    before = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    result = session.fit(SMALLER.get(name, name), output=tmp_path / "artifact")
    assert result.trainable_parameters > 0
    assert torch.isfinite(torch.tensor(result.loss))
    again = session.test(tmp_path / "artifact", "validation")
    assert again["loss"] == pytest.approx(result.loss, rel=1e-5)
    for key, value in session.model.named_parameters():
        assert torch.equal(value, before[key]), key
