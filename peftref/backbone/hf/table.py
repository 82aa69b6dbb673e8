"""The site table of a Hugging Face model, read from its real modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from peftref.backbone.family import Family, Place, Role, Stack, choose, expand, families
from peftref.backbone.hf.infer import infer
from peftref.backbone.hf.modules import (
    base_prefix,
    count_parameters,
    head_modules,
    measure,
    named_modules,
    owners,
)
from peftref.backbone.hf.refusal import refusal
from peftref.backbone.rows import row_slice
from peftref.backbone.site_table import (
    Argument,
    AttentionShape,
    CacheArgument,
    Site,
    SiteKind,
    SiteTable,
)
from peftref.errors import BackboneError, SpecError

__all__ = ["inferred_table", "module_table", "site_table"]

SPANS = {"attention": SiteKind.ATTENTION, "cross_attention": SiteKind.ATTENTION,
         "ffn": SiteKind.SPAN, "mixer": SiteKind.SPAN}


def site_table(
    model: PreTrainedModel, family: Family | None = None, *, strict: bool = True
) -> SiteTable:
    """Return every site of ``model``, whatever its task head.

    Works on the meta device and on quantised models; what peftref attached is left out.

    Args:
        model: a model of the ``transformers`` library.
        family: the row to read it by; None: the built-in row of its model type, else an
            inferred one.
        strict: roles are needed; else a model type without a row gives :func:`module_table`.

    Raises:
        BackboneError: the row does not fit the model.
        SitesError: no row for the model type, and none is inferred with certainty.
    """
    if family is not None:
        if model.config.model_type not in family.families:
            raise BackboneError(f"The site row is for {', '.join(family.families)}, the model is "
                                f"of type {model.config.model_type!r}")
        return replace(_Reader(model, family).table(), row=family)
    row = families().get(model.config.model_type)
    if row is not None:
        return _Reader(model, row).table()
    return inferred_table(model) if strict else module_table(model)


def inferred_table(model: PreTrainedModel) -> SiteTable:
    """Return the sites of ``model`` by a row that a trial of a small random model of it shows.

    Raises:
        SitesError: the trial leaves a doubt; the message says which.
    """
    found = infer(model)
    doubts = list(found.doubts)
    if found.certain:
        try:
            row = found.row()
            table = replace(_Reader(model, row).table(), row=row)
        except (BackboneError, SpecError) as error:
            doubts.append(str(error))
        else:
            wrong = [site.label for site in table if site.role == "attention" and site.attention
                     and site.attention.causal != found.causal[site.stack]]
            if not wrong:
                return table
            doubts.append(f"{wrong[0]}: whether a token sees those after it is not as declared")
    raise refusal(model, replace(found, doubts=doubts))


def module_table(model: PreTrainedModel) -> SiteTable:
    """Return a table without roles: only ``modules``, for raw ``module:`` selectors."""
    modules = named_modules(model)
    heads = head_modules(model)
    embedding = model.get_input_embeddings()
    return SiteTable(
        family="modules",
        hidden_size=getattr(model.config, "hidden_size", 0),
        vocabulary=embedding.num_embeddings if isinstance(embedding, nn.Embedding) else 0,
        layers={},
        sites=(),
        modules=_module_sites(modules, {}),
        head_modules=heads,
        frozen_parameters=count_parameters(model, heads),
    )


def _module_sites(
    modules: Mapping[str, nn.Module], layers: Mapping[str, _Layer]
) -> dict[str, Site]:
    tied = owners(modules)
    sites: dict[str, Site] = {}
    for path, module in modules.items():
        parts = path.split(".")
        inside = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        own = next((layers[start] for start in inside if start in layers), _Layer("", None))
        site = _site(f"module:{path}", own.stack, own.index, path, module)
        sites[path] = replace(site, tied=_tied(path, module, tied), shared_by=own.runs)
    return sites


def _site(role: str, stack: str, layer: int | None, path: str, module: nn.Module) -> Site:
    size = measure(module)
    return Site(role, stack, layer, path, size.kind, size.d_in, size.d_out, size.bias,
                size.transposed)


def _tied(path: str, module: nn.Module, tied: Mapping[int, list[str]]) -> str | None:
    others = tied.get(id(getattr(module, "weight", None)), ())
    return next((other for other in others if other != path), None)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer of a stack and how often a forward runs it."""

    stack: str
    index: int | None
    runs: int = 1


