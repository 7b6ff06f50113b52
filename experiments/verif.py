"""VerIF (Peng et al. 2025, arXiv 2506.09942): reinforcement learning for instruction following, rewarded by rules and by a judge.

    jaxrl-llm verif --config=configs/verif.py --workdir=runs/verif --config.policy.model=FOLDER --config.stories.source=stories.txt

The script reads as the method does:

  1. instructions: VerInstruct's rows, or made here by back-translation: a text of a story, rules that it keeps and a theme that it has,
     asked for in words. Held out are rules of types that training saw, and of types that it never saw;
  2. the policy learns the format from those texts (supervised);
  3. a judge for the soft constraints: any chat server, or a copy of the policy that learns to answer with known answers, measured on
     held-out ones and served on the loopback;
  4. GRPO, an arm for each reward: rules and judge, rules alone, judge alone; same prompts, same order, same noise in each seed;
  5. held-out responses before and after, by rules, by the truth of the themes and by the judge; loss on held-out stories; one report page.

Every stage leaves its result in the workdir and is skipped when it is found there, so the same command goes on where a stopped run left off.
Expected figures: docs/verif.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import models
from experiments._verif_checks import check
from jaxrl_llm import report
from jaxrl_llm.commands._policy import FOLDER as POLICY
from jaxrl_llm.commands.sft import batches_of
from jaxrl_llm.curation.processes import from_first, is_writer
from jaxrl_llm.data.prompts import PromptBatch, pad_answers, tokenise_prompts
from jaxrl_llm.data.sampler import ShuffledSchedule, epoch_order
from jaxrl_llm.data.sources import parse_fields, read_rows
from jaxrl_llm.data.story_prompts import read_stories
from jaxrl_llm.data.story_themes import THEMES, keeps_theme, story_pieces, themes_of
from jaxrl_llm.errors import UserError
from jaxrl_llm.evals.degeneration import row_nlls
from jaxrl_llm.evals.following import Followed, follow
from jaxrl_llm.report import verif as page
from jaxrl_llm.rewards import registry
from jaxrl_llm.rewards.judge import YES_NO, judge_messages
from jaxrl_llm.rewards.verif import VerifReward, soft_question
from jaxrl_llm.rewards.verinstruct import make_rows, read_requirements
from jaxrl_llm.run_dir import RunDir, write_json
from jaxrl_llm.runtime import parse_mesh
from jaxrl_llm.train.config import GRPOConfig, SFTConfig, from_mapping

# A judge that is taught sees the texts alone, without the words that are the same in every question and the lines of the markers.
JUDGE_TEMPLATE = (
    "{{ bos_token }}{% for part in messages[-1].content.split('\n\n')[1:-1] %}{% for line in part.split('\n') %}"
    "{% if not line.startswith('<<<') %}{{ line }}\n{% endif %}{% endfor %}{% endfor %}Answer:"
)
OF_ROWS = ("thinks", "untagged", "field", "sandbox")  # options of the reward that ask no judge
PACK = 256  # tokens of a row into which texts are packed in supervised training
JUDGE_TESTS = 400  # held-out questions that a taught judge is measured on


@dataclasses.dataclass
class Data:
    """train: rows that GRPO (and the policy's first lesson) sees. sets: held-out rows by name. texts, held_texts: pieces of stories, for the judge.
    kept_stories, stories: whole stories, to be trained on and held out. made: whether the truth of the soft constraints is known."""

    train: list[dict[str, Any]]
    sets: dict[str, list[dict[str, Any]]]
    texts: list[str]
    held_texts: list[str]
    kept_stories: list[str]
    stories: list[str]
    made: bool

    @property
    def truth(self) -> Callable[[str, str], bool] | None:
        """(soft constraint, text) -> whether it is kept, where that is known."""
        return keeps_theme if self.made else None


@dataclasses.dataclass
class Bench:
    """What the stages share."""

    config: Any
    root: Path
    mesh: Any
    data: Data
    tokenizer: Any
    cfg: models.ModelConfig
    base: Any  # parameters of the policy that was given
    rules: VerifReward  # decides the rules of held-out responses


def run(config: Any, workdir: str) -> None:
    """Runs the experiment; see configs/verif.py for the fields.

    Raises UserError where something that is needed is not named or cannot be used, and what the stages raise.
    """
    check(config)
    run_dir = RunDir(workdir, config, kind="verif", owns=("sft", "judge", "arms", "tables.md"))
    started, mesh = time.time(), parse_mesh(config.mesh)
    data = make_data(config)
    tokenizer = models.load_tokenizer(config.policy.model)  # before the weights, which take longer to come
    cfg, base = models.load(config.policy.model, dtype=config.policy.dtype, mesh=mesh)
    of_rows = {name: value for name, value in json.loads(config.judge.options).items() if name in OF_ROWS and name != "thinks"}  # `follow` knows
    bench = Bench(config, run_dir.path, mesh, data, tokenizer, cfg, base, VerifReward(use="rules", **of_rows))
    say(f"{len(data.train)} rows to train on; held out: " + ", ".join(f"{len(rows)} {name}" for name, rows in data.sets.items()))

    start = teach_format(bench)
    with judge_of(bench, start) as asked:
        measure_judge(bench, asked)
        results = {"base": measured(bench, "base", base, asked), "before": measured(bench, "before", start, asked)}
        for seed in config.seeds:
            for arm in config.arms:
                results[f"{arm}-seed{seed}"] = run_arm(bench, arm, seed, start, asked)
    if not run_dir.is_writer:
        return
    figures, content = page.build(config, run_dir.path, data.sets, results, seconds=time.time() - started)
    run_dir.summary(figures)
    report.save_data(run_dir.path, content)
    report.write_report(run_dir.path / "report.html", content)
    (run_dir.path / "tables.md").write_text(page.markdown(content), encoding="utf-8")
    print(f"{content['headline']}\nreport: {run_dir.path / 'report.html'}")


def say(text: str) -> None:
    """Prints once, however many processes there are."""
    if is_writer():
        print(text, flush=True)


# --- 1. instructions -------------------------------------------------------------------------------------------------


def make_data(config: Any) -> Data:
    """Reads VerInstruct's rows, or makes such rows from stories; held-out ones come from stories of their own."""
    s, d, made = config.stories, config.data, config.made
    stories = read_stories(s.source, parse_fields(s.fields), s.separator or None)[: None if d.source else d.limit] if s.source else []
    order = [stories[i] for i in epoch_order(len(stories), 0, d.seed)] if stories else []
    held, kept = order[: s.held_out], order[s.held_out :]
    if d.source:
        needed = ("prompt", "answer") if config.sft.steps else ("prompt",)
        rows = list(read_rows(d.source, parse_fields(d.fields), split=d.split, limit=d.limit, required=needed))
        rows = [rows[i] for i in epoch_order(len(rows), 0, d.seed)]
        if len(rows) <= d.held_out:
            raise UserError(f"{d.source} has {len(rows)} rows, too few to hold out {d.held_out}: lower config.data.held_out")
        return Data(rows[d.held_out :], {"held out": rows[: d.held_out]}, [], [], kept, held, made=False)
    if not kept:
        raise UserError(f"{len(stories)} stories are too few to hold out {s.held_out}: lower config.stories.held_out, or give more")

    def rows_of(texts: Sequence[str], types: Sequence[str], prefix: str, most: int | None = None) -> list[dict[str, Any]]:
        themed = [text for text in texts if themes_of(text)]
        found = make_rows(themed, types, (made.least_rules, made.most_rules), themes_of, made.template, d.seed)[:most]
        return [{**row, "id": f"{prefix}-{row['id']}"} for row in found]

    lengths = dict(pieces=s.pieces, least_words=s.least_words, most_words=s.most_words, seed=d.seed)
    texts = story_pieces(kept, **lengths)
    known = set(texts)  # stories repeat each other's sentences
    held_texts = [text for text in story_pieces(held, **lengths) if text not in known]
    train = rows_of(texts, made.seen, "train")
    sets = {name: rows_of(held_texts, types, name, d.held_out) for name, types in (("seen", made.seen), ("unseen", made.unseen))}
    for name, rows in {"training": train, **sets}.items():
        if len(rows) < (1 if name == "training" else d.held_out):
            raise UserError(
                f"the stories give {len(rows)} rows of {name} types, fewer than asked for: give more stories, hold out more of them "
                "(config.stories.held_out) or fewer prompts (config.data.held_out)"
            )
    return Data(train, sets, texts, held_texts, kept, held, made=True)


def prompts_of(bench: Bench, rows: Sequence[Mapping[str, Any]]) -> PromptBatch:
    """Rows as the policy is given them."""
    d = bench.config.data
    return tokenise_prompts(rows, bench.tokenizer, max_length=d.max_prompt_tokens, template=d.template, overflow=d.overflow)


# --- 2. the format ---------------------------------------------------------------------------------------------------


def teach_format(bench: Bench) -> Any:
    """The policy that the arms start from: fine-tuned on the texts that the instructions were made from."""
    c, folder = bench.config.sft, bench.root / "sft"
    if not c.steps:
        return bench.base
    if from_first(not (folder / "done.json").exists()):
        prompts = prompts_of(bench, bench.data.train)
        answers = [str(row["answer"]) for row in prompts.rows]
        end = [bench.cfg.eos_token_ids[0]]
        ids = bench.tokenizer(answers, add_special_tokens=False)["input_ids"]
        rows = [(p + a + end, len(p)) for p, a in zip(prompts.token_lists(), ids, strict=True)]
        plain = bench.data.kept_stories[: int(len(rows) * c.stories / (1 - c.stories))]
        rows += [(ids[: min(PACK, bench.cfg.max_position)], 1) for ids in (bench.tokenizer(plain)["input_ids"] if plain else [])]
        tuned(bench, folder, bench.cfg, rows, bench.tokenizer, c)
    return models.load(folder / POLICY, dtype=bench.config.policy.dtype, mesh=bench.mesh)[1]


def tuned(bench: Bench, folder: Path, cfg: models.ModelConfig, rows: list[tuple[list[int], int]], tokenizer: Any, c: Any) -> None:
    """Fine-tunes the policy that was given on rows (tokens, where the answer begins), and leaves it in folder/policy."""
    from jaxrl_llm.train.sft import train_sft

    tokens_NT, mask_NT = pad_answers(rows)
    if tokens_NT.shape[1] > cfg.max_position:
        raise UserError(
            f"{folder.name}: the longest text has {tokens_NT.shape[1]} tokens, the model's context is {cfg.max_position}: lower "
            "config.stories.most_words or config.made.most_rules"
        )
    schedule = ShuffledSchedule(len(rows), min(c.batch, len(rows)), bench.config.data.seed)
    batches = batches_of(tokens_NT, mask_NT, schedule, pack=max(tokens_NT.shape[1], min(PACK, cfg.max_position)))
    settings = SFTConfig(steps=c.steps, log_every=20, checkpoint_every=200)
    adam = dict(learning_rate=c.learning_rate, schedule="cosine", warmup_steps=min(20, c.steps // 10), final_share=0.05)
    settings = dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, **adam))
    head = {**dataclasses.asdict(settings), "batch": c.batch, "overwrite": bench.config.overwrite}
    run_dir = RunDir(folder, head, kind="sft", owns=(POLICY, "done.json"))
    params, history = train_sft(cfg, bench.base, batches, settings, run_dir, mesh=bench.mesh)
    models.save(folder / POLICY, cfg, params, tokenizer_from=tokenizer)
    if is_writer():
        write_json(folder / "done.json", {"rows": len(rows), "loss_first": history[0]["loss"], "loss_last": history[-1]["loss"]})
    from_first(0)  # the others wait until the first has written it


# --- 3. the judge ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def judge_of(bench: Bench, start: Any) -> Iterator[dict[str, Any] | None]:
    """The options by which the reward "verif" asks the judge; a judge of our own is taught, and served while this lasts. None where nobody is to
    be asked: no url, and rows whose truth is not known."""
    c = bench.config.judge
    options = {"show_instruction": c.show_instruction, "mode": c.mode, **json.loads(c.options)}
    if c.url or not bench.data.made:
        yield {"url": c.url, "model": c.model, **options} if c.url else None
        return
    folder = bench.root / "judge"
    if not (folder / "done.json").exists():
        teach_judge(bench, folder, start)
    with served(folder / POLICY, c.places, bench.cfg.max_position - 1) as url:
        yield {"url": url, "model": "judge", "workers": 2 * c.places, **options}


def teach_judge(bench: Bench, folder: Path, start: Any) -> None:
    """A copy of the policy that was given learns to answer with the first token of YES or NO whether a text keeps a theme: texts of stories, and of
    the policy that it is to judge."""
    c, data = bench.config.judge, bench.data
    sampled = int(c.sampled * c.steps * c.batch)
    texts: list[str] = []
    if sampled:
        rows = (data.train * math.ceil(sampled / len(data.train)))[:sampled]
        texts = respond(bench, start, rows, temperature=1.0, seed=2, name="texts for the judge")
    rng = np.random.default_rng(bench.config.data.seed)
    texts += [data.texts[i] for i in rng.integers(0, len(data.texts), c.steps * c.batch - sampled)]
    tokenizer = judge_tokenizer(bench)
    yes, no = answer_tokens(tokenizer)
    rows = []
    for sentence, text, kept in theme_questions(texts, rng):
        prompt = judge_prompt(tokenizer, sentence, text)
        rows.append((prompt + [yes if kept else no], len(prompt)))
    tuned(bench, folder, bench.cfg, rows, tokenizer, c)


def theme_questions(texts: Sequence[str], rng: np.random.Generator) -> list[tuple[str, str, bool]]:
    """A (theme, text, whether it is kept) for each text that is not blank, kept and not kept equally likely where the text allows it."""
    found = []
    for text in texts:
        kept = [sentence for sentence in THEMES if keeps_theme(sentence, text)]
        others = [sentence for sentence in THEMES if sentence not in kept]
        of = (kept or others) if rng.random() < 0.5 else (others or kept)
        if text.strip():
            sentence = of[rng.integers(len(of))]
            found.append((sentence, text, sentence in kept))
    return found


def judge_tokenizer(bench: Bench) -> Any:
    """The policy's tokenizer with the judge's chat template."""
    tokenizer = models.load_tokenizer(bench.config.policy.model)
    tokenizer.chat_template = JUDGE_TEMPLATE
    return tokenizer


def judge_prompt(tokenizer: Any, sentence: str, text: str) -> list[int]:
    """The tokens of the question, as the server makes them of the client's messages."""
    chat = tokenizer.apply_chat_template(judge_messages(soft_question([sentence], text), "logprobs"), tokenize=False, add_generation_prompt=True)
    return tokenizer(chat, add_special_tokens=False)["input_ids"]


def answer_tokens(tokenizer: Any) -> tuple[int, int]:
    """The first tokens in which the two answers differ."""
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in YES_NO)
    return next((a, b) for a, b in zip(yes, no, strict=False) if a != b)


