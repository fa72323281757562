"""Logits of an adapted model as PEFT computes them, and of a merged directory as transformers does.

Usage: peft_logits.py BASE ADAPTER MERGED TOKENS.safetensors OUT.safetensors
"""
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

base_dir, adapter_dir, merged_dir, tokens_file, out_file = sys.argv[1:6]
tokens = load_file(tokens_file)["tokens"].long()
with torch.no_grad():
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    plain = base(tokens).logits.clone()
    adapted = PeftModel.from_pretrained(base, adapter_dir).eval()(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(merged_dir, dtype=torch.float32).eval()(tokens).logits
save_file(
    {"plain": plain.contiguous(), "adapted": adapted.contiguous(), "merged": merged.contiguous()}, out_file
)
