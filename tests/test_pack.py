"Packed rows: every token once and in its place, and what the model says of it is what it says of the response by itself."

import random
from dataclasses import dataclass, replace

import pytest

pytest.importorskip("transformers")
import torch
import torch.distributed as dist
from forks import ended, fork
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from offpolicy_rl.llm import pack
from offpolicy_rl.llm.cli import config_values, parse
from offpolicy_rl.llm.config import TrainConfig
from offpolicy_rl.llm.critic import hidden_states
from offpolicy_rl.llm.engine import HFEngine, response_logits, token_entropy, token_logps
from offpolicy_rl.llm.learner import Learner
from offpolicy_rl.llm.logp import model_logps
from offpolicy_rl.llm.model import char_tokenizer, load
from offpolicy_rl.llm.pack import attention_mask, best_fit, layout, packed_logits, refusal
from offpolicy_rl.llm.rollouts import Rollouts, pad_left
from offpolicy_rl.llm.shard import Sharded
from offpolicy_rl.llm.tool import rollout

VOCABULARY = 40
USUAL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
# These compute nothing in float32 when they are float64. The others normalise in float32 at all times: one rounding of the sum of what several responses
# say of their prompt, instead of one of each.
ROUNDING = 16 * torch.finfo(torch.float32).eps
EXACT = dict(gpt2={}, gpt_neox={}, phi={}, opt=dict(ffn_dim=48, word_embed_proj_dim=32), falcon={})
ROUNDED = dict(llama={}, qwen2={}, qwen3=dict(head_dim=8), phi3={})
EXPERTS = dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
REFUSED = dict(bloom="does not take packed rows", mpt=r"reads packed rows of \d+ tokens otherwise", mistral="a sliding window", gemma3_text="a sliding window",
               mamba="a recurrent state")


def made(kind: str, dtype=torch.float64, how=None, **more):
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, bos_token_id=None, **USUAL | more)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **({} if how is None else dict(attn_implementation=how))).eval()


def of_lengths(prompts: list[int], lengths: list[list[int]], seed: int = 0, kept: int = 0) -> Rollouts:
    "Rollouts of random tokens, the responses in any order; some hold what is not the policy's own, never at the end."
    g = torch.Generator().manual_seed(seed)
    def row(n): return torch.randint(2, VOCABULARY, (n,), generator=g).tolist()
    ids, real = pad_left([row(n) for n in prompts], 0)
    longs = torch.tensor([n for some in lengths for n in some])
    order = torch.randperm(len(longs), generator=g)
    group, longs = torch.tensor([i for i, some in enumerate(lengths) for _ in some])[order], longs[order]
    there = torch.arange(int(longs.max()) + 2) < longs[:, None]
    heard = (torch.rand(there.shape, generator=g) < 0.3) & (torch.arange(there.shape[1]) < longs[:, None] - 1)
    tokens, sets = torch.randint(2, VOCABULARY, there.shape, generator=g) * there, None
    if kept: sets = torch.rand(*there.shape, VOCABULARY, generator=g).argsort(-1)[..., :kept].masked_fill(~there[..., None], -1)
    return Rollouts(ids, real, tokens, (there & ~heard).double(), torch.zeros(there.shape, dtype=torch.float64), group, torch.zeros_like(group),
                    [""] * len(prompts), [""] * len(group), kept=sets)


def lengths_of(r: Rollouts) -> list[int]:
    return [int(row.nonzero().max()) + 1 if row.any() else 1 for row in r.mask]


def one_by_one(model, r: Rollouts) -> torch.Tensor:
    "The logits at each token of the responses, one after the other, each response read by itself and without padding."
    out = []
    for i, n in enumerate(lengths_of(r)):
        prompt = r.prompt_ids[r.group[i]][r.prompt_mask[r.group[i]]]
        out.append(model(torch.cat([prompt, r.tokens[i, :n - 1]])[None], use_cache=False).logits[0, -n:])
    return torch.cat(out)


def real_of(r: Rollouts) -> torch.Tensor:
    return torch.arange(r.mask.shape[1]) < torch.tensor(lengths_of(r))[:, None]