@dataclass(frozen=True, slots=True)
class _Heads:
    """Head counts of a stack and the width of its stream, from the configuration."""

    heads: int
    key_value_heads: int
    width: int
    hidden: int
    value_width: int | None = None


class _Reader:
    """Reads one model by one row."""

    def __init__(self, model: PreTrainedModel, row: Family) -> None:
        self.model, self.row = model, row
        self.modules = named_modules(model)
        self.prefix = base_prefix(model)
        self.tied = owners(self.modules)
        self.pre_norm = choose(row.norms, model.config) == "pre"
        self.name = model.config.model_type
        self.crosses = True

    def table(self) -> SiteTable:
        """Return the table; a stack that the model lacks altogether is left out."""
        layers = {name: self._layers(name, stack) for name, stack in self.row.stacks.items()}
        layers = {name: own for name, own in layers.items() if own}
        if not layers:
            tried = ", ".join(repr(self.prefix + s.layers) for s in self.row.stacks.values())
            raise self._misfit(f"it has no list of layers at {tried}")
        stacks = {name: own for name, own in self.row.stacks.items() if name in layers}
        self.crosses = "encoder" in layers  # a decoder alone has nothing to look across to
        sites = [site for name, own in layers.items()
                 for site in self._stack(name, stacks[name], own)]
        heads = head_modules(self.model)
        sites += self._language_head(list(stacks)[-1])
        where = {path: layer for own in layers.values() for path, layer in own.items()}
        return SiteTable(
            family=self.name,
            hidden_size=self._heads(next(iter(stacks.values()))).hidden,
            vocabulary=self._vocabulary(sites),
            layers={name: len(own) for name, own in layers.items()},
            sites=tuple(sites),
            modules=_module_sites(self.modules, where),
            head_modules=heads,
            frozen_parameters=count_parameters(self.model, heads),
            pre_norm=self.pre_norm,
        )

    def _layers(self, name: str, stack: Stack) -> dict[str, _Layer]:
        """The layers of a stack by path; empty where the model lacks the stack altogether."""
        lists = self._lists(self.prefix + stack.layers)
        passes = self._attribute(stack, stack.runs) if stack.runs else len(lists)
        # A pass runs all layers of one group; the groups share out the passes evenly.
        groups = [int(i * len(lists) / passes) for i in range(passes)]
        found: dict[str, _Layer] = {}
        for group, path in enumerate(lists):
            for child, _ in self.modules[path].named_children():
                found[f"{path}.{child}"] = _Layer(name, len(found), groups.count(group))
        return found

    def _lists(self, path: str) -> list[str]:
        """The lists of layers at ``path``, in which ``*`` stands for any child of a list."""
        start, star, end = path.partition("*")
        if star and isinstance(self.modules.get(start.rstrip(".")), nn.ModuleList):
            groups = self.modules[start.rstrip(".")].named_children()
            return [f"{start}{group}{end}" for group, _ in groups]
        return [path] if isinstance(self.modules.get(path), nn.ModuleList) else []

    def _stack(self, name: str, stack: Stack, layers: dict[str, _Layer]) -> Iterator[Site]:
        heads = self._heads(stack)
        yield from self._sites(expand(stack.before), name, None, self.prefix, heads)
        roles = expand(stack.layer)
        for i, (path, layer) in enumerate(layers.items()):
            sites = [replace(site, shared_by=layer.runs)
                     for site in self._sites(roles, name, i, f"{path}.", heads)]
            yield from sites
            block = Site("block", name, i, path, SiteKind.SPAN, heads.hidden, heads.hidden,
                         shared_by=layer.runs)
            yield block
            norm = next((site for site in sites if site.role == "norm.ffn"), None)
            if all(site.role != "ffn" for site in sites):
                continue
            if self.pre_norm or norm is None:
                yield replace(block, role="residual.ffn")
            else:
                yield replace(norm, role="residual.ffn")
        if layers:
            yield Site("stack", name, None, list(layers)[-1], SiteKind.STACK, heads.hidden,
                       heads.hidden)
        yield from self._sites(expand(stack.after), name, None, self.prefix, heads)

    def _sites(
        self, roles: tuple[Role, ...], stack: str, layer: int | None, prefix: str, heads: _Heads
    ) -> Iterator[Site]:
        for role in roles:
            if "cross_attention" in role.name.split(".") and not self.crosses:
                continue
            path = self._find(role, prefix)
            if path is None:
                continue
            site = _site(role.name, stack, layer, path, self.modules[path])
            beyond = role.place.beyond_tokens
            site = replace(site, tied=_tied(path, self.modules[path], self.tied),
                           no_rows=role.place.no_rows,
                           beyond_tokens=bool(beyond and getattr(self.model.config, beyond, False)))
            if role.name in SPANS:
                yield self._span(site, role.place, prefix, heads)
            elif role.place.tensor is not None:
                yield from self._matrices(site, role, heads)
            elif role.place.rows is not None:
                yield self._slice(site, role, heads)
            else:
                yield self._checked(site, heads)

    def _find(self, role: Role, prefix: str) -> str | None:
        for path in role.place.module:
            if prefix + path in self.modules:
                empty = isinstance(self.modules[prefix + path], nn.Identity)
                return None if role.optional and empty else prefix + path
        if role.optional:
            return None
        wanted = " or ".join(repr(prefix + path) for path in role.place.module)
        inside = [path.removeprefix(prefix) for path in self.modules if path.startswith(prefix)]
        raise self._misfit(f"role {role.name!r} should be at {wanted}; there are only "
                           f"{', '.join(inside[:40]) or 'no modules'}")

    def _span(self, site: Site, place: Place, prefix: str, heads: _Heads) -> Site:
        reads = None
        if place.input is not None:
            enclosing = place.input.module
            reads = Argument(prefix + enclosing if enclosing else site.module,
                             place.input.argument)
            if reads.module not in self.modules:
                raise self._misfit(f"role {site.role!r} reads at {reads.module!r}: no such module")
        shape = None
        if SPANS[site.role] is SiteKind.ATTENTION:
            shape = self._attention(site, place, prefix, heads)
        return Site(site.role, site.stack, site.layer, site.module, SPANS[site.role],
                    heads.hidden, heads.hidden, input=reads, attention=shape)

    def _attention(self, site: Site, place: Place, prefix: str, heads: _Heads) -> AttentionShape:
        interface = site.module
        if isinstance(place.interface, tuple):
            paths = [prefix + path for path in place.interface]
            interface = next((path for path in paths if path in self.modules), paths[0])
        elif place.interface is not None:
            interface = prefix + place.interface if place.interface else None
        if interface is not None and interface not in self.modules:
            raise self._misfit(f"role {site.role!r} attends at {interface!r}: no such module")
        fallback = site.role == "attention" and site.stack == "decoder"
        module = self.modules[interface or site.module]
        causal = getattr(module, "is_causal", fallback)
        declared = self.row.stacks[site.stack].causal  # pyright: ignore[reportArgumentType]
        causal = causal if declared is None else declared
        cache = place.cache
        taken = cache and CacheArgument(cache.argument, tuple(cache.pad.items()), cache.windows)
        return AttentionShape(heads.heads, heads.key_value_heads, heads.width, interface,
                              bool(causal), taken, place.form, heads.value_width)

    def _matrices(self, site: Site, role: Role, heads: _Heads) -> Iterator[Site]:
        """A matrix that the module reads itself, or one for each of its experts."""
        name = str(role.place.tensor)
        own = dict(self.modules[site.module].named_parameters(recurse=False))
        tensor = own.get(name)
        if tensor is None or tensor.dim() not in (2, 3):
            raise self._misfit(f"{site.module!r} has no matrix {name!r} among {', '.join(own)}")
        rows, width = tensor.shape[-2:][:: -1 if role.place.transposed else 1]
        site = replace(site, kind=SiteKind.MATRIX, d_in=width, d_out=rows, tensor=name,
                       transposed=role.place.transposed)
        site = replace(site, bias=site.bias_tensor in own)
        site = site if role.place.rows is None else self._slice(site, role, heads)
        if tensor.dim() == 2:
            yield site
        else:
            yield from (replace(site, expert=i) for i in range(len(tensor)))

    def _slice(self, site: Site, role: Role, heads: _Heads) -> Site:
        rule = choose(role.place.rows, self.model.config)
        rows = row_slice(str(rule), role.part, site.d_out, heads.heads, heads.key_value_heads,
                         heads.width, heads.value_width or heads.width)
        if rows is None:
            raise self._misfit(
                f"{site.module!r} has {site.d_out} rows, which is not what rule {rule!r} makes of "
                f"{heads.heads} heads, {heads.key_value_heads} key-value heads of {heads.width}")
        return replace(site, d_out=rows.rows, rows=rows)

    def _checked(self, site: Site, heads: _Heads) -> Site:
        """Return ``site`` if a projection has the width that the head counts promise."""
        count = {"query": heads.heads, "key": heads.key_value_heads,
                 "value": heads.key_value_heads}.get(site.role.split(".")[-1])
        if count is None or site.role.split(".")[0] not in SPANS:
            return site
        if site.d_out != count * heads.width:
            raise self._misfit(f"{site.module!r} has {site.d_out} rows, not {count} heads of "
                               f"{heads.width}")
        return site

    def _language_head(self, stack: str) -> Iterator[Site]:
        output = self.model.get_output_embeddings()
        for path, module in self.modules.items():
            if module is output:
                site = _site("head", stack, None, path, module)
                yield replace(site, tied=_tied(path, module, self.tied))

    def _vocabulary(self, sites: list[Site]) -> int:
        for site in sites:
            module = self.modules[site.module]
            if site.role == "embedding.tokens" and isinstance(module, nn.Embedding):
                return module.num_embeddings
        return 0

    def _heads(self, stack: Stack) -> _Heads:
        config = self._config(stack)
        hidden = self._attribute(stack, "hidden_size")
        if not stack.heads:
            return _Heads(1, 1, hidden, hidden)
        heads = int(self._attribute(stack, stack.heads))
        width = self._attribute(stack, stack.head_width) if stack.head_width else None
        width = width or getattr(config, "head_dim", None) or hidden // heads
        groups = choose(stack.key_value_heads, config)
        if groups is None:
            groups = getattr(config, "num_key_value_heads", None) or heads
        elif isinstance(groups, str):
            groups = self._attribute(stack, groups)
        value = self._attribute(stack, stack.value_width) if stack.value_width else None
        return _Heads(heads, int(groups), int(width), hidden, value)

    def _config(self, stack: Stack) -> object:
        """The configuration of a stack: its own one, or the model's."""
        whole = self.model.config
        return getattr(whole, stack.config, whole) if stack.config else whole

    def _attribute(self, stack: Stack, name: str) -> int:
        value = getattr(self._config(stack), name, None)
        if not isinstance(value, int):
            raise self._misfit(f"its configuration has no number {name!r}")
        return value

    def _misfit(self, what: str) -> BackboneError:
        return BackboneError(f"The site row {self.name!r} does not fit "
                             f"{type(self.model).__name__}: {what}")
