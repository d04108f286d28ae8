"""EleutherAI's lm-eval on a model of ours. lm_eval is imported when it is used, and not before."""

import functools
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from maxlm.evaluate.choices import encode_pair
from maxlm.evaluate.scoring import EvaluationError, Scorer
from maxlm.infer.generate import Generator
from maxlm.infer.models import OpenModel
from maxlm.infer.sampling import Sampling
from maxlm.infer.texts import Options, continue_texts

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
            return _generated(generate, [request.args for request in requests])

    return MaxlmLM()


def _generated(generate: Generate, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Texts of requests, those with the same options together."""
    groups, texts = dict[tuple[int, tuple[str, ...], float], list[int]](), [""] * len(requests)
    for number, (_, options) in enumerate(requests):
        until = options.get("until") or []
        stop = (until,) if isinstance(until, str) else tuple(until)
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        groups.setdefault((int(options.get("max_gen_toks", MAX_TOKENS)), stop, temperature), []).append(number)
    for (max_tokens, stop, temperature), numbers in groups.items():
        found = generate([requests[i][0] for i in numbers], max_tokens, stop, temperature)
        for number, text in zip(numbers, found, strict=True):
            texts[number] = text
    return texts


def make_generate(opened: OpenModel, batch_size: int = 8) -> Generate:
    """A Generate of a model; its layers are there twice from the first call on.

    Args:
        opened: the model; on a mesh without context shards.
        batch_size: prompts at a time.
    """

    @functools.cache
    def generator() -> Generator:
        return Generator(opened.model, dict(opened.params), opened.mesh)

    def generate(prompts: Sequence[str], max_tokens: int, stop: Sequence[str], temperature: float) -> list[str]:
        tokenizer = opened.tokenizer
        room = max(1, opened.context - max_tokens)  # the first tokens of a long prompt are left out, as lm-eval does
        ids = [x.tolist()[-room:] or [tokenizer.eos_id] for x in tokenizer.encode_batch(prompts)]
        options = Options(max_tokens, Sampling(temperature=temperature), tuple(stop), batch_size=batch_size)
        eos_ids = {tokenizer.eos_id, *opened.eos_ids}
        done = continue_texts(generator(), tokenizer.decode, eos_ids, ids, options)
        return [found.text for found in sorted(done, key=lambda found: found.number)]

    return generate


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
        generate: see make_lm; default: make_generate.
        **options: of lm_eval.simple_evaluate, such as limit.

    Returns:
        Metrics by task, as lm-eval names them.

    Raises:
        EvaluationError: a task is not known, or needs what is not there.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    given = [task for task in tasks if os.sep in task or os.path.isdir(task)]
    places = given + ([include_path] if include_path else [])
    if missing := next((folder for folder in places if not os.path.isdir(folder)), None):
        raise EvaluationError(f"{missing} is not a folder of tasks")
    manager = TaskManager(include_path=places or None)
    names = [name for task in tasks for name in (_tasks_in(task) if task in given else [task])]
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise EvaluationError(f"task {unknown[0]} is not known to lm-eval; --include-path says where others are")
    lm = make_lm(scorer, generate or make_generate(scorer.opened))
    found = simple_evaluate(model=lm, tasks=names, task_manager=manager, log_samples=False, **options)
    return {} if found is None else found["results"]


def _tasks_in(folder: str) -> list[str]:
    """Names of the tasks in a folder's YAML files."""
    names = []
    for name in sorted(os.listdir(folder)):
        if name.endswith((".yaml", ".yml")):
            with open(os.path.join(folder, name)) as file:
                names += re.findall(r"^task:\s*([\w.-]+)\s*$", file.read(), re.MULTILINE)
    if not names:
        raise EvaluationError(f"{folder} has no task: a YAML file with a line such as task: NAME")
    return names
