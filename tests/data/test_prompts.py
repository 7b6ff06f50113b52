"""Templates, the context limit and padding, against tokenizers small enough to check by hand."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxrl_llm.data.chats import answer_end, assistant_tokens
from jaxrl_llm.data.prompts import fill_template, pack_rows, tokenise_prompts
from jaxrl_llm.errors import UserError

CHAT = "{% for m in messages %}<u> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
WORDS = ["<pad>", "<s>", "</s>", "<u>", "<a>", "one", "two", "three", "four", "Question", "Answer", ":"]


def make_tokenizer(bos=True, eos=False, chat=True):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pattern = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    core.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=[("<s>", 1), ("</s>", 2)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = CHAT if chat else None
    return made


def rows_of(*prompts):
    return [{"id": f"r{i}", "prompt": prompt, "answer": "four"} for i, prompt in enumerate(prompts)]


def test_right_padding_and_lengths():
    batch = tokenise_prompts(rows_of("one two", "three"), make_tokenizer(), max_length=8, pad_to=5)
    assert batch.tokens_NT.tolist() == [[1, 5, 6, 0, 0], [1, 7, 0, 0, 0]]
    assert batch.lengths_N.tolist() == [3, 2] and batch.tokens_NT.dtype == np.int32
    assert batch.token_lists() == [[1, 5, 6], [1, 7]] and batch.ids == ["r0", "r1"]
    assert tokenise_prompts(rows_of("one two", "three"), make_tokenizer(), max_length=8).tokens_NT.shape == (2, 3)


def test_take_keeps_rows_and_width():
    batch = tokenise_prompts(rows_of("one two", "three", "four"), make_tokenizer(), max_length=8)
    taken = batch.take([2, 0])
    assert taken.ids == ["r2", "r0"] and [row["prompt"] for row in taken.rows] == ["four", "one two"]
    assert taken.token_lists() == [[1, 8], [1, 5, 6]] and taken.tokens_NT.shape == (2, 3)
    assert len(batch.take([])) == 0


def test_chat_template_has_one_start_and_opens_the_answer():
    batch = tokenise_prompts(rows_of("one two"), make_tokenizer(), max_length=9, template="chat")
    assert batch.token_lists() == [[3, 5, 6, 4]]
    row = {"id": "m", "prompt": "x", "messages": [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]}
    assert tokenise_prompts([row], make_tokenizer(), max_length=9, template="chat").token_lists() == [[3, 5, 3, 6, 4]]


def test_chats_keep_their_roles_or_it_is_said(caplog):
    rows = [{"id": name, "prompt": "one", "messages": [{"role": "user", "content": "one"}]} for name in "mn"]
    with pytest.raises(UserError, match="^prompt 'm' and 1 more: a chat, of which template=none would drop the roles: set the template to 'chat'"):
        tokenise_prompts(rows, make_tokenizer(), max_length=9)
    text = tokenise_prompts(rows, make_tokenizer(), max_length=9, template="{prompt}").token_lists()
    assert not caplog.text and text == tokenise_prompts(rows_of("one", "one"), make_tokenizer(), max_length=9).token_lists()
    for _ in range(2):
        assert tokenise_prompts(rows, make_tokenizer(chat=False), max_length=9).token_lists() == text
    assert caplog.text.count("template=none drops the roles, since this tokenizer has no chat template") == 1


def test_no_chat_template_is_one_clear_line():
    with pytest.raises(UserError, match="has no chat template: set the template to 'none'"):
        tokenise_prompts(rows_of("one"), make_tokenizer(chat=False), max_length=9, template="chat")


def test_format_template_reads_any_column_and_leaves_empty_braces():
    row = {"id": "r", "prompt": "one", "hint": "two"}
    assert fill_template("Q: {prompt} ({hint}) in \\boxed{} {{x}}", row) == "Q: one (two) in \\boxed{} {x}"
    with pytest.raises(UserError, match="names column 'promt'.*did you mean prompt"):
        fill_template("Q: {promt}", row)
    with pytest.raises(UserError, match="every row would become the same text"):
        fill_template("Question", row)
    batch = tokenise_prompts(rows_of("one"), make_tokenizer(), max_length=9, template="Question : {prompt} Answer :")
    assert batch.token_lists() == [[1, 9, 11, 5, 10, 11]]


def test_an_end_token_added_by_the_tokenizer_is_taken_off():
    batch = tokenise_prompts(rows_of("one two"), make_tokenizer(eos=True), max_length=9)
    assert batch.token_lists() == [[1, 5, 6]]


def test_a_row_that_was_read_is_named_by_its_place_too():
    class Placed(list):
        places = {"r0": "train.jsonl:7"}

    rows = Placed(rows_of("one two three four", "one two three"))
    with pytest.raises(UserError, match="^train.jsonl:7: prompt 'r0' has 5 tokens, longer than the 3"):
        tokenise_prompts(rows, make_tokenizer(), max_length=3)
    with pytest.raises(UserError, match="^train.jsonl:7: prompt 'r0' has no token"):
        tokenise_prompts(Placed(rows_of("")), make_tokenizer(bos=False), max_length=3)
    with pytest.raises(UserError, match="^prompt 'r1' has 4 tokens"):  # one that was made has no place
        tokenise_prompts(rows[1:], make_tokenizer(), max_length=3)


def test_overflow_policies():
    rows = rows_of("one two three four", "one")
    with pytest.raises(UserError, match="^prompt 'r0' has 5 tokens, longer than the 3"):
        tokenise_prompts(rows, make_tokenizer(), max_length=3)
    dropped = tokenise_prompts(rows, make_tokenizer(), max_length=3, overflow="drop")
    assert dropped.ids == ["r1"] and (dropped.dropped, dropped.truncated) == (1, 0)
    cut = tokenise_prompts(rows, make_tokenizer(), max_length=3, overflow="truncate")
    assert cut.token_lists() == [[1, 7, 8], [1, 5]] and (cut.dropped, cut.truncated) == (0, 1)
    bare = tokenise_prompts(rows, make_tokenizer(bos=False), max_length=3, overflow="truncate")
    assert bare.token_lists()[0] == [6, 7, 8]
    with pytest.raises(UserError, match="no prompt is left: all 1"):
        tokenise_prompts(rows[:1], make_tokenizer(), max_length=3, overflow="drop")
    with pytest.raises(UserError, match="the rows are none"):
        tokenise_prompts([], make_tokenizer(), max_length=3)
    with pytest.raises(UserError, match="overflow 'trunc': did you mean truncate"):
        tokenise_prompts(rows, make_tokenizer(), max_length=3, overflow="trunc")


def test_impossible_widths_and_empty_prompts():
    with pytest.raises(UserError, match="pad_to 2 is shorter than the longest prompt, 3"):
        tokenise_prompts(rows_of("one two"), make_tokenizer(), max_length=9, pad_to=2)
    with pytest.raises(UserError, match="max_length 0"):
        tokenise_prompts(rows_of("one"), make_tokenizer(), max_length=0)
    with pytest.raises(UserError, match="prompt 'r0' has no token"):
        tokenise_prompts(rows_of(""), make_tokenizer(bos=False), max_length=9)


def test_real_tokenizer(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(assets / "checkpoints" / "stories260k"))
    batch = tokenise_prompts(rows_of("Once upon a time"), tokenizer, max_length=64)
    assert batch.tokens_NT[0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(batch.token_lists()[0], skip_special_tokens=True) == "Once upon a time"


def texts(seed, count=30, width=12):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, count)
    return [(rng.integers(1, 50, n).tolist(), rng.random(n) < 0.5) for n in lengths]


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_row_whole(seed):
    rows, width = texts(seed), 12
    tokens, mask, segments = pack_rows(rows, width)
    assert len(tokens) < len(rows) and (segments >= 0).mean() > 0.85
    found = []
    for row, counts, numbers in zip(tokens, mask, segments, strict=True):
        assert (np.diff(numbers[numbers >= 0]) >= 0).all() and (numbers[(numbers >= 0).sum() :] == -1).all()
        assert not counts[numbers < 0].any()
        found += [(row[numbers == s].tolist(), counts[numbers == s].tolist()) for s in range(numbers.max() + 1)]
    first_uncounted = [(row, [False, *counts[1:].tolist()]) for row, counts in rows]
    assert sorted(found) == sorted(first_uncounted)


def test_a_row_wider_than_the_packed_ones_is_refused():
    with pytest.raises(ValueError, match="row 1 has 3 tokens, over the width of 2"):
        pack_rows([([1], [True]), ([1, 2, 3], [True] * 3)], 2)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }} <|im_end|>{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }} <|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }} <|im_end|>{% endif %}{{ ' ' }}{% endfor %}"
)
# As Qwen3 does with reasoning: a turn is shorter once another follows.
REWRITES = "{% for m in messages %}{{ m.role }} {% if loop.last %}thought {% endif %}{{ m.content }} {% endfor %}"


def chat_tokenizer(template):
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system", "thought", *"abcde"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template)


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marked"])
def test_the_assistants_tokens_of_a_chat(template):
    """Both turns with their end, not the roles; a conversation of several turns, one that ends with the user too."""
    tokenizer = chat_tokenizer(template)
    messages = chat(("system", "a"), ("user", "b c"), ("assistant", "c d"), ("user", "e"), ("assistant", "a"))
    tokens, counts = assistant_tokens(messages, tokenizer, "row 1")
    assert tokenizer.convert_ids_to_tokens(np.array(tokens)[counts].tolist()) == ["c", "d", "<|im_end|>", "a", "<|im_end|>"]
    assert tokens == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    tokens, counts = assistant_tokens(messages[:4], tokenizer, "row 1")
    assert tokenizer.convert_ids_to_tokens(np.array(tokens)[counts].tolist()) == ["c", "d", "<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (None, [("user", "a"), ("assistant", "b")], "no chat template"),
        (CHATML, [("user", "a")], "rows.jsonl:3 has no turn of the assistant.*roles are user"),
        (REWRITES, [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")], "rows.jsonl:3: the chat template rewrites message 2"),
        ("{{ raise_exception('no {% generation %} of yours') }}", [("assistant", "b")], "rows.jsonl:3: the chat template refuses it: no "),
        ("{{ messages[0].content }} {% generation %}{% endgeneration %}", [("assistant", "b")], "rows.jsonl:3: .*marks none"),
        ("{{ raise_exception('roles must alternate') }}", [("user", "a"), ("assistant", "b")], "rows.jsonl:3: .*roles must alternate"),
    ],
)
def test_chats_that_cannot_be_masked_are_named(template, turns, message):
    with pytest.raises(UserError, match=message):
        assistant_tokens(chat(*turns), chat_tokenizer(template), "rows.jsonl:3")


def test_an_answer_ends_as_its_template_writes_it():
    """Of several tokens that a model stops at, that of the template; of a base model, one at which it does not stop."""
    tokenizer = chat_tokenizer(CHATML)
    a, end = tokenizer.convert_tokens_to_ids(["a", "<|im_end|>"])
    assert answer_end(tokenizer, (a, end), "chat") == [end]
    assert answer_end(tokenizer, (a, end), "none") == answer_end(tokenizer, (a, end), "{prompt} =") == [a]
    assert answer_end(tokenizer, (a,), "chat") == [a]  # as nothing says that <|im_end|> is more than a word
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert answer_end(tokenizer, (a,), "chat") == answer_end(tokenizer, (), "chat") == [end]
    two = chat_tokenizer("{% for m in messages %}{{ m.role }} {{ m.content }} b <|im_end|> a {% endfor %}")
    assert two.convert_ids_to_tokens(answer_end(two, (end,), "chat")) == ["b", "<|im_end|>"]
    assert answer_end(chat_tokenizer("{% for m in messages %}{{ m.content }} {% endfor %}"), (), "chat") == []
    with pytest.raises(UserError, match="a question with an answer: the chat template refuses it: no"):
        answer_end(chat_tokenizer("{{ raise_exception('no') }}"), (a,), "chat")