def gradient(model, x: torch.Tensor) -> torch.Tensor:
    loss = (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum()
    return torch.cat([torch.zeros_like(p).flatten() if d is None else d.flatten()
                      for p, d in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))])


MIXED = of_lengths([5, 1, 8, 3], [[4, 1, 9, 9], [1], [2, 14, 1], [6, 6]])


# the layout

groups = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 12), max_size=6)), min_size=1, max_size=8).filter(lambda gs: any(some for _, some in gs))


@settings(max_examples=60, deadline=None)
@given(groups, st.integers(1, 60), st.integers(0, 99), st.booleans())
def test_every_token_stands_once_in_its_place_and_sees_what_it_saw_alone(lengths, length, seed, apart):
    r = of_lengths([p for p, _ in lengths], [some for _, some in lengths], seed)
    at, longs = layout(r, length, apart), lengths_of(r)
    n, width = at.ids.shape
    prompts = r.prompt_mask.sum(1).tolist()
    assert width <= max(length, max(prompts[g] + k - 1 for g, k in zip(r.group.tolist(), longs)))
    assert (at.owner > 0).sum() == sum(longs) - len(longs)
    assert sum(at.block.amax(1).tolist()) > 0 and len(at.block.unique()) - int((at.block == 0).any()) == at.block.max()
    seen, ids, place = at.visible(), at.ids.flatten(), at.position.flatten()
    for i, g in enumerate(r.group.tolist()):
        whole = torch.cat([r.prompt_ids[g][r.prompt_mask[g]], r.tokens[i, :longs[i] - 1]])
        for j in range(longs[i]):                                           # from the place that token j is read at, the model sees just what it should
            row, where = divmod(int(at.reads[i, j]), width)
            sight = row * width + seen[row, where].nonzero()[:, 0]
            assert ids[sight].tolist() == whole[:prompts[g] + j].tolist() and place[sight].tolist() == list(range(prompts[g] + j))
        assert (at.reads[i, longs[i]:] == at.reads[i, 0]).all()
    assert seen.any(-1).all()                                               # padding sees something, too: there is no softmax over nothing
    assert all(torch.equal(x, y) for x, y in zip(vars(at).values(), vars(layout(r, length, apart)).values()))
    for row in range(n):                                                    # what stands alone in a row is at places that are its positions
        used = int(at.block[row].bool().sum())
        if apart and used > length: assert at.owner[row].unique().numel() <= 2 and torch.equal(at.position[row, :used], torch.arange(used))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=30), st.integers(20, 40))
def test_bins_hold_everything_once_and_no_two_would_fit_into_one(sizes, room):
    bins = best_fit(sizes, room)
    assert sorted(i for some in bins for i in some) == list(range(len(sizes)))
    full = sorted(sum(sizes[i] for i in some) for some in bins)
    assert not full or full[-1] <= room and (len(full) == 1 or full[0] + full[1] > room)


def test_a_group_that_fits_stays_together_and_a_larger_one_has_its_prompt_in_every_part():
    r = of_lengths([6, 6, 6], [[3] * 4, [3] * 4, [3] * 4])                  # each with its prompt 14 tokens, of which 8 are the responses'
    for length, shape, blocks in ((14, (3, 14), 3), (13, (6, 10), 6), (9, (12, 8), 12), (1, (12, 8), 12)):
        at = layout(r, length)
        assert at.ids.shape == shape and at.block.max() == blocks


def test_rows_share_out_what_is_a_little_more_than_a_row():
    r = of_lengths([10] * 6, [[10] * 2] * 6)                                # six groups of 28
    assert [len(some) for some in best_fit([28] * 6, 150)] == [5, 1] and layout(r, 150).ids.numel() == 6 * 28


def test_a_long_tail_leaves_little_padding():
    draw = random.Random(0)
    r = of_lengths([draw.randint(10, 20) for _ in range(24)], [[min(256, int(15 * 2.718 ** draw.gauss(0, 1)) + 1) for _ in range(8)] for _ in range(24)])
    needed = int(r.prompt_mask.sum()) + sum(lengths_of(r)) - len(r)
    for length in (512, 1024): assert layout(r, length).ids.numel() < 1.1 * needed < 0.3 * len(r) * (20 + r.tokens.shape[1])


# what the model says

