"Logged rollouts: every valid batch gets a diagnosis, the same however it is written down; an invalid one an error that names what is wrong."

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offpolicy_rl.lab import diagnose as module
from offpolicy_rl.lab.diagnose import Diagnosis, add_parser, diagnose, run_diagnose
from offpolicy_rl.lab.matched import Target, kl_behind, matched_toy, reliability
from offpolicy_rl.lab.measures import ALARM, clip_rules, mean_ratio_test
from offpolicy_rl.lab.rollouts import COLUMNS, NEEDED, batch_of, intended, read_rollouts, write_rollouts
from offpolicy_rl.reinforce.reinforce import reinforce_loss
from offpolicy_rl.toys.toy import noisy, stale
from offpolicy_rl.toys.tree import TokenTree

EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
OPTIONAL = [name for name in COLUMNS if name not in NEEDED]


@st.composite
def batches(draw, most: int = 6, drift: float = 30.0):
    "Valid batches: ragged, with holes in the mask, any optional columns, near and far."
    b, t, seed = draw(st.integers(1, most)), draw(st.integers(1, most)), draw(st.integers(0, 10_000))
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    spread = draw(st.sampled_from([0.0, 1e-6, 0.1, 1.0, drift]))
    logp = -normal(b, t).double().abs()
    full = dict(reward=normal(b).sign().clamp(min=0), reward_t=normal(b, t), adv=normal(b), group=torch.randint(0, 2, (b,), generator=g),
                turn=torch.zeros(b, t, dtype=torch.long), value=normal(b, t), entropy=normal(b, t).abs(), expert=torch.rand(b, generator=g) < 0.2,
                age=torch.randint(0, 50, (b,), generator=g), logp_old=logp + spread * normal(b, t), logp_ref=normal(b, t), logp_teacher=normal(b, t),
                mean_logp=-normal(b, t).abs() - 1, mean_logp_old=-normal(b, t).abs() - 1)
    chosen = draw(st.sets(st.sampled_from(OPTIONAL)))
    return dict(logp=logp, logp_mu=logp + spread * normal(b, t), mask=torch.rand(b, t, generator=g) < 0.7) | {k: full[k] for k in sorted(chosen)}


def numbers(x) -> list[float]:
    "Every number in a nested structure, in order."
    if isinstance(x, dict): return [n for k in x for n in numbers(x[k])]
    if isinstance(x, list | tuple): return [n for y in x for n in numbers(y)]
    return [float(x)] if isinstance(x, int | float) and not isinstance(x, bool) else []


def measured(d: Diagnosis) -> list[float]:
    "All measured numbers (not the table of estimators)."
    return numbers({k: v for k, v in d.to_dict().items() if k not in ("match", "standings", "notes")})


def same(a: Diagnosis, b: Diagnosis) -> bool:
    # to_dict keeps five digits: two roundings may differ by one unit of the fifth; 1e-9 is the size of what cancels
    x, y = measured(a), measured(b)
    return len(x) == len(y) and all(abs(p - q) <= 2e-4 * max(abs(p), abs(q)) + 1e-9 for p, q in zip(x, y))


def sample(toy, responses=256, seed=0, **more):
    rows = toy.sample(responses, torch.Generator().manual_seed(seed)).flatten()
    return {k: toy.batch()[k][rows] for k in ("logp", "logp_mu", "mask", "reward", "adv", "entropy")} | more


@EXAMPLES
@given(batches())
def test_every_valid_batch_gets_a_diagnosis(batch):
    d = diagnose(batch, estimators={})
    assert d.notes[0].topic == "verdict" and {n.level for n in d.notes} <= {"good", "info", "watch", "bad"}
    own = batch["mask"] if "expert" not in batch else batch["mask"] & ~batch["expert"][:, None]
    assert d.tokens == own.sum() and d.responses == own.any(1).sum()
    assert str(d).startswith(d.notes[0].text) and json.loads(json.dumps(d.to_dict(), allow_nan=False)) == d.to_dict()
    if d.tokens:
        assert all(1 / d.tokens - 1e-9 <= x <= 1 + 1e-9 for x in d.weights["ess"].values())
        assert all(0 <= r.tokens <= 1 + 1e-9 and 0 <= r.sequences <= 1 + 1e-9 for r in d.rules) and d.figure().data
        for k in d.kl.values(): assert k["k2"].value >= 0 and k["k3"].value >= -1e-9


