"""Rows of token ids as a model saw them: BOS once, no other special token added; which ids are special."""

from jaxrl_llm.data.lab_world import build_tokenizer, vocabulary
from jaxrl_llm.data.texts import special_tokens, token_rows

WORDS = [word for word in vocabulary() if word.isalpha()]


def test_rows_open_with_bos_once_and_special_tokens_in_a_text_are_those():
    tokenizer = build_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    one, two = tokenizer.convert_tokens_to_ids(WORDS[:2])
    texts = [f"{WORDS[0]} {WORDS[1]}", f"<bos> {WORDS[1]}", f"{WORDS[0]} <eos> {WORDS[1]}", ""]
    assert token_rows(texts, tokenizer) == [[bos, one, two], [bos, two], [bos, one, eos, two], [bos]]
    tokenizer.bos_token = None
    assert token_rows(["", WORDS[0]], tokenizer) == [[], [one]]


def test_special_tokens_are_those_beside_bos():
    tokenizer = build_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<unk>"])
    assert special_tokens(tokenizer) == sorted(ids) and tokenizer.bos_token_id not in special_tokens(tokenizer)


def test_bos_that_is_eos_is_special_wherever_it_stands():
    tokenizer = build_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    assert tokenizer.eos_token_id in special_tokens(tokenizer)
