"""The explorer: its numbers are the lab's, every slider moves them, the widget follows, and the saved grid says the same.

The explorer of every method is built and fills its panels. The page, which is ten times as much work, is held to the lab for one method of
each kind: of each combination of what it is, whether it compares groups and which sorts of knobs it has. So a new method costs a fraction of a second.

The grid stores 16-bit codes, so a stored number is within half a step, (hi - lo) / 65534 / 2, of what it stores; the direction error is a square root
of a difference from 1 and carries another 1e-7 of rounding."""

import functools
import itertools
import json
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import pytest
import torch

from offpolicy_rl.core import Range, catalogue, inputs, knobs, method, seq_mean_token_sum
from offpolicy_rl.lab import explorer_view
from offpolicy_rl.lab.coefficient import coefficient
from offpolicy_rl.lab.curve import curve
from offpolicy_rl.lab.exact import exact
from offpolicy_rl.lab.explore import DIALS, LEVELS, PARTS, RIVALS, UPDATES, Setting, advantage_by_correct, drifted, explore, kind_of, pointwise, turned
from offpolicy_rl.lab.explorer_grid import LOG_VARIANCES, STEPS, pack, unpack
from offpolicy_rl.recipes import recipes

METHODS = {**{row.name: row.fn for row in catalogue() if row.kind in RIVALS and row.module.startswith("offpolicy_rl.")}, **recipes()}


def own_knobs(name):
    return METHODS[name].knobs if name in recipes() else knobs(METHODS[name])


def sort_of(name):
    "What the explorer treats alike: a kind of method, with or without groups, with these sorts of knobs (a range, a switch, neither)."
    tensors = METHODS[name].inputs if name in recipes() else inputs(METHODS[name])
    sorts = {("fixed" if knob.range is None else "range", type(knob.default).__name__) for knob in own_knobs(name).values()}
    return kind_of(METHODS[name]), "group" in tensors, frozenset(sorts)


ALL = pytest.mark.parametrize("name", METHODS)
KINDS = {sort_of(name): name for name in reversed(METHODS)}.values()      # of each sort the first in the catalogue
EACH_KIND = pytest.mark.parametrize("name", sorted(KINDS))
ROUNDING = 1e-7
LIMIT = 60_000


@functools.cache
def explorer(name):
    return explore(METHODS[name])


@functools.cache
def page(name):
    return explorer(name).grid()


def small_toy(name):
    "A toy with draws few enough to try many settings, also in groups."
    return "token tree" if explorer(name).group_size == 1 else "with end token"


def other_value(knob, value):
    "A value of a knob far from the present one."
    if knob.range is None:
        return not value
    lo, hi = knob.range.lo, knob.range.hi
    return lo if abs(value - lo) > abs(value - hi) else hi


def refused(this, **params):
    "Whether the method refuses this combination of knobs."
    try:
        this.compute(parts=("moments",), **params)
    except ValueError:
        return True
    return False


@ALL
def test_every_explorer_builds(name):
    this = explore(METHODS[name], rivals={})      # fills each panel once, or says why it cannot
    assert set(this.knobs) | set(this.held) == set(own_knobs(name)) and not set(this.knobs) & set(this.held)
    assert "moments" not in this.missing and all(this.missing.values())
    made = this.compute(parts=("moments",), toy="bandit", mu_age=2)
    assert np.isfinite(made["direction_error"]).all() and np.isfinite(made["variance"]).all()


