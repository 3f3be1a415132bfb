"Log-probabilities and entropies in chunks: the plain way's values and gradients, without its tensor of all logits."

import weakref
from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("transformers")
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PhiConfig, Qwen3Config

from offpolicy_rl import core
from offpolicy_rl.llm.config import TrainConfig
from offpolicy_rl.llm.engine import HFEngine, kept_logits, mean_logp, token_entropy, token_logps
from offpolicy_rl.llm.learner import Learner
from offpolicy_rl.llm.logp import chunked_logp, fits, model_logps
from offpolicy_rl.llm.model import char_tokenizer, embedded_model
from offpolicy_rl.recipes import recipe

B, T, V, D = 3, 4, 7, 5
SIZE = dict(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48,
            pad_token_id=0, bos_token_id=None, eos_token_id=1)


class Made(TorchDispatchMode):
    "What the operations inside the block make: the elements of the largest tensor, and the most bytes that are held at once. Views do not count."

    def __init__(self):
        super().__init__()
        self.largest, self.held, self.peak = 0, {}, 0

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        out = fn(*args, **(kwargs or {}))
        given, made = ([x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in ((args, kwargs), out))
        for storage in made:
            if storage.data_ptr() in {x.data_ptr() for x in given} or storage._cdata in self.held: continue
            self.held[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.held.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.held.values()))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata in self.held)])
        return out


def made(run) -> Made:
    with Made() as seen: run()
    return seen


def inputs(b=B, t=T, v=V, d=D, dtype=torch.float64, bias=True, seed=0):
    "Hidden states, output layer, bias, tokens, and what a loss might ask of log pi and of the entropy."
    g = torch.Generator().manual_seed(seed)
    def normal(*shape): return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    hidden, head, offset = normal(b, t, d), normal(v, d), normal(v) if bias else None
    ups = [torch.randn(b, t, generator=g, dtype=torch.float64) for _ in range(2)]
    return hidden, head, offset, torch.randint(v, (b, t), generator=g), *ups


def plainly(hidden, head, bias, tokens, temperature, mask, kept=None):
    logits = torch.nn.functional.linear(hidden, head, bias) / temperature
    logp = logits.gather(-1, tokens[..., None])[..., 0] - (logits if kept is None else kept_logits(logits, kept)).logsumexp(-1)
    return dict(logp=logp * mask, entropy=token_entropy(logits, kept) * mask, mean_logp=mean_logp(logits) * mask)


def sets(b=B, t=T, v=V, k=5, seed=0):
    "For each token 1 to `k` ids in any order, filled up with -1; the sampled token is in some of the sets."
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(b, t, v, generator=g).argsort(-1)[..., :k]
    return ids.masked_fill(torch.arange(k) > torch.randint(k, (b, t, 1), generator=g), -1).int()


def gradients(out, ups, wanted, entropy):
    loss = (out["logp"] * ups[0]).sum()
    if entropy: loss = loss + (out["entropy"] * ups[1]).sum()
    return torch.autograd.grad(loss, [x for x in wanted if x is not None])


# against the plain way

@pytest.mark.parametrize("chunk", [*range(1, B * T + 1), None])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_the_plain_way_s_for_every_chunk(chunk, temperature, bias):
    hidden, head, offset, tokens, *ups = inputs(bias=bias)
    for mask in (torch.ones(B, T), (torch.arange(T) < torch.tensor([[4], [1], [0]])).float()):
        for entropy in (False, "detached", True):
            plain = plainly(hidden, head, offset, tokens, temperature, mask)
            ours = chunked_logp(hidden, head, tokens, bias=offset, temperature=temperature, mask=mask, chunk=chunk, entropy=entropy, mean=True)
            assert list(ours) == (["logp", "entropy", "mean_logp"] if entropy else ["logp", "mean_logp"])
            for name in ours: assert ours[name].dtype == torch.float64 and (ours[name] - plain[name]).abs().max() < 1e-10
            assert not ours["mean_logp"].requires_grad and (not entropy or ours["entropy"].requires_grad == (entropy is True))
            grads = [gradients(out, ups, (hidden, head, offset), entropy is True) for out in (ours, plain)]
            for mine, his in zip(*grads): assert (mine - his).abs().max() < 1e-10


