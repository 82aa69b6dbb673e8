"""The two encodings name the same candidates, and every candidate is a valid composition."""

from __future__ import annotations

import random

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftref.errors import SearchError, SpecError
from peftref.search.build_space import build_space
from peftref.search.settings import Choice, SpaceSettings
from peftref.search.space import Candidate, Space, Value
from peftref.spec import load, parameters

SETTINGS = SpaceSettings(
    techniques=(
        Choice.model_validate({"use": "lora", "vary": ["rank", "dropout"]}),
        Choice.model_validate({"use": "prefix_tuning", "vary": {"length": [5, 10]}}),
        Choice.model_validate({"use": "scaled_parallel_adapter", "vary": {
            "bottleneck": None, "activation": ["relu", "gelu"]}}),
        Choice.model_validate("ia3"),
    ),
    max_members=2,
    layers=("all", "upper", "alternate"),
)
SPACE = build_space(SETTINGS, 6)


def flat_points(space: Space) -> st.SearchStrategy[dict[str, Value]]:
    box: dict[str, st.SearchStrategy[Value]] = {
        "layers": st.sampled_from([name for name, _ in space.layers]),
        "rate": st.sampled_from([-2.0, -1.5, 0.0, 2.0]),
    }
    for option in space.options:
        box[option.name] = st.integers(-1, option.levels - 1)
        for dim in option.others:
            values = range(len(dim.values)) if dim.ordered else dim.values
            box[f"{option.name}.{dim.name}"] = st.sampled_from(list(values))
    return st.fixed_dictionaries(box)


@given(flat_points(SPACE))
def test_every_flat_point_is_a_valid_composition(point: dict[str, Value]) -> None:
    candidate = SPACE.decode(point)
    on = [option.name for option in SPACE.options if int(point[option.name]) >= 0]
    assert len(candidate.members) == min(len(on), SETTINGS.max_members)
    assert set(candidate.members) <= set(on)
    if candidate.expression is None:
        assert not on
        return
    spec = load(candidate.expression)
    assert [m.technique.technique for m in spec.members] == list(candidate.members)
    for member in spec.members:
        values = member.technique.values
        selector = dict(SPACE.layers)[str(point["layers"])]
        assert values["layers"] == selector
        if member.technique.technique == "lora":
            ranks = parameters("lora")["rank"].search
            assert ranks is not None
            assert values["rank"] == sorted(ranks)[int(point["lora"])]  # type: ignore[type-var]


@given(flat_points(SPACE))
def test_the_encodings_are_equivalent(point: dict[str, Value]) -> None:
    candidate = SPACE.decode(point)
    levels = {name: int(point[name]) for name in candidate.members}
    for encoding in ("flat", "conditional"):
        encoded = SPACE.point(levels, encoding, point)
        assert SPACE.decode(encoded) == candidate
        fixed = optuna.trial.FixedTrial(encoded)
        assert SPACE.suggest(fixed, encoding) == candidate  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["flat", "conditional"])
def test_draws_have_several_members_and_differ(encoding: str) -> None:
    source = random.Random(0)
    drawn = [SPACE.decode(SPACE.draw(source, encoding)) for _ in range(50)]  # type: ignore[arg-type]
    assert {len(candidate.members) for candidate in drawn} == {2}
    assert len({candidate.key for candidate in drawn}) > 40


def test_baselines_are_the_floor_and_every_technique_alone_at_its_default() -> None:
    first = [SPACE.decode(point) for point in SPACE.baselines("flat", 1)]
    assert [candidate.members for candidate in first] == [
        (), ("lora",), ("prefix_tuning",), ("scaled_parallel_adapter",), ("ia3",)]
    assert load(first[1].expression or "").members[0].technique.values["rank"] == 8
    assert all(candidate.rate == 1.0 for candidate in first)
    sizes = [SPACE.decode(point) for point in SPACE.baselines("conditional", 3)]
    ranks = {load(c.expression or "").members[0].technique.values["rank"]
             for c in sizes if c.members == ("lora",)}
    assert ranks == {2, 8, 16}


def test_the_key_is_of_the_training_and_not_of_the_point() -> None:
    off = {"lora": 0, "lora.dropout": 1, "prefix_tuning": -1, "scaled_parallel_adapter": -1,
           "ia3": -1, "layers": "all", "rate": 0.0}
    same = {**off, "scaled_parallel_adapter.activation": "gelu"}
    other = {**off, "rate": 1.0}
    keys: list[str] = [Candidate.key.fget(SPACE.decode(p)) for p in (off, same, other)]  # type: ignore[misc]
    assert keys[0] == keys[1] != keys[2]


def test_what_cannot_be_searched_is_refused() -> None:
    def build(*techniques: object, **rest: object) -> Space:
        chosen = tuple(Choice.model_validate(item) for item in techniques)
        return build_space(SpaceSettings(techniques=chosen, **rest), 6)  # type: ignore[arg-type]

    with pytest.raises(SearchError, match="empty"):
        build()
    with pytest.raises(SearchError, match=r"'rnak'.*Did you mean 'rank'"):
        build({"use": "lora", "vary": ["rnak"]})
    with pytest.raises(SpecError, match="must be from 1"):
        build({"use": "lora", "vary": {"rank": [0, 4]}})
    with pytest.raises(SpecError, match="no effect"):
        build({"use": "prefix_tuning", "vary": {"hidden": [64, 128]}})
    with pytest.raises(SearchError, match=r"'site'.*list the values"):
        build({"use": "lora", "vary": ["site"]})
    with pytest.raises(SearchError, match="holds no factor"):
        build("lora", learning_rate=(1.1, 1.2))
