"""Apply a plan to a model in place, and undo it bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftref.backbone.hf.offload import runs_on
from peftref.backbone.site_table import SiteKind
from peftref.errors import BackboneError
from peftref.ir.edits import EditPlan
from peftref.ir.plan import Plan, PlannedTensor
from peftref.ir.types import Stage
from peftref.lowering.attachment import Attachment
from peftref.lowering.fold import Slot
from peftref.lowering.group import join_groups
from peftref.lowering.initialise import initial_tensor
from peftref.lowering.layers import carry_masks, collect_layers, put_seams
from peftref.lowering.matrix import stored_matrix
from peftref.lowering.original import original_class
from peftref.lowering.prefix import interface_name, register_interface
from peftref.lowering.projections import own_projections
from peftref.lowering.root import RootState, SwappedRoot, root_class
from peftref.lowering.state import CHILD, AdapterEdits, CallContext
from peftref.lowering.swap import (
    is_swapped,
    refuse_foreign,
    set_class,
    state_of,
    swap,
    unswap,
)
from peftref.lowering.weight import dense_weight
from peftref.spec.typology import Port

__all__ = ["Attachment", "attach_plan", "detach_plan", "refresh", "root_state", "swapped_modules"]


def root_state(model: nn.Module) -> RootState | None:
    """The root's adapter state, where the model has one."""
    return getattr(model, CHILD) if isinstance(model, SwappedRoot) else None


def attach_plan(model: nn.Module, plan: Plan, name: str, seed: int) -> Attachment:
    """Swap the modules that the plan names and give them their tensors.

    Raises:
        BackboneError: the model cannot take the plan; nothing is changed then.
    """
    root = root_state(model)
    if "." in name or not name or name.startswith("_"):
        raise BackboneError(f"adapter name {name!r}: must be non-empty, without dots")
    if root is not None and name in root.adapters:
        raise BackboneError(f"an adapter named {name!r} is attached already; give another name")
    attachment = Attachment(name, plan)
    first = root is None
    root = _swap_root(model) if root is None else root
    try:
        _attach(model, root, attachment, seed)
    except BaseException:
        detach_plan(model, attachment)
        raise
    if first:
        _freeze(model, root, attachment)
    return attachment


def _attach(model: nn.Module, root: RootState, attachment: Attachment, seed: int) -> None:
    plan, name = attachment.plan, attachment.name
    root.adapters[name] = AdapterEdits((), ())
    for module_plan in plan.modules:
        _swap_module(model, root, attachment, module_plan.path, module_plan.edits)
    for tensor in plan.tensors:
        _create(model, root, attachment, tensor, seed)
    for module_plan in plan.modules:
        module = attachment.modules[module_plan.path]
        sources = tuple(
            tuple(_source(attachment, t) for t in edit.tensors)
            for edit in module_plan.edits
        )
        state_of(module).adapters[name] = AdapterEdits(module_plan.edits, sources)
        state_of(module).changed()
        state_of(module).fold(module)  # refuses what does not go with other adapters
    join_groups(plan, attachment.modules)
    _switch_attention(model, root, attachment)
    _hide_from_save(model)
    carry_masks(model, root, attachment)
    collect_layers(model, root, attachment)
    put_seams(model, root, attachment)
    stacks = plan.table.layers
    root.guard.after = 1 if "decoder" not in stacks else 0
    refresh(model)


def _source(attachment: Attachment, tensor: str) -> tuple[bool, str]:
    path, local = attachment.tensors[tensor]
    return not path, local


def _swap_root(model: nn.Module) -> RootState:
    refuse_foreign(model, "the model")
    state = RootState(CallContext())
    model.add_module(CHILD, state)
    state.train(model.training)
    set_class(model, root_class(type(model)))
    state.guard.special = _special_tokens(getattr(model, "config", None))
    state.guard.encoder_decoder = bool(
        getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    )
    return state


def _special_tokens(config: Any) -> tuple[int, ...]:  # noqa: ANN401 - any configuration
    """Ids that the configuration names; padding is none of them."""
    found: list[Any] = []
    for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        value = getattr(config, name, None)
        found += value if isinstance(value, list | tuple) else [value]
    return tuple(sorted({token for token in found if isinstance(token, int)}))


