"""Names are found, kept unique, and explained when unknown."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from peftref.errors import SpecError
from peftref.registry import Registry, load_plugin, loaded_plugins, primitives


def test_an_unknown_name_gives_the_nearest_and_all() -> None:
    registry: Registry[type] = Registry("primitive")
    registry.register("linear")(int)
    registry.register("vector")(str)
    with pytest.raises(SpecError, match=r"'linaer'.*Did you mean 'linear'\?.*linear, vector"):
        registry.get("linaer")
    assert registry.get("linear") is int
    assert registry.names() == ("linear", "vector")
    assert "vector" in registry
    assert "tokens" not in registry


def test_a_name_belongs_to_one_class() -> None:
    registry: Registry[type] = Registry("coupling")
    registry.register("mix")(int)
    registry.register("mix")(int)  # a module that is reloaded registers again
    with pytest.raises(SpecError, match=r"named 'mix': builtins\.int and builtins\.str"):
        registry.register("mix")(str)


def test_modules_of_the_package_are_found_without_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "found_here"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text(
        "from builtins import found_registry\n"
        "@found_registry.register('one')\n"
        "class One: ...\n"
    )
    registry: Registry[type] = Registry("thing", package="found_here")
    monkeypatch.setattr("builtins.found_registry", registry, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert "found_here" not in sys.modules
    assert registry.names() == ("one",)


def test_an_entry_point_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "broken_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[test.group]\nmine = no_such_module_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry: Registry[type] = Registry("thing", group="test.group")
    with pytest.raises(SpecError, match=r"'mine' \(no_such_module_here\).*ModuleNotFoundError"):
        registry.names()


def test_a_plugin_file_registers_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from peftref.registry import primitives\n"
        "@primitives.register('test_registry_mine')\n"
        "class Mine: ...\n"
    )
    load_plugin(file)
    load_plugin(str(file))
    assert primitives.get("test_registry_mine").__name__ == "Mine"
    assert loaded_plugins().count(file.resolve()) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.py", None, "is not a Python file"),
        ("mine.txt", "", "is not a Python file"),
        ("bad.py", "1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("syntax.py", "def", "failed: SyntaxError"),
    ],
)
def test_a_plugin_that_cannot_run_says_why(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(SpecError, match=message):
        load_plugin(file)
    assert file.resolve() not in loaded_plugins()
