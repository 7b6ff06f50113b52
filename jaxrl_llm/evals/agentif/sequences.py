"""A constraint's evaluation on a response: a condition to be met, an extract, a question, code.

The working text begins as the response after its reasoning. A gate asks about it and ends the evaluation where it is not met; an LLM step
replaces it by the judge's reply; code judges it. What ends in a reply is YES or NO. Judges are asked of many constraints at once, and code
runs in the sandbox alone, each check in a process of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.evals.agentif.outcomes import Outcome, Result, yes_no
from jaxrl_llm.evals.agentif.rows import CODE, FUNCTION, GATE, Constraint
from jaxrl_llm.rewards.chat import Answer, ChatClient, Request
from jaxrl_llm.rewards.judge import Judge, JudgeConfig, Question, marked_messages
from jaxrl_llm.rewards.sandbox.pool import Job, Sandbox
from jaxrl_llm.rewards.sandbox.pool import Outcome as Ran
from jaxrl_llm.rewards.verdict import Status

PROMPTS = ("delimited", "published")
PLACE, MARK = "{response}", "RESPONSE"
THERE = f"(the text marked {MARK} below)"
EXTRACT = "Answer with what is asked for, and nothing else."
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


def spoken(text: str) -> str:
    """A response or reply without its reasoning: what follows the first </think>."""
    _, closed, after = text.partition("</think>")
    return after.strip() if closed else text


def read_bare(text: str) -> bool | None:
    """YES or NO where a reply, or its last line, is that and nothing else, but for stars, quotes and a full stop; None for anything else."""
    lines = [line for line in text.splitlines() if line.strip()]
    for part in (text, lines[-1] if lines else ""):
        word = re.fullmatch(r"[\s*\"'`]*(YES|NO)[\s*\"'`.。]*", part)
        if word:
            return word[1] == "YES"
    return None


@dataclass(frozen=True)
class Reply:
    """What a judge said: text as it came; choice of a YES or NO question by our reading; fault, why there is none that counts."""

    text: str | None = None
    choice: bool | None = None
    fault: str = ""


class Asker:
    """Asks the LLM steps of a server.

    prompts: "delimited" puts the benchmark's question in front and the response between markers that it cannot hold, and reads the verdict as
    `Judge` does; "published" fills the response into the question, as the published code does, and reads the bare YES or NO. mode: of the
    judge's verdict, see JudgeConfig.
    """

    def __init__(self, client: ChatClient, prompts: str = "delimited", mode: str = "line"):
        self.client, self.prompts = client, prompts
        self.judge = Judge(client, JudgeConfig(mode=mode))

    def ask(self, asked: Sequence[tuple[str, str, bool]], progress: Progress | None = None) -> list[Reply]:
        """One reply to each of (the step's question, the working text, whether it is YES or NO), in order. Raises RewardStopped."""
        requests = [self.request(*one) for one in asked]
        answers = self.client.ask_all(requests, progress)
        return [self._reply(answer, closed) for answer, (_, _, closed) in zip(answers, asked, strict=True)]

    def request(self, question: str, text: str, closed: bool) -> Request:
        """What is sent of one step."""
        if self.prompts == "published":
            if PLACE not in question:
                question += f"\n\nHere is model response: {PLACE}"
            return Request([{"role": "user", "content": question.replace(PLACE, text)}])
        task = question.replace(PLACE, THERE)
        if closed:
            return self.judge.request(Question(task, {MARK: text}))
        return Request(marked_messages(task, {MARK: text}, EXTRACT))

    def _reply(self, answer: Answer, closed: bool) -> Reply:
        if answer.fault is not None:
            return Reply(fault=f"{answer.fault}: {answer.reason}")
        said = spoken(answer.text)
        if not closed or self.prompts == "published":
            if not said.strip():
                return Reply(fault="the judge's answer is empty")
            choice = read_bare(said) if closed else None
            return Reply(said, choice, "" if choice is not None or not closed else f"the judge says {said[:60]!r}, not YES or NO")
        choice = max(answer.value, key=answer.value.__getitem__) == "YES"
        return Reply("YES" if choice else "NO", choice)


@dataclass
class _State:
    """An evaluation under way."""

    constraint: Constraint
    text: str
    step: int = 0
    said: str | None = None
    outcome: Outcome | None = None

    @property
    def last(self) -> bool:
        return self.step == len(self.constraint.steps) - 1


def evaluate(
    tasks: Sequence[tuple[Constraint, str | None]],
    asker: Asker | None,
    sandbox: Sandbox,
    *,
    exec_text: bool = True,
    progress: Progress | None = None,
) -> list[Outcome]:
    """One Outcome of each (constraint, response as the model gave it, None where there is none), in order.

    asker: None where no judge is named: what needs one is INFRASTRUCTURE. exec_text: whether code that runs text as a program is run, in the
    sandbox; else such constraints are BROKEN. Raises RewardStopped as `ChatClient.ask_all` does, and what the sandbox raises.
    """
    states = [_begin(constraint, response, exec_text) for constraint, response in tasks]
    while True:
        open_states = [state for state in states if state.outcome is None]
        if not open_states:
            return [state.outcome for state in states if state.outcome is not None]
        coded = [state for state in open_states if state.constraint.steps[state.step].kind == CODE]
        asked = [state for state in open_states if state.constraint.steps[state.step].kind != CODE]
        jobs = [Job(state.constraint.steps[state.step].text, FUNCTION, [state.text], group=hash(state.text)) for state in coded]
        for state, ran in zip(coded, sandbox.run(jobs) if jobs else [], strict=True):
            state.outcome = _of_code(ran, state.said)
        questions = [(step.text, state.text, step.kind == GATE or state.last) for state in asked for step in [state.constraint.steps[state.step]]]
        if asker is None:
            replies = [Reply(fault="no judge is named")] * len(questions)
        else:
            replies = asker.ask(questions, progress) if questions else []
        for state, reply in zip(asked, replies, strict=True):
            _take(state, reply)


def _begin(constraint: Constraint, response: str | None, exec_text: bool) -> _State:
    state = _State(constraint, "" if response is None else spoken(response))
    if constraint.broken:
        state.outcome = Outcome(Result.BROKEN, reason=constraint.broken)
    elif not exec_text and constraint.executes:
        state.outcome = Outcome(Result.BROKEN, reason="its code runs text as a program, which is switched off")
    elif response is None or not state.text.strip():
        state.outcome = Outcome(Result.UNANSWERED, reason="there is no response" if response is None else "the response is blank")
    return state


def _take(state: _State, reply: Reply) -> None:
    """Goes on with what a judge said."""
    step = state.constraint.steps[state.step]
    if step.kind == GATE:
        if reply.fault:
            state.outcome = Outcome(Result.INFRASTRUCTURE, None, f"the condition: {reply.fault}", reply.text)
        elif not reply.choice:
            state.outcome = Outcome(Result.CLOSED, None, "the judge says that the condition is not met", reply.text)
    elif state.last:
        published = None if reply.text is None else yes_no(reply.text)
        result = Result.INFRASTRUCTURE if reply.fault else Result.PASSED if reply.choice else Result.FAILED
        state.outcome = Outcome(result, published, reply.fault or "the judge says " + ("YES" if reply.choice else "NO"), reply.text)
    elif reply.fault or reply.text is None:
        state.outcome = Outcome(Result.INFRASTRUCTURE, None, f"the extract: {reply.fault}", reply.text)
    else:
        state.text = state.said = reply.text
    state.step += 1


def _of_code(ran: Ran, said: str | None) -> Outcome:
    verdict = ran.verdict()
    if verdict.status in (Status.PASS, Status.FAIL):
        return Outcome(Result.PASSED if verdict.status is Status.PASS else Result.FAILED, ran.value, verdict.reason, said)
    # The published code takes what a check returns for what it is worth: a text is searched, another value is true or false.
    published = yes_no(ran.value) if isinstance(ran.value, str) else ran.value
    return Outcome(Result.TIMEOUT if verdict.status is Status.TIMEOUT else Result.ERROR, published, verdict.reason, said)