@settings(max_examples=8, deadline=None)
@given(batches())
def test_the_table_is_finite_and_sorted(batch):
    d = diagnose(batch, estimators=dict(reinforce=reinforce_loss))
    if not d.tokens: return
    assert [s.name for s in d.standings] == ["reinforce"] and 0 <= d.standings[0].mse <= 1 + 1e-9 and 0 <= d.match["kl_token"] * d.match["length"] <= 4 + 1e-6


@EXAMPLES
@given(batches(drift=2.0), st.integers(0, 1000))
def test_the_order_of_responses_does_not_matter(batch, seed):
    order = torch.randperm(len(batch["logp"]), generator=torch.Generator().manual_seed(seed))
    assert same(diagnose(batch, estimators={}), diagnose({k: x[order] for k, x in batch.items()}, estimators={}))


@EXAMPLES
@given(batches(drift=2.0), st.integers(1, 3), st.sampled_from([0.0, 3.7, float("nan"), float("inf")]))
def test_padding_changes_nothing(batch, more, junk):
    wide = {k: torch.cat([x, x.new_zeros(len(x), more)], 1) if x.ndim == 2 else x for k, x in batch.items()}
    wide = {k: torch.where(wide["mask"], x, torch.full_like(x, junk)) if x.ndim == 2 and x.is_floating_point() else x for k, x in wide.items()}
    assert same(diagnose(batch, estimators={}), diagnose(wide, estimators={}))


@EXAMPLES
@given(batches(drift=2.0), st.floats(0.1, 10), st.floats(-5, -0.1))
def test_scaling_advantages_and_shifting_both_log_probabilities_changes_no_ratio(batch, scale, shift):
    batch = {k: x for k, x in batch.items() if k not in ("entropy", "logp_old", "expert")}
    other = batch | dict(logp=batch["logp"] + shift, logp_mu=batch["logp_mu"].double() + shift)
    if "adv" in batch: other["adv"] = batch["adv"].double() * scale
    a, b = diagnose(batch, estimators={}), diagnose(other, estimators={})
    if not a.tokens: return
    for name in ("ess", "largest_weight"):
        for x, y in zip(numbers(a.weights[name]), numbers(b.weights[name])): assert x == pytest.approx(y, rel=1e-9)
    for x, y in zip(a.rules, b.rules): assert x[3:] == pytest.approx(y[3:], abs=1e-9)


def test_measures_by_hand():
    "Two responses with ratios 2 and 1/2: all by pencil."
    s = torch.tensor([[2.0], [0.5]]).double().log()
    d = diagnose(dict(logp=-2 + s, logp_mu=torch.full((2, 1), -2.0).double(), mask=torch.ones(2, 1), adv=torch.tensor([1.0, -1.0])), estimators={})
    assert d.weights["ess"] == pytest.approx(dict(token=2.5 ** 2 / 4.25 / 2, prefix=2.5 ** 2 / 4.25 / 2, sequence=2.5 ** 2 / 4.25 / 2))
    assert d.weights["chi2"]["token"].value == pytest.approx((1 + 0.25) / 2) and d.weights["largest_weight"] == pytest.approx(0.8)
    k = d.kl["token, KL(mu||pi)"]
    assert k["k1"].value == pytest.approx(0, abs=1e-12) and k["k3"].value == pytest.approx(0.25) and k["k2"].value == pytest.approx(s[0].item() ** 2 / 2)
    rules = {r.rule: r for r in d.rules}
    assert rules["PPO 0.2"].tokens == 1 and rules["TIS, cap 2"].tokens == 0 and rules["TOPR, cap 1"].tokens == pytest.approx(0.5)


@pytest.mark.parametrize("sigma", [0.1, 0.7])
def test_the_alarm_keeps_its_rate_with_responses_of_many_tokens(sigma):
    "Tokens of one response share their prefix: of 2000 honest batches below 2 alarm; more than 7 would have a probability of 1e-3."
    toy = noisy(TokenTree(3, 6, seed=3), sigma, seed=4)
    batch, rows = toy.batch(), toy.sample(2000 * 100, torch.Generator().manual_seed(5)).view(2000, 100)
    s = batch["logp"] - batch["logp_mu"]
    found = [mean_ratio_test(s[r], toy.mask[r]) for r in rows]
    assert sum(abs(x["z"]) > ALARM and x["decided"] for x in found) <= 7 and any(x["decided"] for x in found)