@contextlib.contextmanager
def served(folder: Path, places: int, room: int) -> Iterator[str]:
    """The url of the judge in a folder, with room for questions of so many tokens: a thread of this process serves it on the loopback, as
    `jaxrl-llm serve` does."""
    import threading

    from jaxrl_llm.commands import serve
    from jaxrl_llm.config import load_config

    changes = {"model": str(folder), "name": "judge", "port": 0, "places": places, "max_prompt_tokens": room, "max_tokens": 1, "chunk": 1}
    server = serve.make_server(load_config("configs/serve.py", {name: str(value) for name, value in changes.items()}))
    threading.Thread(target=server.serve_forever, args=(0.05,), name="jaxrl-llm-judge", daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        serve.end(server, 1.0)


def measure_judge(bench: Bench, asked: Mapping[str, Any] | None) -> None:
    """How often the judge is right about held-out texts of stories, where the truth is known: judge.json."""
    path = bench.root / "judge.json"
    if path.exists() or not bench.data.made or asked is None:
        return
    questions = theme_questions(bench.data.held_texts[:JUDGE_TESTS], np.random.default_rng(1))
    rows = [{"id": str(i), "checkers": [f"[llm] {sentence}"], "functions": [""]} for i, (sentence, _, _) in enumerate(questions)]
    texts = [text for _, text, _ in questions]
    found = judged_follow(bench, rows, texts, asked)
    if is_writer():
        write_json(path, found)


# --- 4. GRPO ---------------------------------------------------------------------------------------------------------


def run_arm(bench: Bench, arm: str, seed: int, start: Any, asked: Mapping[str, Any] | None) -> dict[str, Any]:
    """Trains one arm and measures it; leaves its run directory with the trained policy."""
    from jaxrl_llm.train.loop import train_grpo

    config, name = bench.config, f"{arm}-seed{seed}"
    folder = bench.root / "arms" / name
    if not from_first(not (folder / "result.json").exists()):
        return json.loads((folder / "result.json").read_text())
    say(f"{name}: {config.arm_table[arm].about}")
    settings = dataclasses.replace(from_mapping(GRPOConfig, config.grpo.to_dict(), "grpo."), seed=seed)
    reward = arm_reward(config, arm, asked)
    rows = bench.data.train
    registry.validate_rows(reward, rows)
    prompts = prompts_of(bench, rows)
    schedule = ShuffledSchedule(len(prompts), config.batch_prompts, seed)
    head = {**dataclasses.asdict(settings), "arm": arm, "batch_prompts": config.batch_prompts, "overwrite": config.overwrite}
    run_dir = RunDir(folder, head, kind="grpo", owns=(POLICY, "result.json"))
    params, _ = train_grpo(bench.cfg, start, bench.tokenizer, prompts, reward, schedule, settings, run_dir, {}, mesh=bench.mesh)
    models.save(folder / POLICY, bench.cfg, params, tokenizer_from=config.policy.model)
    return measured(bench, name, params, asked, folder / "result.json")


def arm_reward(config: Any, arm: str, asked: Mapping[str, Any] | None) -> Any:
    """The reward of an arm."""
    use = config.arm_table[arm].use
    own = {"use": use, "combine": config.reward.combine, "rule_reduce": config.reward.rule_reduce}
    asked = asked or {}
    of_judge = {name: value for name, value in asked.items() if use != "rules" or name in OF_ROWS}
    return registry.get_reward("verif", **own, **of_judge)


# --- 5. what was learnt ----------------------------------------------------------------------------------------------


def measured(bench: Bench, name: str, params: Any, asked: Mapping[str, Any] | None, path: Path | None = None) -> dict[str, Any]:
    """Of a policy, on each held-out set: its greedy responses and what they follow, and the same of samples; nats and tokens of held-out stories."""
    path = path or bench.root / f"{name}.json"
    if not from_first(not path.exists()):
        return json.loads(path.read_text())
    found: dict[str, Any] = {"sets": {}, "sampled": {}}
    for set_name, rows in bench.data.sets.items():
        for kind, temperature in (("sets", 0.0), ("sampled", 1.0)):
            responses = respond(bench, params, rows, temperature, seed=1, name=f"{name}, {set_name}")
            kept = prompts_of(bench, rows).rows
            found[kind][set_name] = judged_follow(bench, kept, responses, asked) | {"responses": responses}
    found["nats"], found["tokens"] = story_loss(bench, params)
    if is_writer():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    return found


def respond(bench: Bench, params: Any, rows: Sequence[Mapping[str, Any]], temperature: float, seed: int, name: str) -> list[str]:
    """One response to each prompt, decoded a block at a time behind a progress bar."""
    from tqdm import tqdm

    from jaxrl_llm.train.rollout import decode_completions

    grpo, prompts = bench.config.grpo, prompts_of(bench, rows)
    texts: list[str] = []
    for at in tqdm(range(0, len(prompts), grpo.rollout_rows), desc=name, unit="block", leave=False, disable=None):
        block = prompts.take(np.arange(at, min(at + grpo.rollout_rows, len(prompts))))
        rollout = models.generate(
            bench.cfg, params, block.token_lists(), max_new_tokens=grpo.max_new_tokens, temperature=temperature, seed=seed + at,
            tokenizer=bench.tokenizer, max_rows=grpo.rollout_rows, mesh=bench.mesh,
        )  # fmt: skip
        texts += decode_completions(bench.tokenizer, rollout)
    return texts


def judged_follow(bench: Bench, rows: Sequence[dict[str, Any]], responses: Sequence[str], asked: Mapping[str, Any] | None) -> Followed:
    """What the responses follow, by rules, truth and judge."""
    from jaxrl_llm.train.rollout import judge

    judged: list[Any] | None = None
    if asked is not None and any(read_requirements(row).soft for row in rows):
        alone = PromptBatch(np.ones((len(rows), 1), np.int32), np.ones(len(rows), np.int32), [str(row["id"]) for row in rows], list(rows))
        judged = judge(registry.get_reward("verif", **{**asked, "use": "judge"}), alone, np.arange(len(rows)), responses)
    return follow(rows, responses, bench.rules, bench.data.truth, judged)


def story_loss(bench: Bench, params: Any) -> tuple[list[float], list[int]]:
    """(nats, tokens) of each held-out story under a policy, after its first token and as far as its context reaches."""
    stories = bench.data.stories
    if not stories:
        return [], []
    tokens = [ids[: min(bench.cfg.max_position, 256)] for ids in bench.tokenizer(stories)["input_ids"]]
    first = np.array([ids[:1] for ids in tokens], np.int32)
    heads = PromptBatch(first, np.ones(len(tokens), np.int32), [str(i) for i in range(len(tokens))], [{} for _ in tokens])
    rests = [ids[1:] for ids in tokens]
    nats = row_nlls(bench.cfg, params, heads, np.arange(len(tokens)), rests, batch_rows=64)
    return nats.tolist(), [len(rest) for rest in rests]
