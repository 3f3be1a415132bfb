"""The run explorer: what a run keeps, its numbers against a loss worked out by hand, the widget without a browser, and what is refused.

Hand-made batches are in float64, so a coefficient computed in another order of operations agrees to about 1e-15; 1e-12 leaves room for sums of tokens."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from offpolicy_rl.core import method
from offpolicy_rl.lab.rollouts import read_rollouts, write_rollouts
from offpolicy_rl.lab.run_explorer import RunExplorer, explore_run, judge, kept_batches, read_kept, recipe_of
from offpolicy_rl.lab.run_explorer_view import RunView, _trace, figure, shown, strip
from offpolicy_rl.llm.config import TrainConfig, config_facts, recipe_facts, record_path, resolve
from offpolicy_rl.llm.record import add_step, new_record, write_record
from offpolicy_rl.llm.train import rollout_lines, rollouts_folder, train
from offpolicy_rl.recipes import Recipe, recipe, recipes

TOLERANCE = 1e-12
HOSTILE = ['<img src=x onerror="alert(1)">', "</span><script>alert(2)</script>", '" onmouseover="alert(3)', "\u202e\x00\n"]
SMALL = TrainConfig(recipe="topr", staleness=4, steps=6, prompts_per_step=2, group_size=4, eval_prompts=4, eval_every=6, threads=1)


@method(family="ratios", paper="a test")
def needy_loss(logp, value, mask):
    "A loss that asks for a critic, which no language-model run keeps."
    return -(logp * value * mask).sum(), {}


def make_batch(responses=6, tokens=4, seed=0):
    "A batch far off-policy, with lengths that differ, a token in the middle that the policy did not write, and a group without variance."
    g = torch.Generator().manual_seed(seed)
    draw = lambda: -torch.rand(responses, tokens, generator=g, dtype=torch.float64)
    mask = torch.ones(responses, tokens, dtype=torch.float64)
    mask[0, 2:], mask[1, 1] = 0, 0
    reward = torch.tensor([1.0, 0.0] * (responses // 2), dtype=torch.float64)
    reward[-2:] = 1.0
    logp_mu = draw() * mask
    ids = torch.arange(responses)
    return dict(logp=draw() * mask, logp_mu=logp_mu, logp_old=logp_mu, mask=mask, reward=reward, group=ids // 2, age=ids * 0 + 3)


def make_run(folder, used="ppo", steps=(4, 8), texts=None, sizes=None, **knobs):
    "A record and its kept batches, made by hand."
    config = TrainConfig(recipe=used, knobs=knobs, out=str(folder))
    record = new_record(config_facts(config), recipe_facts(resolve(config)[1]))
    for i in range(max(steps)):
        add_step(record, dict(reward=i / 10, ess_sequence=0.5))
    write_record(record_path(config), record)
    rollouts_folder(config).mkdir()
    for i, step in enumerate(steps):
        batch = make_batch((sizes or [6] * len(steps))[i], seed=step)
        n, t = batch["mask"].shape
        pieces = texts or [[f"t{j}" for j in range(t)]] * n
        lines = rollout_lines(batch, prompt=[texts[0][0] if texts else f"p{j}" for j in range(n)], pieces=pieces)
        (rollouts_folder(config) / f"step-{step:06d}.jsonl").write_text(lines, encoding="utf-8")
    return record_path(config)


@pytest.fixture
def explorer(tmp_path):
    return explore_run(make_run(tmp_path))


# what a run keeps


def test_a_run_keeps_what_its_recipe_saw(tmp_path):
    config = replace(SMALL, keep_rollouts=3, out=str(tmp_path))
    record = train(config)
    found = kept_batches(rollouts_folder(config))
    assert list(found) == [3, 6]
    assert not list(tmp_path.rglob(".*")), "a temporary file was left"
    for step, path in found.items():
        kept = read_kept(path)
        batch = kept.batch
        assert batch["mask"].shape[0] == 8 and len(kept.prompts) == 8 and len(set(kept.prompts)) <= 2
        assert (batch["age"] == (step - 1) % 4).all() and record["steps"]["age"][step - 1] == (step - 1) % 4
        assert record["steps"]["reward"][step - 1] == pytest.approx(batch["reward"].mean().item(), rel=1e-5)  # a record keeps five digits
        task = resolve(config)[0]
        for i, prompt in enumerate(kept.prompts):
            length = int(batch["mask"][i].sum())
            text = "".join(kept.pieces[i][:length])
            assert task.verify(prompt, text.removesuffix("<eos>")) == batch["reward"][i]
        row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
        assert row["version"] == step - 1 - row["age"]
        torch.testing.assert_close(batch["adv"], recipe("topr").prepare(batch)["adv"], rtol=1e-5, atol=1e-6)  # kept in float32


def test_keeping_batches_changes_nothing_else(tmp_path):
    kept, plain = train(replace(SMALL, keep_rollouts=2, out=str(tmp_path / "a"))), train(replace(SMALL, out=str(tmp_path / "b")))
    assert kept["config"] == plain["config"]
    timed = {"sampling_seconds", "sync_seconds", "training_seconds"}
    assert {k: v for k, v in kept["steps"].items() if k not in timed} == {k: v for k, v in plain["steps"].items() if k not in timed}
    assert not rollouts_folder(replace(SMALL, out=str(tmp_path / "b"))).exists()


def test_a_fresh_run_leaves_no_batch_of_the_last_one(tmp_path):
    config = replace(SMALL, keep_rollouts=1, out=str(tmp_path))
    train(config)
    train(replace(config, keep_rollouts=4), afresh=True)
    assert list(kept_batches(rollouts_folder(config))) == [4]


def test_pieces_of_a_batch_are_the_same_batch(tmp_path):
    "In micro-batches the forward passes differ in their order of summation: float32 to about 1e-5."
    whole, parts = (replace(SMALL, keep_rollouts=1, steps=1, micro_batch=m, out=str(tmp_path / str(m))) for m in (None, 3))
    batches = [train(c) and read_rollouts(kept_batches(rollouts_folder(c))[1]) for c in (whole, parts)]
    assert batches[0].keys() == batches[1].keys()
    for name, x in batches[0].items():
        torch.testing.assert_close(x, batches[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [dict(keep_rollouts=-1), dict(keep_rollouts=1.5), dict(keep_rollouts=2, out=None)])
def test_the_setting_is_checked(wrong):
    with pytest.raises(ValueError, match="keep_rollouts"):
        TrainConfig(**{"out": "somewhere", **wrong})


def test_rows_are_the_format_of_logged_rollouts(tmp_path):
    batch = make_batch()
    path = tmp_path / "x.jsonl"
    path.write_text(rollout_lines(batch, prompt=HOSTILE + ["", ""], pieces=[HOSTILE] * 6), encoding="utf-8")
    back = read_rollouts(path)
    assert back.keys() == batch.keys()
    assert all(torch.equal(back[name].double(), x.double()) for name, x in batch.items())
    assert read_kept(path).pieces[1] == tuple(HOSTILE) and read_kept(path).prompts[0] == HOSTILE[0]


# the numbers


@pytest.mark.parametrize("name", sorted(recipes()))
def test_coefficients_are_the_gradient_of_the_recipes_loss(name):
    batch = make_batch()
    if lacks := [x for x in recipe(name).inputs if x not in batch]:
        with pytest.raises(ValueError, match=lacks[0]):
            judge(recipe(name), batch)
        return
    logp = batch["logp"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(recipe(name).loss_on({**batch, "logp": logp})[0], logp)
    torch.testing.assert_close(judge(recipe(name), batch).coefficient, -gradient * batch["mask"], rtol=0, atol=TOLERANCE)
    assert not judge(recipe(name), {**batch, "logp": batch["logp_mu"]}).stopped.any(), "on-policy, nothing is stopped"


def test_reinforce_by_hand(explorer):
    "Every token is pushed by its advantage over the number of responses; in a pair with one right answer the advantage is 0.5 over 1 / sqrt(2)."
    batch = explorer.kept(8).batch
    made = explorer.batch(8, "reinforce", "ppo")
    np.testing.assert_allclose(made["adv"], np.array([1, -1, 1, -1, 0, 0]) / np.sqrt(2), rtol=3e-6)  # the floor of 1e-6 under the deviation
    np.testing.assert_allclose(made["coefficient"], made["adv"] * [2, 3, 4, 4, 4, 4] / 6, atol=TOLERANCE)
    assert (made["stopped"] == 0).all()
    shift = ((batch["logp"] - batch["logp_mu"]) * batch["mask"]).sum(1).numpy()
    w = np.exp(shift)
    np.testing.assert_allclose(made["log_ratio"], shift, atol=TOLERANCE)
    np.testing.assert_allclose(made["share"], w / w.sum(), atol=TOLERANCE)
    assert made["ess"] == pytest.approx(w.sum() ** 2 / (w**2).sum() / 6, abs=TOLERANCE)


@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_under_ppo_the_stopped_tokens_are_those_outside_the_clip(tmp_path, eps):
    explorer = explore_run(make_run(tmp_path, eps_low=eps, eps_high=eps))
    batch, ppo = explorer.kept(8).batch, explorer.judgement(8, "ppo")
    ratio = (batch["logp"] - batch["logp_old"]).exp()
    outside = (((ppo.adv > 0) & (ratio > 1 + eps)) | ((ppo.adv < 0) & (ratio < 1 - eps))) & batch["mask"].bool()
    assert (ppo.stopped == outside).all() and outside.any() and not outside.all()
    assert (ppo.adv[-2:] == 0).all() and not ppo.stopped[-2:].any(), "a group without variance has nothing to stop"


def test_another_rival_changes_the_rivals_columns_only(explorer):
    one, other = explorer.compute(rival="reinforce"), explorer.compute(rival="topr")
    for view in ("run", "batch", "response"):
        moved = {k for k in one[view] if not np.array_equal(one[view][k], other[view][k])}
        assert all(k.startswith("rival_") for k in moved)
        assert bool(moved) == (view != "run")
    swapped = explorer.compute(recipe="reinforce", rival="ppo")["batch"]
    np.testing.assert_array_equal(swapped["coefficient"], explorer.compute(rival="reinforce")["batch"]["rival_coefficient"])


def test_a_response_is_its_row_of_the_batch(explorer):
    for i in range(6):
        made = explorer.compute(response=i)
        r = made["response"]
        assert len(r["text"]) == (2 if i == 0 else 4) and {len(x) for x in r.values()} == {len(r["text"])}
        assert r["coefficient"].sum() == pytest.approx(made["batch"]["coefficient"][i], abs=TOLERANCE)
        assert r["log_ratio"].sum() == pytest.approx(made["batch"]["log_ratio"][i], abs=TOLERANCE)
    assert explorer.response(8, 1, "ppo", "topr")["written"].tolist() == [True, False, True, True]


def test_the_run_is_the_record(explorer):
    run = explorer.run()
    assert run["update"].tolist() == list(range(1, 9)) and run["reward"].tolist() == [i / 10 for i in range(8)]


def test_the_recipe_is_made_again_with_its_knobs(tmp_path):
    explorer = explore_run(make_run(tmp_path, "topr", neg_cap=3.0))
    assert explorer.own == "topr" and explorer.recipes["topr"].knobs["neg_cap"].default == 3.0
    for aggregate in ("token_mean", "seq_mean_token_sum_norm"):
        config = TrainConfig(recipe="topr", aggregate=aggregate)
        made = resolve(config)[1]
        assert recipe_facts(recipe_of(new_record(config_facts(config), recipe_facts(made)))) == recipe_facts(made)


# the widget, without a browser


def test_the_widget_follows(explorer):
    view = RunView(explorer)
    assert view.values["rival"] == "reinforce" and view.values["response"] != 3
    for params in (dict(rival="grpo"), dict(recipe="topr"), dict(response=3), dict(step=4)):
        before = view.strip.value
        view.set(**params)
        made = explorer.compute(**view.values)
        for who, prefix in (("own", ""), ("rival", "rival_")):
            np.testing.assert_array_equal(_trace(view.figure, f"batch/{who}").y, made["batch"][prefix + "coefficient"].astype(np.float32))
            np.testing.assert_array_equal(_trace(view.figure, f"tokens/{who}").y, made["response"][prefix + "coefficient"].astype(np.float32))
            crosses = np.round(np.array(_trace(view.figure, f"stopped/{who}").x, float)).astype(int)
            assert crosses.tolist() == np.flatnonzero(made["response"][prefix + "stopped"]).tolist()
        assert view.strip.value == strip(explorer, view.values)
        assert view.strip.value != before
        assert _trace(view.figure, "reward/now").x == (view.values["step"],)


def test_a_smaller_batch_moves_the_slider(tmp_path):
    explorer = explore_run(make_run(tmp_path, sizes=(4, 6)), response=5)
    view = RunView(explorer)
    view.set(step=4)
    assert view.controls["response"].value == 3 and len(_trace(view.figure, "batch/own").y) == 4
    view.set(step=8)
    assert view.controls["response"].max == 5


def test_a_saved_explorer_holds_its_picture(explorer):
    bundle = explorer._repr_mimebundle_()
    picture = json.loads(json.dumps(bundle["application/vnd.plotly.v1+json"]))
    assert {t.get("meta") for t in picture["data"]} >= {"batch/own", "tokens/rival", "reward"}
    assert "explore_run(ppo)" in bundle["text/plain"] and "application/vnd.jupyter.widget-view+json" not in bundle


class Tags(HTMLParser):
    "Collects what a browser would see as tags and attributes."

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def test_text_from_outside_is_escaped(tmp_path):
    explorer = explore_run(make_run(tmp_path, texts=[HOSTILE] * 6), response=2)
    seen = Tags(explorer.strip())
    assert seen.tags == {"div", "b", "span"} and seen.attributes == {"style", "title"}
    assert "<img src=x" not in explorer.strip() and '<img␣src=x␣onerror="alert(1)">' in seen.text
    for text in HOSTILE:
        assert not re.search(r"[<>\n\x00\u202e]", shown(text)) and not Tags(shown(text)).tags
    drawn = figure(explorer).to_dict()
    labels = [*drawn["layout"]["xaxis4"]["ticktext"], *(t for trace in drawn["data"] for t in trace.get("hovertext") or [])]
    assert labels and all(Tags(label).tags <= {"br"} for label in labels)


# what is refused


def test_without_kept_batches_it_says_how_to_keep_them(tmp_path):
    config = replace(SMALL, steps=1, out=str(tmp_path))
    record = train(config)
    with pytest.raises(ValueError, match="keep_rollouts=20, or offpolicy train --keep-rollouts 20"):
        explore_run(record_path(config))
    with pytest.raises(ValueError, match="^rollouts: expected the folder"):
        explore_run(record)


@pytest.mark.parametrize("wrong, message", [
    (dict(rival="magic"), "recipe: expected one of .*ppo.*got 'magic'"), (dict(recipe="magic"), "recipe: expected one of"),
    (dict(step=5), "step: expected one of 4, 8, got 5"), (dict(response=6), "response: expected a number from 0 to 5, got 6"),
    (dict(response=-1), "response: "), (dict(response=True), "response: "), (dict(cap=1), "has no cap; there are step, recipe")])
def test_an_impossible_position_is_refused(explorer, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        explorer.compute(**wrong)
    with pytest.raises(ValueError, match=message):
        explore_run(next(tmp_path.glob("*.json")), **wrong)


def test_a_recipe_that_the_batch_cannot_feed_is_named(tmp_path, monkeypatch):
    needy = Recipe("needy", loss=needy_loss)
    monkeypatch.setattr("offpolicy_rl.lab.run_explorer.recipes", lambda: {**recipes(), "needy": needy})
    path = make_run(tmp_path)
    explorer = explore_run(path)
    assert explorer.missing["needy"] == "value" and "needy" not in explorer.recipes
    assert "needy" not in RunView(explorer).controls["rival"].options
    with pytest.raises(ValueError, match="recipe 'needy' needs value, which the kept batches lack"):
        explorer.compute(rival="needy")
    with pytest.raises(ValueError, match="needs value"):
        explore_run(path, recipe=needy)


def test_a_recipe_that_has_changed_since_is_refused(tmp_path):
    path = make_run(tmp_path)
    record = json.loads(path.read_text())
    record["recipe"]["knobs"]["eps_low"] = 0.123
    with pytest.raises(ValueError, match=r"^recipe: the run's was .*0\.123.*pass the run's own as `recipe`"):
        RunExplorer(record, path.with_suffix(".rollouts"))
    own = recipe("ppo").with_knobs(eps_low=0.123)
    assert RunExplorer(record, path.with_suffix(".rollouts"), own).recipes["ppo"] is own


def test_files_without_text_and_with_wrong_text(tmp_path):
    path = write_rollouts(tmp_path / "step-000001.jsonl", make_batch())
    kept = read_kept(path)
    assert kept.prompts[0] == "" and kept.pieces[1] == ("1", "2", "3", "4")
    rows = [{**json.loads(line), "pieces": ["too few"]} for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="row 1: column 'pieces': expected a list of 2 texts"):
        read_kept(path)