def test_matched_toys_are_as_far_as_asked():
    for kl in (0.0, 1e-6, 0.3, 4.0): assert kl_behind(matched_toy(5, Target(kl))) == pytest.approx(kl, rel=1e-6, abs=1e-12)
    _, how = reliability(300, 0.05, 64, Target(15.0), estimators=dict(reinforce=reinforce_loss), seeds=(0,))
    assert how["capped"] == 1 and how["kl_response"] == pytest.approx(4, rel=1e-6) and how["kl_token"] == pytest.approx(0.05, rel=1e-6)


def test_farther_is_worse():
    near, far = (diagnose(sample(stale(TokenTree(4, 4, seed=0), k), 512)) for k in (1, 16))
    kept = lambda d: {s.name: s.kept for s in d.standings}
    assert near.weights["ess"]["sequence"] > far.weights["ess"]["sequence"] and kept(near)["reinforce_loss"] > kept(far)["reinforce_loss"]
    assert [s.mse for s in far.standings] == sorted(s.mse for s in far.standings)


def test_rules_look_at_their_own_ratio():
    "With logp_old, PPO compares with it and TIS compares it with mu."
    one = torch.ones(1, 1).double()
    batch = dict(logp=-one, logp_old=-1 - 3 * one, logp_mu=-1 - 3 * one, mask=one)
    tokens = lambda b: {r.rule: r.tokens for r in clip_rules(b)}
    assert tokens(batch)["PPO 0.2"] == 1 and tokens(batch)["TIS, cap 2"] == 0
    assert tokens(batch | dict(logp_old=-one))["PPO 0.2"] == 0 and tokens(batch | dict(logp_old=-one))["TIS, cap 2"] == 1


def test_expert_responses_are_left_out():
    batch = sample(noisy(TokenTree(3, 3), 0.3), 64)
    wild = {k: torch.cat([x, x[:1] - 9]) if k == "logp" else torch.cat([x, x[:1]]) for k, x in batch.items()}
    d = diagnose(wild | dict(expert=torch.arange(65) == 64), estimators={})
    assert d.note("expert").value == 1 and d.weights == diagnose(batch, estimators={}).weights


def renamed(batch, old, new): return {(new if k == old else k): x for k, x in batch.items()}


@pytest.mark.parametrize("change, words", [
    (lambda b: {k: x for k, x in b.items() if k != "logp_mu"}, "'logp_mu' is missing"),
    (lambda b: renamed(b, "logp_mu", "rollout_log_probs"), "'rollout_log_probs' is likely it"), (lambda b: renamed(b, "adv", "advantages"), "'adv' is meant"),
    (lambda b: b | dict(logp=b["logp"][:, :-1]), "expected shape"), (lambda b: b | dict(logp=b["logp"] * float("nan")), "logp: expected finite"),
    (lambda b: b | dict(mask=b["mask"] * 2), "mask: expected zeros and ones"), (lambda b: b | dict(reward=[1.0]), "reward: expected a tensor"),
    (lambda b: b | dict(age=b["reward"]), "age: expected integers")])
def test_what_is_wrong_with_a_batch_is_named(change, words):
    with pytest.raises(ValueError, match=words): diagnose(change(sample(noisy(TokenTree(3, 3), 0.3), 8)))


@EXAMPLES
@given(batches(), st.sampled_from([".parquet", ".jsonl"]))
def test_files_round_trip(tmp_path, batch, ending):
    again = read_rollouts(write_rollouts(tmp_path / f"x{ending}", batch))
    t = again["mask"].shape[1]
    live = batch["mask"]
    assert again.keys() == batch.keys() and os.listdir(tmp_path) == [f"x{ending}"] and not live[:, t:].any()
    for k, x in batch.items():
        if x.ndim == 2 and x.is_floating_point(): x = torch.where(live, x, torch.zeros_like(x))
        if x.ndim == 2 and COLUMNS[k].number == "int": x = torch.where(torch.arange(x.shape[1]) < t, x, 0)
        assert torch.equal(again[k].double(), x[:, :t].double() if x.ndim == 2 else x.double()), k
    (tmp_path / f"x{ending}").unlink()