def check(kind: str, values: float, gradients: float, dtype=torch.float64, **how) -> None:
    model = made(kind, dtype, **how)
    plain, real = one_by_one(model, MIXED), real_of(MIXED)
    base = gradient(model, plain)
    for length in (1, 30, 1000):
        packed = packed_logits(model, MIXED, length)
        assert packed.shape == (*MIXED.tokens.shape, VOCABULARY) and packed.dtype == dtype and packed.isfinite().all()
        assert (packed[real] - plain).abs().max() <= values * plain.abs().max()
        assert base.norm() > 0 and (gradient(model, packed[real]) - base).norm() <= gradients * base.norm()


@pytest.mark.parametrize("kind", EXACT)
def test_logits_and_gradients_are_those_of_each_response_by_itself(kind): check(kind, 1e-10, 1e-10, **EXACT[kind])


@pytest.mark.parametrize("kind", ROUNDED)
def test_also_where_gradients_are_rounded_to_float32(kind): check(kind, 1e-10, ROUNDING, **ROUNDED[kind])


def test_also_where_tokens_choose_their_experts(): check("qwen3_moe", ROUNDING, ROUNDING, torch.float32, **EXPERTS)      # there is no other on a CPU


@pytest.mark.parametrize("kind, more", [("gpt2", {}), ("gemma2", dict(head_dim=8, layer_types=["full_attention"] * 2))])
def test_eager_attention_whose_softmax_is_in_float32_takes_the_mask_as_numbers(kind, more):
    check(kind, ROUNDING, ROUNDING, how="eager", **more)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "qwen3_moe"])
def test_flex_attention_reads_the_same(kind):
    model = made(kind, torch.float32, **(EXACT | ROUNDED | dict(qwen3_moe=EXPERTS))[kind])
    own, at = model.config._attn_implementation, layout(MIXED, 30)
    mask = attention_mask(at, "flex_attention", torch.float32)
    assert isinstance(mask, BlockMask) and mask.shape == (len(at.ids), 1, *at.visible().shape[1:])
    assert own == "sdpa" and refusal(model) is None
    with torch.no_grad(), torch.compiler.set_stance("force_eager"): flex = packed_logits(model, MIXED, 30, "flex_attention")
    assert model.config._attn_implementation == own == model.base_model.config._attn_implementation
    plain = one_by_one(model, MIXED)
    assert (flex[real_of(MIXED)] - plain).abs().max() <= ROUNDING * plain.abs().max()


def test_log_probs_entropies_kept_sets_and_hidden_states_are_the_plain_ones():
    model = made("gpt2")
    r = of_lengths([5, 1, 8], [[4, 1, 9], [3, 3], [2, 12, 1]], kept=6)
    for some in (r, replace(r, kept=None)):
        plain, logits = token_logps(model, some, 0.7, share=False)
        logp, whole = token_logps(model, some, 0.7, pack=25)
        chunked = model_logps(model, some, 0.7, entropy=True, pack=25, chunk=5)
        grads = [gradient(model, x) for x in (plain, logp, chunked["logp"])]
        assert (grads[0] - grads[1]).norm() < 1e-10 * grads[0].norm() > (grads[0] - grads[2]).norm()
        for x in (logp, chunked["logp"]): assert (x - plain).abs().max() < 1e-10
        for x in (token_entropy(whole, some.kept) * r.mask, chunked["entropy"]):
            assert (x - token_entropy(logits, some.kept) * r.mask).abs().max() < 1e-10
    real = real_of(r)
    states, expected = hidden_states(model, r, 25), hidden_states(model, r)
    assert states.shape == expected.shape and (states - expected)[real].abs().max() < 1e-5      # both are given in float32


@dataclass(frozen=True)
class Echo:
    "Says 31= until it is told a number that begins with 0."
    max_turns: int = 3
    def reply(self, transcript): return None if transcript[-1].startswith("0") else "31="