@EACH_KIND
def test_numbers_are_the_labs(name):
    this, toy = explorer(name), small_toy(name)
    setting = Setting(toy, mu_age=3, mu_temperature=1.5, mu_noise=0.2, mu_mixture=0.1)
    values = {n: other_value(k, this.start[n]) for n, k in this.knobs.items()}
    dials = dict(toy=toy, mu_age=3, mu_temperature=1.5, mu_noise=0.2, mu_mixture=0.1)
    if refused(this, **dials, **values):
        values = {}
    made = this.compute(**dials, **values)
    fn = turned(METHODS[name], values)
    moments = exact(fn, drifted(this.toys[toy], setting), group_size=this.group_size)
    assert made["direction_error"][0] == moments.direction_error and made["variance"][0] == moments.relative_variance
    if "coefficient" in made:
        lab = advantage_by_correct(fn) if this.kind == "advantage" else coefficient(pointwise(fn))
        np.testing.assert_array_equal(made["coefficient"], lab.numpy())
    if "objective" in made:
        np.testing.assert_array_equal(made["objective"][:, 0], curve(fn, this.toys[toy], staleness=4, updates=UPDATES).objective.mean(0).numpy())
    for i, (rival, other) in enumerate(this.rivals.items(), 1):
        assert made["direction_error"][i] == exact(other, drifted(this.toys[toy], setting), group_size=this.group_size).direction_error, rival


def test_weights_are_the_ratios_of_the_batch():
    made = explore(METHODS["sequence_ratio"], toy="with end token", mu_age=6).compute(parts=("weights",))
    np.testing.assert_allclose(made["weights"][:, 0], made["weights"][:, 1], rtol=1e-12)
    assert (np.diff(made["weights"][:, 0]) <= 0).all()
    weight = made["weights"][:, 0]
    assert made["ess"] == pytest.approx(weight.sum() ** 2 / (weight**2).sum() / len(weight))
    unweighted = explore(METHODS["reinforce_loss"], toy="token tree", mu_age=6).compute(parts=("weights",))
    np.testing.assert_allclose(unweighted["weights"][:, 1], 1)


@EACH_KIND
def test_every_knob_has_a_slider_or_is_named(name):
    shown = page(name)
    assert {k["name"] for k in shown["knobs"]} | set(shown["held"]) == set(own_knobs(name))


def moved_by(this, knob, toys):
    "The largest change in any table of the grid, in units of the table's step, when a knob goes from one end to the other."
    ends = (False, True) if this.knobs[knob].range is None else (this.knobs[knob].range.lo, this.knobs[knob].range.hi)
    most = 0.0
    for toy, (dial, levels) in itertools.product(toys, LEVELS.items()):
        where = {"toy": toy, "mu_age": 0, dial: levels[-1]}
        if any(refused(this, **where, **{knob: v}) for v in ends):
            return np.inf
        a, b = (this.compute(parts=("coefficient", "moments"), **where, **{knob: v}) for v in ends)
        change = abs(a["direction_error"][0] - b["direction_error"][0]) * STEPS
        change = max(change, abs(np.log10(max(a["variance"][0], 1e-9)) - np.log10(max(b["variance"][0], 1e-9))) * STEPS / np.ptp(LOG_VARIANCES))
        if "coefficient" in a:
            change = max(change, np.nanmax(abs(a["coefficient"].clip(-10, 10) - b["coefficient"].clip(-10, 10))) * STEPS / 20)
        most = max(most, change)
    return most


@EACH_KIND
def test_a_knob_moves_something_or_the_page_says_so(name):
    this, shown = explorer(name), page(name)
    for knob in (k["name"] for k in shown["knobs"]):
        moved = moved_by(this, knob, shown["toys"][:1] if this.group_size > 1 else shown["toys"])
        if moved > 1:
            assert knob not in shown["idle"], f"{knob} moves a number by {moved:.0f} steps"
        elif this.group_size == 1:
            assert moved > 0 or knob in shown["idle"], f"{knob} moves nothing, and the page does not say so"


def test_a_dead_knob_is_called_idle():
    @method(family="ratios", paper="a test")
    def half_dead_loss(
        logp, logp_mu, adv, mask, *, alive: Annotated[float, Range(0, 2)] = 1.0, dead: Annotated[float, Range(0, 1)] = 0.5, switch: bool = False
    ):
        "A loss with a knob that does nothing."
        return -seq_mean_token_sum((adv[:, None] + alive * (logp - logp_mu).detach()) * logp * (2 if switch else 1), mask), {}

    shown = explore(half_dead_loss).grid()
    assert [k["name"] for k in shown["knobs"]] == ["alive", "dead", "switch"] and shown["idle"] == ["dead"]