def _swap_module(
    model: nn.Module,
    root: RootState,
    attachment: Attachment,
    path: str,
    edits: tuple[EditPlan, ...],
) -> None:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise BackboneError(
            f"the model has no module {path!r}; was the plan made for it?"
        ) from None
    if module is model:
        raise BackboneError("the model itself cannot carry an edit; select modules inside it")
    substitutes: set[str] = set()
    for edit in edits:
        if edit.write.site.kind is not SiteKind.LINEAR:
            substitutes |= {edit.write.site.tensor} if edit.stage.on_weight else set()
            substitutes |= {edit.write.site.bias_tensor} if edit.stage is Stage.BIAS else set()
        shape = edit.write.site.attention
        if edit.stage is Stage.KEYS_VALUES and shape is not None and shape.cache is not None:
            substitutes |= {shape.cache.windows} if shape.cache.windows else set()
    state = swap(module, path, root.context, tuple(substitutes))
    state.__dict__["root"] = root
    attachment.modules[path] = module
    for edit in edits:
        argument = edit.write.site.input
        if argument is not None and argument.module == path and argument.name:
            state.argument = argument.name
        if any(step.primitive.reads_projections for step in edit.program.steps):
            projections = own_projections(model, attachment.plan.table, edit.write.site)
            state.__dict__["projections"] = projections
        if _needs_carrier(edit):
            _swap_carrier(model, root, attachment, edit)


def _needs_carrier(edit: EditPlan) -> bool:
    beside = edit.stage is Stage.PARALLEL or edit.write.looks_back
    return edit.write.ends_a_span and beside


def _swap_carrier(
    model: nn.Module, root: RootState, attachment: Attachment, edit: EditPlan
) -> None:
    """Let the span's input reach the module that ends it.

    An enclosing module hands it in with its first argument; one beside it leaves it in a slot.
    """
    argument = edit.write.site.input
    if argument is None:
        return
    carrier = model.get_submodule(argument.module)
    state = swap(carrier, argument.module, root.context)
    state.__dict__["root"] = root
    if not edit.write.path.startswith(f"{argument.module}."):
        end = state_of(attachment.modules[edit.write.path])
        end.takes = end.takes or Slot()
        state.puts[edit.write.path] = end.takes
    elif state.carries in (None, argument.name):
        state.carries = argument.name
    else:
        raise BackboneError(f"{argument.module}: hands in {state.carries!r} already")
    state.adapters.setdefault(attachment.name, AdapterEdits((), ()))
    state.carriers.add(attachment.name)
    state.changed()
    attachment.modules[argument.module] = carrier


def _create(
    model: nn.Module, root: RootState, attachment: Attachment, tensor: PlannedTensor, seed: int
) -> None:
    spec = tensor.spec
    owner = model.get_submodule(tensor.owner) if tensor.owner else None
    local = tensor.name.removeprefix(f"{tensor.owner}.") if tensor.owner else tensor.name
    module = owner if owner is not None else next(iter(attachment.modules.values()))
    weight: Callable[[], Tensor] | None = None
    if owner is not None:
        weight = _frozen_weight(attachment, tensor, owner)
    reference = _reference(module)
    value = _start_of(model, attachment, tensor)
    if value is None:
        value = initial_tensor(spec, tensor.name, seed, weight)
    dtype = reference.dtype if value.is_floating_point() else value.dtype  # positions stay whole
    value = value.to(dtype).to(reference.device, copy=True)
    if reference.is_meta:
        value = value.to("meta")
    state = root if owner is None else state_of(owner)
    state.tree(attachment.name).put(
        local, value, trainable=spec.trainable, buffer=spec.buffer
    )
    attachment.tensors[tensor.name] = (tensor.owner, local)


def _start_of(
    model: nn.Module, attachment: Attachment, tensor: PlannedTensor
) -> Tensor | None:
    """The first values of the tensor that this one is the start of, made just before."""
    if tensor.spec.start_of is None:
        return None
    path, local = attachment.tensors[tensor.spec.start_of]
    state = state_of(attachment.modules[path]) if path else root_state(model)
    if state is None:
        raise TypeError(f"{tensor.name}: the model has no adapter state")
    return state.tree(attachment.name).fetcher(local)().detach().clone()


def _frozen_weight(
    attachment: Attachment, tensor: PlannedTensor, module: nn.Module
) -> Callable[[], Tensor]:
    def weight() -> Tensor:
        from peftref.lowering.program import gather_rows

        for plan in attachment.plan.modules:
            for edit in plan.edits:
                if tensor.name in edit.tensors:
                    full = stored_matrix(module, edit.write.site)
                    if edit.stage is Stage.TOKENS:
                        # Gemma scales its embeddings inside the module, and rows come behind it.
                        full = full * getattr(module, "embed_scale", 1.0)
                    return gather_rows(full, edit.write.site.rows, 0)
        return dense_weight(module)

    return weight


