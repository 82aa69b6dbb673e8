"""PEMA: the map before the final norm, its two losses and their phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

import peftref
from peftref.training.encode import Collator
from tests.training.test_trainer import arguments

ROWS = [
    {"input_ids": list(range(n, n + 6 + n % 3)), "attention_mask": [1] * (6 + n % 3),
     "labels": list(range(n, n + 6 + n % 3))} for n in range(24)
]
SPEC = "pema(rank=6, dropout=0.0)"


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, initializer_range=0.2))


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2))


def final_norm(model: Any) -> nn.Module:
    return model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm


def tensors(made: Any) -> dict[str, Tensor]:
    """The four matrices by member and local name."""
    return {f"{t.member}.{t.spec.name}": made.tensors()[t.name] for t in made.plan.tensors}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_head_reads_a_narrow_map_of_the_state(make: Any) -> None:
    plain, model = make().double().eval(), make().double().eval()
    made = peftref.attach(model, SPEC)
    held = tensors(made)
    assert made.plan.trainable_parameters == 2 * 2 * 6 * 16
    assert not made.plan.properties.identity_at_init
    assert not made.plan.properties.mergeable
    for name, tensor in held.items():
        if "up" in name:
            assert not tensor.any()
        tensor.data = torch.randn(tensor.shape, dtype=torch.double)
    ids, states = torch.randint(0, 64, (2, 7)), []
    hook = final_norm(plain).register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        expected = plain(ids).logits
        hook.remove()
        with made.disabled():
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
        made_anew = states[0] @ held["prediction.down.weight"].T @ held["prediction.up.weight"].T
        expected = plain.get_output_embeddings()(final_norm(plain)(made_anew))
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-10, atol=1e-10)


class Watch(TrainerCallback):
    """Keeps the tensors after every step."""

    def __init__(self, made: Any) -> None:
        self.made, self.after = made, [{n: t.clone() for n, t in tensors(made).items()}]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append({n: t.detach().clone() for n, t in tensors(self.made).items()})


def test_reconstruction_trains_first_and_then_holds_the_encoder(tmp_path: Path) -> None:
    model = llama()
    made = peftref.attach(model, "pema(rank=6, dropout=0.0, kappa=0.2)")
    losses: list[tuple[float, float, float]] = []
    states: list[Tensor] = []
    watch = Watch(made)

    class Recording(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            hook = final_norm(model).register_forward_pre_hook(
                lambda _, given: states.append(given[0].detach()))
            total, outputs = super().compute_loss(model, inputs, return_outputs=True)
            hook.remove()
            own = tensors(made)
            encoder = "memory" if len(losses) < 30 else "prediction"
            f = states.pop()
            again = f @ own[f"{encoder}.down.weight"].T @ own["memory.up.weight"].T
            real = inputs["attention_mask"].bool()
            losses.append((float(total.detach()), float(outputs.loss.detach()),
                           float(F.mse_loss(again[real], f[real]).detach())))
            return (total, outputs) if kwargs.get("return_outputs") else total

    seen: list[float] = []
    adapted = peftref.trainer(Recording)

    class Outer(adapted):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            seen.append(float(loss))
            return loss

    Outer(args=arguments(tmp_path, max_steps=60, learning_rate=0.02), train_dataset=ROWS * 20,
          data_collator=Collator(0), adapted=made, callbacks=[watch]).train()
    for step, (total, (task, _, error)) in enumerate(zip(seen, losses, strict=True)):
        weight = 1.0 if step < 30 else 0.2 / 0.8
        assert total == pytest.approx(task + weight * error, rel=1e-4)
    start, middle, end = watch.after[0], watch.after[30], watch.after[60]
    same = {n: (torch.equal(start[n], middle[n]), torch.equal(middle[n], end[n])) for n in start}
    assert same == {
        "memory.down.weight": (False, True), "memory.up.weight": (False, True),
        "prediction.down.weight": (True, False), "prediction.up.weight": (True, False),
    }
    assert losses[29][2] < 0.5 * losses[0][2]
    assert losses[-1][1] < losses[30][1]
    assert losses[-1][2] < losses[30][2]


def test_what_cannot_reconstruct_is_refused() -> None:
    def composed(*procedures: Any) -> Any:
        return {
            "composition": "mine", "reference": {"paper": "none", "url": "https://example.org"},
            "members": [{"name": "one", "use": "pema_decoder", "with": {"rank": 4}},
                        {"name": "two", "use": "pema_decoder", "with": {"rank": 6}}],
            "couplings": [{"set_aside": {"members": ["one"]}}], "procedures": list(procedures),
        }

    for arguments_, message in [
        ({"encoder": "oen:down.weight", "decoder": "one:up.weight"}, "Did you mean 'one'"),
        ({"encoder": "one:down.weight", "decoder": "two:up.weight"}, "of the same modules"),
        ({"encoder": "one:down", "decoder": "one:up.weight"}, "of the same modules"),
        ({"encoder": "one:down.weight", "decoder": "one:up.weight", "during": ["late"]}, "phase"),
    ]:
        with pytest.raises(peftref.PeftRefError, match=message):
            peftref.attach(llama(), composed({"reconstruct": arguments_}))


def test_a_second_one_names_its_own_members() -> None:
    spec = peftref.load("pema + pema")
    entries = [p.arguments["encoder"] for p in spec.procedures if p.name == "reconstruct"]
    names = [member.name for member in spec.members]
    assert len(set(names)) == 4
    assert [str(entry).partition(":")[0] for entry in entries] == names