def test_conversations_are_read_with_what_the_environment_said(models):
    model, tokenizer = load("embedded", "sort", 0)
    engine = HFEngine(model.double(), tokenizer)
    for how in ({}, dict(top_k=2)):
        r = rollout(engine, Echo(), ["52918043=", "31=", "77120=", "99988777="], 8, 9, generator=torch.Generator().manual_seed(0), **how)
        heard = (r.mask == 0) & real_of(r)
        assert heard.any() and r.turn.max() >= 1
        logp, logits = token_logps(model, r, pack=64)
        torch.testing.assert_close(logp, r.logp_mu, atol=1e-10, rtol=0)             # what each turn was sampled with
        torch.testing.assert_close(logits[heard], response_logits(model, r, share=False)[heard], atol=1e-10, rtol=0)


# an update

@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    "A folder with a GPT-2, and rollouts that another policy than it might have made, some of them alike."
    folder, tokenizer = tmp_path_factory.mktemp("exact"), char_tokenizer()
    config = AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                                  bos_token_id=None, **USUAL | dict(n_positions=64))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        for p in model.parameters(): torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    r = HFEngine(model, tokenizer).sample(["52918043=", "31=", "77120=", "4="], 6, 12, generator=torch.Generator().manual_seed(1), top_k=30)
    r.reward = torch.arange(24, dtype=torch.float64) % 3 / 2
    r.logp_mu -= torch.linspace(0, 0.4, 24, dtype=torch.float64)[:, None] * r.mask
    assert len({int(n) for n in r.mask.sum(1)}) > 4 and r.mask.sum(1).min() <= 2
    return str(folder), r.take(torch.cat([torch.arange(24), torch.tensor([5, 17])]))


HOWS = [("ppo", dict(micro_batch=5, gradient_checkpointing=True)), ("ppo", dict(logp_chunk=7)), ("grpo_k3", dict(micro_batch=7, logp_chunk=7)),
        ("reinforce", dict(lora=4, micro_batch=9)), ("vtrace", {}), ("self_normalised_is", dict(micro_batch=6)), ("rover", {})]


@pytest.mark.parametrize("recipe, how", HOWS, ids=str)
def test_an_update_is_the_same_packed(exact, recipe, how):
    folder, r = exact
    config = TrainConfig(recipe=recipe, task="sort", model=folder, dtype="float64", warmup=0, lr=1e-3, **how)
    plain, packed = Learner(config), Learner(replace(config, pack=48))
    start = torch.cat([p.detach().flatten() for p in plain.trained])
    for _ in range(3):
        rows = [learner.update(r) for learner in (plain, packed)]
        assert rows[1] == pytest.approx(rows[0], abs=1e-5, rel=1e-5)                  # the critic's error is in float32
    ends = [torch.cat([p.detach().flatten() for p in learner.trained]) for learner in (plain, packed)]
    assert (ends[0] - start).abs().max() > 1e-3 and (ends[1] - ends[0]).abs().max() < 1e-10


@pytest.mark.parametrize("name, more", [("policy", {}), ("policy", dict(logp_chunk=7)), ("hidden", {}), ("reference", {})], ids=str)
def test_a_prompt_is_read_once_under_gradient_checkpointing_too(exact, name, more):
    folder, r = exact
    def tokens(**how):
        learner, seen = Learner(TrainConfig(recipe="grpo_k3", task="sort", model=folder, gradient_checkpointing=True, **more, **how)), []
        model = learner.reference if name == "reference" else learner.model
        model.get_input_embeddings().register_forward_hook(lambda layer, given, out: seen.append(given[0].numel()))
        learner.read(model, r) if name == "reference" else getattr(learner, name)(r)
        return seen
    d = r if name == "hidden" else r.distinct()[0]
    assert tokens(pack=4096) == [int(d.prompt_mask.sum() + d.mask.sum()) - len(d)]     # all that is needed, in one pass
    if name == "policy": assert tokens() == [len(d) * (d.prompt_ids.shape[1] + d.tokens.shape[1] - 1)]


@pytest.mark.parametrize("recipe, how", [("ppo", {}), ("grpo_k3", dict(logp_chunk=7)), ("ppo", dict(lora=4)), ("self_normalised_is", dict(micro_batch=6))],
                         ids=str)
