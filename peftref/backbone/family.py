"""A backbone family as data: where each role is below the base model.

A row names, for every stack, the list of its layers and the module of each role; paths are
relative to the base model, and below ``layer`` relative to one layer::

    families: [llama]
    norms: pre
    stacks:
      decoder:
        layers: layers
        before: {embedding.tokens: embed_tokens}
        layer:
          norm.attention: input_layernorm
          "attention.{query,key,value,output}": "self_attn.{q_proj,k_proj,v_proj,o_proj}"
          attention: {module: self_attn, input: {argument: hidden_states}}
          ...
        after: {norm.final: norm}

Alternatives in braces pair up with those of the path. A role that ends in ``?`` may be absent;
a list of paths means the first that exists. ``block`` and ``residual.ffn`` follow from the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from peftref.backbone.pattern import expand_braces
from peftref.errors import SpecError
from peftref.spec.base import Frozen
from peftref.spec.loader import parse_yaml, read_yaml, validated
from peftref.spec.selector import StackName

__all__ = ["CacheRule", "Family", "Place", "Role", "RowRule", "SpanInput", "Stack", "choose",
           "expand", "families", "read_family"]

T = TypeVar("T")
RowRule = Literal["halves", "thirds", "gqa", "head_interleaved", "grouped", "multi_query",
                  "alternating", "latent"]
Padding = Literal["visible", "hidden", "zero", "distance"]
OTHERWISE = "otherwise"
WORKSPACES = ("attention", "cross_attention", "embedding", "experts", "ffn", "mixer", "norm",
              "pooler", "router")


def _role(key: str) -> str:
    try:
        names = expand_braces(key.removesuffix("?"))
    except SpecError as error:
        raise ValueError(str(error)) from error
    for name in names:
        if name.split(".")[0] not in WORKSPACES or not all(name.split(".")):
            raise ValueError(f"a role begins with one of {', '.join(WORKSPACES)}, not {name!r}")
    return key


RoleName = Annotated[str, AfterValidator(_role)]


class SpanInput(Frozen):
    """Where the input of a sub-layer is read: an argument of ``module`` (None: its own).

    ``module`` may enclose the module that ends the sub-layer, and then hands its first argument
    on to it (BERT); or it stands beside it and begins the sub-layer (OPT's ``fc1``).
    """

    argument: str
    module: str | None = None


class CacheRule(Frozen):
    """How a prefix enters attention that never calls the attention interface.

    Attributes:
        argument: the argument of the module's forward that takes the cache of keys and values.
        pad: arguments that count keys in their last dimension, and what a prefix gets there:
            ``visible`` and ``hidden`` are masks (true or 0 is seen; true is hidden), ``zero`` a
            bias by position from the first token, ``distance`` one by distance from the last key.
        windows: buffer of the module that says which key each query sees (GPT-Neo).
    """

    argument: str
    pad: Mapping[str, Padding] = Field(default_factory=dict)
    windows: str | None = None


class Place(Frozen):
    """The module of a role.

    Attributes:
        module: path, alternatives in braces pairing with those of the role; or several paths of
            which the first that exists is taken.
        rows: how the rows of a fused projection are shared out, in the order of the role's
            alternatives; or a mapping from configuration attributes to such rules, of which the
            first with a true attribute holds, else ``otherwise``.
        tensor: a matrix that the module reads itself, or one for each expert in a tensor of three
            dimensions; ``transposed`` where it is stored (d_in, d_out).
        input: where a span reads; None: first argument of ``module``.
        interface: for attention spans, the module that calls the attention interface (of
            several the first that exists); None: ``module``; ``""``: none does.
        cache: for attention spans without an attention interface, how a prefix enters instead.
        form: for attention spans with neither, the forward of ours that takes a prefix.
        beyond_tokens: configuration attribute that, where true, says that the module runs on
            more than the tokens of the batch (DeBERTa's table of positions).
        no_rows: for token embeddings, why no learned rows can stand among the tokens.
    """

    module: tuple[str, ...] = Field(min_length=1)
    rows: RowRule | Mapping[str, RowRule] | None = None
    tensor: str | None = None
    transposed: bool = False
    input: SpanInput | None = None
    interface: str | tuple[str, ...] | None = None
    cache: CacheRule | None = None
    form: Literal["disentangled"] | None = None
    beyond_tokens: str | None = None
    no_rows: str = ""

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: object) -> object:
        return {"module": value} if isinstance(value, str | list) else value

    @field_validator("module", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("module")
    @classmethod
    def _braces_pair(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            for path in value:
                expand_braces(path)
        except SpecError as error:
            raise ValueError(str(error)) from error
        return value


class Role(Frozen):
    """One role of a row after its braces are expanded; ``part`` counts within them."""

    name: str
    optional: bool
    place: Place
    part: int


def expand(places: Mapping[str, Place]) -> tuple[Role, ...]:
    """Return one role for every alternative of the keys, paired with those of the paths.

    Raises:
        ValueError: role and path have different numbers of alternatives.
    """
    roles: list[Role] = []
    for key, place in places.items():
        names = expand_braces(key.removesuffix("?"))
        paths = [expand_braces(path) for path in place.module]
        for path in paths:
            if len(path) not in (1, len(names)):
                raise ValueError(f"{key!r} has {len(names)} alternatives, its path {len(path)}")
        for part, name in enumerate(names):
            own = tuple(path[part if len(path) > 1 else 0] for path in paths)
            own_place = place.model_copy(update={"module": own})
            roles.append(Role(name=name, optional=key.endswith("?"), place=own_place, part=part))
    return tuple(roles)


def choose(value: T | Mapping[str, T], config: object) -> T | None:
    """Return ``value``, or of a mapping the entry of the first true attribute of ``config``."""
    if not isinstance(value, Mapping):
        return value
    for name, entry in value.items():
        if name != OTHERWISE and getattr(config, name, False):
            return entry
    return value.get(OTHERWISE)


class Stack(Frozen):
    """One stack of layers: before them, in each of them, after them.

    ``heads``, ``key_value_heads`` and ``head_width`` name attributes of the configuration (or,
    as ``rows``, choose one by a true attribute); unset, ``num_key_value_heads`` and ``head_dim``
    are used where they exist, else as many as heads, and the hidden size over the heads.
    ``heads`` is empty where there is no attention. ``value_width`` names the width of a head's
    value where it is another one than the key's.

    Attributes:
        layers: path of the list of layers; ``*`` stands for every group of layers, in order.
        runs: configuration attribute with the number of passes through groups of layers, where
            a layer is run more often than once (ALBERT).
        config: configuration attribute with the stack's own configuration (CLIP).
        causal: whether a token sees only those before it; None: as its attention declares.
    """

    layers: str
    runs: str | None = None
    config: str | None = None
    causal: bool | None = None
    before: Mapping[RoleName, Place] = Field(default_factory=dict)
    layer: Mapping[RoleName, Place]
    after: Mapping[RoleName, Place] = Field(default_factory=dict)
    value_width: str | None = None
    heads: str = "num_attention_heads"
    key_value_heads: str | int | Mapping[str, str | int] | None = None
    head_width: str | None = None

    @model_validator(mode="after")
    def _roles_are_given_once(self) -> Self:
        roles = [role.name for part in (self.before, self.layer, self.after)
                 for role in expand(part)]
        for name in roles:
            if roles.count(name) > 1:
                raise ValueError(f"role {name!r} is given twice")
        return self


class Family(Frozen):
    """One row: the model types it serves, where its norms are, and its stacks.

    ``norms`` is ``post`` where a norm takes the sum of a sub-layer and the residual stream
    (BERT), ``pre`` where a sub-layer starts with its norm (Llama).
    """

    families: tuple[str, ...] = Field(min_length=1)
    norms: Literal["pre", "post"] | Mapping[str, Literal["pre", "post"]]
    stacks: Mapping[StackName, Stack] = Field(min_length=1)


def read_family(path: str | Path) -> Family:
    """Return the row in the YAML file at ``path``.

    Raises:
        SpecError: the file cannot be read or is no valid row.
    """
    return validated(Family, read_yaml(Path(path)))


@cache
def families() -> Mapping[str, Family]:
    """Return the built-in rows by model type."""
    rows: dict[str, Family] = {}
    for file in sorted(files("peftref.backbone").joinpath("families").iterdir(), key=str):
        if file.name.endswith(".yaml"):
            row = validated(Family, parse_yaml(file.read_text(encoding="utf-8"), file.name))
            rows.update(dict.fromkeys(row.families, row))
    return rows
