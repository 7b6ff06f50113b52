"""Languages and scripts, Chinese among them."""

from __future__ import annotations

import random

from jaxrl_llm.rewards.constraints.kinds import choice, count, share
from jaxrl_llm.rewards.constraints.language import LANGUAGES, SAMPLES, SCRIPTS, detect, language, other_sample, scripts
from jaxrl_llm.rewards.constraints.lengths import paragraphs
from jaxrl_llm.rewards.constraints.table import Found, between, constraint

script = choice(*SCRIPTS)
# Frequent characters whose simplified and traditional forms differ, pair by pair.
_PAIRS = (
    "这這个個们們来來时時说說会會为為国國学學对對开開还還没沒见見过過后後话話书書车車门門问問间間东東长長马馬鸟鳥鱼魚风風飞飛电電"
    "语語读讀写寫谁誰让讓认認识識请請谢謝应應当當从從众眾体體头頭发發爱愛听聽买買卖賣给給红紅绿綠蓝藍钱錢岁歲边邊远遠近近"
)
_SIMPLE = frozenset(one for one, two in zip(_PAIRS[::2], _PAIRS[1::2], strict=True) if one != two)
_TRADITIONAL = frozenset(two for one, two in zip(_PAIRS[::2], _PAIRS[1::2], strict=True) if one != two)


def _is_examples(rng: random.Random):
    code = rng.choice(list(SAMPLES))
    return {"language": code}, SAMPLES[code], rng.choice((other_sample(code, rng.choice), "123 ..."))


@constraint(
    "language:is", lambda language: f"Write in {LANGUAGES[language]}.", examples=_is_examples,
    derive=lambda response, rng: {"language": code} if (code := detect(response)) else None, language=language,
)  # fmt: skip
def _is(response: str, language: str) -> Found:
    found = detect(response)
    return found == language, f"looks {LANGUAGES.get(found or '', 'like no language')}, wanted {LANGUAGES[language]}"


def _paragraph_languages(rng: random.Random):
    one, two = rng.sample(["en", "de", "fr", "ru", "zh", "ja", "ar", "hi"], 2)
    return {"language": one}, f"{SAMPLES[one]}\n\n{SAMPLES[one]}", f"{SAMPLES[one]}\n\n{SAMPLES[two]}"


def _shared_language(response: str, rng: random.Random):
    found = {detect(block) for block in paragraphs(response)}
    code = found.pop() if len(found) == 1 else None
    return {"language": code} if code else None


@constraint(
    "language:every_paragraph", lambda language: f"Write every paragraph in {LANGUAGES[language]}.", examples=_paragraph_languages,
    derive=_shared_language, language=language,
)  # fmt: skip
def _every_paragraph(response: str, language: str) -> Found:
    blocks = paragraphs(response)
    known = {block: detect(block) for block in set(blocks)}
    found = [known[block] for block in blocks]
    other = [place for place, code in enumerate(found, 1) if code not in (language, None)]
    return language in found and not other, f"paragraphs in another language: {other[:20]}"


def _of_script(response: str, name: str) -> tuple[int, int]:
    counts = scripts(response)
    return counts[name], sum(counts.values())


def _script_examples(rng: random.Random):
    code, name, other = rng.choice((("ru", "Cyrillic", "en"), ("zh", "Han", "ko"), ("ar", "Arabic", "ru"), ("en", "Latin", "hi")))
    return {"script": name, "least": 0.9}, f"{SAMPLES[code]} 123", f"{SAMPLES[code]} {SAMPLES[other]}"


def _main_script(response: str, rng: random.Random):
    counts = scripts(response)
    name = max(counts, key=lambda found: counts[found], default="other")
    return None if name == "other" else {"script": name, "least": int(20 * counts[name] / sum(counts.values())) / 20}


@constraint(
    "language:script", "Write a share of at least {least} of your letters in {script} script.", examples=_script_examples, derive=_main_script,
    script=script, least=share,
)  # fmt: skip
def _script(response: str, script: str, least: float) -> Found:
    found, letters = _of_script(response, script)
    return letters > 0 and found >= least * letters, f"{found} of {letters} letters are {script}, wanted a share of {least}"


def _without_examples(rng: random.Random):
    code, name = rng.choice((("zh", "Latin"), ("en", "Han"), ("ru", "Latin"), ("ko", "Han")))
    return {"script": name}, SAMPLES[code], SAMPLES[code] + (" OK" if name == "Latin" else " 好")


@constraint(
    "language:without_script", "Use no {script} letters.", examples=_without_examples,
    derive=lambda response, rng: {"script": rng.choice([name for name in SCRIPTS if not scripts(response)[name]])}, script=script,
)  # fmt: skip
def _without_script(response: str, script: str) -> Found:
    found, _ = _of_script(response, script)
    return found == 0, f"{found} letters are {script}"


def _chinese_examples(rng: random.Random):
    number = len("".join(char for char in SAMPLES["zh"] if char.isalpha()))
    return {"low": number, "high": number + 5}, f"{SAMPLES['zh']} OK 12", SAMPLES["zh"][:-4]


def _chinese_of(response: str, rng: random.Random):
    found, _ = _of_script(response, "Han")
    return {"low": found * 9 // 10, "high": found + found // 10} if found else None


@constraint(
    "language:chinese_characters", "Write {range} Chinese characters.", examples=_chinese_examples, derive=_chinese_of,
    low=count, high=count,
)  # fmt: skip
def _chinese_characters(response: str, low: int, high: int) -> Found:
    return between(_of_script(response, "Han")[0], low, high, "Chinese characters")


def _form_examples(rng: random.Random):
    simple, traditional = "我们说话的时候，他来了。", "我們說話的時候，他來了。"
    return ({"form": "simplified"}, simple, traditional) if rng.random() < 0.5 else ({"form": "traditional"}, traditional, simple)


def _forms(response: str) -> tuple[int, int]:
    return sum(char in _SIMPLE for char in response), sum(char in _TRADITIONAL for char in response)


def _form_of(response: str, rng: random.Random):
    simple, traditional = _forms(response)
    if bool(simple) == bool(traditional):
        return None
    return {"form": "simplified" if simple else "traditional"}


@constraint(
    "language:chinese_form", "Write in {form} Chinese characters.", examples=_form_examples, derive=_form_of,
    form=choice("simplified", "traditional"),
)  # fmt: skip
def _chinese_form(response: str, form: str) -> Found:
    simple, traditional = _forms(response)
    right, wrong = (simple, traditional) if form == "simplified" else (traditional, simple)
    return right > 0 and wrong == 0, f"{simple} characters that are only simplified, {traditional} only traditional"
