"""Sampling with tunix's Sampler: tokens a second, fp32."""

import jax
from tunix.generate.sampler import CacheConfig, Sampler

from peer_common import HEADS, HIDDEN, KV_HEADS, LAYERS, arguments, emit, timed
from tunix_common import WordTokenizer, mesh, model, texts


def main():
    """Times `repeats` calls of the sampler on random prompts; an end token that comes by chance does not stop the loop."""
    args = arguments(__doc__, batch=64, prompt=32, new=128, repeats=3)
    with jax.set_mesh(mesh()):
        cache = CacheConfig(cache_size=args.prompt + args.new, num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HIDDEN // HEADS)
        sampler = Sampler(model(), WordTokenizer(), cache)
        prompts = texts(args.batch, args.prompt)
        seeds = iter(range(1000))

        def call():
            out = sampler(
                input_strings=prompts,
                max_generation_steps=args.new,
                max_prompt_length=args.prompt,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
                seed=next(seeds),
                return_logprobs=True,
            )
            jax.block_until_ready(out.tokens)
            assert max(len(row) for row in out.tokens) == args.new

        compile_s, best, middle = timed(call, args.repeats)
    emit("google-tunix", args.batch * args.new / best, "tokens/s", compile_s, seconds=middle)


if __name__ == "__main__":
    main()
