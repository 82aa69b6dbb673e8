"""Memory of a training step, from shapes alone.

What a backward pass keeps is derived from the site table: norms keep what they read, attention
its queries, keys, values and result (or the softmax, where no fused kernel runs), activations
what they read. A frozen linear keeps nothing; an adapter there keeps what it reads, a tensor
that all modules reading it keep together. Below the lowest edit nothing is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftref.backbone.site_table import AttentionShape, Site, SiteKind, SiteTable
from peftref.ir.depth import Depth, depth, edit_depth, lowest, part_depth
from peftref.ir.device import element_size
from peftref.ir.edits import EditPlan, ModulePlan
from peftref.ir.plan import Plan
from peftref.ir.types import Stage
from peftref.spec.typology import Port

__all__ = ["Memory", "Step", "Traits", "adapter_rows", "step_memory"]

_STREAMS = {
    "attention.query": "attention", "attention.key": "attention", "attention.value": "attention",
    "attention": "attention", "cross_attention.query": "cross_attention",
    "cross_attention": "cross_attention", "ffn.up": "ffn", "ffn.gate": "ffn", "ffn": "ffn",
    "attention.output": "attention.result", "cross_attention.output": "cross_attention.result",
}  # fmt: skip
"""Inputs that several modules of a layer read, by the name they are kept under."""
_THIN = ("lora_linear", "bottleneck", "dora_linear")
_WIDE = 4  # bytes of what is computed in float32 whatever the type


@dataclass(frozen=True, slots=True)
class Traits:
    """What of a model, beside its sites, decides what a step keeps.

    Attributes:
        weight_bytes: of all parameters and buffers as they are loaded.
        head_parameters: trained parameters of the task head.
        attention: name of the attention implementation.
        attention_dropout, hidden_dropout, inner_dropout: shares dropped from the softmax, from the
            result of each sub-layer and behind the activation.
        activation_tensors: how many tensors of its input's size the activation keeps.
        vocabulary_loss: whether the loss reads logits over the vocabulary for every token.
        tokens: length of a sequence where the model fixes it (images); 0: the batch does.
        stem_flops: of a sequence before the first layer (the patches of an image).
    """

    weight_bytes: int
    head_parameters: int = 0
    attention: str = "sdpa"
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    inner_dropout: float = 0.0
    activation_tensors: int = 1
    vocabulary_loss: bool = False
    tokens: int = 0
    stem_flops: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """A batch and where it runs: rows, tokens of each, type of the activations, device's name."""

    batch: int
    length: int
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a training step by what they hold.

    ``peak`` is reached either when the backward pass starts, where all activations are kept, or
    when it ends, where all gradients are.
    """

    weights: int
    adapter: int
    gradients: int
    optimiser: int
    activations: int
    temporaries: int
    last_temporaries: int

    @property
    def peak(self) -> int:
        """Largest sum at one time."""
        held = self.weights + self.adapter + self.optimiser
        begun = self.activations + self.temporaries
        return held + max(begun, self.gradients + self.last_temporaries)


def step_memory(plan: Plan, traits: Traits, step: Step) -> Memory:
    """Return what a step of ``plan`` holds."""
    return _Count(plan.table, traits, step, plan.modules).total(plan)


def adapter_rows(edit: EditPlan) -> int:
    """Rows that a function of learned tokens gives."""
    shapes = [t.shape for step in edit.program.steps for t in step.primitive.tensors()]
    return max((shape[-2] for shape in shapes[:1] if len(shape) > 1), default=1)


class _Count:
    """Collects kept tensors by name, so that what several modules keep counts once."""

    def __init__(
        self, table: SiteTable, traits: Traits, step: Step, modules: tuple[ModulePlan, ...]
    ) -> None:
        self.table, self.traits, self.step, self.modules = table, traits, step, modules
        prompts = [e for m in modules for e in m.edits if e.stage is Stage.TOKENS]
        self.length = (traits.tokens or step.length) + sum(map(adapter_rows, prompts))
        self.rows = step.batch * self.length
        self.size = element_size(step.dtype)
        self.kept: dict[str, int] = {}
        self.low = lowest(table, modules)
        # A CPU kernel keeps the factors of a dropout, others one byte an entry.
        self.noise = self.size if step.device == "cpu" else 1

    def total(self, plan: Plan) -> Memory:
        layers = self._layers()
        if self.low is not None:
            self._keep_backbone(layers)
            for module in self.modules:
                self._keep_edits(module)
        logits = self._logits()
        trained = plan.trainable_parameters + self.traits.head_parameters
        small = max(map(self._layer_temporaries, layers.values()), default=0)
        small = small if self.low is not None else 0
        return Memory(
            weights=self.traits.weight_bytes,
            adapter=_WIDE * sum(tensor.spec.size for tensor in plan.tensors),
            gradients=_WIDE * trained,
            optimiser=2 * _WIDE * trained,
            activations=sum(self.kept.values()) + logits,
            temporaries=max(2 * logits, small),
            last_temporaries=small,
        )

    def _layers(self) -> dict[tuple[str, int], dict[str, Site]]:
        found: dict[tuple[str, int], dict[str, Site]] = {}
        for site in self.table:
            if site.layer is not None:
                found.setdefault((site.stack, site.layer), {})[site.role] = site
        return found

    def _keep(self, at: Depth, name: str, bytes_: int) -> None:
        if self.low is not None and at >= self.low:
            self.kept[name] = max(self.kept.get(name, 0), bytes_)

    def _keep_backbone(self, layers: dict[tuple[str, int], dict[str, Site]]) -> None:
        for site in self.table:
            if site.role.startswith("norm."):
                # A norm without bias squares its input in float32.
                size = self.size if site.bias else _WIDE
                self._keep(depth(self.table, site), f"{site.label}.input",
                           self.rows * _norm_width(site, layers) * size)
        for (stack, layer), sites in layers.items():
            for role, rank in (("attention", 2.0), ("cross_attention", 6.5)):
                site = sites.get(role)
                if site is not None and site.attention is not None:
                    self._attention(site, site.attention, stack, layer, rank)
            self._feed_forward(sites, stack, layer)

    def _attention(
        self, site: Site, shape: AttentionShape, stack: str, layer: int, rank: float
    ) -> None:
        traits, key_rows = self.traits, self.length + self._prefix(site)
        at = part_depth(self.table, stack, layer, rank)
        queries = shape.heads * shape.head_width
        name = f"{stack}.{layer}.{site.role}"
        if self._fused:
            keys = self.step.batch * key_rows * shape.row_width
            statistics = self.step.batch * shape.heads * self.length * _WIDE
            self._keep(at, f"{name}.kernel", (self.rows * queries + keys) * self.size + statistics)
            self._keep(at, f"{name}.result", self.rows * queries * self.size)
        else:
            keys = 2 * self.step.batch * key_rows * queries
            entries = self.step.batch * shape.heads * self.length * key_rows
            each = self.size
            if traits.attention_dropout > 0:
                each += self.size + self.noise
            self._keep(at, f"{name}.kernel", (self.rows * queries + keys) * self.size)
            self._keep(at, f"{name}.softmax", entries * each)
        self._dropped(f"{name}.dropout", (stack, layer, rank + 0.5), site.d_out)

    @property
    def _fused(self) -> bool:
        """Whether one kernel computes attention; CPUs have none that drops entries."""
        if self.traits.attention == "eager":
            return False
        return self.step.device != "cpu" or self.traits.attention_dropout == 0

    def _prefix(self, site: Site) -> int:
        return sum(
            adapter_rows(edit) for module in self.modules for edit in module.edits
            if edit.stage is Stage.KEYS_VALUES and edit.write.site.label == site.label
        )

    def _feed_forward(self, sites: dict[str, Site], stack: str, layer: int) -> None:
        down = sites.get("ffn.down")
        if down is None:
            return
        at = part_depth(self.table, stack, layer, 10.0)
        # A gate keeps what it multiplies: its own result and the other branch.
        tensors = self.traits.activation_tensors + 2 * ("ffn.gate" in sites)
        name = f"{stack}.{layer}.ffn"
        self._keep(at, f"{name}.activation", tensors * self.rows * down.d_in * self.size)
        if self.traits.inner_dropout > 0:
            self._keep(at, f"{name}.inner_dropout", self.rows * down.d_in * self.noise)
        self._dropped(f"{name}.dropout", (stack, layer, 11.0), down.d_out)

    def _dropped(self, name: str, where: tuple[str, int, float], width: int) -> None:
        if self.traits.hidden_dropout > 0:
            at = part_depth(self.table, *where)
            self._keep(at, name, self.rows * width * self.noise)

    def _logits(self) -> int:
        """Log-probabilities of the vocabulary, in float32."""
        if not self.traits.vocabulary_loss:
            return 0
        head = next((site.d_out for site in self.table if site.role == "head"), 0)
        return self.rows * (head or self.table.vocabulary) * _WIDE

    def _layer_temporaries(self, sites: dict[str, Site]) -> int:
        """Gradients alive at once in the backward pass of the widest layer."""
        wide = max((site.d_in for role, site in sites.items() if role == "ffn.down"), default=0)
        width = self.table.hidden_size
        most = self.rows * (2 * wide * (1 + ("ffn.gate" in sites) / 2) + 2 * width) * self.size
        shape = next((s.attention for s in sites.values() if s.attention is not None), None)
        if shape is not None and not self._fused:
            scores = self.rows * shape.heads * self.length
            most = max(most, (3 * scores + 4 * self.rows * width) * self.size)
        return int(most)

    def _keep_edits(self, module: ModulePlan) -> None:
        for edit in module.edits:
            site, at = edit.write.site, edit_depth(self.table, edit)
            if edit.stage in (Stage.TOKENS, Stage.KEYS_VALUES, Stage.STREAMS):
                continue
            if site.kind is SiteKind.NORM and not site.bias and edit.stage.on_weight:
                self._keep(at, f"{site.label}.normed", self.rows * site.d_in * _WIDE)
            if site.kind in (SiteKind.NORM, SiteKind.EMBEDDING) and edit.stage.on_weight:
                continue
            if edit.stage is Stage.BIAS:
                continue
            if edit.formed or edit.write.needs_matrix:
                self._keep(at, f"{module.path}.formed", site.d_in * site.d_out * self.size)
                self._keep(at, _stream(edit), self.rows * site.d_in * self.size)
                continue
            self._keep_program(edit, at)

    def _keep_program(self, edit: EditPlan, at: Depth) -> None:
        """What the operations of a function on the stream read, each register once."""
        site, name = edit.write.site, edit.write.label
        first = site.d_out if edit.write.read is Port.OUTPUT else site.d_in
        tensors = len(edit.program.tensors)
        width, alias = {0: first}, {0: _stream(edit)}
        thin: list[int] = []
        for number, step in enumerate(edit.program.steps, tensors + 1):
            primitive = step.primitive
            read = next((i for i in step.inputs if i == 0 or i > tensors), None)
            if primitive.on_tensors or read is None or read not in width:
                continue
            width[number], alias[number] = primitive.width, f"{name}.{number}"
            link = primitive.link
            if link is not None and link.kind == "dropout":
                if not link.value:
                    alias[number] = alias[read]
                elif edit.write.op not in _THIN:
                    self._keep(at, f"{name}.{number}.noise", self.rows * width[read] * self.noise)
                continue
            if edit.write.op in _THIN:
                thin.append(primitive.width)
                continue
            self._keep(at, alias[read], self.rows * width[read] * self.size)
        if edit.write.op in _THIN and thin:
            self._keep(at, _stream(edit), self.rows * first * self.size)
            self._keep(at, f"{name}.hidden", self.rows * min(thin) * self.size)
        if edit.gate is not None or edit.stage is Stage.WEIGHT_NORM:
            self._keep(at, f"{name}.joined", self.rows * site.d_out * self.size)


def _stream(edit: EditPlan) -> str:
    """Name of the tensor that an edit reads, the same for all that read it."""
    site = edit.write.site
    on_weight = edit.stage.on_weight or edit.write.read is Port.INPUT
    shared = _STREAMS.get(site.role) if on_weight else None
    port = "input" if on_weight else edit.write.read.value
    return f"{site.stack}.{site.layer}.{shared}" if shared else f"{site.label}.{port}"


def _norm_width(site: Site, layers: dict[tuple[str, int], dict[str, Site]]) -> int:
    """Numbers a token: the norms of queries and keys run on every head."""
    if site.layer is None or site.role not in ("norm.query", "norm.key"):
        return site.d_in
    linear = layers[site.stack, site.layer].get(f"attention.{site.role.partition('.')[2]}")
    return linear.d_out if linear is not None else site.d_in
