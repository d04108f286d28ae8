"""EleutherAI's lm-eval on a model of ours. lm_eval is imported when it is used, and not before."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from maxlm.evaluate.choices import encode_pair
from maxlm.evaluate.scoring import EvaluationError, Scorer

Generate = Callable[[Sequence[str], int, Sequence[str], float], list[str]]
"""(prompts, max_tokens, stop texts, temperature) -> what follows each, without the stop text."""
MAX_TOKENS = 256
"""Generated where a task does not say how many, as lm-eval's own models do."""


def check_installed() -> None:
    """Refuses when lm-eval is not there.

    Raises:
        EvaluationError: says how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("lm-eval is not installed: pip install 'maxlm[eval]'")


def make_lm(scorer: Scorer, generate: Generate | None = None) -> Any:
    """An lm_eval.api.model.LM.

    Args:
        scorer: the model.
        generate: continues prompts; without it tasks that generate text are refused.

    References:
        https://github.com/EleutherAI/lm-evaluation-harness, docs/model_guide.md.
    """
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer = scorer.opened.tokenizer
    prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

    class MaxlmLM(LM):
        """Requests are lists of objects whose args are tuples."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return scorer.loglikelihoods([encode_pair(tokenizer, *request.args) for request in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            pairs, counts = [], []
            for (text,) in (request.args for request in requests):
                ids = tokenizer.encode_batch([text])[0].tolist()
                cut = get_rolling_token_windows(ids, prefix, scorer.opened.context, context_len=1)
                windows = [make_disjoint_window(pair) for pair in cut]
                pairs += windows
                counts.append(len(windows))
            scores = iter(scorer.loglikelihoods(pairs))
            return [sum(next(scores)[0] for _ in range(count)) for count in counts]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            if generate is None:
                raise EvaluationError("this task generates text, for which the model was not opened")
            return [_generated(generate, *request.args) for request in requests]

    return MaxlmLM()


def _generated(generate: Generate, prompt: str, options: dict[str, Any]) -> str:
    until = options.get("until") or []
    stop = [until] if isinstance(until, str) else list(until)
    temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
    return generate([prompt], int(options.get("max_gen_toks", MAX_TOKENS)), stop, temperature)[0]


def run_tasks(
    scorer: Scorer,
    tasks: Sequence[str],
    include_path: str | None = None,
    generate: Generate | None = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Runs tasks.

    Args:
        scorer: the model.
        tasks: names of tasks or groups; or folders, all of whose tasks are run.
        include_path: folder of more tasks.
        generate: see make_lm.
        **options: of lm_eval.simple_evaluate, such as limit.

    Returns:
        Metrics by task, as lm-eval names them.

    Raises:
        EvaluationError: a task is not known, or needs what is not there.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    for folder in filter(None, [include_path, *(task for task in tasks if os.sep in task)]):
        if not os.path.isdir(folder):
            raise EvaluationError(f"{folder} is not a folder of tasks")
    given = [task for task in tasks if os.path.isdir(task)]
    manager = TaskManager(include_path=[*given, *([include_path] if include_path else [])] or None)
    names = [name for task in tasks for name in (_tasks_in(task) if task in given else [task])]
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise EvaluationError(f"task {unknown[0]} is not known to lm-eval; --include-path says where others are")
    lm = make_lm(scorer, generate)
    found = partial(simple_evaluate, model=lm, tasks=names, task_manager=manager, log_samples=False)(**options)
    return {} if found is None else found["results"]


def _tasks_in(folder: str) -> list[str]:
    """Names of the tasks in a folder's YAML files."""
    import re

    names = []
    for name in sorted(os.listdir(folder)):
        if name.endswith((".yaml", ".yml")):
            with open(os.path.join(folder, name)) as file:
                names += re.findall(r"^task:\s*([\w.-]+)\s*$", file.read(), re.MULTILINE)
    if not names:
        raise EvaluationError(f"{folder} has no task: a YAML file with a line such as task: NAME")
    return names
