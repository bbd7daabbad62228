"""Attention without copies of keys and values, for sampling, judging and training alike.

Where several query heads share a key and value head, their queries are stacked instead of the keys and values
being repeated. Registered with transformers as ``"grouped"``; `benchmarks/` has what it gains.
"""

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask


def use(model) -> None:
    """Switch a loaded model to grouped attention, if its attention is one that transformers lets be replaced.

    Others keep what they were loaded with: those with capped logits or attention sinks, which need more than keys
    and values, and those that bring code of their own.
    """
    text = model.config.get_text_config()
    more = getattr(text, "attn_logit_softcapping", None) or any("sink" in name for name, _ in model.named_parameters())
    if text._attn_implementation == "sdpa" and not more and model._can_set_attn_implementation():
        model.set_attn_implementation("grouped")


def is_full(config, length: int) -> bool:
    """Whether every layer attends to all of up to `length` tokens, so that rows may be packed and keys be moved.

    A tree's mask means nothing to linear attention, convolutions or state spaces, and knows no window. Models that
    `use` left as they were may not take it at all.
    """
    text = config.get_text_config()
    if text._attn_implementation != "grouped":
        return False
    layers = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    return (
        layers <= {"full_attention", "sliding_attention"}
        and (not window or length <= window)
        and not getattr(text, "num_kv_shared_layers", 0)
    )


def grouped_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """softmax(query keys / sqrt(d) + mask) values; (batch, heads, tokens, d) in, (batch, tokens, heads, d) out.

    `attention_mask` is what is added to the logits, (batch, 1, tokens, keys). bfloat16's softmax computes in float32
    inside: converting its input, as transformers does, changes nothing and takes longer than all of the rest on a CPU.
    Many queries in float32, or on a GPU, are left to torch's fused attention, which is faster there.
    """
    batch, heads, n, d = query.shape
    if attention_mask is not None and attention_mask.dtype != query.dtype:
        # weights in bfloat16 without autocast, as under DeepSpeed: CUDA's fused attention takes no other mask, and
        # float32's least number would become minus infinity
        attention_mask = attention_mask.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)
    if attention_mask is None or n > 1 and (query.is_cuda or query.dtype == torch.float32):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    kv = key.shape[1]
    scaling = d**-0.5 if scaling is None else scaling
    logits = (query * scaling).reshape(batch, kv, heads // kv * n, d) @ key.transpose(2, 3)
    logits.view(batch, heads, n, -1).add_(attention_mask)
    weights = torch.nn.functional.dropout(logits.softmax(-1), dropout, training=module.training)
    return (weights @ value).view(batch, heads, n, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", eager_mask)