@EACH_KIND
def test_grid_is_small_and_equals_compute(name):
    this, shown = explorer(name), page(name)
    assert len(json.dumps(shown)) <= LIMIT
    assert "NaN" not in json.dumps(shown)
    tables = {k: unpack(t) for k, t in shown["tables"].items()}
    half = {k: (t["hi"] - t["lo"]) / STEPS / 2 + ROUNDING for k, t in shown["tables"].items()}
    random = np.random.default_rng(0)
    for _ in range(6):
        at = tuple(int(random.integers(len(k["values"]))) for k in shown["knobs"])
        toy, dial, level = (int(random.integers(n)) for n in (len(shown["toys"]), len(DIALS), 6))
        chosen = {k["name"]: k["values"][i] for k, i in zip(shown["knobs"], at)}
        setting = {"mu_age": 0, shown["dials"][dial]["name"]: shown["dials"][dial]["values"][level]}
        where = (toy, dial, level)
        if refused(this, toy=shown["toys"][toy], **setting, **chosen):
            assert np.isnan(tables["direction_error"][at + where])
            continue
        made = this.compute(parts=("coefficient", "moments"), toy=shown["toys"][toy], **setting, **chosen)
        logs = np.log10(np.maximum(made["variance"], 10 ** LOG_VARIANCES[0]))
        assert abs(tables["direction_error"][at + where] - made["direction_error"][0]) <= half["direction_error"]
        assert abs(tables["log_variance"][at + where] - logs[0]) <= half["log_variance"]
        assert (abs(tables["rival_log_variance"][(slice(None), *where)] - logs[1:]) <= half["rival_log_variance"]).all()
        if "coefficient" in made:
            np.testing.assert_allclose(tables["coefficient"][at], made["coefficient"].T.clip(-10, 10), atol=half["coefficient"])


def bounded(**defaults):
    "A loss whose two knobs must be in order."

    @method(family="ratios", paper="a test")
    def bounded_loss(
        logp, logp_mu, adv, mask, *, low: Annotated[float, Range(0, 2)] = 0.5, high: Annotated[float, Range(0, 2)] = 1.0
    ):
        "A ratio held between two bounds."
        if low > high:
            raise ValueError(f"low: expected at most high={high}, got {low}")
        return -seq_mean_token_sum((logp - logp_mu).exp().detach().clamp(low, high) * adv[:, None] * logp, mask), {}

    return explore(bounded_loss, **defaults)


def test_a_refused_combination_is_a_gap_and_is_told():
    this = bounded()
    tables, (low, high) = this.grid()["tables"], (k["values"] for k in this.grid()["knobs"])
    gaps = np.isnan(unpack(tables["direction_error"])).all(axis=(2, 3, 4))
    np.testing.assert_array_equal(gaps, np.greater.outer(low, high))
    np.testing.assert_array_equal(np.isnan(unpack(tables["coefficient"])).all(axis=(2, 3)), gaps)
    before = drawn(this.view)
    this.view.controls["low"].value = 2.0
    assert "low: expected at most" in this.view.told.value
    assert all(np.array_equal(before[m][1], y, equal_nan=True) for m, (_, y) in drawn(this.view).items())
    this.view.controls["low"].value = 0.2
    assert this.view.told.value == ""


def test_pack_keeps_numbers_gaps_and_cuts():
    values = np.random.default_rng(0).normal(size=(3, 5)) * 4
    values[1, 2] = np.nan
    table = pack(values, (-5, 5))
    back = unpack(table)
    assert np.isnan(back[1, 2]) and np.isnan(back).sum() == 1
    assert np.nanmax(abs(back - values.clip(-5, 5))) <= (table["hi"] - table["lo"]) / STEPS / 2 * (1 + 1e-9)
    assert unpack(pack(np.full((2, 2), 3.0), (0, 9))).tolist() == [[3, 3], [3, 3]]
    assert unpack(pack(np.empty((0, 4)), (0, 1))).shape == (0, 4)


def trace(view, meta):
    return next(view.figure.select_traces(selector=dict(meta=meta)))


def drawn(view):
    return {t.meta: (None if t.x is None else np.array(t.x), np.array(t.y)) for t in view.figure.data}