@pytest.mark.parametrize("chunk", [1, 5, 7, None])
@pytest.mark.parametrize("temperature, bias", [(1.0, True), (0.6, False), (2.5, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_over_what_truncated_sampling_kept_too(chunk, temperature, bias, dtype):
    hidden, head, offset, tokens, *ups = inputs(bias=bias, dtype=dtype)
    exact = [x if x is None else x.detach().double().requires_grad_() for x in (hidden, head, offset)]
    kept = sets()
    inside, sizes = (kept == tokens[..., None]).any(-1), (kept >= 0).sum(-1)
    assert inside.any() and not inside.all() and sizes.min() == 1 and sizes.max() == kept.shape[2]
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    for mask in (torch.ones(B, T), (torch.arange(T) < torch.tensor([[4], [1], [0]])).float()):
        padded = kept.masked_fill(mask[..., None] == 0, -1)
        for entropy in (False, "detached", True):
            plain = plainly(*exact, tokens, temperature, mask, padded)
            ours = chunked_logp(hidden, head, tokens, bias=offset, temperature=temperature, mask=mask, kept=padded, chunk=chunk, entropy=entropy, mean=True)
            for name in ours: assert ours[name].dtype == dtype and (ours[name] - plain[name]).abs().max() < limit
            assert not ours["mean_logp"].requires_grad and (not entropy or ours["entropy"].requires_grad == (entropy is True))
            grads = gradients(ours, ups, (hidden, head, offset), entropy is True), gradients(plain, ups, exact, entropy is True)
            for mine, his in zip(*grads): assert (mine - his).abs().max() < limit * max(1.0, float(his.abs().max()))


def test_the_whole_vocabulary_kept_is_no_truncation():
    hidden, head, offset, tokens, *ups = inputs()
    every = torch.arange(V).flip(0).expand(B, T, V)
    ours, plain = (chunked_logp(hidden, head, tokens, bias=offset, kept=kept, entropy=True, mean=True) for kept in (every, None))
    for name in plain: assert (ours[name] - plain[name]).abs().max() < 1e-12
    for mine, his in zip(*(gradients(out, ups, (hidden, head, offset), True) for out in (ours, plain))): assert (mine - his).abs().max() < 1e-12


def test_the_gradient_is_that_of_finite_differences():
    hidden, head, offset, tokens, *_ = inputs()
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    def values(hidden, head, offset):
        out = chunked_logp(hidden, head, tokens, bias=offset, temperature=0.8, mask=mask, chunk=3, entropy=True)
        return out["logp"], out["entropy"]
    assert torch.autograd.gradcheck(values, (hidden, head, offset))


def test_an_entropy_alone_has_its_gradient():
    hidden, head, offset, tokens, _, up = inputs()
    grads = [torch.autograd.grad((out["entropy"] * up).sum(), (hidden, head, offset)) for out in (
        chunked_logp(hidden, head, tokens, bias=offset, entropy=True, chunk=5), plainly(hidden, head, offset, tokens, 1.0, torch.ones(B, T)))]
    for mine, his in zip(*grads): assert (mine - his).abs().max() < 1e-10


def test_a_second_derivative_is_refused():
    hidden, head, _, tokens, *_ = inputs(bias=False)
    logp = chunked_logp(hidden, head, tokens)["logp"].sum()
    with pytest.raises(RuntimeError, match="differentiated once"): torch.autograd.grad(logp, hidden, create_graph=True)


@pytest.mark.parametrize("truncated", [False, True])
def test_padding_may_hold_anything(truncated):
    hidden, head, offset, tokens, *ups = inputs()
    kept, strange = (sets(), sets()) if truncated else (None, None)
    mask = (torch.arange(T) < torch.tensor([[4], [1], [0]])).float()
    wild, odd = hidden.detach().clone(), tokens.clone()
    wild[mask == 0], odd[mask == 0] = torch.nan, -100
    wild.requires_grad_()
    if truncated: strange[mask == 0] = 10**6
    plain, ours = plainly(hidden, head, offset, tokens, 1.0, mask, kept), chunked_logp(wild, head, odd, bias=offset, mask=mask, kept=strange, entropy=True)
    assert (ours["logp"] - plain["logp"]).abs().max() < 1e-10 and (ours["logp"][mask == 0] == 0).all() and (ours["entropy"][mask == 0] == 0).all()
    for mine, his in zip(gradients(ours, ups, (wild, head, offset), True), gradients(plain, ups, (hidden, head, offset), True)):
        assert (mine - his).abs().max() < 1e-10
    none = chunked_logp(hidden, head, tokens, bias=offset, mask=torch.zeros(B, T), kept=strange, entropy=True, mean=True)
    assert all((x == 0).all() for x in none.values())
    assert all((g == 0).all() for g in gradients(none, ups, (hidden, head, offset), True))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("kept", [None, sets()], ids=["all", "kept"])
def test_logits_of_any_size_give_finite_numbers(scale, kept):
    hidden, head, _, tokens, *ups = inputs(dtype=torch.float32, bias=False)
    big = hidden.detach().mul(scale).requires_grad_()
    plain, ours = plainly(big.double(), head.double(), None, tokens, 1.0, torch.ones(B, T), kept), chunked_logp(big, head, tokens, kept=kept, entropy=True)
    size = max(1.0, float((big @ head.T).detach().abs().max()))
    eps = torch.finfo(torch.float32).eps
    assert (ours["logp"] - plain["logp"]).abs().max() <= 2 * D * eps * size                     # D products and sums a logit, two logits
    assert all(g.isfinite().all() for g in gradients(ours, [1e6 * up for up in ups], (big, head), True))


# precision and devices of mixed kinds

@pytest.mark.parametrize("half", ["both", "hidden", "head"])
def test_half_precision_is_multiplied_in_float32(half):
    v = 8192 + 100                                                                              # more than one piece of the head
    hidden, head, offset, tokens, *ups = inputs(v=v, dtype=torch.bfloat16)
    if half == "hidden": head, offset = (x.detach().float().requires_grad_() for x in (head, offset))
    if half == "head": hidden = hidden.detach().float().requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (hidden, head, offset)]
    plain = plainly(*exact, tokens, 1.0, torch.ones(B, T))
    ours = chunked_logp(hidden, head, tokens, bias=offset, chunk=5, entropy=True)
    wanted = (hidden, head, offset)
    with torch.autocast("cpu", torch.bfloat16):
        inside = chunked_logp(hidden, head, tokens, bias=offset, chunk=5, entropy=True)
        inside_grads = gradients(inside, ups, wanted, True)
    for name in ours:
        assert ours[name].dtype == torch.float32 and torch.equal(ours[name], inside[name])
        assert (ours[name] - plain[name]).abs().max() < 1e-5                                    # bfloat16 logits would be 1e-2 off
    for mine, same, his, x in zip(gradients(ours, ups, wanted, True), inside_grads, gradients(plain, ups, exact, True), wanted):
        assert mine.dtype == x.dtype and torch.equal(mine, same)
        assert (mine - his).abs().max() <= (torch.finfo(x.dtype).eps + 1e-5) * his.abs().max()


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, head, offset, tokens, *ups = inputs()
    still = dict(head=(head, offset), hidden=(hidden,))[frozen]
    for x in still: x.requires_grad_(False)
    moving = [x for x in (hidden, head, offset) if x.requires_grad]
    ours, plain = (gradients(out, ups, moving, True) for out in (chunked_logp(hidden, head, tokens, bias=offset, entropy=True, chunk=2),
                                                                 plainly(hidden, head, offset, tokens, 1.0, torch.ones(B, T))))
    for mine, his in zip(ours, plain): assert (mine - his).abs().max() < 1e-10


# memory

def test_no_tensor_of_all_logits_is_ever_made():
    hidden, head, offset, tokens, *ups = inputs(b=4, t=10, v=500, d=6)
    def step(out): gradients(out, ups, (hidden, head, offset), True)
    mask = torch.ones(4, 10)
    assert made(lambda: step(plainly(hidden, head, offset, tokens, 0.9, mask))).largest == 4 * 10 * 500
    for chunk in (1, 7, 20):
        chunked = partial(chunked_logp, hidden, head, tokens, bias=offset, temperature=0.9, mask=mask, chunk=chunk, entropy=True, mean=True)
        assert made(lambda chunked=chunked: step(chunked())).largest == max(chunk, 6) * 500         # a chunk of logits, or the head's gradient
        cut = partial(chunked, kept=sets(4, 10, 500, 90))
        assert made(lambda cut=cut: step(cut())).largest == max(chunk, 6) * 500
    frozen, half, wide = head.detach(), torch.bfloat16, torch.zeros(9000, 6, dtype=torch.bfloat16)
    assert made(lambda: gradients(chunked_logp(hidden, frozen, tokens, chunk=3), ups, (hidden,), False)).largest == 3 * 500
    assert made(lambda: chunked_logp(hidden.to(half), wide, tokens, chunk=1)).largest == 8192 * 6     # one piece of the head


@pytest.mark.parametrize("entropy, copies", [(False, 1), ("detached", 2), (True, 2)])
def test_a_chunk_of_logits_exists_once_or_with_an_entropy_twice(entropy, copies):
    b, t, v, d, chunk = 4, 10, 2000, 2, 10
    hidden, head, offset, tokens, *ups = inputs(b=b, t=t, v=v, d=d)
    def step(): return gradients(chunked_logp(hidden, head, tokens, bias=offset, chunk=chunk, entropy=entropy), ups, (hidden, head, offset), entropy is True)
    logits, results = chunk * v, v * d + v                                                        # the latter: gradients of head and bias
    a_row = 8 * d + 40                                                                            # numbers of which there is one a row, all together
    numbers = made(step).peak / 8
    assert copies * logits < numbers < copies * logits + results + v + a_row * b * t             # + v: the sum of one chunk for the bias


def test_rows_without_gradient_are_not_computed_again():
    hidden, head, offset, tokens, *_ = inputs(b=4, t=10, v=500, d=2)
    logp = chunked_logp(hidden, head, tokens, bias=offset, chunk=100)["logp"]
    up = torch.zeros(4, 10, dtype=torch.float64)
    up[1, 3:6] = 1.0
    def backward(): return torch.autograd.grad(logp, (hidden, head, offset), up, retain_graph=True)
    assert made(backward).largest == 3 * 500
    for mine, his in zip(backward(), torch.autograd.grad(plainly(hidden, head, offset, tokens, 1.0, 1.0)["logp"], (hidden, head, offset), up)):
        assert (mine - his).abs().max() < 1e-10


# of a whole model

@pytest.fixture
def sampled():
    "The embedded model, away from its initial weights, and rollouts of it for prompts of two lengths at temperature 0.8."
    model, g = embedded_model(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.05 * torch.randn(p.shape, generator=g))
    rollouts = HFEngine(model, char_tokenizer()).sample(["3142=", "10=", "98765432="], 5, 9, 0.8, g)
    rollouts.mask = rollouts.mask * (torch.arange(rollouts.tokens.shape[1]) < 1 + torch.arange(15)[:, None])   # responses of all lengths
    return model, rollouts


def check_against_token_logps(model, rollouts, temperature=0.8, share=None):
    logp, logits = token_logps(model, rollouts, temperature, share)
    plain = dict(logp=logp, entropy=token_entropy(logits, rollouts.kept) * rollouts.mask, mean_logp=mean_logp(logits) * rollouts.mask)
    ours = model_logps(model, rollouts, temperature, entropy=True, mean=True, share=share, chunk=7)
    ups = torch.randn(2, *logp.shape, generator=torch.Generator().manual_seed(0))
    for name in plain: assert (ours[name] - plain[name]).abs().max() < 1e-5 * max(1.0, float(plain[name].detach().abs().max()))
    mine, his = (gradients(out, ups, list(model.parameters()), True) for out in (ours, plain))
    top = max(float(g.abs().max()) for g in his)
    for a, b, (name, _) in zip(mine, his, model.named_parameters(), strict=True): assert (a - b).abs().max() < 1e-5 * top, name
    return ours


@pytest.mark.parametrize("share", [True, False])
def test_the_embedded_model_s_numbers_and_gradients_are_token_logps_s(sampled, share):
    model, rollouts = sampled
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ours = check_against_token_logps(model, rollouts, share=share)
    assert (ours["logp"] - rollouts.logp_mu * rollouts.mask).abs().max() < 1e-5                # and what the engine said when it sampled


def other(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SIZE) if isinstance(config, type) else config, dtype=dtype).eval()


PLAIN = [GraniteConfig(logits_scaling=8.0, **SIZE), CohereConfig(logit_scale=0.25, **SIZE), PhiConfig(**SIZE), Qwen3Config(head_dim=16, **SIZE)]
BENT = Gemma2Config(head_dim=16, **SIZE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("config", PLAIN, ids=lambda c: c.model_type)
def test_linear_output_layers_fit(config, dtype):
    model = other(config, dtype)
    head = model.get_output_embeddings()
    if head.bias is not None: torch.nn.init.normal_(head.bias)
    state = torch.get_rng_state()
    assert fits(model) and model.get_output_embeddings() is head and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("config", PLAIN, ids=lambda c: c.model_type)
def test_other_architectures_numbers_are_token_logps_s(sampled, config):
    model = other(config)
    head = model.get_output_embeddings()
    if head.bias is not None: torch.nn.init.normal_(head.bias)
    check_against_token_logps(model, sampled[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bent_logits_are_refused(sampled, dtype):
    model = other(BENT, dtype)
    assert not fits(model)
    with pytest.raises(ValueError, match="Gemma2.*token_logps"): model_logps(model, sampled[1])
    assert model_logps(other(Gemma2Config(head_dim=16, final_logit_softcapping=None, **SIZE)), sampled[1])["logp"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scaled_layer_with_a_bias_is_refused(dtype):
    model = other(PLAIN[0], dtype)
    model.lm_head = torch.nn.Linear(32, 40, dtype=dtype)                                       # c (W h + b) is not W (c h) + b,
    torch.nn.init.constant_(model.lm_head.bias, 1e-4)                                          # also where b is small
    torch.nn.init.normal_(model.get_input_embeddings().weight)                                 # and no hidden state is 0
    assert not fits(model)


def test_an_output_layer_of_another_kind_is_refused():
    model = other(PLAIN[3])
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert not fits(model)


def bans_a_token(layer, given, logits): return logits.index_fill(-1, torch.tensor([1]), -1e4)


def cuts_the_vocabulary(layer, given, logits): return logits[..., :-2]


def cuts_the_model_s_output(model, given, out):
    out.logits = out.logits[..., :model.config.vocab_size]
    return out


@pytest.mark.parametrize("hook", [bans_a_token, cuts_the_vocabulary, cuts_the_model_s_output], ids=lambda f: f.__name__)
def test_logits_that_are_changed_afterwards_are_refused(hook):
    model = embedded_model()
    assert fits(model) and model.config.vocab_size < model.config.hidden_size                   # so that the last hook cuts hidden states
    (model if hook is cuts_the_model_s_output else model.lm_head).register_forward_hook(hook)
    assert not fits(model)


@pytest.mark.parametrize("how", [dict(top_p=0.7), dict(top_k=3), dict(min_p=0.3, top_p=0.9)], ids=str)
def test_truncated_sampling_s_numbers_are_token_logps_s(sampled, how):
    model, prompts = sampled[0], sampled[1].prompts
    rollouts = HFEngine(model, char_tokenizer()).sample(prompts, 5, 9, 0.8, torch.Generator().manual_seed(2), **how)
    assert len({tuple(row) for row in (rollouts.kept >= 0).sum(-1).tolist()}) > 1
    ours = check_against_token_logps(model, rollouts)
    assert (ours["logp"] - rollouts.logp_mu).abs().max() < 1e-5
    whole = model_logps(model, replace(rollouts, kept=None), 0.8)["logp"]
    assert (whole - ours["logp"]).min() > -9 and (ours["logp"] - whole).max() > 0.1               # without the sets each token gets less


@pytest.mark.parametrize("name, more", [("grpo", {}), ("grpo with entropy", {}), ("rover", {}), ("grpo_k3", dict(micro_batch=5, lora=4))])
def test_an_update_on_truncated_sampling_is_the_same_in_chunks(monkeypatch, name, more):
    monkeypatch.setattr(core, "_entered", dict(core._entered))

    @core.method(family="entropy")
    def spread_penalty(entropy: core.PerToken, mask: core.TokenMask): return -core.token_mean(entropy, mask)
    own = replace(recipe("grpo"), name=name, penalties=(spread_penalty,)) if name == "grpo with entropy" else recipe(name)
    config = TrainConfig(recipe=own, task="sort", temperature=2.0, top_p=0.9, warmup=0, lr=1e-3, **more)
    learners = [Learner(replace(config, logp_chunk=chunk)) for chunk in (None, 11)]
    plain = learners[0]
    r = HFEngine(plain.model, plain.tokenizer).sample(["52918043=", "31=", "77120="], 6, 9, 2.0, torch.Generator().manual_seed(0), top_p=0.9)
    r.reward = torch.arange(18) % 3 / 2.0
    rows = [learner.update(r) for learner in learners]
    flat = [torch.cat([p.grad.flatten() for p in learner.trained]) for learner in learners]
    assert 0 < (flat[1] - flat[0]).norm() < 1e-5 * flat[0].norm() and rows[1] == pytest.approx(rows[0], abs=1e-5, rel=1e-4) and abs(rows[1]["kl"]) < 1e-5


def test_a_whole_model_makes_no_tensor_of_all_logits(sampled):
    rollouts, model = sampled[1], other(Qwen3Config(head_dim=16, **{**SIZE, "vocab_size": 3000}))
    every = rollouts.tokens.numel() * 3000
    assert made(lambda: token_logps(model, rollouts)[0].sum().backward()).largest == every
    assert made(lambda: model_logps(model, rollouts, chunk=20, checked=True)["logp"].sum().backward()).largest == 3000 * 32 < every


# what cannot be meant

@pytest.mark.parametrize("change, named", [
    (dict(hidden=torch.zeros(B, T, D + 1)), "hidden"), (dict(head_weight=torch.zeros(V, D - 1)), "hidden"), (dict(bias=torch.zeros(V + 1)), "bias"),
    (dict(mask=torch.ones(B, T + 1)), "mask"), (dict(temperature=0.0), "temperature"), (dict(temperature=float("nan")), "temperature"),
    (dict(chunk=0), "chunk"), (dict(entropy="yes"), "entropy"), (dict(entropy=1), "entropy"),
    (dict(tokens=torch.full((B, T), V)), "tokens"),
    (dict(tokens=torch.full((B, T), -1)), "tokens"),
    (dict(kept=torch.zeros(B, T, dtype=torch.int)), "kept"), (dict(kept=torch.zeros(B, T + 1, 2, dtype=torch.int)), "kept"),
    (dict(kept=torch.zeros(B, T, 0, dtype=torch.int)), "kept"), (dict(kept=torch.full((B, T, 2), V)), "kept"),
    (dict(kept=torch.tensor([0, -2]).expand(B, T, 2)), "kept"),
    (dict(kept=torch.full((B, T, 2), -1)), "kept: expected a token or more .* got none at 12 of 12")])
def test_what_cannot_be_meant_is_named(change, named):
    given = dict(hidden=torch.zeros(B, T, D), head_weight=torch.zeros(V, D), tokens=torch.zeros(B, T, dtype=torch.long))
    with pytest.raises(ValueError, match=f"^{named}"): chunked_logp(**{**given, **change})
