"""A GRPO step of TRL's GRPOTrainer: seconds for rollout, reward and update, fp32, no KL."""

import itertools
import os
import random
import tempfile
import time

os.environ.setdefault("WANDB_DISABLED", "true")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from peer_common import HEADS, HIDDEN, KV_HEADS, LAYERS, MLP, VOCAB, arguments, emit


def tokenizer():
    """One token a word, w3 to w2047; three special ones."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left")


def model():
    """The benchmark's model with random weights."""
    config = Qwen2Config(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=MLP,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def even_share(completions, **_):
    """A reward that costs nothing: the share of even words."""
    return [sum(int(word[1:]) % 2 == 0 for word in text.split() if word[:1] == "w") / max(len(text.split()), 1) for text in completions]


class Clock(TrainerCallback):
    """The times at which steps end."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **_):
        """One more step is done."""
        self.ends.append(time.perf_counter())


def main():
    """Trains for repeats + 2 steps; the first two warm up."""
    args = arguments(__doc__, prompts=8, samples=8, prompt=32, new=64, repeats=3)
    torch.manual_seed(0)
    rng = random.Random(0)
    steps = args.repeats + 2
    rows = [{"prompt": " ".join(f"w{rng.randrange(3, VOCAB)}" for _ in range(args.prompt))} for _ in range(args.prompts * steps)]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=args.prompts * args.samples,
            num_generations=args.samples,
            max_completion_length=args.new,
            generation_kwargs={"min_new_tokens": args.new},
            beta=0.0,
            num_iterations=1,
            temperature=1.0,
            top_k=0,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            max_steps=steps,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model(),
            reward_funcs=even_share,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            callbacks=[clock],
        )
        begin = time.perf_counter()
        trainer.train()
    times = [end - start for start, end in itertools.pairwise(clock.ends[1:])]
    assert len(times) == args.repeats
    emit("trl", min(times), "s", max(0.0, clock.ends[0] - begin - min(times)), seconds=sorted(times)[len(times) // 2])


if __name__ == "__main__":
    main()