def _reference(module: nn.Module) -> Tensor:
    """A tensor that tells where adapter tensors belong and of which type; at least float32."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if parameter.is_floating_point():
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                device = runs_on(part) if parameter.is_meta else None
                return torch.empty(0, dtype=dtype, device=device or parameter.device)
    return torch.empty(0)


def _freeze(model: nn.Module, root: RootState, attachment: Attachment) -> None:
    """Switch gradients of the backbone off; task heads keep theirs."""
    heads = attachment.plan.table.head_modules
    for name, parameter in model.named_parameters():
        inside_head = any(name == h or name.startswith(f"{h}.") for h in heads)
        adapter = f".{CHILD}." in f".{name}"
        if parameter.requires_grad and not inside_head and not adapter:
            parameter.requires_grad_(False)
            root.frozen.append(parameter)


def _switch_attention(model: nn.Module, root: RootState, attachment: Attachment) -> None:
    """Use the prefix form of each attention implementation that a prefix meets."""
    edits = [e for m in attachment.plan.modules for e in m.edits
             if e.stage is Stage.KEYS_VALUES and _by_interface(e)]
    if not edits:
        return
    configs: dict[int, Any] = {}
    for edit in edits:
        module = attachment.modules[edit.write.path]
        config = getattr(module, "config", None)
        if config is None:
            raise BackboneError(f"{edit.write.label}: its attention does not use transformers' "
                                "attention interface; prefixes cannot be inserted")
        configs[id(config)] = config
        register_interface(config._attn_implementation)
    # Stacks of one model may hold copies of the config: all of them build masks by this name.
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            configs.setdefault(id(config), config)
    for config in configs.values():
        before = config._attn_implementation
        if before is None or before.startswith("peftref_"):
            continue
        register_interface(before)
        root.implementations.append((config, before))
        config._attn_implementation_internal = interface_name(before)


def _by_interface(edit: EditPlan) -> bool:
    shape = edit.write.site.attention
    return shape is not None and shape.calls_interface


def _hide_from_save(model: nn.Module) -> None:
    """Keep adapter keys out of a plain ``save_pretrained``."""
    keys = {k for k in model.state_dict() if f".{CHILD}." in f".{k}"}
    own: set[str] | None = getattr(type(model), "_keys_to_ignore_on_save", None)
    model.__dict__["_keys_to_ignore_on_save"] = {*(own or ()), *keys}


def detach_plan(model: nn.Module, attachment: Attachment) -> None:
    """Undo ``attach_plan``: classes, keys, ``requires_grad`` and attention as before."""
    name = attachment.name
    for path, module in attachment.modules.items():
        if not is_swapped(module):
            raise BackboneError(f"{path}: its class changed after attach; undo that first")
    for path, module in attachment.modules.items():
        state = state_of(module)
        state.adapters.pop(name, None)
        state.carriers.discard(name)
        state._modules.pop(name, None)
        state.changed()
        if not state.adapters:
            unswap(module, path)
    root = root_state(model)
    if root is None:
        return
    root.adapters.pop(name, None)
    root._modules.pop(name, None)
    refresh(model)
    if root.adapters:
        _hide_from_save(model)
        return
    for config, before in root.implementations:
        config._attn_implementation_internal = before
    for parameter in root.frozen:
        parameter.requires_grad_(True)
    model.__dict__.pop("_keys_to_ignore_on_save", None)
    del model._modules[CHILD]
    set_class(model, original_class(model))


def refresh(model: nn.Module) -> None:
    """Derive from the active edits what the root adds to and checks in every call."""
    root = root_state(model)
    if root is None:
        return
    guard = root.guard
    prompt, mask, prefix, reasons = 0, False, False, list[str]()
    guard.positions, collects, streams = {}, set[str](), False
    for path, module in swapped_modules(model):
        for _, edit in state_of(module).bound():
            algebra = edit.edit.write.algebra
            if edit.stage is Stage.TOKENS:
                guard.vocabulary = int(module.num_embeddings)  # pyright: ignore[reportArgumentType]
                prompt += edit.rows_of_tokens(torch.empty(0)).shape[-2]
            prefix = prefix or edit.stage is Stage.KEYS_VALUES
            write = edit.edit.write
            if write.positions is not None:
                guard.positions[f"{write.site.reads_stack}:{write.positions.key}"] = write.positions
            if write.read is Port.HIDDEN_STATES:
                collects.add(write.site.stack)
            streams = streams or write.streams is not None
            if algebra is not None and algebra.per_sample:
                mask = True
            if algebra is not None and algebra.mixes_tokens:
                reasons.append(f"{edit.edit.write.member} at {path}")
    guard.prompt, guard.needs_mask, guard.prefix = prompt, mask, prefix
    guard.collects, root.context.collects = bool(collects), frozenset(collects)
    guard.streams = streams
    guard.no_cache = (
        f"{reasons[0]} depends on all tokens of a row, which cached decoding does not see; "
        "disable it, or decode with whole forwards (use_cache=False)" if reasons else ""
    )


def swapped_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All swapped modules inside the model with their paths."""
    found = model.named_modules()
    return [(path, module) for path, module in found if module is not model and is_swapped(module)]
