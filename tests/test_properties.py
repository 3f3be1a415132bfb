"""What every ratio, advantage, loss and penalty of the catalogue must do, found by its signature: there is no list to maintain.

The inputs are random batches of the vocabulary. Tolerances: float32 against float64 is 1e-3 relative to the largest entry (weights up to e^6 multiply
rounding errors of 1e-7 in a sum of log-probabilities); everything that must be the same is compared to 1e-10 in float64."""
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offpolicy_rl.core import CARRIERS, VOCABULARY, call, catalogue, knobs, trusted

TENSOR_KINDS = ("ratio", "advantage", "loss", "penalty", "return", "reward")
METHODS = [pytest.param(row, id=row.name) for row in catalogue() if row.kind in TENSOR_KINDS]
LOSSES = [pytest.param(row, id=row.name) for row in catalogue() if row.kind in ("loss", "penalty")]
EXAMPLES = settings(max_examples=25, deadline=None)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10_000))


def batch_for(row, b: int, t: int, seed: int, dtype=torch.float64, drift: float = 1.0) -> dict[str, torch.Tensor]:
    "A random batch with what the method names; `drift` is the spread of the log-ratio in nats."
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    lengths = torch.randint(0, t + 1, (b,), generator=g)
    mask = torch.arange(t)[None, :] < lengths[:, None]
    logp = -normal(b, t).abs() - 0.1
    integers = lambda most, *shape: torch.randint(0, most, shape, generator=g)
    made = dict(logp=logp, mask=mask, reward=normal(b).round(decimals=1), reward_t=normal(b, t), adv=normal(b), group=integers(max(1, b // 2), b),
                turn=(torch.arange(t) // 2).expand(b, t).clone(), value=normal(b, t), entropy=normal(b, t).abs(), logits=normal(b, t, 4),
                teacher_logits=normal(b, t, 4), expert=torch.rand(b, generator=g) < 0.3, age=integers(4, b))
    for name in ("mean_logp", "mean_logp_old"): made[name] = logp - normal(b, t).abs()
    for name in ("logp_mu", "logp_old", "logp_ref", "logp_teacher"): made[name] = logp - drift * normal(b, t)
    needed = {k: made[k] for k in row.inputs + row.optional if k in made}
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in needed.items()}


def value_of(row, batch) -> torch.Tensor:
    "What the method computes: the scalar of a loss, else its tensor."
    made = call(row.fn, batch)
    return made[0] if row.kind == "loss" else made


def gradient_of(row, batch) -> torch.Tensor:
    "Gradient by `logp` of a loss or penalty."
    logp = batch["logp"].detach().clone().requires_grad_()
    value = value_of(row, {**batch, "logp": logp})
    if not value.requires_grad: return torch.zeros_like(logp)
    return torch.autograd.grad(value, logp)[0]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> bool:
    "Equal relative to the largest entry."
    scale = max(1.0, float(a.detach().abs().max()) if a.numel() else 1.0)
    return bool(((a.double() - b.double()).abs() <= tolerance * scale).all())


@pytest.mark.parametrize("row", METHODS)
@EXAMPLES
@given(shapes)
def test_output_has_the_shape_of_its_kind(row, shape):
    b, t, seed = shape
    made = call(row.fn, batch_for(row, b, t, seed))
    if row.kind in ("ratio", "return"): assert made.shape == (b, t)
    if row.kind == "reward": assert made.shape == (b,)
    if row.kind == "advantage": assert made.shape in ((b,), (b, t))
    if row.kind == "penalty": assert made.shape == ()
    if row.kind == "loss":
        loss, stats = made
        assert loss.shape == () and all(isinstance(x, torch.Tensor) and x.ndim == 0 and not x.requires_grad for x in stats.values())


@pytest.mark.parametrize("row", [p for p in METHODS if "mask" in p.values[0].inputs])
@EXAMPLES
@given(shapes)
def test_padding_changes_nothing(row, shape):
    "Masked entries replaced by other numbers, and by NaN, leave value and gradient as they are."
    batch = batch_for(row, *shape)
    for junk in (3.7, float("nan"), float("inf")):
        filled = {k: torch.where(batch["mask"] if x.ndim == 2 else batch["mask"][..., None], x, torch.full_like(x, junk))
                  if x.is_floating_point() and x.shape[:2] == batch["mask"].shape else x for k, x in batch.items()}
        assert close(value_of(row, batch), value_of(row, filled))
        if "logp" in row.inputs and row.kind in ("loss", "penalty"):
            assert close(gradient_of(row, batch), gradient_of(row, filled)) and (gradient_of(row, filled)[~batch["mask"]] == 0).all()


@pytest.mark.parametrize("row", METHODS)
@EXAMPLES
@given(shapes)
def test_order_of_sequences_does_not_matter(row, shape):
    batch = batch_for(row, *shape)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(shape[2]))
    before, after = value_of(row, batch), value_of(row, {k: x[order] for k, x in batch.items()})
    assert close(before if before.ndim == 0 else before[order], after)


@pytest.mark.parametrize("row", METHODS)
@EXAMPLES
@given(shapes)
def test_float32_agrees_with_float64_and_half_comes_out_as_float32(row, shape):
    double = batch_for(row, *shape)
    single = {k: x.float() if x.is_floating_point() else x for k, x in double.items()}
    half = {k: x.bfloat16() if x.is_floating_point() else x for k, x in double.items()}
    assert value_of(row, double).dtype == torch.float64 and value_of(row, half).dtype == torch.float32
    assert torch.isfinite(value_of(row, half)).all()
    assert close(value_of(row, double), value_of(row, single), 1e-3)


@pytest.mark.parametrize("row", METHODS)
@pytest.mark.parametrize("shift", [-1e4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_are_finite_in_value_and_gradient(row, shift, dtype):
    far = shift * torch.tensor([[1.], [-1.], [1.], [0.]], dtype=dtype)
    batch = {k: x + far if k.startswith("logp_") else x for k, x in batch_for(row, 4, 3, 0, dtype).items()}
    assert torch.isfinite(value_of(row, batch)).all()
    if "logp" in row.inputs and row.kind in ("loss", "penalty"): assert torch.isfinite(gradient_of(row, batch)).all()


@pytest.mark.parametrize("row", METHODS)
def test_nothing_at_all_is_finite(row):
    "Rows without tokens, a group of one, a group without variance."
    batch = batch_for(row, 3, 2, 1)
    if "mask" in batch: batch["mask"] = torch.zeros_like(batch["mask"])
    if "group" in batch: batch["group"] = torch.tensor([7, 3, 3])
    if "reward" in batch: batch["reward"] = torch.full_like(batch["reward"], 0.1)
    assert torch.isfinite(value_of(row, batch)).all()
    if "logp" in row.inputs and row.kind in ("loss", "penalty"): assert (gradient_of(row, batch) == 0).all()


@pytest.mark.parametrize("row", METHODS)
def test_nan_and_wrong_shapes_are_refused_by_name(row):
    batch = batch_for(row, 3, 2, 2)
    if "mask" in batch: batch["mask"] = torch.ones_like(batch["mask"])
    for name in row.inputs:
        if VOCABULARY[name].number == "float":
            with pytest.raises(ValueError, match=rf"^{name}: "): call(row.fn, {**batch, name: torch.full_like(batch[name], float("nan"))})
        with pytest.raises(ValueError, match="expected"): call(row.fn, {**batch, name: batch[name][None, None]})
        if len(row.inputs) > 1:
            with pytest.raises(ValueError, match="expected shape"): call(row.fn, {**batch, name: torch.cat([batch[name], batch[name]])})
        with pytest.raises(ValueError, match=f"needs {name}"): call(row.fn, {k: x for k, x in batch.items() if k != name})


@pytest.mark.parametrize("row", METHODS)
def test_a_knob_outside_its_range_is_refused_by_name(row):
    batch = batch_for(row, 3, 2, 3)
    for name, knob in knobs(row.fn).items():
        if knob.range is None: continue
        assert knob.default in knob.range, f"{name}: default {knob.default} outside {knob.range}"
        for bad in (float("nan"), "much"):
            with pytest.raises(ValueError, match=f"^{name}: expected a number in"): call(row.fn, batch, **{name: bad})
        below = (knob.range.limits or (knob.range.lo,))[0] - 1
        if below > -float("inf"):
            with pytest.raises(ValueError, match=f"^{name}: "): call(row.fn, batch, **{name: below})


@pytest.mark.parametrize("row", LOSSES)
def test_only_logp_carries_gradient(row):
    batch = {k: x.clone().requires_grad_() if x.is_floating_point() else x for k, x in batch_for(row, 4, 3, 4).items()}
    value = value_of(row, batch)
    others = {k: x for k, x in batch.items() if k != "logp" and x.requires_grad}
    if not others: return
    for name, gradient in zip(others, torch.autograd.grad(value, list(others.values()), allow_unused=True)):
        if name not in CARRIERS: assert gradient is None or (gradient == 0).all(), name


@pytest.mark.parametrize("row", METHODS)
def test_nothing_is_changed_in_place_and_the_same_again_is_the_same(row):
    batch = batch_for(row, 4, 3, 5)
    copies = {k: x.clone() for k, x in batch.items()}
    first, second = value_of(row, batch), value_of(row, batch)
    assert torch.equal(first, second) and all(torch.equal(batch[k], copies[k]) for k in batch)


@pytest.mark.parametrize("row", METHODS)
def test_it_is_documented(row):
    assert row.summary.endswith(".") and row.paper and inspect.signature(row.fn).parameters


def test_inside_trusted_a_door_is_open_and_outside_it_is_shut():
    "A method built on another one can be differentiated and vectorised by the lab."
    row = catalogue()["token_ratio"]
    wrong = dict(logp=torch.full((1, 1), float("nan")), logp_mu=torch.zeros(1, 1), mask=torch.ones(1, 1))
    with trusted(): assert row.fn(**wrong).isnan().all()
    with pytest.raises(ValueError, match="^logp: "): row.fn(**wrong)
    with trusted(): assert torch.func.vmap(row.fn)(torch.zeros(5, 2, 3), torch.zeros(5, 2, 3), torch.ones(5, 2, 3)).shape == (5, 2, 3)


@pytest.mark.parametrize("row", [p for p in LOSSES if p.values[0].module.startswith("offpolicy_rl.")])
def test_its_notebook_holds_it_to_its_coefficient(row):
    "Every loss and penalty is differentiated in a cell of its own notebook that asserts something, and the notebook states the coefficient."
    notebook = json.loads((Path(__file__).parents[1] / "nbs" / f"{row.notebook}.ipynb").read_text(encoding="utf-8"))
    text = {kind: ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind] for kind in ("code", "markdown")}
    differentiates = re.compile(r"\bcoefficient\(|token_coefficients\(|\.backward\(|autograd\.grad|coefficients?_of\(|gradient")
    checks = [cell for cell in text["code"] if "assert" in cell and differentiates.search(cell) and not cell.startswith("#| export")]
    assert any(re.search(rf"\b{row.name}\b", cell) for cell in checks), f"no cell of {row.notebook} asserts the gradient coefficient of {row.name}"
    assert any("gradient coefficient" in cell for cell in text["markdown"]), f"{row.notebook} does not state its gradient coefficient"
