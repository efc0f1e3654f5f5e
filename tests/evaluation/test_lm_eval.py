"""The adapter for lm-eval: its numbers are those of the run's own logits. lm-eval itself: the slow test at the end."""

import importlib
import importlib.util
import json
import sys
import types

import numpy as np
import pytest

import molora_jax
from tests.surgery.make import lora_rules, new_run

API, REGISTRY, OURS = "lm_eval.api.model", "lm_eval.api.registry", "molora_jax.evaluation.lm_eval"


class Instance:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return molora_jax.load_run(new_run(tmp_path_factory.mktemp("lm_eval") / "run", lora_rules()))


@pytest.fixture
def adapter(run, monkeypatch):
    """`RunLM` over the two names that it takes from lm-eval; the package itself where it is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", API, REGISTRY)}
        modules[API].LM, modules[REGISTRY].register_model = object, lambda name: lambda found: found
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, OURS, raising=False)
    yield importlib.import_module(OURS).RunLM(run, batch_size=4)
    if "lm_eval" not in sys.modules or sys.modules["lm_eval"].__spec__ is None:
        sys.modules.pop(OURS, None)  # it was made over the stand-ins


def _logprobs(run, ids):
    """`[n, V]` float64: of the token after each of the ids."""
    z = run.logits(ids).astype(np.float64)
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _sum(run, ids, n):
    """Of the last n ids: (log-likelihood, greedy)."""
    found, places = _logprobs(run, ids[:-1]), range(len(ids) - 1 - n, len(ids) - 1)
    return sum(found[p, ids[p + 1]] for p in places), all(found[p].argmax() == ids[p + 1] for p in places)


def test_loglikelihood(run, adapter):
    encode, first = run.tokenizer.encode, adapter.prefix
    greedy = run.tokenizer.decode([int(run.logits(encode("Is 3 even?"))[-1].argmax())])
    asked = [("Is 3 even?", " no"), ("Is 3 even? ", "yes"), ("", "Double"), ("x" * 600, " no")]
    asked += [("Is 3 even?", greedy)] * greedy.isascii()
    found = adapter.loglikelihood([Instance(*pair) for pair in asked])
    context = run.model.config.context
    wanted = [(encode("Is 3 even? no"), 3), (encode("Is 3 even? yes"), 4), ([first, *encode("Double")], 6)]
    wanted += [(encode("x" * 600 + " no")[-context - 1 :], 3)] + [(encode("Is 3 even?" + greedy), 1)] * greedy.isascii()
    for (nll, flag), (ids, n) in zip(found, wanted, strict=True):
        value, likeliest = _sum(run, ids, n)
        assert nll == pytest.approx(value, abs=2e-3) and flag == likeliest


def test_rolling_counts_each_token_once(run, adapter):
    text = "".join(chr(97 + i * i % 26) for i in range(700))
    ids, context = run.tokenizer.encode(text), run.model.config.context
    first, second = [adapter.prefix, *ids[:context]], ids[-context - 1 :]
    wanted = _sum(run, first, context)[0] + _sum(run, second, len(ids) - context)[0]
    short = _sum(run, [adapter.prefix, *run.tokenizer.encode("abc")], 3)[0]
    assert adapter.loglikelihood_rolling([Instance(text), Instance("abc")]) == pytest.approx([wanted, short], abs=2e-2)


def test_generate_until(run, adapter, monkeypatch):
    prompt = run.tokenizer.decode(run.prompt_ids("Double 4"))
    assert adapter.apply_chat_template([{"role": "user", "content": "Double 4"}]) == prompt
    whole = run.generate("Double 4", max_new_tokens=8)
    stop = whole[3:5] or whole
    kwargs = [dict(until=[], max_gen_toks=8, do_sample=False), dict(until=[stop], max_gen_toks=8, temperature=0.0)]
    assert adapter.generate_until([Instance(prompt, k) for k in kwargs]) == [
        whole, run.generate("Double 4", max_new_tokens=8, stop=stop)
    ]  # fmt: skip
    with pytest.raises(molora_jax.errors.InputError, match="generation_kwargs: got 'num_beams'"):
        adapter.generate_until([Instance(prompt, dict(num_beams=4))])


YAML = """
task: quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}\\n"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.mark.slow
def test_a_local_task_of_lm_eval(run, tmp_path):
    """Needs the extra `eval`; the numbers are those of the run's own logits."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from molora_jax.evaluation.lm_eval import RunLM

    rows = [dict(prompt=f"Double {i}", choices=[f"{2 * i}", f"not {i}", "no idea"], answer=i % 3) for i in range(9)]
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "quiz.yaml").write_text(YAML.format(file=file))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(RunLM(run), tasks=["quiz"], task_manager=tasks, bootstrap_iters=0)["results"]["quiz"]
    right = by_length = 0
    for row in rows:
        texts = [f"{row['prompt']}\n {choice}" for choice in row["choices"]]
        n = [len(run.tokenizer.encode(choice)) + 2 for choice in row["choices"]]  # the line's end, and a space
        scores = [_sum(run, run.tokenizer.encode(text), k)[0] for text, k in zip(texts, n, strict=True)]
        right += int(np.argmax(scores) == row["answer"])
        by_length += int(np.argmax(np.array(scores) / [len(c) for c in row["choices"]]) == row["answer"])
    assert found["acc,none"] == pytest.approx(right / 9) and found["acc_norm,none"] == pytest.approx(by_length / 9)
