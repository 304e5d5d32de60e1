"""The items of a task of lm-evaluation-harness, and their scores for every stage.

lm-eval builds the prompts and computes the metrics of each item; how the items become one score, with which interval,
is metrics.py's and the gate's matter. KL and agreement with BF16 are taken on the right answer's tokens, or, where text
is generated, on what the BF16 model said: every stage reads it along, token by token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from halfbyte.training.config import Task
from halfbyte.training.crew import Crew
from halfbyte.training.errors import UserError
from halfbyte.training.files import damage, read_json, write_json
from halfbyte.training.generate import Output, Prompt
from halfbyte.training.harness import InPlace, quiet
from halfbyte.training.lm_load import LoadedTask, blamed
from halfbyte.training.metrics import METRICS, Statistic, Value
from halfbyte.training.runtime import Runtime
from halfbyte.training.scoring import Item, Score, digest

FEW_SHOT_SEED = 1234
"""Which examples lm-eval draws for a few-shot prompt (its own default)."""


@dataclass(frozen=True)
class Setting:
    """What a task of lm-eval is scored with, on every rank.

    Attributes:
        runtime: This process.
        folder: Run folder.
        tokenizer: The model's tokenizer.
        max_length: Tokens that the model takes.
        compared: Whether KL and agreement with BF16 are wanted.
        seed: Of sampling, for tasks that sample.
        score: Items -> scores in their order; collective.
        generate: Prompts -> outputs in their order; collective.
    """

    runtime: Runtime
    folder: Path
    tokenizer: Any
    max_length: int
    compared: bool
    seed: int
    score: Callable[[list[Item]], list[Score]]
    generate: Callable[[list[Prompt]], list[Output]]


def score_task(loaded: LoadedTask | None, task: Task, stage: str, setting: Setting) -> tuple[list[Score], str | None]:
    """Score a task of lm-eval with the model in place; collective.

    Args:
        loaded: The task, on rank 0.
        task: Its entry in the recipe.
        stage: "bf16" leaves its outputs for the later stages.
        setting: The model.

    Returns:
        One Score per item, in order, and a note for the console; empty on the ranks after the first.

    Raises:
        UserError: lm-eval or the task's own functions stopped, or a metric's value cannot be used.
    """
    crew = Crew(setting.runtime, {"score": setting.score, "generate": setting.generate})

    def work() -> tuple[list[Score], str | None]:
        assert loaded is not None
        return _Session(loaded, task, stage, setting, crew).run()

    return crew.lead(work) or ([], None)


@dataclass
class _Session:
    """One task and stage on rank 0."""

    loaded: LoadedTask
    task: Task
    stage: str
    setting: Setting
    crew: Crew
    gold: dict[int, int] = field(default_factory=dict)
    """Instance.doc_id -> which of the item's requests holds the right answer."""

    def run(self) -> tuple[list[Score], str | None]:
        """All of it: lm-eval, then what only we measure."""
        lm, setting = self.loaded.lm, self.setting
        model = InPlace(self.crew, setting.tokenizer, setting.max_length, compared=self._is_gold, seed=setting.seed)
        lm.set_fewshot_seed(FEW_SHOT_SEED)  # every stage draws the same examples
        with blamed(self.task, self.crew), quiet():
            results: Any = evaluator.evaluate(
                model,
                {"tasks": {self.task.name: lm}, "groups": {}},
                samples={self.task.name: self.loaded.items},  # type: ignore[arg-type] - a range will do, and is fast
                bootstrap_iters=0,
            )
            samples = sorted(results["samples"][self.task.name], key=lambda sample: sample["doc_id"])
            scores = self._scores(model, samples)
            if lm.OUTPUT_TYPE == "generate_until":
                scores = self._with_gold(model, self._with_reference(model, scores))
        cut = f"{model.truncated} requests cut on the left to {setting.max_length} tokens"
        return scores, cut if model.truncated else None

    def _is_gold(self, request: Instance) -> bool:
        if request.doc_id not in self.gold:
            self.gold[request.doc_id] = _right_choice(self.loaded.lm, request)  # type: ignore[index]
        return request.idx == self.gold[request.doc_id]  # type: ignore[index]

    def _scores(self, model: InPlace, samples: list[dict[str, Any]]) -> list[Score]:
        answers: dict[int, dict[int, Score | Output]] = {}
        for request, answer in model.answers:  # of several outputs to one prompt the first is kept
            answers.setdefault(request.doc_id, {}).setdefault(request.idx, answer)  # type: ignore[arg-type]
        scores = []
        for sample in samples:
            mine = answers[sample["doc_id"] - self.loaded.items.start]
            content = digest([sample["doc_hash"], sample["arguments"], sample["target_hash"]])
            if self.loaded.lm.OUTPUT_TYPE == "generate_until":
                score = self._generated(model, mine[0], content)
            else:
                gold = mine[self.gold[sample["doc_id"] - self.loaded.items.start]]
                assert isinstance(gold, Score)
                score = replace(gold, correct=None, output=self._choice(sample, mine, gold))
            metrics = self._metrics(sample, score)
            scores.append(replace(score, item=sample["doc_id"], content=content, metrics=metrics))
        return scores

    def _generated(self, model: InPlace, output: Any, content: str) -> Score:
        text = model.text(model.prompts[output.index], output)
        return Score(
            item=output.index,
            loglikelihood=None,
            tokens=None,
            bytes=None,
            correct=None,
            content=content,
            output=text,
            output_tokens=len(output.tokens),
            cut=output.cut,
        )

    def _choice(self, sample: dict[str, Any], mine: dict[int, Any], gold: Score) -> str | None:
        """The text of the likeliest choice, per character where the task is judged so; else the greedy tokens."""
        if self.loaded.lm.OUTPUT_TYPE != "multiple_choice":
            return gold.output
        texts = [str(arguments[1]) for arguments in sample["arguments"]]
        lengths = [1] * len(texts)
        if "acc_norm" in self.loaded.metrics and not self.loaded.lm.multiple_input:
            lengths = [max(1, len(choice)) for choice in self.loaded.lm.doc_to_choice(sample["doc"])]
        best = max(range(len(lengths)), key=lambda i: mine[i].loglikelihood / lengths[i])
        return texts[best].strip()

    def _metrics(self, sample: dict[str, Any], score: Score) -> dict[str, Value]:
        if self.loaded.lm.OUTPUT_TYPE == "loglikelihood_rolling":
            assert score.loglikelihood is not None
            assert score.tokens
            return {"perplexity": score.loglikelihood / score.tokens}
        where = f"task {self.task.name}, item {sample['doc_id']}"
        return {name: metric_value(name, sample[name], where) for name in self.loaded.metrics}

    def _with_reference(self, model: InPlace, scores: list[Score]) -> list[Score]:
        """KL and agreement on the BF16 model's outputs, which its own stage leaves in the cache folder."""
        if not self.setting.compared:
            return scores
        path = self.setting.folder / "cache" / f"outputs.{self.task.name}.json"
        first = {request.doc_id: answer for request, answer in reversed(model.answers)}
        if self.stage == "bf16":
            write_json(path, {str(self._place(i)): list(output.tokens) for i, output in first.items()})  # type: ignore
        said = read_json(path)
        items = []
        for i, output in first.items():
            prompt = model.prompts[output.index].tokens  # type: ignore[union-attr]
            with damage(path):
                tokens = tuple(int(token) for token in said[str(self._place(i))])
            if tokens:  # a limit of 0 leaves nothing to compare
                items.append(Item(self._place(i), (*prompt, *tokens), len(prompt), 0))
        if not items:
            return scores
        compared = {score.item: score for score in self.crew.do("score", items)}
        return [
            replace(score, **{name: vars(compared[score.item])[name] for name in ("kl", "agreement", "kl_at")})
            for score in scores
        ]

    def _with_gold(self, model: InPlace, scores: list[Score]) -> list[Score]:
        """Log-likelihood of the right answer, if the task says which field of a document holds it."""
        name = self.loaded.gold_field
        if name is None:
            return scores
        items = []
        for request in {request.doc_id: request for request, _ in model.answers}.values():
            gold = request.doc[name]
            context, continuation = model._encode_pair(request.args[0], gold)
            place = self._place(request.doc_id)
            where = f"task {self.task.name}, item {place}"
            items.append(model._item(place, where, context, continuation, len(gold.encode()), False))
        right = {score.item: score for score in self.crew.do("score", items)}
        return [
            replace(score, **{name: vars(right[score.item])[name] for name in ("loglikelihood", "tokens", "bytes")})
            for score in scores
        ]

    def _place(self, doc_id: Any) -> int:
        return self.loaded.items[doc_id]


