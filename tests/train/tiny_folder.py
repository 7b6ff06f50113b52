"""A checkpoint folder and rows for it, small enough for tests of whole verbs."""

import json

import tiny_preferences as prefs
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

import models

WORDS = ["<pad>", "</s>", *"0123456789", "+", "=", "a", "b"]


def write(folder):
    """(the model's folder, a jsonl file of sums: question, good, bad) below `folder`."""
    core = Tokenizer(token_models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    models.save(folder / "tiny", prefs.CONFIG, prefs.params(), tokenizer_from=tokenizer)
    rows = [{"question": f"{a} + {b} =", "good": str(a + b), "bad": str(9 - a)} for a in range(4) for b in range(4)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "tiny", folder / "sums.jsonl"
