"""VerIF (Peng et al. 2025, arXiv:2506.09942): a reward for following instructions, of rules that code decides and constraints that a judge decides.

With h_1 .. h_m in {0, 1} the rules of a row and q in [0, 1] the judge's answer to all its soft constraints at once,

    rule term r = mean of h (rule_reduce "mean"), or 1 where all h are 1, else 0 ("all");   r = 1 without rules
    reward      = r q ("product"), or (r + q) / 2 ("average");                              q = 1 where the judge is not asked

"product" with "mean" is what the authors' code computes, "average" with "all" what the paper's section 3.1 says. In their code a checker that
raises, a judge that is away and a response that fails are all 0, and one exception makes the whole batch -1; here they are ERROR, TIMEOUT and
INFRASTRUCTURE, which are masked and counted.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from jaxrl_llm.errors import UserError, nearest
from jaxrl_llm.rewards.constraints.table import evaluate
from jaxrl_llm.rewards.judge import Judge, Question, make_judge
from jaxrl_llm.rewards.sandbox.pool import Job, Limits, Sandbox
from jaxrl_llm.rewards.verdict import RewardInput, Status, Verdict
from jaxrl_llm.rewards.verinstruct import ENTRY, Requirements, look_over, read_requirements

COMBINES = ("product", "average")
RULE_REDUCES = ("mean", "all")
USES = ("both", "rules", "judge", "judge_all")
UNTAGGED = ("report", "judge", "error")
THOUGHTS_END = "</think>"
TASK = (
    "Decide whether RESPONSE, which was written to the instruction, follows every one of CONSTRAINTS. YES: it follows all of them. NO: it breaks "
    "at least one, if only in part."
)
TASK_ALONE = "Decide whether RESPONSE does all that INSTRUCTION asks for. YES: it does. NO: it leaves out or breaks at least one of its demands."


def soft_question(soft: Sequence[str], response: str, instruction: str | None = None) -> Question:
    """The one question that is asked about all soft constraints of a row."""
    listed = soft[0] if len(soft) == 1 else "\n".join(f"{n}. {text}" for n, text in enumerate(soft, 1))
    shown = {} if instruction is None else {"INSTRUCTION": instruction}
    return Question(TASK, {**shown, "CONSTRAINTS": listed, "RESPONSE": response})


class VerifReward:
    """The reward "verif". PASS means that every rule holds and the judge, where it is asked, says YES; the score is the reward above.

    combine, rule_reduce: see the head of this file. use: "both"; the paper's ablations "rules" (only code), "judge" (only the soft constraints)
    and "judge_all" (the judge decides the rules too, no code runs); a row with nothing of what is used is NOT_APPLICABLE. A blank response fails.
    judge_always: ask the judge, about the instruction alone, where a row has no soft constraint, as the authors' code does.
    show_instruction: whether the judge sees the prompt. thinks: every response is to reason first, so that one without </think> has no answer and
    fails; what stands before the last </think> is never judged.
    untagged: checkers that are neither "[rule]" nor "[llm]" are counted and left out ("report"), asked of the judge ("judge") or refused ("error").
    field: the column of constraints by name. sandbox: of `Sandbox` and its `Limits`, by name, for rules that come as Python.
    url, model and further options: the judge's, as of `JudgeReward`; not needed with use "rules".
    Raises UserError for values that are not known; RewardStopped once the judge's error budget is spent.
    """

    def __init__(
        self,
        url: str = "",
        model: str = "",
        combine: str = "product",
        rule_reduce: str = "mean",
        use: str = "both",
        judge_always: bool = False,
        show_instruction: bool = True,
        thinks: bool = False,
        untagged: str = "report",
        field: str = "constraints",
        sandbox: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        for name, value, known in (
            ("combine", combine, COMBINES), ("rule_reduce", rule_reduce, RULE_REDUCES), ("use", use, USES), ("untagged", untagged, UNTAGGED),
        ):  # fmt: skip
            if value not in known:
                raise UserError(f"reward verif: {name} is {value!r}: {nearest(str(value), known)}")
        if use != "rules" and not url:
            raise UserError("reward verif: no url of a judge: give url and model of an OpenAI-compatible server, or use='rules'")
        self.combine, self.rule_reduce, self.use, self.judge_always = combine, rule_reduce, use, judge_always
        self.show_instruction, self.thinks, self.untagged, self.field = show_instruction, thinks, untagged, field
        self.judge: Judge | None = None if use == "rules" else make_judge("verif", url, model, options)
        if use == "rules" and options:
            raise UserError(f"reward verif has no parameter {next(iter(options))!r} with use='rules', where no judge is asked")
        self._sandbox_options, self._sandbox = _sandbox_options(sandbox or {}), None

    def validate_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Reads every row, says what is left out, and opens the sandbox where rules come as Python: to be called before a run starts. Raises
        UserError for the first row that is ill-formed, and where the sandbox cannot be closed on this host."""
        counts, first = look_over(rows, self.field)
        if counts["untagged"] and self.untagged != "judge":
            told = f"{counts['untagged']} of the checkers in {counts['rows']} rows are tagged neither [rule] nor [llm], the first {first}"
            if self.untagged == "error":
                raise UserError(f"reward verif: {told}: tag them, or let them be left out (untagged='report') or asked of the judge ('judge')")
            logging.warning("reward verif: %s; they are left out (untagged='judge' asks the judge about them)", told)
        if counts["asking"] and self._by_code:
            logging.warning(
                "reward verif: %d rules import llm_call to ask a language model, which the sandbox does not let them: they will be errors, masked",
                counts["asking"],
            )
        if self._by_code and any(read_requirements(row, self.field).functions for row in rows):
            self._open()

    def __call__(self, inputs: Sequence[RewardInput]) -> list[Verdict]:
        """One verdict an input, in order."""
        rows = {id(item.row): item.row for item in inputs}
        asked = {key: self._requirements(row) for key, row in rows.items()}  # the samples of a prompt share their row
        answers = [self._answer(item.response) for item in inputs]
        rules = self._rules([asked[id(item.row)] for item in inputs], inputs, answers)
        verdicts: list[Verdict | None] = []
        waiting: list[tuple[int, Question]] = []
        for index, (item, answer, found) in enumerate(zip(inputs, answers, rules, strict=True)):
            needs = asked[id(item.row)]
            settled = self._settled(needs, answer, found)
            verdicts.append(settled)
            if settled is None and (question := self._question(needs, item, answer or "")) is not None:
                waiting.append((index, question))
        said: dict[int, Verdict] = {}
        if waiting and self.judge is not None:
            decided = self.judge.decide([question for _, question in waiting])
            said = {index: verdict for (index, _), verdict in zip(waiting, decided, strict=True)}
        return [
            self._combined(rules[index], said.get(index)) if verdict is None else verdict for index, verdict in enumerate(verdicts)
        ]

    def rule_verdicts(self, inputs: Sequence[RewardInput]) -> list[list[Verdict]]:
        """Of each input the verdicts of its rules, those by name first: what the rule term is made of. A blank response keeps none."""
        return self._rules([self._requirements(item.row) for item in inputs], inputs, [self._answer(item.response) for item in inputs])

    @property
    def _by_code(self) -> bool:
        return self.use in ("both", "rules")

    def _requirements(self, row: Mapping[str, Any]) -> Requirements:
        found = read_requirements(row, self.field)
        soft = found.soft + (found.untagged if self.untagged == "judge" else [])
        if self.use == "judge_all":
            return Requirements(soft=found.rules() + soft)
        return Requirements(
            found.constraints if self._by_code else [], found.functions if self._by_code else [], [] if self.use == "rules" else soft
        )

    def _answer(self, response: str) -> str | None:
        """What is judged: the response after its reasoning. None where it was to reason and does not come to an end."""
        _, ended, answer = response.rpartition(THOUGHTS_END)
        return answer.strip() if ended or not self.thinks else None

    def _rules(self, needs: Sequence[Requirements], inputs: Sequence[RewardInput], answers: Sequence[str | None]) -> list[list[Verdict]]:
        """The verdicts of each input's rules, those by code run together."""
        found: list[list[Verdict]] = [[] for _ in inputs]
        jobs: list[tuple[int, str, Job]] = []
        for index, (need, item, answer) in enumerate(zip(needs, inputs, answers, strict=True)):
            if not answer:
                found[index] = [Verdict(Status.FAIL, reason=f"{rule}: there is no answer") for rule in need.rules()]
                continue
            found[index] = [evaluate(name, answer, kwargs) for name, kwargs in need.constraints]
            jobs += [(index, name, Job(source, ENTRY, (item.prompt, answer), as_bool=True, group=index)) for name, source in need.functions]
        if jobs:
            for (index, name, _), outcome in zip(jobs, self._open().run([job for _, _, job in jobs]), strict=True):
                verdict = outcome.verdict()
                found[index].append(Verdict(verdict.status, reason=f"{name}: {verdict.reason}"))
        return found

    def _settled(self, needs: Requirements, answer: str | None, rules: Sequence[Verdict]) -> Verdict | None:
        """The verdict of a response that no judge can change; None for the others."""
        if not (needs.constraints or needs.functions or needs.soft or self._asks(needs)):
            return Verdict(Status.NOT_APPLICABLE, reason="the row asks for nothing that is looked at")
        if answer is None:
            return Verdict(Status.FAIL, 0.0, f"the response does not come to the end of its reasoning, {THOUGHTS_END}")
        if not answer:  # it would keep every rule that forbids something
            return Verdict(Status.FAIL, 0.0, "the response is blank")
        undecided = [verdict for verdict in rules if verdict.value is None and verdict.status is not Status.NOT_APPLICABLE]
        if undecided:
            return Verdict(undecided[0].status, reason=undecided[0].reason)
        if self.combine == "product" and self._rule_term(rules) == 0:
            return self._combined(rules, None)  # 0 whatever the judge says
        return None

    def _asks(self, needs: Requirements) -> bool:
        return self.use != "rules" and (bool(needs.soft) or self.judge_always)

    def _question(self, needs: Requirements, item: RewardInput, answer: str) -> Question | None:
        if not self._asks(needs):
            return None
        if not needs.soft:
            return Question(TASK_ALONE, {"INSTRUCTION": item.prompt, "RESPONSE": answer})
        return soft_question(needs.soft, answer, item.prompt if self.show_instruction else None)

    def _rule_term(self, rules: Sequence[Verdict]) -> float:
        kept = [verdict.status is Status.PASS for verdict in rules if verdict.status is not Status.NOT_APPLICABLE]
        if not kept:
            return 1.0
        return float(all(kept)) if self.rule_reduce == "all" else sum(kept) / len(kept)

    def _combined(self, rules: Sequence[Verdict], judged: Verdict | None) -> Verdict:
        if judged is not None and judged.value is None:
            return judged
        r, q = self._rule_term(rules), 1.0 if judged is None or judged.value is None else judged.value
        broken = [verdict.reason for verdict in rules if verdict.status is Status.FAIL]
        if judged is not None and judged.status is not Status.PASS:
            broken.append(judged.reason)
        score = r * q if self.combine == "product" else (r + q) / 2
        if broken:
            return Verdict(Status.FAIL, score, "; ".join(broken))
        return Verdict(Status.PASS, score, "all rules hold" + (f"; {judged.reason}" if judged is not None else ""))

    def _open(self) -> Sandbox:
        if self._sandbox is None:
            pool, limits = self._sandbox_options
            self._sandbox = Sandbox(limits=Limits(**limits), **pool)
        return self._sandbox


def _sandbox_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(of the pool, of its limits)."""
    limits = set(Limits.__dataclass_fields__)
    pool = set(inspect.signature(Sandbox).parameters) - {"limits"}
    for name in given:
        if name not in limits | pool:
            raise UserError(f"reward verif: sandbox has no option {name!r}; {nearest(name, limits | pool)}")
    return {name: value for name, value in given.items() if name in pool}, {name: value for name, value in given.items() if name in limits}