def test_what_is_read_again_is_read_with_the_same_attention(exact, recipe, how):
    "The model's own attention is one that reads no packed rows: not in the backward pass either."
    calls = []
    def own(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return sdpa_attention_forward(*args, **kwargs)
    AttentionInterface.register("own", own)
    AttentionMaskInterface.register("own", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config = TrainConfig(recipe=recipe, task="sort", model=exact[0], dtype="float64", gradient_checkpointing=True, **how)
    plain, packed = Learner(config), Learner(replace(config, pack=48))
    for learner in (plain, packed): learner.model.set_attn_implementation("own")
    plain.update(exact[1])
    assert any(calls)
    calls.clear()
    packed.update(exact[1])
    assert not calls and packed.model.config._attn_implementation == "own"


def test_responses_of_a_group_stay_in_one_pass_where_nothing_is_padded(exact):
    r = exact[1].take(torch.arange(24))
    r.mask = (torch.arange(12) < torch.tensor([2, 12]).repeat(12)[:, None]).double()
    def groups(**how): return [r.group[part].unique().tolist() for part in Learner(TrainConfig(recipe="ppo", model=exact[0], micro_batch=6, **how)).parts(r)]
    assert groups(pack=64) == [[0], [1], [2], [3]] and groups() == [[0, 1], [2, 3]] * 2


def test_no_logits_are_made_that_nobody_asked_for(exact):
    learner, seen = Learner(TrainConfig(recipe="ppo", task="sort", model=exact[0], pack=64)), []
    own = learner.model.get_output_embeddings()
    handle = own.register_forward_hook(lambda layer, given, out: seen.append(given[0].shape[1]))
    d = exact[1].distinct()[0]
    learner.policy(exact[1])
    handle.remove()
    blocks = layout(d, 64).block.max()
    assert learner.model.get_output_embeddings() is own and seen == [int(d.mask.sum()) - len(d) + int(blocks)]     # the first tokens have theirs in common


# who is refused

@pytest.mark.parametrize("kind", REFUSED)
def test_who_would_read_something_else_is_refused(kind, tmp_path):
    more = dict(mpt=dict(d_model=32, n_heads=4, n_layers=2)).get(kind, {})
    model = made(kind, torch.float32, **more)
    with pytest.raises(ValueError, match=f"^pack: {type(model).__name__} .*{REFUSED[kind]}.*expected None"): token_logps(model, MIXED, pack=64)
    with pytest.raises(ValueError, match="^pack: "): model_logps(model, MIXED, pack=64, checked=True)
    if kind in ("mpt", "mistral"):
        tokenizer = char_tokenizer()
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="^pack: "): Learner(TrainConfig(recipe="ppo", task="sort", model=str(tmp_path), pack=64))
        Learner(TrainConfig(recipe="ppo", task="sort", model=str(tmp_path)))


def test_a_window_that_is_switched_off_is_none():
    assert refusal(made("mistral", torch.float32, sliding_window=None)) is None
    on, off = (made("qwen2", torch.float32, use_sliding_window=on, sliding_window=64, max_window_layers=0) for on in (True, False))
    assert "a sliding window" in refusal(on) and refusal(off) is None


def neo(dtype=torch.float64, window: int = 24, places: int = 64, kind: str = "local"):
    "A GPT-Neo, whose cache says nothing of the window in every second layer."
    return made("gpt_neo", dtype, num_layers=2, num_heads=4, attention_types=[[["global", kind], 1]], window_size=window, max_position_embeddings=places)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_window_that_no_cache_shows_is_found_at_the_width_of_the_rows(dtype):
    model = neo(dtype)
    assert pack.has_full_kv_cache(model) and refusal(model) is None and refusal(model, 24) is None
    assert "packed rows of 25 tokens otherwise" in refusal(model, 25) and "of 25 tokens" in refusal(model, 64) and refusal(model, 24) is None
    with pytest.raises(ValueError, match="^pack: GPTNeo.* of 25 tokens otherwise .*expected None or shorter rows"): pack.check_packs(model, 30)
    assert "packed rows of 40 tokens otherwise" in refusal(neo(dtype), 40)


def test_rows_wider_than_the_table_of_places_are_refused():
    assert refusal(neo(kind="global"), 64) is None and "does not take packed rows of 65 tokens" in refusal(neo(kind="global"), 65)


TALL = of_lengths([5, 3, 8], [[9, 1, 33, 9, 9, 9], [2, 12, 1], [6, 28]])


def test_a_longer_response_stands_alone_where_its_row_would_be_read_otherwise():
    r = TALL
    for model in (neo(), neo(window=64)):
        plain, real = one_by_one(model, r), real_of(r)
        packed = packed_logits(model, r, 24)
        assert (packed[real] - plain).abs().max() <= ROUNDING * plain.abs().max()      # its attention is in float32
        base = gradient(model, plain)
        assert (gradient(model, packed[real]) - base).norm() <= ROUNDING * base.norm()
    assert layout(r, 24).ids.shape[1] == layout(r, 24, apart=True).ids.shape[1] == 37


def in_parts() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model, seen = neo(torch.float32, window=64), []
    plain = one_by_one(model, TALL)
    assert refusal(model, 24) is None
    model.get_input_embeddings().register_forward_hook(lambda layer, given, out: seen.append(tuple(given[0].shape)))
    packed = Sharded(model, "cpu")(lambda model: packed_logits(model, TALL, 24))
    assert seen == [tuple(layout(TALL, 24, apart=True).ids.shape)]
    assert (packed[real_of(TALL)] - plain).abs().max() <= ROUNDING * plain.abs().max()
    with pytest.raises(ValueError, match="^pack: .*is in parts, and has not been asked about rows of 30 tokens"): pack.check_packs(model, 30)
    dist.destroy_process_group()


def test_a_model_in_parts_is_not_asked_any_more():
    "For that all processes would have to ask at once, each about rows as wide as its own."
    assert ended(fork(in_parts)) == 0


def test_the_learner_asks_for_rows_as_long_as_pack(tmp_path):
    tokenizer = char_tokenizer()
    config = AutoConfig.for_model("gpt_neo", vocab_size=len(tokenizer), hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
                                  window_size=32, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    how = dict(recipe="ppo", task="sort", model=str(tmp_path))
    Learner(TrainConfig(pack=32, **how))
    with pytest.raises(ValueError, match="^pack: GPTNeo.*packed rows of 48 tokens.*expected None or shorter rows"): Learner(TrainConfig(pack=48, **how))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_is_asked_once_and_left_as_it_was(dtype, monkeypatch):
    model = made("llama", dtype)
    before, own, state = [p.clone() for p in model.parameters()], model.get_output_embeddings(), torch.get_rng_state()
    seen = []
    own.register_forward_hook(lambda layer, given, out: seen.append(out.dtype))
    assert refusal(model) is None and set(seen) == {torch.float32} and model.get_output_embeddings() is own and torch.equal(torch.get_rng_state(), state)
    assert all(p.dtype == dtype and torch.equal(p, q) for p, q in zip(model.parameters(), before))
    monkeypatch.setattr(pack, "_refusal", None)
    assert refusal(model) is None


def test_a_model_is_asked_in_full_precision_under_autocast_too():
    with torch.autocast("cpu", torch.bfloat16): assert refusal(made("llama", torch.float32)) is None


def sees_its_neighbours(at):
    block = at.block
    return lambda row, head, place, other: (place >= other) & (block[row, place] == block[row, other])


def goes_on_counting(rollouts, length):
    at = layout(rollouts, length)
    return replace(at, position=torch.arange(at.ids.shape[1]).expand_as(at.ids))


def one_too_late(rollouts, length):
    at = layout(rollouts, length)
    return replace(at, reads=(at.reads + 1).clamp(max=at.ids.numel() - 1))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "falcon"])
@pytest.mark.parametrize("where, name, wrong", [(pack.Layout, "sight", sees_its_neighbours), (pack, "layout", goes_on_counting),
                                               (pack, "layout", one_too_late)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_question_finds_out_what_is_wrong(monkeypatch, kind, where, name, wrong, dtype):
    assert refusal(made(kind, dtype)) is None
    monkeypatch.setattr(where, name, wrong)
    assert "otherwise" in refusal(made(kind, dtype))


def test_rows_of_nothing_are_refused():
    with pytest.raises(ValueError, match="^pack: expected .*got 0"): layout(MIXED, 0)
    for wrong in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match="^pack: expected"): TrainConfig(pack=wrong)
    assert config_values(parse(["train", "--pack", "4096"]))["pack"] == 4096
    assert TrainConfig().pack is None
