"""Tiny random checkpoints of the families PlainTune loads, for its tests.

make_checkpoint writes one to a folder, as published checkpoints of that family look, and returns
the transformers model; make_tokenizer writes only the tokenizer (family_tokenizers.py). Nothing is
downloaded; the same seed gives the same bytes.
"""

import copy
import json
from pathlib import Path

import torch
from family_tokenizers import TOKENIZERS, write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def _family(model_type, tokenizer, theta=10000.0, rope=None, drop=(), **config):
    """drop: config keys that old-style files of this family lack (their default must do)."""
    return dict(model_type=model_type, tokenizer=tokenizer, theta=theta, rope=rope or {},
                drop=drop, config=config)


_OLD_LLAMA = ("head_dim", "mlp_bias", "attention_bias")
FAMILIES = {
    "llama2": _family("llama", "llama2", num_key_value_heads=4, rms_norm_eps=1e-5,
                      drop=_OLD_LLAMA + ("num_key_value_heads", "tie_word_embeddings")),
    "llama3": _family("llama", "llama3", 5e5, LLAMA3_ROPE, rms_norm_eps=1e-5, drop=("head_dim",)),
    "llama3_1": _family("llama", "llama3_1", 5e5, LLAMA3_ROPE, rms_norm_eps=1e-5),
    "llama3_tied": _family("llama", "llama3_1", 5e5, dict(LLAMA3_ROPE, factor=32.0),
                           rms_norm_eps=1e-5, tie_word_embeddings=True),
    "tinyllama": _family("llama", "tinyllama", rms_norm_eps=1e-5, num_key_value_heads=1,
                         drop=_OLD_LLAMA + ("rope_theta",)),
    "smollm2": _family("llama", "smollm2", 1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
                       drop=("head_dim",)),
    "yi": _family("llama", "yi", 5e6, rms_norm_eps=1e-5, drop=_OLD_LLAMA),
    "yi1_5": _family("llama", "yi1_5", 5e6, drop=_OLD_LLAMA + ("rms_norm_eps",)),
    "deepseek": _family("llama", "deepseek", num_key_value_heads=4, drop=_OLD_LLAMA),
    "llama_bias": _family("llama", "llama2", attention_bias=True, mlp_bias=True),
    "llama_headdim": _family("llama", "llama2", head_dim=24),
    "llama_linear": _family("llama", "llama2", rope={"rope_type": "linear", "factor": 2.0}),
    "llama_dynamic": _family("llama", "llama2", rope={"rope_type": "dynamic", "factor": 2.0},
                             max_position_embeddings=32),
    "llama_yarn": _family("llama", "llama2", rope=YARN),
    "llama_yarn_all": _family("llama", "llama2", head_dim=32, rope=dict(
        YARN, beta_fast=4.0, beta_slow=0.5, mscale=1.5, mscale_all_dim=0.5, truncate=False)),
    "mistral": _family("mistral", "mistral", 1e6, sliding_window=8, drop=("head_dim",)),
    "mistral_nowindow": _family("mistral", "mistral", 1e6, sliding_window=None, head_dim=24),
    "qwen2": _family("qwen2", "qwen2_5", 1e6, sliding_window=8, max_window_layers=1),
    "qwen2_0": _family("qwen2", "qwen2", 1e6, tie_word_embeddings=True),
    "qwen2_window": _family("qwen2", "qwen2_5", 1e6, use_sliding_window=True, sliding_window=8,
                            max_window_layers=1),
    "qwen3": _family("qwen3", "qwen3", 1e6, head_dim=32, tie_word_embeddings=True),
    "qwen3_yarn": _family("qwen3", "qwen3", 1e6, YARN, head_dim=32),
}


def make_tokenizer(folder, family, style="old"):
    """Write the family's tokenizer (see write_tokenizer); return the tokenizers.Tokenizer."""
    return write_tokenizer(folder, FAMILIES[family]["tokenizer"], style)


def _randomize(model, seed, dtype):
    """Weights large enough that every part shows in the logits, rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        else:
            value = (0.05 if "embed_tokens" in name else 0.2) * noise
        parameter.data.copy_(value.to(dtype).float())


def make_checkpoint(folder, family, style="new", dtype=torch.float32, seed=0, shards=False):
    """Write a tiny checkpoint with its tokenizer; return the transformers model, fp32, eval mode.

    dtype: that of the stored weights (the model's are rounded to it). style "old": config.json
    as before transformers 5 (rope_theta, rope_scaling, torch_dtype, no layer_types).
    """
    folder, spec = Path(folder), FAMILIES[family]
    tokenizer = make_tokenizer(folder, family, style)
    names = TOKENIZERS[spec["tokenizer"]]
    ids = {role + "_token_id": tokenizer.token_to_id(names.get(role) or "")
           for role in ("bos", "eos", "pad")}
    if "stops" in names:  # Llama 3.1: a list of end tokens
        ids["eos_token_id"] = [tokenizer.token_to_id(token) for token in names["stops"]]
    settings = dict(vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=96,
                    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=128, rms_norm_eps=1e-6, **ids)
    settings.update(spec["config"])
    rope = {"rope_theta": spec["theta"], "rope_type": "default", **spec["rope"]}
    config = AutoConfig.for_model(spec["model_type"], rope_parameters=dict(rope), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _randomize(model, seed, dtype)
    stored = copy.deepcopy(model).to(dtype)
    stored.save_pretrained(folder, max_shard_size="150KB" if shards else "5GB")

    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    if style == "old":
        for key in ("rope_parameters", "layer_types", "dtype"):
            written.pop(key, None)
        # What old files say: an unused window is written all the same (Qwen2.5).
        written.update({key: value for key, value in settings.items() if "window" in key})
        scaling = dict(spec["rope"])
        if scaling and scaling["rope_type"] != "llama3":
            scaling["type"] = scaling.pop("rope_type")
        written.update(rope_theta=spec["theta"], rope_scaling=scaling or None,
                       torch_dtype=str(dtype).removeprefix("torch."))
        for key in spec["drop"]:
            written.pop(key, None)
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return model
