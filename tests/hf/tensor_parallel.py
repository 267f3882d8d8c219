"""Run under torchrun: a patched model split over two processes must equal the whole model. Argument: its folder."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from transformers import DistributedConfig, LlamaForCausalLM

import posenc
from tests.hf import tiny

torch.set_num_threads(1)
split = LlamaForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_plan="auto")).eval()
ids = tiny.tokens(2, 80)
with torch.no_grad(), posenc.apply(split, "lampe", **tiny.LAMPE):
    logits = split(ids).logits
    generated = split.generate(ids[:1], do_sample=False, max_new_tokens=8)
if dist.get_rank() == 0:
    whole = LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()
    with torch.no_grad(), posenc.apply(whole, "lampe", **tiny.LAMPE):
        assert (whole(ids).logits - logits).abs().max() < 1e-4
        assert torch.equal(whole.generate(ids[:1], do_sample=False, max_new_tokens=8), generated)
    heads = split.model.layers[0].self_attn.q_proj.weight
    assert heads.to_local().shape[0] * dist.get_world_size() == whole.model.layers[0].self_attn.q_proj.weight.shape[0]
    print("equal")
dist.barrier()
dist.destroy_process_group()
