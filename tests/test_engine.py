"Engine and learner: exact under truncated sampling and in pieces, and nothing computed twice."

import json
import math
import os
import random
import socket
from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("transformers")
import torch
from forks import ended, fork
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel

from offpolicy_rl.core import Advantage, PerToken, TokenMask, method
from offpolicy_rl.llm import parallel
from offpolicy_rl.llm.adapter import merged_weights, with_adapter
from offpolicy_rl.llm.config import TrainConfig
from offpolicy_rl.llm.engine import HFEngine, positions, token_entropy, token_logps
from offpolicy_rl.llm.checkpoint import checkpoints
from offpolicy_rl.llm.learner import Learner
from offpolicy_rl.llm.master import Masters
from offpolicy_rl.llm.model import embedded_model, load
from offpolicy_rl.llm.pack import rope_limit
from offpolicy_rl.llm.pieces import ignores_equals, independent
from offpolicy_rl.llm.rollouts import Rollouts, joined
from offpolicy_rl.llm.sampling import Sampling, race
from offpolicy_rl.llm.tasks import draw, task
from offpolicy_rl.llm.train import Trainer
from offpolicy_rl.ratios.tis import keep_min_p, keep_top_k, keep_top_p
from offpolicy_rl.recipes import Recipe, recipe

PROMPTS = ["52918043=", "31=", "77120=", "90817263="]
HOW = [dict(top_p=0.7), dict(top_k=2), dict(min_p=0.3), dict(top_p=0.8, top_k=4, min_p=0.05)]


pytestmark = pytest.mark.usefixtures("models")


@pytest.fixture
def loaded(): return load("embedded", "sort", 0)


def seeded(n: int) -> torch.Generator: return torch.Generator().manual_seed(n)


# models that remember in other ways

KINDS = dict(mistral=dict(sliding_window=4), rwkv=dict(), mamba=dict(state_size=8), lfm2=dict(layer_types=["conv", "full_attention"]),
             falcon_h1=dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64))


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_those_of_a_row_that_is_read_alone(loaded, kind):
    "Of a window or a recurrent state, with prompts of unequal lengths: what the engine reports, and what the trainer finds."
    usual = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **usual, **KINDS[kind])).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1: p.normal_(std=0.2)
    r = HFEngine(model, loaded[1]).sample(PROMPTS, 3, 8, generator=seeded(0))
    logp = token_logps(model, r)[0]
    for i in range(len(r)):
        n, prompt = int(r.mask[i].sum()), r.prompt_ids[r.group[i]][r.prompt_mask[r.group[i]]]
        logits = model(torch.cat([prompt, r.tokens[i, :n]])[None], use_cache=False).logits[0, -n - 1:-1]
        alone = logits.log_softmax(-1).gather(1, r.tokens[i, :n, None])[:, 0]
        assert (alone - r.logp_mu[i, :n]).abs().max() < 2e-5 and (alone - logp[i, :n]).abs().max() < 2e-5
    assert len({tuple(row) for row in r.tokens.tolist()}) > 8


# rotary frequencies that depend on the longest position of a batch

ROPES = dict(phi3=dict(max_position_embeddings=64, original_max_position_embeddings=16,
                       rope_parameters=dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=4.0)),
             llama=dict(max_position_embeddings=16, rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)))


def roped(kind: str):
    usual = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
                 eos_token_id=1, bos_token_id=None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **usual, **ROPES[kind]), dtype=torch.float64).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.2)
    return model