@pytest.mark.parametrize("name", ["ppo_loss", "token_ratio", "grpo_advantage", "topr"])
def test_every_control_moves_the_figure(name):
    this = explore(METHODS[name], toy="with end token")
    view = this.view
    start = {n: c.value for n, c in view.controls.items()}
    assert all(start[n] == pytest.approx(this.start[n]) for n in start if n != "toy")
    for control, knob in {**this.knobs, **DIALS}.items():
        before = drawn(view)
        view.controls[control].value = other_value(knob, start[control])
        after = drawn(view)
        assert any(not np.array_equal(a, b, equal_nan=True) for m in before for a, b in zip(before[m], after[m]) if a is not None), control
        made = this.compute(parts=("moments",), **view.values)
        np.testing.assert_allclose(trace(view, "direction_error").x, made["direction_error"], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(trace(view, "variance").x, made["variance"].clip(explorer_view.LEAST_VARIANCE), rtol=1e-6)
        assert trace(view, "variance").text == tuple(f"{v:.3g}" for v in made["variance"])
    view.controls["toy"].value = "bandit"
    made = this.compute(**view.values)
    np.testing.assert_allclose(trace(view, f"{this.name}/3").y, made["objective"][:, 0], rtol=1e-5, atol=1e-6)
    view.reset.click()
    assert all(view.controls[n].value == start[n] for n in start)


def test_live_view_is_quick():
    this = explore(METHODS["topr_loss"], toy="token tree")
    view = this.view
    took = {}
    for part in PARTS:
        times = []
        for cap in (0.5, 2.0, 4.0):
            start = time.process_time()
            view_made = this.compute(parts=(part,), **{**view.values, "neg_cap": cap})
            with view.figure.batch_update():
                explorer_view.place(view.figure, this, view_made)
            times.append(time.process_time() - start)
        took[part] = min(times)
    assert took["coefficient"] < 0.1 and took["moments"] < 0.5, took


def test_saved_output_has_the_figure_and_a_live_one_the_widget(monkeypatch):
    saved = explorer("topr_loss")._repr_mimebundle_()
    assert set(saved) == {"text/plain", explorer_view.EXPLORER_MIME, explorer_view.FIGURE_MIME}
    assert "topr_loss" in saved["text/plain"] and "variance" in saved["text/plain"]
    monkeypatch.setattr(explorer_view, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    live = explorer("topr_loss")._repr_mimebundle_()
    assert live[explorer_view.WIDGET_MIME]["model_id"] == explorer("topr_loss").widget.model_id
    assert live[explorer_view.EXPLORER_MIME] == saved[explorer_view.EXPLORER_MIME]


def test_three_explorers_leave_room_in_a_notebook():
    largest = sorted(KINDS, key=lambda name: len(json.dumps(page(name))))[-3:]
    sizes = [len(json.dumps(explorer(name)._repr_mimebundle_(), indent=1)) for name in largest]
    assert sum(sizes) < 240_000, "of the 300 KB that a notebook may have"


def test_refuses_what_it_cannot_explore():
    this = explorer("topr_loss")
    for params, told in [({"neg_cap": -1}, "neg_cap"), ({"nonsense": 1}, "nonsense"), ({"toy": "chess"}, "chess"), ({"mu_age": 17}, "mu_age")]:
        with pytest.raises(ValueError, match=told):
            this.compute(**params)
    with pytest.raises(ValueError, match="rivals"):
        explore(METHODS["topr_loss"], rivals=[METHODS["grpo_advantage"]])
    with pytest.raises(ValueError, match="@method"):
        explore(torch.exp)


WITHOUT = """
import sys
for name in ("plotly", "ipywidgets", "anywidget", "IPython"): sys.modules[name] = None
from offpolicy_rl.lab.explore import explore
from offpolicy_rl.ratios.importance import token_ratio
explorer = explore(token_ratio)
print(explorer)
explorer.widget
"""


def test_without_the_extra_it_computes_and_says_what_to_install():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert "token_ratio" in done.stdout
    assert done.returncode != 0 and "pip install 'offpolicy_rl[lab]'" in done.stderr.splitlines()[-1]
