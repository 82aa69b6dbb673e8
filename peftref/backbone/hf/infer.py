"""The row of a model whose type has none, from what its modules do in a trial."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftref.backbone.hf.layer import Doubt, LayerReader, kind_of, same
from peftref.backbone.hf.modules import head_modules, named_modules
from peftref.backbone.hf.probe import Probe
from peftref.backbone.hf.shrink import base_model, example_inputs, outline, small_model
from peftref.backbone.hf.trace import Attended, Call
from peftref.backbone.infer import Finding, Findings, StackFindings
from peftref.backbone.site_table import SiteKind
from peftref.errors import BackboneError

__all__ = ["infer"]

Key = tuple[type, str, frozenset[str]]
_KNOWN: dict[Key, Findings] = {}  # a trial takes a second; a model is compiled for many times


def infer(model: PreTrainedModel) -> Findings:
    """Return what a trial shows about ``model``, whose weights are not read.

    A small random model of its class is run: see `LayerReader`. Whatever is not explained is a
    doubt, never a guess.
    """
    base = base_model(model)
    modules = frozenset(outline(base))
    key = (type(base), base.config.to_json_string(use_diff=False), modules)
    if key not in _KNOWN:
        _KNOWN[key] = _tried(model)
    found = _KNOWN[key]
    odd = [doubt for stack in found.stacks.values() for doubt in _odd_layers(base, stack.layers)]
    return replace(found, doubts=[*found.doubts, *odd])


def _tried(model: PreTrainedModel) -> Findings:
    found = Findings(model.config.model_type)
    try:
        small = small_model(model)
        reader = _ModelReader(small, found)
    except BackboneError as error:
        found.doubts.append(str(error))
        return found
    except Exception as error:  # noqa: BLE001 - the forward of a foreign class may raise anything
        found.doubts.append(f"a small model of it cannot be run: {error}")
        return found
    reader.read()
    return found


def _odd_layers(base: nn.Module, layers: str) -> Iterator[str]:
    """Yield a doubt if the layers of the real model have not all the same modules."""
    path = base.get_submodule(layers)
    own = [{name for name, each in named_modules(layer).items()
            if kind_of(each) in (SiteKind.LINEAR, SiteKind.NORM)}
           for layer in path.children()]
    for i, names in enumerate(own):
        if names != own[0]:
            yield f"layer {i} of {layers} differs from the first: {min(names ^ own[0])}"
            return


class _ModelReader:
    """Reads one small model into ``found``."""

    def __init__(self, small: PreTrainedModel, found: Findings) -> None:
        self.small, self.found = small, found
        self.inputs = example_inputs(small)
        self.probe = Probe(small, self.inputs)
        self.calls = self.probe.trace.calls
        self.modules = named_modules(small)
        self.inside: set[str] = set()  # module paths that have a role

    def read(self) -> None:
        """Fill in stacks, norms and doubts."""
        lists = dict.fromkeys(self._list_of(each) for each in self.probe.trace.attended)
        if not lists or None in lists or len(lists) > 2:
            self.found.doubts.append(
                "no attention went through transformers' attention interface" if not lists else
                "its attention is not in one or two lists of layers: "
                + ", ".join(str(path) for path in lists))
            return
        stacks = {self._name(path, len(lists)): path for path in lists if path is not None}
        if len(stacks) != len(lists):
            self.found.doubts.append(f"{' and '.join(map(str, lists))} are both one stack")
            return
        norms: set[str] = set()
        for name, path in stacks.items():
            self.found.stacks[name] = self._stack(name, path, norms)
            self.found.causal[name] = self._causal(path, name)
        self._outside(stacks)
        if len(norms) == 1:
            self.found.norms = norms.pop()
        elif norms:
            self.found.doubts.append("some layers have their norms before sub-layers, some after")
        left = [path for path, module in self.modules.items() if path not in self.inside
                and kind_of(module) is not SiteKind.SPAN]
        self.found.unplaced = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", path) for path in left})

    def _list_of(self, attended: Attended) -> str | None:
        """Return the outermost list of layers around the module that attended."""
        parts = attended.path.split(".")
        starts = (".".join(parts[:end]) for end in range(1, len(parts)))
        return next((path for path in starts
                     if isinstance(self.modules.get(path), nn.ModuleList)), None)

    def _name(self, path: str, count: int) -> str:
        for name in ("encoder", "decoder"):
            if name in path.split("."):
                return name
        if count > 1:
            return path
        return "decoder" if self._causal(path, "") else "encoder"

    def _causal(self, path: str, stack: str) -> bool:
        """Whether the first token of a stack is the same whatever the last one is."""
        side = "input_ids"
        if stack == "decoder" and "decoder_input_ids" in self.inputs:
            side = "decoder_input_ids"
        ids = self.inputs.get(side)
        if ids is None:
            return False
        other = ids.clone()
        other[:, -1] = torch.where(ids[:, -1] == ids.max(), ids.min(), ids.max())
        after = self.probe.with_inputs({**self.inputs, side: other})
        last = self._layers(path)[-1]
        before, now = self.calls[last][-1].output, after.calls[last][-1].output
        return before is not None and now is not None and bool((before[:, 0] == now[:, 0]).all())

    def _layers(self, path: str) -> list[str]:
        return [f"{path}.{name}" for name, _ in self.modules[path].named_children()]

    # --- a stack -----------------------------------------------------------------------------

    def _stack(self, name: str, path: str, norms: set[str]) -> StackFindings:
        stack = StackFindings(path)
        read: list[tuple[Finding, ...]] = []
        for layer in self._layers(path):
            reader = LayerReader(self.probe, layer, self.small.config.hidden_size)
            try:
                read.append(reader.read())
            except Doubt as doubt:
                self.found.doubts.append(str(doubt))
            stack.sections.setdefault("layer", tuple(reader.findings))
            norms |= reader.norms
            self.inside |= reader.placed.keys()
        silent = [each for each, module in self.modules.items()
                  if each.startswith(f"{path}.") and each not in self.calls
                  and kind_of(module) in (SiteKind.LINEAR, SiteKind.NORM)]
        if silent:
            self.found.doubts.append(f"{silent[0]}: is not called in every forward")
        if any(findings != read[0] for findings in read):
            self.found.doubts.append(f"the layers of {path} are not alike")
        stack.settings = self._settings(name, path)
        return stack

    def _settings(self, stack: str, path: str) -> Mapping[str, object]:
        """Return the configuration's names of the head counts, where they are not the usual."""
        shapes = {(each.query.shape[1], each.key.shape[1], each.query.shape[3])
                  for each in self.probe.trace.attended if each.path.startswith(f"{path}.")}
        if len(shapes) != 1:
            self.found.doubts.append(f"the layers of {path} have different heads: {shapes}")
            return {}
        heads, groups, width = shapes.pop()
        config = self.small.config
        settings: dict[str, object] = {}
        own = getattr(config, f"{stack}_attention_heads", None)
        if own == heads and config.is_encoder_decoder:
            settings["heads"] = f"{stack}_attention_heads"
        elif getattr(config, "num_attention_heads", None) != heads:
            settings["heads"] = self._named(heads, "head", stack)
        if (getattr(config, "num_key_value_heads", None) or heads) != groups:
            settings["key_value_heads"] = groups if groups == 1 else self._named(
                groups, "kv", "key_value")
        elif "heads" in settings and hasattr(config, "num_key_value_heads"):
            settings["key_value_heads"] = settings["heads"]
        if (getattr(config, "head_dim", None) or config.hidden_size // heads) != width:
            settings["head_width"] = self._named(width, "kv", "head_dim", "head_size")
        return settings

    def _named(self, value: int, *words: str) -> str:
        """Return the one entry of the configuration that has this value and such a name."""
        names = [name for name, each in vars(self.small.config).items()
                 if each == value and not isinstance(each, bool)
                 and any(word in name for word in words)]
        if len(names) != 1:
            self.found.doubts.append(f"which entry of the configuration is the {words[0]} number "
                                     f"{value}? {', '.join(names) or 'none'}")
        return names[0] if names else "num_attention_heads"

    # --- outside the layers --------------------------------------------------------------------

    def _outside(self, stacks: Mapping[str, str]) -> None:
        starts = {name: self.calls[self._layers(path)[0]][0].begin for name, path in stacks.items()}
        ordered = sorted(starts, key=lambda name: starts[name])
        placed: dict[tuple[str, str], list[Finding]] = {}
        for call in self._calls_outside(stacks.values()):
            found = self._one_outside(call, stacks, ordered, starts)
            if found is not None:
                stack, section, finding = found
                placed.setdefault((stack, section), []).append(finding)
                self.inside.add(call.path)
        for (stack, section), findings in placed.items():
            roles = [finding.role for finding in findings]
            for role in {role for role in roles if roles.count(role) > 1}:
                self.found.doubts.append(f"{role}: more than one module can be it")
            key = "before" if section == "before" else "after"
            self.found.stacks[stack].sections[key] = tuple(findings)
        if "input_ids" in self.inputs:
            for name in stacks:
                if not any(f.role == "embedding.tokens" for f in placed.get((name, "before"), ())):
                    self.found.doubts.append(f"no embedding looks up the token ids of the {name}")

    def _calls_outside(self, lists: Iterable[str]) -> list[Call]:
        paths = tuple(f"{path}." for path in lists)
        calls = [call for path, each in self.calls.items() for call in each
                 if not path.startswith(paths)]
        return sorted(calls, key=lambda call: call.begin)

    def _one_outside(
        self, call: Call, stacks: Mapping[str, str], ordered: list[str], starts: Mapping[str, int]
    ) -> tuple[str, str, Finding] | None:
        module = self.modules[call.path]
        kind = kind_of(module)
        if kind is SiteKind.EMBEDDING:
            words = getattr(module, "num_embeddings", 0) == self.small.config.vocab_size
            side = self._reads_ids(call) if words else None
            if side is None:
                return None
            stack = next((name for name in ordered if name == side), ordered[0])
            return stack, "before", Finding("embedding.tokens", call.path, "looks up the token ids")
        if kind is SiteKind.LINEAR and "pool" in call.path and call.begin > starts[ordered[-1]]:
            return ordered[-1], "after", Finding(
                "pooler?", call.path, "a linear after the last layer, by its name")
        if kind is SiteKind.LINEAR and "input_ids" in self.inputs:
            later = [name for name in ordered if starts[name] > call.begin]
            if later and call.path not in head_modules(self.small):
                return later[0], "before", Finding("embedding.projection", call.path,
                                                   "a linear between embedding and layers")
        if kind is not SiteKind.NORM:
            return None
        for name in ordered:
            if same(next(iter(call.arguments.values())),
                    self.calls[self._layers(stacks[name])[-1]][-1].output):
                return name, "after", Finding("norm.final", call.path,
                                              "reads what the last layer gives")
        later = [name for name in ordered if starts[name] > call.begin]
        if later:
            return later[0], "before", Finding("norm.embedding", call.path,
                                               "stands before the first layer")
        self.found.doubts.append(f"{call.path}: a norm outside the layers without a role")
        return None

    def _reads_ids(self, call: Call) -> str | None:
        given: Tensor = next(iter(call.arguments.values()))
        for name, side in (("decoder_input_ids", "decoder"), ("input_ids", "encoder")):
            if name in self.inputs and same(given, self.inputs[name]):
                return side
        return None