def alone(model, prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    logits = model(torch.cat([prompt, response[:-1]])[None], use_cache=False).logits[0, -len(response):]
    return logits.log_softmax(-1).gather(1, response[:, None])[:, 0]


@pytest.mark.parametrize("kind", ROPES)
@torch.no_grad()
def test_up_to_the_first_length_frequencies_are_the_same_for_all_and_beyond_it_is_refused(loaded, kind):
    model = roped(kind)
    assert rope_limit(model) == positions(model) == 16 and rope_limit(loaded[0]) is None
    engine, prompts = HFEngine(model, loaded[1]), ["52918043=", "31="]
    with pytest.raises(ValueError, match="^max_tokens: expected at most 8, for 16 positions .*rotary.* prompt of 9 tokens, got 9"): engine.sample(prompts, 2, 9)
    short, long = engine.sample(prompts, 6, 8, generator=seeded(1)), engine.sample(prompts[1:], 6, 14, generator=seeded(1))
    assert short.mask.sum(1).max() == 8 and long.mask.sum(1).max() == 14
    both = joined([short, long])            # the rectangle is wider than what any response needs
    assert both.prompt_ids.shape[1] + both.tokens.shape[1] - 1 > 16
    for r in (short, long, both):
        for how in ({}, dict(share=False), dict(share=True), dict(pack=64)):
            logp = token_logps(model, r, **how)[0]
            for i in range(len(r)):
                n, prompt = int(r.mask[i].sum()), r.prompt_ids[r.group[i]][r.prompt_mask[r.group[i]]]
                expected = alone(model, prompt, r.tokens[i, :n])
                assert (logp[i, :n] - expected).abs().max() < 1e-5 and (r.logp_mu[i, :n] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ROPES)
def test_a_response_beyond_the_first_length_is_not_read(loaded, kind):
    r = HFEngine(loaded[0], loaded[1]).sample(["52918043="], 2, 9, generator=seeded(1))
    assert r.mask.sum(1).max() == 9         # with its prompt 17 tokens are read
    for how in ({}, dict(pack=64)):
        with pytest.raises(ValueError, match="^model: .* beyond 16, .*response of 17 tokens, expected fewer max_tokens"): token_logps(roped(kind), r, **how)


# a world that can be enumerated: five tokens, of which one ends, at most three of them

class FiveWords:
    "What the engine needs of a tokenizer: a prompt is token 4, text is digits."
    pad_token_id, eos_token_id, unk_token_id, chat_template = 0, 0, None, None
    def __call__(self, prompts, **_): return {"input_ids": [[4]] * len(prompts)}
    def decode(self, row): return "".join(map(str, row))


def five_words(seed: int):
    "GPT-2's architecture, which does nothing in float32 when it is float64."
    config = GPT2Config(vocab_size=5, n_positions=8, n_embd=16, n_layer=1, n_head=2, pad_token_id=0, eos_token_id=0, bos_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).double().eval()
        for p in model.parameters(): torch.nn.init.normal_(p, std=0.4)
    return model


def every_response(model, how: dict) -> Rollouts:
    "All responses that the truncated engine can give, each once, drawn from it until all have come."
    rollouts, _ = HFEngine(model, FiveWords()).sample([""], 60_000, 3, generator=seeded(0), **how).distinct()
    assert abs(rollouts.logp_mu.sum(1).exp().sum() - 1) < 1e-12
    return rollouts


def exact_gradient(policy, behaviour, rollouts: Rollouts, reward, how: dict) -> torch.Tensor:
    "Gradient of J_K: the policy truncated to the behaviour's sets, by plain forward passes and the definitions of top-p, top-k and min-p."
    def logits(model, prefix): return model(torch.tensor([[4, *prefix]])).logits[0, -1]
    def log_nu(prefix, token):
        left = keep_min_p(logits(behaviour, prefix), how.get("min_p", 0))
        if how.get("top_k"): left = keep_top_k(left, how["top_k"])
        out = keep_top_p(left, how.get("top_p", 1)).isinf()
        return logits(policy, prefix).masked_fill(out, -math.inf).log_softmax(-1)[token]
    rows = [row[:n] for row, n in zip(rollouts.tokens.tolist(), rollouts.mask.sum(1).int().tolist())]
    probability = [sum(log_nu(row[:i], token) for i, token in enumerate(row)).exp() for row in rows]
    assert abs(sum(probability).item() - 1) < 1e-12     # the sets close: nothing of nu lies outside
    policy.zero_grad()
    sum(p * r for p, r in zip(probability, reward)).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_the_expected_update_under_truncation_is_the_gradient_of_what_is_sampled(how, baseline):
    behaviour, policy = five_words(0), five_words(1)
    rollouts = every_response(behaviour, how)
    assert 1 < len(rollouts) < 85        # something is left out: there are 85 responses in all
    reward = torch.rand(len(rollouts), generator=seeded(1), dtype=torch.float64)
    exact = exact_gradient(policy, behaviour, rollouts, reward, how)

    def expected(kept):
        logp = token_logps(policy, replace(rollouts, kept=kept))[0].sum(1)
        mu = rollouts.logp_mu.sum(1)
        policy.zero_grad()
        (mu.exp() * (logp - mu).exp().detach() * (reward - baseline) * logp).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert (expected(rollouts.kept) - exact).abs().max() < 1e-10
    assert (expected(None) - exact).norm() > 0.01 * exact.norm()        # the whole softmax's is another gradient


@pytest.mark.parametrize("how", [{}, *HOW], ids=str)
def test_samples_come_as_often_as_the_engine_says(loaded, how):
    model, tokenizer = loaded
    n = 5000
    r = HFEngine(model, tokenizer).sample(PROMPTS, n, 9, 1.8, seeded(0), **how)
    few, like = r.distinct()
    p, count = few.logp_mu.double().sum(1).exp().clamp(max=1), torch.bincount(like)
    often = n * p > 20
    assert often.sum() > 5 and ((count / n - p).abs() < 4 * (p * (1 - p) / n).sqrt() + 1e-5)[often].all()
    if r.kept is not None: assert (r.kept == r.tokens[..., None]).any(-1)[r.mask > 0].all() and (r.kept[r.mask == 0] == -1).all()


@pytest.mark.parametrize("how", HOW, ids=str)
def test_the_learner_s_log_probabilities_are_those_of_the_truncated_engine(loaded, how):
    model, tokenizer = loaded
    for temperature in (0.7, 1.5):
        r = HFEngine(model, tokenizer).sample(PROMPTS, 20, 9, temperature, seeded(0), **how)
        logp, logits = token_logps(model, r, temperature)
        torch.testing.assert_close(logp, r.logp_mu, atol=1e-5, rtol=0)
        log_p = Sampling(1, **how).log_p(logits.flatten(0, 1)).view_as(logits)
        entropy = -torch.where(log_p > -math.inf, log_p.exp() * log_p, 0).sum(-1)
        torch.testing.assert_close(token_entropy(logits, r.kept) * r.mask, entropy * r.mask, atol=1e-4, rtol=0)


def test_the_kept_sets_reach_the_learner_s_update():
    learner = Learner(TrainConfig(recipe="grpo", task="sort", top_p=0.8))
    engine = HFEngine(learner.model, learner.tokenizer)
    r = rewarded(learner, engine.sample(draw(learner.task, 8, random.Random(0)), 16, 9, generator=seeded(0), top_p=0.8))
    row = learner.update(r)
    assert abs(row["kl"]) < 1e-5 and row["ess_sequence"] > 0.9999
    r.kept = None
    assert learner.update(r)["kl"] > 1e-3      # the whole softmax gives the same tokens less


@pytest.mark.parametrize("wrong, message", [(dict(top_p=0), "top_p: expected a number above 0"), (dict(top_k=-1), "top_k: expected at least 1, or 0"),
                                            (dict(min_p=1.0), "min_p: expected a number from 0 to below 1, got 1.0"),
                                            (dict(temperature=-1), "temperature: expected a number of at least 0, got -1")])
def test_nonsense_is_refused_by_name(loaded, wrong, message):
    with pytest.raises(ValueError, match=message): HFEngine(*loaded).sample(PROMPTS, 1, 2, **wrong)


# nothing twice

def plainly(model, tokenizer, prompt: str, n: int, max_tokens: int, how: Sampling, generator) -> tuple[list[list[int]], torch.Tensor]:
    "The engine without any of its savings: no cache, all rows to the end, the whole of each read again for every token."
    ids = torch.tensor([tokenizer(prompt)["input_ids"]] * n)
    drawn, logp = [], []
    for _ in range(max_tokens):
        with torch.no_grad(): log_p = how.log_p(model(ids, use_cache=False).logits[:, -1])
        token, lp = race(log_p, torch.empty_like(log_p).exponential_(generator=generator))
        ids = torch.cat([ids, token[:, None]], 1)
        drawn.append(token)
        logp.append(lp)
    rows = torch.stack(drawn, 1).tolist()
    return [row[:row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in rows], torch.stack(logp, 1)


@pytest.mark.parametrize("how", [Sampling(1.5), Sampling(1.8, 0.95)], ids=str)
def test_what_is_saved_does_not_change_what_is_sampled(loaded, how):
    model, tokenizer = loaded
    r = HFEngine(model, tokenizer).sample([PROMPTS[0]], 64, 12, how.temperature, seeded(0), top_p=how.top_p)
    rows, logp = plainly(model, tokenizer, PROMPTS[0], 64, r.tokens.shape[1], how, seeded(0))
    assert len({len(row) for row in rows}) > 2      # they end at different times
    assert [row[:int(n)] for row, n in zip(r.tokens.tolist(), r.mask.sum(1))] == rows
    torch.testing.assert_close(r.logp_mu, logp * r.mask, atol=1e-5, rtol=0)


def read_by(model, run) -> int:
    "How many tokens `model` read in `run`."
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"]).numel()), with_kwargs=True)
    try: run()
    finally: hook.remove()
    return sum(seen)


def test_the_engine_reads_each_prefix_once(loaded):
    model, tokenizer = loaded
    engine, out = HFEngine(model, tokenizer), []
    tokens = read_by(engine.model, lambda: out.append(engine.sample(["52918043=", "12345678="], 32, 9, generator=seeded(0))))
    r = out[0]
    prefixes = {(g, *row[:k]) for g, row, n in zip(r.group.tolist(), r.tokens.tolist(), r.mask.sum(1).int().tolist()) for k in range(1, min(n, 8) + 1)
                if row[k - 1] != tokenizer.eos_token_id}
    assert tokens == 2 * 9 + len(prefixes)      # tokens of the prompts, and one for each prefix that goes on


def test_the_learner_reads_each_different_response_once(loaded):
    learner = Learner(TrainConfig(recipe="grpo", task="sort"))
    r = HFEngine(learner.model, learner.tokenizer).sample(["52918043=", "12345678="], 32, 9, generator=seeded(0))
    few, like = r.distinct()
    assert len(few) < 32 and torch.equal(few.tokens[like], r.tokens) and torch.equal(few.group[like], r.group)
    assert read_by(learner.model, lambda: learner.policy(r)) == 2 * 9 + len(few) * 8
    torch.testing.assert_close(learner.policy(r)["logp"], token_logps(learner.model, r)[0], atol=1e-5, rtol=0)


def test_responses_of_similar_length_go_together():
    learner = Learner(TrainConfig(recipe="grpo", task="sort", micro_batch=4))
    r = HFEngine(learner.model, learner.tokenizer).sample(PROMPTS, 8, 30, 1.6, generator=seeded(0))
    length = r.mask.sum(1)
    parts = learner.parts(r)
    assert torch.cat(parts).sort().values.tolist() == list(range(32)) and max(map(len, parts)) == 4
    padded = lambda parts: sum(len(part) * int(length[part].max()) for part in parts)
    assert padded(parts) < 0.8 * padded(torch.arange(32).split(4))
    short = r.take(parts[0]).trimmed()
    assert short.tokens.shape[1] == length[parts[0]].max() and not short.prompt_mask.all(0)[0] or short.prompt_mask[:, 0].any()
    torch.testing.assert_close(token_logps(learner.model, short)[0], token_logps(learner.model, r)[0][parts[0], :short.tokens.shape[1]], atol=1e-5, rtol=0)


# new weights in the middle of a response

def test_with_refill_each_token_is_of_its_version(loaded):
    old, tokenizer = loaded
    new, engine, calls = embedded_model(3), HFEngine(old, tokenizer), []
    def between():
        calls.append(1)
        if len(calls) == 3: engine.sync(new, 5)
    r = engine.sample(PROMPTS, 6, 9, 1.5, seeded(0), top_p=0.95, between=between, refill=True)
    assert r.version.eq(0).all() and (r.token_version == torch.tensor([0] * 3 + [5] * (r.tokens.shape[1] - 3)) * r.mask).all()
    for version, model in ((0, old), (5, new)):
        mine = (r.token_version == version) & (r.mask > 0)
        torch.testing.assert_close(token_logps(model, r, 1.5)[0][mine], r.logp_mu[mine], atol=1e-5, rtol=0)
    assert engine.sample(PROMPTS, 2, 9, generator=seeded(0)).token_version is None


def test_without_refill_new_weights_go_on_with_the_old_memory(loaded):
    old, tokenizer = loaded
    new, engine, calls = embedded_model(3), HFEngine(old, tokenizer), []
    def between():
        calls.append(1)
        if len(calls) == 2: engine.sync(new, 1)
    r = engine.sample(["52918043="], 4, 5, generator=seeded(0), between=between)
    prompt = torch.tensor([tokenizer("52918043=")["input_ids"]])
    with torch.no_grad():
        for row, logp, n in zip(r.tokens, r.logp_mu, r.mask.sum(1).int()):
            cache = DynamicCache(config=old.config)
            read = [(old, prompt), *(((old if i < 1 else new), row[i].view(1, 1)) for i in range(int(n) - 1))]
            said = [model(ids, past_key_values=cache, use_cache=True).logits[0, -1] for model, ids in read]
            exact = torch.stack([x.log_softmax(-1)[token] for x, token in zip(said, row)])
            torch.testing.assert_close(logp[:n], exact, atol=1e-5, rtol=0)


def test_joined_rollouts_keep_their_columns(loaded):
    engine = HFEngine(*loaded)
    a, b = (engine.sample(PROMPTS[:2], 3, t, generator=seeded(t), top_k=k) for t, k in ((4, 2), (9, 5)))
    b.token_version, b.turn = torch.full_like(b.tokens, 8), torch.ones_like(b.tokens)
    both = joined([a, b])
    assert both.kept.shape == (12, 9, b.kept.shape[2]) and both.token_version[:6].eq(0).all() and both.turn.sum() == b.turn.numel()
    torch.testing.assert_close(token_logps(loaded[0], both)[0], both.logp_mu, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="joined: expected `kept` of all parts or of none"): joined([replace(a, kept=None), b])


# the gradient in pieces, and of what teaches

def rewarded(learner, r: Rollouts) -> Rollouts:
    r.reward = torch.tensor([learner.task.verify(r.prompts[g], text) for g, text in zip(r.group.tolist(), r.texts)])
    return r


def sampled(learner, prompts: int = 8, seed: int = 0, temperature: float = 1.0) -> Rollouts:
    engine = HFEngine(load("embedded", "sort", 0)[0], learner.tokenizer)
    return rewarded(learner, engine.sample(draw(task("sort"), prompts, random.Random(seed)), 8, 14, temperature, seeded(seed)))


def gradient(learner, rollouts) -> torch.Tensor:
    learner.optimizer.zero_grad()
    learner.backward(rollouts)
    return torch.cat([p.grad.flatten() for p in learner.trained])


def moved(**how) -> Learner:
    "A learner whose policy is not the one that samples."
    learner = Learner(TrainConfig(task="sort", **how))
    with torch.no_grad():
        for p in learner.model.parameters(): p.mul_(1 + 0.05 * torch.rand(p.shape, generator=seeded(1)))
    return learner


@pytest.mark.parametrize("name, passes", [("ppo", 1), ("gspo", 1), ("self_normalised_is", 2)])
def test_pieces_of_unequal_lengths_give_the_whole_gradient(name, passes):
    whole, pieces = moved(recipe=name), moved(recipe=name, micro_batch=7)
    r = sampled(whole, temperature=1.3)
    assert r.mask.sum(1).unique().numel() > 3 and independent(recipe(name)) == (passes == 1)
    expected, count = gradient(whole, r), []
    hook = pieces.model.register_forward_hook(lambda *_: count.append(1))
    found = gradient(pieces, r)
    hook.remove()
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert len(count) == 2 * passes * math.ceil((len(r) - len(pieces.idle(r))) / 7) + 2 * math.ceil(len(pieces.idle(r)) / 7)   # prompts, then responses
    (loss, stats, batch), (loss7, stats7, batch7) = whole.backward(r), pieces.backward(r)
    torch.testing.assert_close(loss7, loss, atol=1e-6, rtol=1e-5)
    for key in batch: torch.testing.assert_close(batch7[key], batch[key], atol=1e-5, rtol=1e-5, msg=key)
    for key in stats: torch.testing.assert_close(torch.as_tensor(stats7[key]), torch.as_tensor(stats[key]), atol=1e-5, rtol=1e-4, msg=key)


def test_a_loss_that_looks_at_the_whole_batch_is_found_out():
    @method(family="reinforce")
    def crowd_loss(logp: PerToken, adv: Advantage, mask: TokenMask):
        return -((logp * mask).sum(1) * adv).mean() * (1 + 1e-3 * logp.detach().sum().sin()), {}
    own = Recipe("crowd", loss=crowd_loss, advantage=recipe("grpo").advantage)
    assert not independent(own) and independent(replace(own, loss=recipe("reinforce").loss))


def with_equals(learner, share: int) -> Rollouts:
    "Rollouts in which so many of eight groups have equal rewards, of both kinds."
    r = sampled(learner)
    half = torch.arange(len(r)) % 2
    r.reward = torch.where(r.group < share, (r.group % 2).float(), half.float())
    return r


def test_what_cannot_teach_has_no_backward_pass():
    learner = moved(recipe="grpo")
    r = with_equals(learner, 5)
    assert ignores_equals(learner.recipe) and learner.idle(r).tolist() == (r.group < 5).nonzero()[:, 0].tolist()
    found, (loss, stats, batch) = gradient(learner, r), learner.backward(r)
    learner.idle = lambda r: r.group[:0]
    expected, (loss_all, stats_all, batch_all) = gradient(learner, r), learner.backward(r)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    torch.testing.assert_close(loss, loss_all)
    for key in stats: torch.testing.assert_close(torch.as_tensor(stats[key]), torch.as_tensor(stats_all[key]), atol=1e-5, rtol=1e-5, msg=key)
    for key in batch: torch.testing.assert_close(batch[key], batch_all[key], atol=1e-5, rtol=1e-5, msg=key)
    for name in ("opmd", "grpo_k2", "awr"): assert len(Learner(TrainConfig(recipe=name, task="sort")).idle(r)) == 0


def test_equal_rewards_that_are_shaped_by_length_do_teach():
    learner = moved(recipe="dapo", knobs=dict(max_length=14, buffer=9))
    r = sampled(learner, temperature=2.0)
    r.reward = torch.zeros_like(r.reward)
    assert any(len(set(r.mask[r.group == g].sum(1).tolist())) > 1 for g in range(8)) and gradient(learner, r).norm() > 0


def test_nothing_to_learn_from_is_an_update_by_momentum():
    def run(idle):
        learner = Learner(TrainConfig(recipe="grpo", task="sort", warmup=0))
        if not idle: learner.idle = lambda r: r.group[:0]
        learner.update(with_equals(learner, 0))
        assert learner.update(with_equals(learner, 8))["gradient_norm"] == 0
        return torch.cat([p.detach().flatten() for p in learner.trained])
    start = torch.cat([p.detach().flatten() for p in Learner(TrainConfig(recipe="grpo", task="sort")).trained])
    assert torch.equal(run(True), run(False)) and (run(True) - start).norm() > 0


# options for large models

OPTIONS = [(dict(gradient_checkpointing=True), 1e-5), (dict(logp_chunk=11), 1e-5), (dict(micro_batch=9, gradient_checkpointing=True, logp_chunk=50), 1e-5),
           (dict(autocast="bfloat16"), 0.15), (dict(autocast="bfloat16", gradient_checkpointing=True, logp_chunk=50), 0.15)]


@pytest.mark.parametrize("how, tolerance", OPTIONS, ids=str)
def test_options_do_not_change_the_gradient(how, tolerance):
    plain, other = Learner(TrainConfig(recipe="grpo", task="sort")), Learner(TrainConfig(recipe="grpo", task="sort", **how))
    r = sampled(plain)
    expected, found = gradient(plain, r), gradient(other, r)
    assert found.dtype == torch.float32 and 0 < (found - expected).norm() < tolerance * expected.norm()
    torch.testing.assert_close(HFEngine(other.model, other.tokenizer, live=True).sample(PROMPTS, 2, 9, generator=seeded(0)).logp_mu,
                               HFEngine(plain.model, plain.tokenizer, live=True).sample(PROMPTS, 2, 9, generator=seeded(0)).logp_mu, atol=1e-6, rtol=0)


def test_checkpointing_keeps_fewer_activations():
    def kept(**how):
        learner, held = Learner(TrainConfig(recipe="grpo", task="sort", **how)), []
        r = sampled(learner)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x): learner.policy(r)
        return sum(held)
    assert kept(gradient_checkpointing=True) < 0.5 * kept()


@pytest.mark.parametrize("how, message", [
    (dict(autocast="float16"), "autocast: in float16 gradients vanish"),
    (dict(autocast="bfloat16", dtype="bfloat16"), "autocast: it stands beside float32 weights"),
    (dict(dtype="float16"), "dtype: in float16 gradients vanish .*expected bfloat16")])
def test_options_that_do_not_go_together(how, message):
    with pytest.raises(ValueError, match=message): Learner(TrainConfig(recipe="grpo", task="sort", **how))


def test_only_the_adapter_is_trained_and_engines_get_the_sum():
    learner = Learner(TrainConfig(recipe="grpo", task="sort", lora=4, lr=1e-2, warmup=0))
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    r = sampled(learner)
    engine = HFEngine(learner.model, learner.tokenizer)
    assert abs(learner.update(r)["kl"]) < 1e-5      # the adapter adds nothing at first
    still = [name for name, p in learner.model.named_parameters() if torch.equal(p, before[name])]
    assert still == [name for name in before if "lora_B" not in name]       # while B is zero, A has no gradient
    assert sum(p.numel() for p in learner.trained) < 0.1 * sum(p.numel() for p in learner.model.parameters())
    old = engine.sample(PROMPTS, 4, 9, generator=seeded(0))
    engine.sync(learner.model, 1)
    new = engine.sample(PROMPTS, 4, 9, generator=seeded(0))
    assert (old.logp_mu - new.logp_mu).abs().max() > 1e-3
    torch.testing.assert_close(token_logps(learner.model, new)[0], new.logp_mu, atol=1e-5, rtol=0)
    plain = load("embedded", "sort", 0)[0]
    plain.load_state_dict(merged_weights(learner.model, tied=True))
    torch.testing.assert_close(token_logps(plain, new)[0], new.logp_mu, atol=1e-5, rtol=0)
    assert merged_weights(learner.model).keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(x, y) for x, y in zip(merged_weights(plain).values(), plain.parameters()))
    again = [with_adapter(load("embedded", "sort", 0)[0], 4, seed) for seed in (0, 0, 1)]
    at_first = [torch.cat([p.flatten() for p in m.parameters() if p.requires_grad]) for m in again]
    assert torch.equal(at_first[0], at_first[1]) and not torch.equal(at_first[0], at_first[2])