def test_parquet_of_the_datasets_library_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = dict(logp=[[-1.0, -2.0], [-0.5]], logp_mu=[[-1.1, -2.0], [-0.4]], mask=[[1, 1], [1]], reward=[1.0, 0.0], text=["a", "b"])
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")
    batch = read_rollouts(tmp_path / "x.parquet")
    assert batch["logp"].tolist() == [[-1, -2], [-0.5, 0]] and batch["reward"].tolist() == [1, 0] and "text" not in batch


LINE = '{"logp":[-1,-2],"logp_mu":[-1,-2],"mask":[1,1]'


@pytest.mark.parametrize("name, text, words", [
    ("x.csv", "", "ending in .parquet or .jsonl, got '.csv'"), ("x.jsonl", "", "'logp' is missing.*columns found: none"),
    ("x.jsonl", "{", "line 1: not JSON"),
    ("x.jsonl", "[1]", "line 1: expected an object"), ("x.jsonl", LINE + "}\n" + LINE + ',"reward":1}', "line 2: expected the same columns.*reward"),
    ("x.jsonl", LINE.replace("logp_mu", "logp_behavior") + "}", "'logp_behavior' is likely it: rename it to 'logp_mu'"),
    ("x.jsonl", LINE + ',"rewards":1}', "'rewards' is not a name of the format, likely 'reward' is meant"),
    ("x.jsonl", LINE.replace('"logp_mu":[-1,-2]', '"logp_mu":[-1]') + "}", "row 1: column 'logp_mu' has 1 entries, 'mask' has 2"),
    ("x.jsonl", LINE.replace('"logp":[-1,-2]', '"logp":[-1,null]') + "}", "row 1: column 'logp': expected a list of numbers"),
    ("x.jsonl", LINE.replace('"logp":[-1,-2]', '"logp":[-1,NaN]') + "}", "logp: expected finite numbers"),
    ("x.jsonl", LINE + ',"group":"a"}', "row 1: column 'group': expected a number, got 'a'"),
    ("x.jsonl", LINE + ',"age":0.5}', "'age': expected whole numbers"),
    ("x.parquet", "no parquet", "not a Parquet file")])
def test_what_is_wrong_with_a_file_is_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words) as error: read_rollouts(tmp_path / name)
    assert str(tmp_path) in str(error.value) or "ending" in words


def test_files_that_cannot_be_opened_or_written(tmp_path):
    with pytest.raises(FileNotFoundError): read_rollouts(tmp_path / "none.parquet")
    batch = batch_of(dict(logp=[[-1.0]], logp_mu=[[-1.0]], mask=[[1]]))
    with pytest.raises(ValueError, match="logits is not in the format"): write_rollouts(tmp_path / "x.jsonl", batch | dict(logits=torch.zeros(1, 1, 2)))
    with pytest.raises(ValueError, match="ending in"): write_rollouts(tmp_path / "x.csv", batch)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name, meant", [
    ("old_log_probs", "logp_old"), ("Advantages", "adv"), ("logp_mus", "logp_mu"), ("response-mask", "mask"),
    *((name, None) for name in ("text", "prompt", "tokens", "prompt_ids", "response", "version", "step"))])
def test_what_a_column_is_likely_to_be(name, meant):
    assert intended(name) == meant


def test_the_command(tmp_path):
    path = write_rollouts(tmp_path / "x.parquet", sample(stale(TokenTree(3, 3), 8), 64))
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(dest="command"))
    said = {}
    for flags in ((), ("--json",)):
        with contextlib.redirect_stdout(io.StringIO()) as out: run_diagnose(parser.parse_args(["diagnose", str(path), *flags]), "")
        said[flags] = out.getvalue()
    assert "effective sample size" in said[()] and json.loads(said["--json",])["responses"] == 64 and max(map(len, said[()].splitlines())) < 200


def test_the_package_does_not_import_it():
    for imported, without in (("offpolicy_rl", ("offpolicy_rl.lab", "pyarrow")), (module.__name__, ("plotly", "pyarrow", "transformers", "datasets"))):
        code = f"import sys, {imported}; print([m for m in sys.modules if m.startswith({without})])"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