def _right_choice(lm: ConfigurableTask, request: Instance) -> int:
    """Which request of an item holds the right answer: the only one, or a choice's (the first of several right ones).

    Raises:
        UserError: the target is none of the choices.
    """
    if lm.OUTPUT_TYPE != "multiple_choice":
        return 0
    choices = lm.doc_to_choice(request.doc)
    gold: Any = lm.doc_to_text(request.doc) if lm.multiple_input else lm.doc_to_target(request.doc)
    gold = gold[0] if isinstance(gold, list) and gold else gold
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise UserError(
            f"task {request.task_name}, item {request.doc_id}: its target {gold!r} is none of {len(choices)} choices; "
            "fix the data or doc_to_target"
        )
    return gold


def metric_value(name: str, value: Any, where: str) -> Value:
    """An item's value of a metric as metrics.py wants it, from what lm-eval has per item.

    Args:
        name: One of METRICS.
        value: A number (NumPy's too), or for bleu (reference, output).
        where: The item, for the error.

    Raises:
        UserError: it is something else: a metric that only exists for the whole task.
    """
    if METRICS[name] is Statistic.bleu:
        from sacrebleu.metrics import BLEU

        reference, output = value
        scorer = BLEU(effective_order=True)  # or it warns; the counts are the same
        found = scorer.sentence_score(str(output), [reference] if isinstance(reference, str) else list(reference))
        return [float(n) for n in (found.sys_len, found.ref_len, *found.counts, *found.totals)]
    if isinstance(value, (tuple, list, dict, str)) or not math.isfinite(value):
        raise UserError(f"{where}: metric {name} is {value!r}, not a number per item; choose another metric")
    return float(value)
