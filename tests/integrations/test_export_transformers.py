"""Export of whole transformers models: PEFT over the base, and AutoPeft from the folder alone, have the model's outputs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from loradash import apply_dash, export_lora
from support.exported import config, outputs, peft, served_like, settings_of, trained

IDS = torch.arange(24).view(2, 12) % 89 + 3
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "num_labels": 3, "pad_token_id": 0}
T5 = {
    "vocab_size": 97,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
MOE = {**SIZES, "num_key_value_heads": 4}
SEQ2SEQ = {"input_ids": IDS, "decoder_input_ids": IDS}
WHOLE = {"trainable_modules": ["classifier"], "target_modules": ["query"]}


def build(name, settings, **changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, settings)(**changes)).eval()


MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES, {}, "CAUSAL_LM", None),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, {"exclude_modules": ["lm_head"]}, "CAUSAL_LM", None),
    "gpt2 and lm_head": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**GPT2, "tie_word_embeddings": False},
        {},
        "CAUSAL_LM",
        None,
    ),
    "gpt2 score": ("GPT2ForSequenceClassification", "GPT2Config", GPT2, {}, "SEQ_CLS", ["score"]),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, {"target_modules": ["q", "v", "wo"]}, "SEQ_2_SEQ_LM", None),
    "bert": ("BertModel", "BertConfig", SIZES, {}, None, None),
    "classes, head adapted": ("BertForSequenceClassification", "BertConfig", SIZES, {}, "SEQ_CLS", ["classifier"]),
    "classes, head trained": ("BertForSequenceClassification", "BertConfig", SIZES, WHOLE, "SEQ_CLS", ["classifier"]),
    "classes, head frozen": (
        "BertForSequenceClassification",
        "BertConfig",
        SIZES,
        {"exclude_modules": ["classifier"]},
        "SEQ_CLS",
        ["classifier"],
    ),
    "classes, head of layers": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**SIZES, "pad_token_id": 0},
        {},
        "SEQ_CLS",
        ["classifier"],
    ),
    "classes, part of the head trained": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**SIZES, "pad_token_id": 0},
        {"trainable_modules": ["classifier.out_proj"]},
        "SEQ_CLS",
        ["classifier"],
    ),
    "tokens": ("BertForTokenClassification", "BertConfig", SIZES, {}, "TOKEN_CLS", ["classifier"]),
    "questions": ("BertForQuestionAnswering", "BertConfig", SIZES, {}, "QUESTION_ANS", ["qa_outputs"]),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**MOE, "num_local_experts": 4},
        {"target_parameters": []},
        "CAUSAL_LM",
        None,
    ),
    "mixtral, one block": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**MOE, "num_local_experts": 4},
        {"target_modules": r"model\.layers\.1\..*", "exclude_modules": ["gate", "experts"]},
        "CAUSAL_LM",
        None,
    ),
}
AUTO = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    None: "AutoPeftModel",
}


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_models(tmp_path, monkeypatch, kind):
    """PeftModel over the base, and AutoPeftModel from the folder alone, give the trained model's outputs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name, settings, sizes, adapters, task, saved = MODELS[kind]
    build(name, settings, **sizes).save_pretrained(tmp_path / "base")
    base = getattr(pytest.importorskip("transformers"), name).from_pretrained(tmp_path / "base").eval()
    inputs = SEQ2SEQ if task == "SEQ_2_SEQ_LM" else {"input_ids": IDS}
    model = trained(apply_dash(copy.deepcopy(base), config(**adapters)))
    with warnings.catch_warnings():
        # No warning of ours may come; PEFT's own come afterwards.
        warnings.simplefilter("error", UserWarning)
        export_lora(model, tmp_path / "peft")
    served_like(base, model, tmp_path / "peft", inputs, 1e-4)
    written = settings_of(tmp_path / "peft")
    assert (written["task_type"], written["modules_to_save"]) == (task, saved)
    assert written["base_model_name_or_path"] == str(tmp_path / "base")
    assert (written["auto_mapping"] is None) == (task is not None)
    served = getattr(peft, AUTO[task]).from_pretrained(str(tmp_path / "peft")).eval()
    torch.testing.assert_close(outputs(served, inputs), outputs(model, inputs), rtol=1e-4, atol=1e-4)


def test_transformers_own_loader(tmp_path):
    base = build("BertForSequenceClassification", "BertConfig", **SIZES)
    model = trained(apply_dash(copy.deepcopy(base), config()))
    export_lora(model, tmp_path)
    base.load_adapter(str(tmp_path))
    torch.testing.assert_close(
        outputs(base.eval(), {"input_ids": IDS}), outputs(model, {"input_ids": IDS}), rtol=1e-4, atol=1e-4
    )


def test_models_that_take_no_tokens_have_no_task(tmp_path):
    sizes = ("layers", "attention_heads", "ffn_dim")
    audio = {
        "vocab_size": 97,
        "d_model": 32,
        "num_mel_bins": 8,
        "max_source_positions": 8,
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **{f"{half}_{size}": n for half in ("encoder", "decoder") for size, n in zip(sizes, (1, 4, 48), strict=True)},
    }
    base = build("WhisperForConditionalGeneration", "WhisperConfig", **audio)
    model = trained(apply_dash(copy.deepcopy(base), config(exclude_modules=["proj_out"])))
    inputs = {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": IDS}
    served_like(base, model, tmp_path, inputs, 1e-4)
    assert settings_of(tmp_path)["task_type"] is None


def test_a_head_that_cannot_be_kept_whole_has_no_task(tmp_path):
    """PEFT would keep every module whose name ends in "score" for this task."""
    base = build("GPT2ForSequenceClassification", "GPT2Config", **GPT2)
    base.transformer.subscore = base.score
    model = trained(apply_dash(copy.deepcopy(base), config(target_modules=["c_attn"])))
    served_like(base, model, tmp_path, {"input_ids": IDS}, 1e-4)
    assert (settings_of(tmp_path)["task_type"], settings_of(tmp_path)["modules_to_save"]) == (None, None)


def test_layers_that_peft_takes_for_experts_are_refused(tmp_path):
    """PEFT turns the names of dense and shared layers into those of the fused experts, and loses their adapters."""
    sizes = {
        **MOE,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    }
    base = build("DeepseekV3ForCausalLM", "DeepseekV3Config", **sizes)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate_proj: PEFT takes a layer of this name"):
        export_lora(trained(apply_dash(copy.deepcopy(base), config(target_parameters=[]))), tmp_path)
    without = config(target_parameters=[], exclude_modules=["gate_proj", "up_proj", "down_proj"])
    served_like(base, trained(apply_dash(copy.deepcopy(base), without)), tmp_path, {"input_ids": IDS}, 1e-4)
