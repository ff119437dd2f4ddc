"""Causal language models of transformers, made tiny."""

import inspect

import torch
from conftest import tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = len(tiny_tokenizer())
LARGEST = 30_000_000  # Parameters. What is larger could not be made tiny.

# By every name that a configuration uses for it.
SMALL = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": None,
    "is_decoder": True,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("attention_hidden_size", "mamba_d_ssm", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "num_experts", "num_local_experts", "n_routed_experts", "time_step_rank"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads", "linear_num_value_heads"), 2
    ),
    **dict.fromkeys(("head_dim", "v_head_dim", "state_size", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_d_state"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_expand", "mamba_n_groups"), 1),
    **dict.fromkeys(("dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
}


def made_tiny(name, **settings):
    """A model of an architecture with random weights; None if no settings known here make it small."""
    kind = CONFIG_MAPPING[name]
    taken = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__dataclass_fields__", {})}
    taken |= set(kind.attribute_map)
    if name == "mamba2":
        settings = {"head_dim": 8, "num_heads": 8, **settings}
    try:
        config = kind(**({key: value for key, value in SMALL.items() if key in taken} | settings))
        with torch.device("meta"):
            size = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            return None
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for each in model.parameters():
                # Weights so small that no token's logit stands out would hide a difference.
                if each.dim() > 1 and each.std() < 0.05:
                    each.mul_(8)
            model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    except Exception:  # Those of nearly two hundred architectures that want other settings.
        return None
    return model