def updates(rank: int, world: int, port: int, path) -> None:
    "What one process of `world` has of an update, in several recipes."
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world), RANK=str(rank))
    parallel.join("cpu")
    assert parallel.place() == (rank, world)
    out = []
    for name, micro_batch in (("ppo", None), ("ppo", 5), ("self_normalised_is", None), ("grpo_k2", 7)):
        learner = Learner(TrainConfig(recipe=name, task="sort", micro_batch=micro_batch))
        prompts = draw(learner.task, 6, random.Random(0))
        parts = [HFEngine(learner.model, learner.tokenizer).sample(prompts[i::2], 8, 14, 1.3, seeded(i)) for i in range(2)]
        r = rewarded(learner, parallel.gathered(parts[rank]) if world == 2 else joined(parts))
        with torch.no_grad():
            for p in learner.model.parameters(): p.mul_(1 + 0.05 * torch.rand(p.shape, generator=seeded(1)))
        row = {}
        read = read_by(learner.model, lambda learner=learner, r=r, row=row: row.update(learner.update(r)))
        out.append(dict(name=name, read=read, norm=row["gradient_norm"], loss=row["loss"], kl=row["kl"],
                        grad=torch.cat([p.grad.flatten() for p in learner.trained])[::37].tolist()))
    path.write_text(json.dumps(out))


