"""K-shot experts: the acceptance list of its specification, item by item (the numbers are the list's), its pipeline."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, kshot_experts
from experiments.kshot_experts import __main__ as pipeline
from experiments.kshot_experts import models, rows
from molora_jax import config as schema
from molora_jax.core.types import Site
from molora_jax.errors import InputError
from molora_jax.evaluation import measure
from molora_jax.evaluation.run import load_base_run, load_run
from molora_jax.inits import made
from molora_jax.io.base import load_base
from molora_jax.runs.expert_runs import load_experts
from molora_jax.runs.warm_start import load_adapters
from molora_jax.training.loop import train
from tests.acceptance import helpers, small
from tests.battery.cases import fresh_adapters
from tests.surgery.make import lora_rules, new_run

EXAMPLES = [dict(prompt=f"{a}+{b}?", rationale=f"{a} and {b}", target=str(a + b)) for a, b in [(1, 2), (3, 4), (5, 1)]]
BANK, STEPS = 5, 2


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """LoRAs of random leaves on q and v."""
    folder = tmp_path_factory.mktemp("bank")
    return [
        str(new_run(folder / f"lora{i}", lora_rules(rank=2, alpha=6.0, sites="q,v"), seed=i, scale=0.3))
        for i in range(BANK)
    ]


# ---- 1: reasoning perplexity -----------------------------------------------------------------------------------------


def plain_run():
    """A base of two tables: the next token follows from the last one alone. A token is a byte."""
    config = common.get_config()
    config.base.source = "random:tiny-untied"
    run = load_base_run(config)
    blocks = {
        name: jax.tree.map(lambda w: 0 * w, leaf) if name in ("o", "down") else leaf
        for name, leaf in run.params["blocks"].items()
    }
    return dataclasses.replace(run, params=run.params | {"blocks": blocks, "head": 0 * run.params["head"]})


def test_acceptance_1_the_perplexity_of_a_sure_model_is_1_and_of_a_blind_one_V():
    run, row = plain_run(), dict(prompt="ask:", rationale="abcde", target="fgh")
    assert run.model.config.vocab > 200
    np.testing.assert_allclose(models.reasoning_ppl(run, [row, EXAMPLES[0]]), run.model.config.vocab, rtol=1e-4)
    encoded = measure.encoded(run, row["prompt"], models.solution(row))
    first = encoded.loss_mask.index(1) - 1  # the last token of the prompt as the template writes it
    ids = encoded.ids[first:]
    assert first > len("ask:") and len(ids) >= 1 + len("abcde fgh")
    embed = np.asarray(run.params["embed"], np.float64)
    h = embed / np.sqrt(np.mean(embed**2, axis=1, keepdims=True))
    after = dict(zip(ids[:-1], ids[1:], strict=True))
    assert len(after) == len(ids) - 1, "no token of the solution stands twice: its next one is known"
    solved = np.linalg.lstsq(h[list(after)], 60 * np.eye(run.model.config.vocab)[list(after.values())], rcond=None)[0]
    sure = dataclasses.replace(run, params=run.params | {"head": jnp.asarray(solved, jnp.float32)})
    np.testing.assert_allclose(models.reasoning_ppl(sure, [row]), 1.0, atol=1e-3)
    other = row | {"prompt": "zzz:"}  # wrong in every token of its own
    np.testing.assert_allclose(models.reasoning_ppl(sure, [other]), models.reasoning_ppl(sure, [row]), rtol=1e-6)


def test_acceptance_1_the_mean_is_of_perplexities():
    class Told:
        config = common.get_config()

        def nll(self, prompts, answers):
            assert prompts == ["1+2?", "3+4?", "5+1?"] and answers[0] == "1 and 2 3"
            return np.log([2.0, 4.0, 9.0])

    np.testing.assert_allclose(models.reasoning_ppl(Told(), EXAMPLES), 5.0)
    run = plain_run()
    run.config.data.raw = True
    with pytest.raises(InputError, match="trained with data.raw=True"):
        models.reasoning_ppl(run, EXAMPLES)


# ---- 2, 3: likeness and groups ---------------------------------------------------------------------------------------


def lora(seed, n=3, R=2, D=7):
    rng = np.random.default_rng(seed)
    return {(layer, "q", leaf): rng.standard_normal((R, D)) for layer in range(n) for leaf in "AB"}


def test_acceptance_2_likeness_counts_tensors_and_sees_no_sign():
    a, b = lora(0), lora(1)
    np.testing.assert_allclose(models.similarity(a, a), 6)
    np.testing.assert_allclose(models.similarity(a, {key: 3 * x for key, x in a.items()}), 6)
    flipped = {key: -x if key[0] == 1 else x for key, x in a.items()}
    np.testing.assert_allclose(models.similarity(b, flipped), models.similarity(b, a))
    assert 0 < models.similarity(a, b) < 6
    wanted = sum(abs(np.vdot(a[k], b[k])) / np.linalg.norm(a[k]) / np.linalg.norm(b[k]) for k in a)
    np.testing.assert_allclose(models.similarity(a, b), wanted)


def test_acceptance_2_a_rotated_basis_is_another_although_the_update_is_the_same():
    a, Q = lora(0), np.linalg.qr(np.random.default_rng(3).standard_normal((2, 2)))[0]
    rotated = {key: Q @ x for key, x in a.items()}  # B of shape [R, D_out]: B Q^T
    for layer in range(3):
        A, B = a[layer, "q", "A"], a[layer, "q", "B"]
        np.testing.assert_allclose(rotated[layer, "q", "B"].T @ rotated[layer, "q", "A"], B.T @ A, atol=1e-12)
    assert models.similarity(a, rotated) < 5.9


def test_acceptance_2_tensors_of_runs(bank):
    one, other = (models.tensors(path, load_run(path)) for path in bank[:2])
    assert len(one) == 4 * 2 * 2
    np.testing.assert_allclose(models.similarity(one, one), 16)
    leaf = np.asarray(load_adapters(bank[0])["all"]["000-003"]["q"]["A"][2, 0])
    np.testing.assert_array_equal(one[2, "q", "A"], leaf)
    pairs = models.similarities([one, other], bank[:2])
    alike = models.similarity(one, other)
    np.testing.assert_allclose(pairs, [[0, alike], [alike, 0]])
    with pytest.raises(InputError, match="--bank: got .*other sites, layers or ranks"):
        models.similarities([one, {**other, (0, "k", "A"): leaf}], bank[:2])


def test_acceptance_3_the_group_is_that_of_brute_force_without_doubles():
    loras = [lora(seed) for seed in range(6)]
    pairs = models.similarities(loras, [str(i) for i in range(6)])
    candidates = (5, 0, 3, 2, 1)
    found, total = models.group(pairs, candidates, 4)
    every = {
        members: sum(models.similarity(loras[i], loras[j]) for i, j in itertools.combinations(members, 2))
        for members in itertools.combinations(sorted(candidates), 4)
    }
    assert tuple(sorted(found)) == min(every, key=every.get) and len(set(found)) == 4
    np.testing.assert_allclose(total, min(every.values()))


def test_how_the_bank_is_ranked():
    ppl, right = [3.0, 2.0, 9.0, 2.0], [0.5, 0.2, 0.9, 0.9]
    assert models.ranked(ppl, right, "ppl") == [1, 3, 0, 2]
    assert models.ranked(ppl, right, "accuracy") == [3, 2, 0, 1]
    assert models.ranked(ppl, right, "both") == [3, 1, 2, 0]  # 0 + 0; 0 + 3; 3 + 0; 2 + 2


# ---- 4, 7: data ------------------------------------------------------------------------------------------------------


def unit(n, D=6, seed=0):
    v = np.random.default_rng(seed).standard_normal((n, D))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


@pytest.mark.parametrize("order", ["distance", "partition"])
def test_acceptance_4_the_n_nearest_rows(order):
    v, probe = unit(50), unit(4, seed=1).mean(axis=0)
    found = rows.nearest(v, probe, 12, order=order)
    distance = np.sqrt(((v - probe) ** 2).sum(axis=1))
    assert len(found) == 12 and set(found) == set(np.argsort(distance)[:12])
    if order == "distance":
        assert (np.diff(distance[found]) >= 0).all()
    assert len(rows.nearest(v, probe, 0, order=order)) == 0
    with pytest.raises(InputError, match="--target_num: got 51 rows"):
        rows.nearest(v, probe, 51)


def test_acceptance_4_a_chain_of_doubles_loses_all_but_its_first():
    angle = np.arccos(1 - 0.09)  # neighbours lie within 0.1, those two steps apart do not
    v = np.array([[np.cos(k * angle), np.sin(k * angle)] for k in (0, 1, 2)] + [[-1.0, 0.0]])
    assert 1 - v[0] @ v[2] > 0.1 > 1 - v[0] @ v[1]
    np.testing.assert_array_equal(rows.distinct(v, np.arange(4)), [0, 3])
    np.testing.assert_array_equal(rows.distinct(v, np.array([1, 0, 2, 3])), [1, 3])
    v = unit(40, D=3)
    kept = rows.distinct(v, np.arange(40))
    literal = list(range(40))
    for i in reversed(range(40)):  # as the code goes: all earlier ones, whether they will be dropped or not
        if any(1 - v[i] @ v[j] <= 0.1 for j in range(i)):
            literal.remove(i)
    np.testing.assert_array_equal(kept, literal)
    assert 1 < len(kept) < 40


def test_acceptance_7_retrieval_does_not_depend_on_the_order_of_the_corpus():
    v, probe = unit(60, D=4), unit(3, D=4, seed=1).mean(axis=0)
    moved = np.random.default_rng(5).permutation(60)
    pick = lambda v, order: rows.distinct(v, rows.nearest(v, probe, 30, order=order))  # noqa: E731
    np.testing.assert_array_equal(moved[pick(v[moved], "distance")], pick(v, "distance"))
    near = lambda v: rows.nearest(v, probe, 30, order="partition")  # noqa: E731
    assert set(moved[near(v[moved])]) == set(near(v)), "before doubles go the code's rows are the same"


# ---- 5, 6: the mixture -----------------------------------------------------------------------------------------------


def loaded(bank, chosen):
    """`(model, params, adapters)` of a mixture of these LoRAs at its start."""
    from molora_jax.backbones.compile import compile_model

    config = kshot_experts.get_config(tuple(bank[i] for i in chosen), rank=3)
    config.base.source = "random:tiny"
    config.method.rules.mix.adapter.dropout = 0.0
    schema.validate(config)
    base = load_base("random:tiny")
    model = compile_model(config, base.config)
    fresh = jax.device_get(fresh_adapters(model, jax.random.key(0), base.params))
    return model, base.params, load_experts(model, fresh, {"digest": base.digest})


def hidden(model, params, adapters, data):
    return np.asarray(helpers.hidden(model, params, adapters, data))


@pytest.fixture(scope="module")
def data():
    vocab = load_base("random:tiny").config.vocab
    return small.batch() | {"tokens": np.random.default_rng(3).integers(1, vocab, (small.B, small.S)).astype(np.int32)}


def test_acceptance_5_a_gate_forced_on_one_expert_gives_that_lora(bank, data):
    """Its own alpha / R (3) is folded in, and the smaller rank is padded."""
    model, params, adapters = loaded(bank, (0, 1, 2, 3))
    keep = data["segment_ids"] > 0
    for e in (0, 2):  # the one expert that is allowed has all of the gate
        only = hidden(model, params, adapters, data | {"allowed": np.arange(4) == e})
        run = load_run(bank[e])
        alone = hidden(run.model, run.params, run.adapters, data)
        np.testing.assert_allclose(only[keep], alone[keep], atol=2e-5)
        assert np.abs(alone - hidden(model.without_rules(), params, {}, data))[keep].max() > 0.05


def test_acceptance_5_equal_experts_give_their_lora_and_two_are_active(bank, data):
    model, params, adapters = loaded(bank, (1, 1, 1, 1))
    keep = data["segment_ids"] > 0
    run = load_run(bank[1])
    alone = hidden(run.model, run.params, run.adapters, data)
    np.testing.assert_allclose(hidden(model, params, adapters, data)[keep], alone[keep], atol=2e-5)
    gates = np.asarray(small.gates(model, params, adapters, {}, data)["mix"]["000-003"]["q"])[:, keep]
    assert ((gates > 0).sum(-1) == 2).all()
    np.testing.assert_allclose(gates.sum(-1), 1, atol=1e-6)


def test_acceptance_5_the_gates_are_softmax_top_2_renormalised_and_no_scale():
    config = kshot_experts.get_config()
    (rule,) = small.build("kshot_experts")[0].rules
    assert rule.adapter.scale() == 1.0 and rule.sites == ("q", "v") and rule.share == "site" and not config.losses
    p = np.array([0.1, 0.4, 0.2, 0.3])
    np.testing.assert_allclose(small.from_probs(rule.router, p).gates[0, 0], [0, 4 / 7, 0, 3 / 7], atol=1e-6)
    leaves = made(dict(name="gaussian"))(jax.random.key(0), Site("q", 512, 256, (0,), 4), 16, scale=1.0)
    assert leaves["A"].shape == (4, 16, 512) and leaves["B"].shape == (4, 16, 256)
    assert abs(float(jnp.std(leaves["A"])) - 0.01) < 3e-4 and not leaves["B"].any()


@pytest.mark.parametrize("gate_only", [True, False])
def test_acceptance_6_gate_only_leaves_experts_bit_identical(bank, tmp_path, gate_only):
    config = kshot_experts.get_config(tuple(bank[:3]), gate_only, rank=2)
    config.base.source = "random:tiny"
    config.data.update(tasks=f"jsonl:{bank[0].rpartition('/')[0]}/task.jsonl", seq_len=96)
    config.train.update(steps=STEPS, batch_size=8, save_every=0)
    schema.validate(config)
    train(config, str(tmp_path / "tuned"), note=lambda text: None)
    own = load_adapters(str(tmp_path / "tuned"))["mix"]["000-003"]
    same = []
    for e, path in enumerate(bank[:3]):
        theirs = load_adapters(path)["all"]["000-003"]
        for site in ("q", "v"):  # its scale is 3, ours 1
            same.append(np.array_equal(own[site]["A"][:, e], theirs[site]["A"][:, 0]))
            same.append(np.array_equal(own[site]["B"][:, e], np.float32(3) * theirs[site]["B"][:, 0]))
    assert all(same) if gate_only else not any(same)


# ---- the pipeline ----------------------------------------------------------------------------------------------------


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_pipeline_picks_and_tunes(bank, tmp_path, capsys):
    near = [{"prompt": f"{a}+{b}?", "target": f"{a} and {b} {a + b}"} for a in range(9) for b in range(9)]
    far = [{"prompt": f"Say {word}", "target": word * 3} for word in ("xyz", "uvw", "klm", "qrs")]
    pool = [f"jsonl:{written(tmp_path / name, lines)}" for name, lines in (("sums.jsonl", near), ("words.jsonl", far))]
    test = [dict(prompt="8+8?", rationale="8 and 8", target="16")]
    command = [
        f"--rows={written(tmp_path / 'k.jsonl', EXAMPLES)}", f"--workdir={tmp_path / 'work'}",
        f"--bank={','.join(bank)}", f"--pool={','.join(pool)}",
        "--embed=random:tiny", "--target_num=20", "--within=0", "--candidates=4",
        "--experts=3", "--max_new_tokens=4", f"--test={written(tmp_path / 't.jsonl', test)}",
        "--config.base.source=random:tiny", f"--config.train.steps={STEPS}", "--config.data.seq_len=96",
    ]  # fmt: skip
    pipeline.run(command)
    told = json.loads((tmp_path / "work" / "selection.json").read_text())
    ppl = [score["reasoning_ppl"] for score in told["experts"]["bank"]]
    assert len(told["experts"]["candidates"]) == 4 and len(told["experts"]["chosen"]) == 3 and min(ppl) > 1
    assert told["data"]["near"] == 17 and told["data"]["kept"] >= 15
    lines = [json.loads(line) for line in (tmp_path / "work" / "rows.jsonl").read_text().splitlines()]
    assert lines[:3] == [{"prompt": row["prompt"], "target": models.solution(row)} for row in EXAMPLES]
    prompts = [line["prompt"] for line in lines]
    assert len(set(prompts)) == len(prompts) and "8+8?" not in prompts, "no example twice, no test row"
    run = load_run(tmp_path / "work" / "tuned")
    assert run.step == STEPS and run.config.method.rules.mix.load == tuple(told["experts"]["chosen"])
    experts = run.view()["mix", 0, "q", "B"][0]
    assert np.abs(experts - 3 * load_run(told["experts"]["chosen"][0]).view()["all", 0, "q", "B"][0]).max() > 1e-6
    assert "held-out rows: reasoning ppl" in capsys.readouterr().out


def test_the_embedding_is_the_direction_of_the_mean_hidden_state():
    base = load_base("random:tiny")
    v = rows.embedded(base, ["one text", "another, longer text", "one text"], rows=2)
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(v[0], v[2], atol=1e-6)
    assert np.abs(v[0] - v[1]).max() > 1e-3


BAD = {
    "a line that is no JSON": ("--rows", "{", "row 1: got no JSON"),
    "a row without an answer": ("--rows", '{"prompt": "a", "target": ""}', "row 1: got .*expected an object"),
    "a row of numbers": ("--rows", '{"prompt": "a", "target": 3}', "row 1: got"),
    "no row": ("--rows", "", "got no row"),
    "an example among the test rows": ("--test", json.dumps(EXAMPLES[1]), "--test: got '3.4.'.* one of the K examples"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_refused(tmp_path, name):
    flag, text, match = BAD[name]
    files = {"--rows": written(tmp_path / "k.jsonl", EXAMPLES)}
    files[flag] = tmp_path / "bad.jsonl"
    files[flag].write_text(text)
    with pytest.raises(InputError, match=match):
        pipeline.run([f"{flag}={path}" for flag, path in files.items()] + [f"--workdir={tmp_path}"])


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--experts=1"], "--experts: got 1"),
        (["--experts=7"], "--experts: got 7"),
        (["--target_num=2"], "--target_num: got 2"),
        (["--within=1"], "--within: got 1"),
        (["--bank=a,a"], "--bank: got 1 different runs"),
    ],
)
def test_bad_numbers_are_refused(tmp_path, flags, match):
    with pytest.raises(InputError, match=match):
        pipeline.run([f"--rows={written(tmp_path / 'k.jsonl', EXAMPLES)}", f"--workdir={tmp_path}", *flags])
