"""An installed package has the catalogue and the data that a checkout has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPORT = """
import json
from importlib.resources import files
import peftref.cli
from peftref.spec.catalogue import entries
from peftref.cli.init import template_text
from pathlib import Path
template_text("run", Path("run.yaml"), "x")
print(json.dumps({e.name: str(e.path) for e in entries().values()}))
"""


def test_a_wheel_is_complete(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", tmp_path, ROOT],
        check=True, timeout=300,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("peftref-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    data = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "peftref").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert data - packed == set()

    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    environment |= {"PEFTREF_CATALOGUE": "", "XDG_CONFIG_HOME": str(tmp_path)}
    report = subprocess.run(
        [sys.executable, "-c", REPORT],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = json.loads(report.stdout)
    shipped = {
        path.relative_to(ROOT).as_posix()
        for folder in ("specs", "compositions")
        for path in (ROOT / folder).rglob("*.yaml")
    }
    inside = str(tmp_path / "installed" / "peftref" / "catalogue")
    assert {os.path.relpath(path, inside) for path in found.values()} == shipped
