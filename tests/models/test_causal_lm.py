"""Language models of transformers as a body and a head: whole logits of both, and heads that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.language_models import TINY, VOCABULARY_SIZE, sequences, tiny, tiny_network
from torch import nn

from kdcache.data.packing import token_batch
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.models.causal_lm import split_causal_lm
from kdcache.models.from_transformers_lm import load_causal_lm, new_causal_lm

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.05},
    "gemma3_text": {"head_dim": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "phi": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_body_and_head_have_the_logits_of_the_network(kind: str) -> None:
    model = tiny(kind, **KINDS[kind])
    for packed in (True, False):
        batch = token_batch(sequences([9, 4, 1, 7]), packed=packed)
        with torch.no_grad():
            inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
            logits = model.network(**inputs, attention_mask=batch.attention_mask).logits.flatten(0, 1)[batch.taught]
            torch.testing.assert_close(model.head.logits(model.hidden_states(batch)), logits, rtol=1e-5, atol=1e-6)
    assert model.packs


def test_the_scale_and_the_bound_are_those_of_the_configuration() -> None:
    assert tiny("cohere", **KINDS["cohere"]).scale == 0.25
    assert tiny("granite", **KINDS["granite"]).scale == pytest.approx(1 / 3)
    assert tiny("gemma2", **KINDS["gemma2"]).softcap == 0.05
    assert tiny().head.cut(50).weight.shape == (50, 16)


def test_the_network_stays_in_its_mode_and_is_not_changed() -> None:
    network = tiny().network.train()
    network.model.layers[0].eval()  # type: ignore[union-attr, index]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    split_causal_lm(network)
    assert network.training
    assert not network.model.layers[0].training  # type: ignore[union-attr, index]
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("OPTConfig", {"ffn_dim": 24, "word_embed_proj_dim": 16, "num_attention_heads": 2}),
        ("BloomConfig", {"n_layer": 1, "n_head": 2}),
        ("MambaConfig", {}),
    ],
)
def test_networks_that_ignore_positions_are_not_to_be_packed(config: str, options: dict[str, Any]) -> None:
    of_all = {key: TINY[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")}
    network = tiny_network(config, **of_all, bos_token_id=1, eos_token_id=2, **options)
    model = split_causal_lm(network)
    assert not model.packs
    two = sequences([3, 4])
    with pytest.raises(UsageError, match="does not keep packed sequences apart"):
        model.hidden_states(token_batch(two))
    assert len(model.hidden_states(token_batch(two, packed=False))) == len(token_batch(two).labels)


class Adapted(nn.Module):
    """A network in a wrapper as peft's, with one adapter in its body."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.base_model = network

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, **inputs: Any) -> Any:
        return self.base_model(**inputs)


def test_a_wrapper_as_of_peft_is_seen_through() -> None:
    wrapper = Adapted(tiny().network)
    model = split_causal_lm(wrapper)
    assert model.network is wrapper
    assert model.output is wrapper.base_model.lm_head


class TwoLayers(nn.Linear):
    """A head with a layer before it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.tanh())


def test_heads_that_are_not_linear_are_refused() -> None:
    network: Any = tiny().network
    network.lm_head = TwoLayers(16, VOCABULARY_SIZE, bias=False, dtype=torch.float64)
    with pytest.raises(UsageError, match="LlamaForCausalLM has the head TwoLayers"):
        split_causal_lm(network)
    network = tiny().network
    network.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits.tanh())
    with pytest.raises(UsageError, match="the logits of LlamaForCausalLM differ by"):
        split_causal_lm(network)
    with pytest.raises(UsageError, match="Linear has no body"):
        split_causal_lm(nn.Linear(2, 2))


def test_a_folder_is_loaded_with_its_weights(tmp_path: Path) -> None:
    saved: Any = tiny(dtype=torch.float32).network
    saved.save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path))
    assert all(value.equal(saved.state_dict()[name]) for name, value in model.network.state_dict().items())
    fresh = load_causal_lm(str(tmp_path), torch.bfloat16, trained=False)
    assert fresh.head.weight.dtype == torch.bfloat16
    assert not fresh.head.weight.float().equal(model.head.weight)


def test_folders_and_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="file not found"):
        load_causal_lm(str(tmp_path / "nothing"))
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(CorruptError, match="cannot read"):
        load_causal_lm(str(tmp_path))
    config.write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UsageError, match="holds a vit network, which is not a causal language model"):
        load_causal_lm(str(tmp_path))
    config.write_text(json.dumps({"model_type": "llama", **TINY}))
    with pytest.raises(MismatchError, match=r"the weights in .* cannot be loaded"):
        load_causal_lm(str(tmp_path))
    with pytest.raises(UsageError, match=r"no causal language model of the type 'lama', did you mean llama\?"):
        new_causal_lm("lama", {})
    with pytest.raises(UsageError, match=r"configuration of llama has no 'hiden_size', did you mean hidden_size\?"):
        new_causal_lm("llama", {"hiden_size": 8})
    with pytest.raises(UsageError, match="transformers cannot build a llama model of these options"):
        new_causal_lm("llama", {**TINY, "num_attention_heads": 3})
