"""Sampling with transformers.generate: tokens a second, fp32."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from peer_common import HEADS, HIDDEN, KV_HEADS, LAYERS, MLP, VOCAB, arguments, emit, timed


def main():
    """Times `repeats` calls of generate on random prompts; every row runs to its last token."""
    args = arguments(__doc__, batch=64, prompt=32, new=128, repeats=3)
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=MLP,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).eval()
    prompts = torch.randint(1, VOCAB, (args.batch, args.prompt))
    mask = torch.ones_like(prompts)

    def call():
        with torch.inference_mode():
            out = model.generate(
                prompts, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=args.new, min_new_tokens=args.new, eos_token_id=None,
            )  # fmt: skip
        assert out.shape == (args.batch, args.prompt + args.new)

    compile_s, best, middle = timed(call, args.repeats)
    emit("transformers", args.batch * args.new / best, "tokens/s", compile_s, seconds=middle)


if __name__ == "__main__":
    main()