def test_two_processes_find_the_gradient_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [(0, 1), (0, 2), (1, 2)]
    copies = [fork(partial(updates, rank, world, port, tmp_path / f"{rank}of{world}")) for rank, world in places]
    assert [ended(copy) for copy in copies] == [0, 0, 0]
    one, a, b = (json.loads((tmp_path / f"{rank}of{world}").read_text()) for rank, world in places)
    for alone, *shares in zip(one, a, b):
        expected = torch.tensor(alone["grad"])
        for share in shares:
            assert (torch.tensor(share["grad"]) - expected).norm() < 1e-5 * expected.norm()
            for key in ("norm", "loss", "kl"): assert share[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6)
            if alone["name"] != "self_normalised_is": assert share["read"] < 0.75 * alone["read"]      # that one needs two passes in pieces


def test_weights_in_half_precision_learn_at_a_small_learning_rate(tmp_path):
    "They follow copies in float32, which go as far as weights in float32 do, and which a checkpoint holds."
    moved = []
    for dtype in ("float32", "bfloat16"):
        trainer = Trainer(TrainConfig(recipe="reinforce", task="sort", lr=1e-6, warmup=0, prompts_per_step=4, group_size=4, eval_prompts=4, micro_batch=6,
                                      dtype=dtype))
        start = torch.cat([p.detach().flatten() for p in trainer.trained])
        for _ in range(5): trainer.advance()
        moved.append((torch.cat([p.detach().flatten() for p in trainer.trained]) - start).norm().item())
    assert 0.8 < moved[1] / moved[0] < 1.25
    weights = list(trainer.model.parameters())
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, copy.bfloat16()) and p.grad is None for p, copy in zip(weights, trainer.trained))
    trainer.save(tmp_path)
    other = Trainer(trainer.config)
    other.restore(checkpoints(tmp_path)[-1])
    for t in (trainer, other): t.advance()
    assert all(torch.equal(p, q) for p, q in zip(trainer.trained, other.trained)) and trainer.trained[0].dtype == torch.float32


def test_gradients_of_weights_in_half_precision_are_added_up_in_float32():
    model = torch.nn.Linear(3, 1, bias=False).bfloat16()
    masters = Masters(model)
    for x in (256.0, 1.0, 1.0, 1.0): (model.weight * x).sum().backward()      # in bfloat16, 256 + 1 is 256
    assert masters.trained[0].grad.tolist() == [[259.0] * 3] and model.weight.grad is None
