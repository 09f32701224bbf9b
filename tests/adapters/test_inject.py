"""What a config's targets mean, and what attaching does to a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lory.adapters.inject import AdapterConfig, adapted_layers, attach_lora, match_targets
from lory.config import build
from lory.runtime import UsageError

Load = Callable[[str], Any]


def attach(model: nn.Module, **settings: Any) -> list[str]:
    """Paths of what was adapted."""
    return [match.name for match in attach_lora(model, AdapterConfig(rank=2, **settings))]


def test_all_linear_is_every_linear_layer_but_the_head(load_random: Load) -> None:
    assert len(attach(load_random("llama"))) == 14
    assert not any("head" in name or "wte" in name for name in attach(load_random("gpt2")))


def test_all_linear_has_the_stacked_experts_but_not_the_router(load_random: Load) -> None:
    names = attach(load_random("mixtral"))
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    assert "model.layers.1.mlp.experts.down_proj" in names
    assert not any("gate.weight" in name for name in names)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"targets": ["q_proj"]}, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        ({"targets": "q_proj"}, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        ({"targets": ["0.self_attn.q_proj"]}, {"0.self_attn.q_proj"}),
        ({"targets": r".*1\.mlp\.(up|down)_proj"}, {"1.mlp.up_proj", "1.mlp.down_proj"}),
        ({"targets": ["q_proj", "v_proj"], "layers": [1]}, {"1.self_attn.q_proj", "1.self_attn.v_proj"}),
        ({"targets": "q_proj", "layers": "0-1"}, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        ({"targets": "q_proj", "layers": "0, 1-1"}, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        ({"layers": "0", "exclude": ["self_attn", "up_proj"]}, {"0.mlp.gate_proj", "0.mlp.down_proj"}),
        ({"layers": "0", "exclude": r".*attn.*|.*gate.*|.*up.*"}, {"0.mlp.down_proj"}),
    ],
)
def test_targets_are_names_expressions_and_layers(
    settings: dict[str, Any], expected: set[str], load_random: Load
) -> None:
    assert {name.removeprefix("model.layers.") for name in attach(load_random("llama"), **settings)} == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"targets": ["q_prj"]},
            r"'q_prj', which no layer matches\. Did you mean 'q_proj'\? There are: .*q_proj \(2\)",
        ),
        ({"targets": ["q_proj", "norm"]}, "'norm', which is no layer that an adapter can go on"),
        ({"targets": "(q_proj"}, "a broken regular expression"),
        ({"exclude": ["nothing_like_it"]}, "adapter.exclude names 'nothing_like_it'"),
        ({"layers": "1-9"}, "names layer 2, which this model does not have: the last one is 1"),
        ({"targets": ["embed_tokens"], "layers": [0]}, "which no layer matches"),
        ({"targets": ["up_proj"], "modules_to_save": ["mlp"]}, "contains all of the targets"),
        ({"rank_pattern": {"qproj": 3}}, "'qproj', which none of the targets matches"),
        ({"modules_to_save": ["lm_hed"]}, r"modules_to_save names 'lm_hed'.*Did you mean 'lm_head'\?"),
        ({"targets": ["embed_tokens"], "init": "pissa"}, "is no linear layer, which adapter.init pissa needs"),
    ],
)
def test_what_matches_nothing_is_an_error_that_names_what_is_there(
    settings: dict[str, Any], message: str, load_random: Load
) -> None:
    with pytest.raises(UsageError, match=message):
        attach(load_random("llama"), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"dropout": 0.1}, "set it to 0, or name it in adapter.exclude"), ({"type": "dora"}, "use lora")],
)
def test_stacked_experts_refuse_what_they_cannot_do(settings: dict[str, Any], message: str, load_random: Load) -> None:
    with pytest.raises(UsageError, match=message):
        attach(load_random("mixtral"), **settings)
    attach(load_random("mixtral"), exclude=["experts"], **settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": "4-"}, "adapter.layers is '4-'"),
        ({"layers": "5-2"}, "adapter.layers is '5-2'"),
        ({"rank_pattern": {"q_proj": 0}}, "a rank is 1 or more"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha is positive"),
        ({"alpha_pattern": {"(q_proj": 1}}, "broken regular expression"),
        ({"lora_plus_ratio": 0}, "lora_plus_ratio"),
        ({"type": "lokr"}, "type"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(AdapterConfig, values, "config")


def test_every_field_has_a_description() -> None:
    assert all(field.description for field in AdapterConfig.model_fields.values())


def test_the_table_says_what_was_matched(load_random: Load) -> None:
    model = load_random("gpt2")
    config = AdapterConfig(
        rank=2,
        targets=["c_attn", "wte"],
        layers=None,
        rank_pattern={"wte": 3},
        modules_to_save=["ln_f"],
        type="dora",
    )
    table = {match.name: match for match in attach_lora(model, config)}
    wte, attention, whole = table["transformer.wte"], table["transformer.h.0.attn.c_attn"], table["transformer.ln_f"]
    assert (wte.kind, wte.shape, wte.rank, wte.parameters) == ("embedding", (61, 16), 3, 3 * (61 + 16) + 16)
    assert (attention.kind, attention.shape, attention.rank) == ("conv1d", (16, 48), 2)
    assert (whole.kind, whole.rank, whole.parameters) == ("LayerNorm", 0, 32)
    learnt = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert learnt == sum(match.parameters for match in table.values())


@pytest.mark.parametrize("settings", [{}, {"targets": ["wte", "lm_head", "c_attn"]}, {"type": "dora"}])
def test_attaching_shares_the_weights_and_keeps_the_keys(settings: dict[str, Any], load_random: Load) -> None:
    model = load_random("gpt2")
    before = dict(model.named_parameters(remove_duplicate=False))
    attach(model, **settings)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all("lora_" in name for name in after.keys() - before.keys())
    assert {name for name, parameter in after.items() if parameter.requires_grad} == after.keys() - before.keys()


def test_a_whole_module_that_was_tied_becomes_its_own(load_random: Load) -> None:
    model = load_random("gpt2")
    attach(model, targets=["c_attn"], modules_to_save=["lm_head"])
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert model.lm_head.weight.requires_grad
    assert not model.transformer.wte.weight.requires_grad


def test_targets_inside_of_a_whole_module_get_no_adapter(load_random: Load) -> None:
    names = attach(load_random("llama"), modules_to_save=["layers.1.mlp"])
    assert not any(name.startswith("model.layers.1.mlp.") for name in names)
    assert "model.layers.0.mlp.up_proj" in names


def test_layers_whose_weight_is_used_without_them_get_none() -> None:
    attention = nn.Sequential(nn.MultiheadAttention(4, 1), nn.Linear(4, 4))
    assert [target.path for target in match_targets(attention, "all-linear")] == ["1"]
    with pytest.raises(UsageError, match="which is no layer that an adapter can go on"):
        match_targets(attention, ["out_proj"])


def test_grouped_convolutions_get_none() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Conv1d(4, 4, 3))
    assert [target.path for target in match_targets(model, ["1"])] == ["1"]
    with pytest.raises(UsageError, match="which is no layer"):
        match_targets(model, ["0"])


def test_experts_learn_and_the_stack_itself_stays(load_random: Load) -> None:
    model = load_random("mixtral")
    attach(model, targets=["gate_up_proj", "down_proj"])
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B)
    experts = model.model.layers[0].mlp.experts
    before = experts.gate_up_proj.clone()
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(experts.gate_up_proj, before)
    assert experts.gate_up_proj.grad is None
    assert all(layer.lora_A.grad.abs().sum() > 0 for _, layer in adapted_layers(model))


def test_an_adapted_rwkv_answers_alike_in_train_and_eval_mode(load_random: Load) -> None:
    # transformers halves the weights of every rescale_every-th layer in eval mode, but not what adapters add
    model = load_random("rwkv")
    model.config.rescale_every = 1
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    attach(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-3)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B, std=0.3)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, model.train()(input_ids=ids).logits)
