"Off-policyness on purpose: who waits for whom, replay, where the old log-probabilities come from, and an engine in another process."

import copy
import json
import math
import os
import random
import re
import shutil
import signal
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from offpolicy_rl.llm import schedule as llm_schedule
from offpolicy_rl.llm.buffer import ReplayBuffer
from offpolicy_rl.llm.checkpoint import checkpoints, pack, rollouts_from, rollouts_parts, unpack, wearing, weights
from offpolicy_rl.llm.cli import build_parser, config_values, main, parse
from offpolicy_rl.llm.config import TrainConfig, checkpoint_folder, config_facts, old_of, resolve, run_name, same_config
from offpolicy_rl.llm.engine import HFEngine, token_logps
from offpolicy_rl.llm.model import embedded_path, load
from offpolicy_rl.llm.old import Average
from offpolicy_rl.llm.record import read_record
from offpolicy_rl.llm.rollouts import Rollouts
from offpolicy_rl.llm.schedule import streams
from offpolicy_rl.llm.tasks import task
from offpolicy_rl.llm.train import Trainer, train
from offpolicy_rl.llm.worker import SHARED, EngineProcess, scratch
from offpolicy_rl.recipes import recipe, recipes

SHORT = dict(task="sort", prompts_per_step=4, group_size=4, eval_prompts=8, steps=6, eval_every=3)
PROMPTS = ["52918043=", "31=", "77120="]
ROUNDING = 5e-5     # of a log-probability in single precision: logits of up to 100 are known to 6e-6 each, and a few of them add up


pytestmark = pytest.mark.usefixtures("models")


@pytest.fixture(scope="module")
def process(models):
    "An engine in another process, which takes seconds to start: one for all tests."
    model, _ = load("embedded", "sort", 0)
    there = EngineProcess(model, str(embedded_path(task("sort"))), threads=1)
    yield there
    there.close()


@pytest.fixture
def lent(process, monkeypatch):
    "Runs take this process in place of one of their own, from version 0 on, and do not end it."
    def lend(model, *how):
        process.sync(model, 0)
        process.restarts = 0
        return process
    monkeypatch.setattr(llm_schedule, "EngineProcess", lend)
    monkeypatch.setattr(process, "close", lambda: [process.collect() for _ in list(process.open)])
    return process


def seeded(n: int) -> torch.Generator: return torch.Generator().manual_seed(n)


def copied(model) -> dict[str, torch.Tensor]: return {name: p.clone() for name, p in weights(model).items()}


def steps_of(trainer: Trainer, count: int) -> list[tuple[Rollouts, dict]]:
    "The rollouts of so many updates, and the weights that each began with."
    seen = []
    for _ in range(count):
        mine = copied(trainer.model)
        seen.append((rollouts := trainer.sample(), mine))
        trainer.update(rollouts)
        trainer.step += 1
    return seen


# schedules

@pytest.mark.parametrize("k, ages", [(1, [0, 1, 1, 1, 1, 1]), (3, [0, 1, 2, 3, 3, 3])])
def test_lagging_samples_are_of_the_weights_of_k_updates_ago(k, ages):
    trainer = Trainer(TrainConfig(recipe="topr", mode="lag", staleness=k, lr=3e-3, **SHORT))
    seen = steps_of(trainer, 6)
    assert [int(j - r.version.unique()) for j, (r, _) in enumerate(seen)] == ages
    for j, (r, _) in enumerate(seen):
        with wearing(trainer.model, seen[j - ages[j]][1]): torch.testing.assert_close(token_logps(trainer.model, r)[0], r.logp_mu, atol=ROUNDING, rtol=0)
        with wearing(trainer.model, seen[max(0, j - ages[j] - 1)][1]): gap = (token_logps(trainer.model, r)[0] - r.logp_mu).abs().max()
        assert j - ages[j] == 0 or gap > 1e-3


def test_another_weight_for_a_while_leaves_no_trace():
    model, _ = load("embedded", "sort", 0)
    before = copied(model)
    with pytest.raises(KeyError), wearing(model, {name: 2 * p for name, p in before.items()}):
        assert torch.equal(next(model.parameters()), 2 * next(iter(before.values())))
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


def test_what_streams():
    by = {name: streams(r) for name, r in recipes().items()}
    assert {by[name] for name in ("grpo", "topr", "dr_grpo", "gspo", "reinforce")} == {"responses"}
    assert {by[name] for name in ("ppo", "cispo", "tis", "decoupled_ppo")} == {"tokens"}
    assert {by[name] for name in ("reinforce_pp", "self_normalised_is", "dapo")} == {None}
    token_mean = resolve(TrainConfig(recipe="grpo", aggregate="token_mean"))[1]
    assert streams(token_mean) == "tokens"
    for name, why in (("reinforce_pp", "its loss is not a sum over groups"), ("dapo", "its sampler chooses")):
        with pytest.raises(ValueError, match=f"mode: recipe '{name}' cannot take in a batch piece by piece, .*{why}"):
            resolve(TrainConfig(recipe=name, mode="periodic"))


@pytest.mark.parametrize("name, how", [("ppo", {}), ("topr", dict(micro_batch=6)), ("decoupled_ppo", dict(replay=8, minibatches=2)), ("vtrace", {})])
def test_a_periodic_update_is_the_synchronous_one_on_the_same_samples(name, how, lent, monkeypatch):
    """In double precision: pieces and whole differ by the order of the sums, 1e-16 of each, and AdamW makes at most the learning rate of that.

    The library's own norm goes through single precision, whatever the model's."""
    monkeypatch.setattr(Qwen3RMSNorm, "forward", lambda norm, x: norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))
    config = TrainConfig(recipe=name, mode="periodic", dtype="float64", engine_dtype="float32", **SHORT, **how)
    trainer, other = Trainer(config), Trainer(replace(config, mode="sync"))
    for j in range(4):
        rollouts = trainer.sample()
        assert (j - rollouts.version).unique().tolist() == ([0] if trainer.stored is None else [0, 1]) or "replay" in how
        assert len(trainer.fresh) == 4 or trainer.stored is not None
        other.old.begin(j, other.model, lambda version: True)
        row, same = trainer.update(rollouts), other.update(rollouts)
        trainer.step, other.step = j + 1, j + 1
        assert row["loss"] == pytest.approx(same["loss"], abs=1e-10) and row["gradient_norm"] == pytest.approx(same["gradient_norm"], abs=1e-10)
        for key in ("kl", "ess_sequence", "entropy", "reward", "age"): assert row[key] == pytest.approx(same[key], abs=1e-10)
    assert (trainer.stored is not None) == ("replay" in how)
    gap = max((a - b).abs().max() for a, b in zip(trainer.model.parameters(), other.model.parameters()))
    moved = max((a - b).abs().max() for a, b in zip(trainer.model.parameters(), load("embedded", "sort", 0)[0].parameters()))
    assert gap < 1e-10 and moved > 1e-4


def test_periodic_pieces_are_asked_again_when_the_engine_dies(lent):
    config = TrainConfig(recipe="topr", mode="periodic", **{**SHORT, "steps": 3})
    whole = train(config)
    trainer = Trainer(config)
    trainer.log_evaluation()
    trainer.advance()
    os.kill(lent.process.pid, signal.SIGKILL)
    for _ in range(2): trainer.advance()
    assert trainer.record["steps"]["restarts"] == [0, 1, 1]
    for key in ("reward", "age"): assert trainer.record["steps"][key] == whole["steps"][key]
    assert trainer.record["steps"]["loss"] == pytest.approx(whole["steps"]["loss"], abs=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_asynchronous_samples_are_at_most_k_updates_old(k, lent):
    record = train(TrainConfig(recipe="tis", mode="async", staleness=k, **{**SHORT, "steps": 10}))
    steps = record["steps"]
    assert len(steps["age"]) == 10 and steps["age"][0] == 0 and max(steps["age"]) <= k and not lent.open
    assert all(x is not None and x >= 0 for name in ("waiting_seconds", "sampling_seconds", "sync_seconds", "queue") for x in steps[name])
    assert all(abs(kl) < 1e-4 for kl, age in zip(steps["kl"], steps["age"]) if age == 0)


def test_an_asynchronous_run_survives_the_death_of_its_engine(lent):
    pids = []
    def progress(step, row):
        pids.append(lent.process.pid)
        if step == 3: os.kill(lent.process.pid, signal.SIGKILL)
    record = train(TrainConfig(recipe="tis", mode="async", staleness=2, **SHORT), progress)
    assert record["updates"] == 6 and record["steps"]["restarts"][-1] == 1 and len(set(pids)) == 2 and max(record["steps"]["age"]) <= 2


def test_an_asynchronous_run_goes_on_from_its_checkpoint(tmp_path, lent):
    config = TrainConfig(recipe="decoupled_ppo", mode="async", staleness=2, old="snapshot", save_every=1, out=str(tmp_path), **SHORT)
    class Enough(Exception): pass
    def progress(step, row):
        if step == 3: raise Enough
    with pytest.raises(Enough): train(config, progress)
    trainer = Trainer(config)
    trainer.restore(checkpoint_folder(config) / "step-000003")
    assert len(lent.open) == 2 and lent.version == 3       # what was in flight is asked again
    rollouts = trainer.sample()
    assert rollouts.version.unique().tolist() == [3]
    trainer.close()
    record = train(config, resume=True)
    assert record["updates"] == 6 and max(record["steps"]["age"]) <= 2 and os.listdir(tmp_path) == [f"{run_name(config)}.json"]


# an engine in another process

def test_the_engine_over_there_is_the_one_here(process):
    model, tokenizer = load("embedded", "sort", 0)
    process.sync(model, 5)
    there = process.sample(PROMPTS, 4, 9, 0.8, seeded(3), top_k=5)
    seed = int(torch.randint(2**62, (), generator=seeded(3)))
    here = HFEngine(model, tokenizer).sample(PROMPTS, 4, 9, 0.8, seeded(seed), top_k=5)
    assert there.texts == here.texts and torch.equal(there.logp_mu, here.logp_mu) and torch.equal(there.kept, here.kept) and there.version.unique().item() == 5
    again = rollouts_from(*unpack(pack(*rollouts_parts(here))))
    for name, x in vars(here).items(): assert torch.equal(x, getattr(again, name)) if isinstance(x, torch.Tensor) else x == getattr(again, name)


def test_newer_weights_take_over_between_two_tokens(process):
    model, _ = load("embedded", "sort", 0)
    process.sync(model, 1)
    process.submit(PROMPTS, 64, 200, temperature=4.0, seed=1, partial=True)
    for version in range(2, 1000):
        process.sync(model, version)
        try: _, r, _ = process.collect(timeout=0.03)
        except TimeoutError: continue
        break
    assert r.token_version is not None and r.version.unique().item() == r.token_version[r.mask.bool()].min() < r.token_version.max() <= version
    steps = r.token_version.masked_fill(r.mask == 0, 10**6).amin(0)
    assert (steps.diff() >= 0).all()       # never back to older weights
    torch.testing.assert_close(token_logps(model, r, 4.0)[0], r.logp_mu, atol=ROUNDING, rtol=0)       # they were the same weights all the time


def test_a_process_that_dies_again_and_again_is_given_up(process, monkeypatch):
    model, _ = load("embedded", "sort", 0)
    there = EngineProcess(model, str(embedded_path(task("sort"))))
    there.submit(PROMPTS, 1, 9)
    with pytest.raises(RuntimeError, match="died 3 times in a row, the last time with SIGKILL; its log ends:"):
        for _ in range(3):
            os.kill(there.process.pid, signal.SIGKILL)
            with pytest.raises(TimeoutError, match="no result within 0.5 s"): there.collect(timeout=0.5)
    assert there.restarts == 2 and not there.folder.exists()


def test_a_process_that_cannot_start_says_why():
    model, _ = load("embedded", "sort", 0)
    there = EngineProcess(model, "/no/such/model")
    there.submit(PROMPTS, 1, 9)
    with pytest.raises(ValueError, match="the engine's process: model '/no/such/model' is not"): there.collect(timeout=60)
    assert there.restarts == 0 and there.process.poll() is not None and not there.folder.exists()


def gone(pid: int) -> bool:
    try: return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError: return True


def test_an_engine_does_not_outlive_its_parent():
    news, tell = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            there = EngineProcess(load("embedded", "sort", 0)[0], str(embedded_path(task("sort"))))
            there.sample(PROMPTS, 1, 9)
            os.write(tell, f"{there.process.pid} {there.folder}".encode())
        finally: os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    os.close(tell)
    pid, folder = os.read(news, 1000).decode().split()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not (gone(int(pid)) and not os.path.exists(folder)): time.sleep(0.05)
    assert gone(int(pid)) and not os.path.exists(folder)


# replay

def rollouts(step: int, success: list[int], n: int = 4) -> Rollouts:
    "Made-up rollouts of one version: one group for each entry, with so many successes among its `n` responses."
    g, t = len(success), 1 + step % 3
    group = torch.arange(g).repeat_interleave(n)
    reward = torch.cat([(torch.arange(n) < s).float() for s in success])
    tokens, logp = torch.randint(9, (g * n, t), generator=seeded(step)), -torch.rand(g * n, t, generator=seeded(step))
    return Rollouts(torch.ones(g, 2, dtype=torch.long), torch.ones(g, 2, dtype=torch.bool), tokens, torch.ones(g * n, t), logp, group,
                    torch.full((g * n,), step), [f"{step}:{i}" for i in range(g)], ["x"] * (g * n), reward)


@pytest.mark.parametrize("memory", [None, 4, 1])
def test_the_buffer_keeps_whole_groups_as_they_came(tmp_path, memory):
    buffer, came = ReplayBuffer(20, max_age=3, memory=memory, folder=tmp_path / "replay"), {}
    for step in range(6):
        r = rollouts(step, [1, 2])
        came |= {prompt: r.take((r.group == i).nonzero()[:, 0]) for i, prompt in enumerate(r.prompts)}
        buffer.add(r)
        assert len(buffer) == min(8 * (step + 1), 20)
    assert [g.version for g in buffer.groups] == [3, 4, 4, 5, 5]       # the oldest went first
    files = len(list(tmp_path.rglob("*.safetensors")))
    assert files == (0 if memory is None else 5 - memory // 4)
    drawn = buffer.draw(3, 7, random.Random(0))
    assert len(buffer.groups) == 4 and 3 not in buffer.versions() and len(set(drawn.prompts)) == 3
    for i, prompt in enumerate(drawn.prompts):
        part, first = drawn.take((drawn.group == i).nonzero()[:, 0]), came[prompt]
        width = first.tokens.shape[1]
        for name in ("tokens", "logp_mu", "mask"):
            assert torch.equal(getattr(part, name)[:, :width], getattr(first, name)) and not getattr(part, name)[:, width:].any()
        assert torch.equal(part.version, first.version) and torch.equal(part.reward, first.reward)
    assert buffer.draw(5, 7, random.Random(0)) is None
    assert buffer.draw(1, 100, random.Random(0)) is None and len(buffer) == 0 and not list(tmp_path.rglob("*.safetensors"))


def test_groups_are_drawn_by_their_success():
    buffer = ReplayBuffer(100, by="success")
    buffer.add(rollouts(0, [0, 2, 4]))
    rng, n = random.Random(0), 4000
    first = [buffer.draw(1, 0, rng).prompts[0] for _ in range(n)]
    for i, weight in enumerate((1, 3, 5)):       # (s + 1) / (n + 2) with n = 4
        p = weight / 9
        assert abs(first.count(f"0:{i}") / n - p) < 4 * math.sqrt(p * (1 - p) / n)
    # the second of two, given the first, is in proportion to what is left: 5/9 * 3/4 + 3/9 * 5/6
    both = sum(set(buffer.draw(2, 0, rng).prompts) == {"0:1", "0:2"} for _ in range(n)) / n
    p = 5 / 9 * 3 / 4 + 3 / 9 * 5 / 6
    assert abs(both - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_a_batch_is_fresh_and_replayed_in_the_share_that_was_asked_for():
    config = TrainConfig(recipe="decoupled_ppo", replay=32, replay_share=0.75, replay_age=4, old="snapshot", **{**SHORT, "steps": 8})
    trainer, seen, sampled = Trainer(config), [], {}
    for j in range(8):
        seen.append(copied(trainer.model))
        r = trainer.sample()
        assert len(r.prompts) == 4 and len(trainer.buffer) <= 32
        for fresh in trainer.fresh: sampled |= {prompt: fresh.take((fresh.group == i).nonzero()[:, 0]) for i, prompt in enumerate(fresh.prompts)}
        given = trainer.given(r)
        for i, prompt in enumerate(r.prompts):
            rows = (r.group == i).nonzero()[:, 0]
            part = r.take(rows).trimmed()
            assert torch.equal(part.logp_mu, sampled[prompt].trimmed().logp_mu) and torch.equal(part.version, sampled[prompt].version)
            with wearing(trainer.model, seen[int(part.version[0])]):      # old="snapshot": by the weights that sampled
                torch.testing.assert_close(token_logps(trainer.model, part)[0], given["logp_old"][rows, :part.tokens.shape[1]], atol=ROUNDING, rtol=0)
        assert given["age"].tolist() == (j - r.version).tolist() and given["age"].max() <= 4
        row = trainer.update(r) | trainer.measures(r)
        trainer.step += 1
        fresh = torch.cat([x.reward for x in trainer.fresh])
        assert row["replayed"] == (0 if j == 0 else 0.75) and row["age_max"] == int(given["age"].max()) and row["reward"] == pytest.approx(fresh.mean().item())
        assert set(trainer.old.kept) <= {g.version for g in trainer.buffer.groups} | {j} | trainer.buffer.versions() | set(range(j - 5, j + 1))


def test_a_batch_may_be_replayed_as_a_whole():
    steps = train(TrainConfig(recipe="topr", replay=16, replay_share=1.0, replay_age=2, **SHORT))["steps"]
    assert steps["replayed"] == [0, 1, 1, 0, 1, 1] and steps["age"] == [0, 1, 2, 0, 1, 2]


# where the old log-probabilities come from

@pytest.mark.parametrize("old, mode, k", [("snapshot", "sync", 4), ("model", "sync", 4), ("snapshot", "lag", 2), ("model", "lag", 2), ("snapshot", "sync", 1)])
def test_the_exact_old_log_probabilities_are_those_of_the_weights_that_sampled(old, mode, k):
    "By a bfloat16 engine, so that they are not what it reported."
    trainer = Trainer(TrainConfig(recipe="ppo", old=old, mode=mode, staleness=k, engine_dtype="bfloat16", lr=3e-3, **SHORT))
    seen = []
    for _ in range(6):
        seen.append(copied(trainer.model))
        given = trainer.given(r := trainer.sample())
        with wearing(trainer.model, seen[int(r.version[0])]): exact = token_logps(trainer.model, r)[0]
        torch.testing.assert_close(given["logp_old"], exact, atol=ROUNDING, rtol=0)
        assert (given["logp_old"] - r.logp_mu).abs().max() > 1e-4
        trainer.update(r)
        trainer.step += 1
    if old == "snapshot": assert len(trainer.old.kept) <= 2


def test_snapshots_read_each_token_by_the_weights_that_wrote_it():
    trainer = Trainer(TrainConfig(recipe="ppo", old="snapshot", staleness=4, lr=3e-3, **SHORT))
    seen = [copied(trainer.model)]
    r = trainer.sample()
    trainer.update(r)
    trainer.step = 1
    trainer.old.follow(trainer.model, 1)
    seen.append(copied(trainer.model))
    r.token_version = (torch.arange(r.tokens.shape[1]) >= 4).long().expand_as(r.tokens).contiguous()
    mixed = trainer.given(r)["logp_old"]
    for version in (0, 1):
        with wearing(trainer.model, seen[version]): torch.testing.assert_close(
            mixed[r.token_version == version], token_logps(trainer.model, r)[0][r.token_version == version], atol=ROUNDING, rtol=0)
    del trainer.old.kept[1]
    with pytest.raises(ValueError, match=r"no snapshot of version 1; stored are \[0\]"): trainer.given(r)


def test_the_average_is_corrected_for_its_start():
    config = TrainConfig(recipe="ppo", old="ewma", old_beta=0.6, staleness=4, lr=3e-3, **SHORT)
    trainer = Trainer(config)
    seen = [mine["model.norm.weight"] for _, mine in steps_of(trainer, 5)]
    weight = [0.6 ** (4 - i) for i in range(5)]
    torch.testing.assert_close(weights(trainer.proximal)["model.norm.weight"], sum(w * x for w, x in zip(weight, seen)) / sum(weight))
    assert (Trainer(replace(config, old_beta=None)).old.beta, Trainer(replace(config, old_beta=None, mode="lag")).old.beta) == (1.5 / 2.5, 4 / 5)
    on_policy = train(replace(config, old_beta=0.0, steps=3))["steps"]["clip_fraction"]
    assert on_policy == [0, 0, 0]       # the average is the policy itself


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_interpolation_only_rescales_the_ratio(alpha):
    trainer = Trainer(TrainConfig(recipe="ppo", old="interpolation", old_alpha=alpha, staleness="offline", lr=3e-3, **SHORT))
    for _ in range(2): trainer.advance()
    trainer.optimizer.zero_grad()
    _, _, batch = trainer.backward(trainer.sample())
    mask = batch["mask"].bool()
    ratio, whole = (batch["logp"] - batch["logp_old"])[mask], (batch["logp"] - batch["logp_mu"])[mask]
    assert whole.abs().max() > 0.05
    torch.testing.assert_close(ratio, (1 - alpha) * whole, atol=1e-6, rtol=0)


# schedules beside a replay buffer

def fresh_ages(config: TrainConfig, steps: int) -> dict[int, list[int]]:
    "How old the fresh samples of each update were that took some; every batch is a whole one."
    trainer, ages = Trainer(config), {}
    for step in range(steps):
        trainer.advance()
        assert len(trainer.batch["mask"]) == config.prompts_per_step * config.group_size
        if trainer.fresh: ages[step] = sorted({step - v for r in trainer.fresh for v in r.version.tolist()})
    return ages


@pytest.mark.parametrize("how, ages", [
    (dict(mode="lag", staleness=2), {0: [0], 4: [2], 6: [2], 8: [2]}), (dict(staleness=3), {0: [0], 4: [1], 7: [1]})])
def test_updates_that_take_no_fresh_samples_count(how, ages):
    "A batch that is replayed whole is an update as any other: what is k updates old stays so."
    config = TrainConfig(**{**SHORT, "steps": 10}, recipe="topr", replay=16, replay_share=1.0, replay_age=3, **how)
    assert fresh_ages(config, 10) == ages


def test_async_batches_beside_a_buffer_are_whole_and_not_too_old(lent):
    "Also after requests that were made while half of a batch was to be replayed, and after updates that took nothing."
    for share, age in ((0.5, 3), (1.0, 5)):
        config = TrainConfig(**{**SHORT, "steps": 20}, recipe="topr", mode="async", staleness=2, replay=32, replay_share=share, replay_age=age)
        ages = fresh_ages(config, 14)
        assert max(map(max, ages.values())) <= 2 and (len(ages) < 14) == (share == 1)
        lent.close()


def test_a_sampler_beside_a_buffer():
    "An update that is replayed whole has nothing fresh to choose from."
    trainer = Trainer(TrainConfig(**SHORT, recipe="dapo", replay=16, replay_share=1.0))
    rows = [trainer.advance() for _ in range(3)]
    assert [row["replayed"] for row in rows] == [0, 1, 1]


def test_a_buffer_tells_the_versions_of_all_tokens():
    r = rollouts(5, [1])      # three tokens
    r.token_version = torch.tensor([[4, 4, 6]]).expand_as(r.tokens)
    buffer = ReplayBuffer(8)
    buffer.add(r)
    assert buffer.versions() == {4, 6}
    again = ReplayBuffer(8)
    tensors, state, _ = buffer.state()
    again.restore(tensors, json.loads(json.dumps(state)), Path())
    assert again.versions() == {4, 6}


def test_a_buffer_that_lay_on_the_disk_goes_on_in_memory(tmp_path):
    buffer = ReplayBuffer(20, memory=4, folder=tmp_path / "replay")
    buffer.add(rollouts(0, [1, 2, 3]))
    tensors, state, files = buffer.state()
    again = ReplayBuffer(20)
    again.restore(tensors, json.loads(json.dumps(state)), tmp_path / "replay")
    one, other = (b.draw(3, 0, random.Random(0)) for b in (buffer, again))
    assert len(files) == 2 and one.prompts == other.prompts and torch.equal(one.tokens, other.tokens) and torch.equal(one.reward, other.reward)


# an engine on a device of its own that takes turns with the updates

@pytest.mark.parametrize("how, ages", [(dict(staleness=2), [0, 1, 0, 1, 0]), (dict(mode="lag", staleness=1), [0, 1, 1, 1, 1])])
def test_an_engine_on_a_device_of_its_own(lent, tmp_path, how, ages):
    "The samples are of the weights that they should be of, and a run goes on from its checkpoint with the same bits."
    config = TrainConfig(**SHORT, recipe="ppo", engine_device="cpu", warmup=0, lr=1e-4, **how)
    trainer, rows = Trainer(config), []
    for step in range(5):
        rows.append(trainer.advance())
        if step == 2: trainer.save(tmp_path)
    assert trainer.schedule.engine is lent and [row["age"] for row in rows] == ages
    assert all((abs(row["kl"]) < ROUNDING) == (row["age"] == 0) for row in rows)
    other = Trainer(config)
    other.restore(checkpoints(tmp_path)[-1])
    for _ in range(2): other.advance()
    assert all(map(torch.equal, trainer.model.parameters(), other.model.parameters()))


def test_what_a_piece_ends_with_is_said_by_the_process_that_knows(lent, tmp_path, monkeypatch):
    "Of several processes the others do not, so nothing is asked of them: no batch is written."
    trainer = Trainer(TrainConfig(**SHORT, recipe="reinforce", mode="periodic", out=str(tmp_path)))
    monkeypatch.setattr(trainer, "stop", None)
    def marks(r, rows): raise ValueError("the verifier said nan")
    monkeypatch.setattr(trainer, "marks", marks)
    with pytest.raises(ValueError, match="^the verifier said nan$"): trainer.advance()


def test_room_in_memory_is_for_all_engines_of_a_machine():
    room = shutil.disk_usage(SHARED).free - 2**24
    if room < 2**24: pytest.skip("there is too little shared memory for an engine of any size")
    for engines, root in ((1, SHARED), (4, Path(tempfile.gettempdir()))):      # 0.4 and 1.6 times the room, which other tests may change meanwhile
        folder, lock = scratch(room // 5, engines)
        folder.joinpath("lock").unlink()
        folder.rmdir()
        lock.close()
        assert folder.parent == root


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_average_of_a_policy_that_stands_still_is_the_policy(dtype):
    policy = load("embedded", "sort", 0, dtype=dtype)[0]
    average = Average(copy.deepcopy(policy).requires_grad_(False), 0.97)
    for step in range(1, 100): average.begin(step, policy, None)
    apart = max((a - b).abs().max().item() for a, b in zip(average.model.parameters(), policy.parameters()))
    assert apart <= (0 if dtype == "bfloat16" else 1e-5)      # rounded to bfloat16, an error of 1e-7 is none
    tensors, state = average.state()
    again = Average(copy.deepcopy(policy).requires_grad_(False), 0.97)
    again.restore({name: {k: x.clone() for k, x in named.items()} for name, named in tensors.items()}, state)
    moved = load("embedded", "sort", 1, dtype=dtype)[0]
    for a in (average, again): a.begin(100, moved, None)
    assert all(map(torch.equal, average.model.parameters(), again.model.parameters()))
    assert average.mean.keys() == again.mean.keys() and all(torch.equal(average.mean[name], x) for name, x in again.mean.items())


# what does not go together

@pytest.mark.parametrize("wrong, message", [
    (dict(mode="lag", staleness="offline"), "staleness: mode lag needs a number of updates, got 'offline'"),
    (dict(mode="periodic", staleness=2), "staleness: mode periodic is on-policy, expected 1, got 2"), (dict(mode="later"), "mode: expected one of sync, lag"),
    (dict(partial=True), "partial: .*got mode sync with engine hf"), (dict(partial=True, mode="async", engine="vllm"), "partial: .*with engine vllm"),
    (dict(engine="sglang"), "engine: expected one of hf, vllm, vllm-server, http"),
    (dict(engine_device="cpu", engine="http://a:1"), "engine_device: a server at an address has its own device; expected None, got 'cpu'"),
    (dict(engine_options=dict(max_len=64)), "engine_options: these are vLLM's; expected none with engine hf, got {'max_len': 64}"),
    (dict(engine="vllm", engine_options=dict(dtype="bfloat16")), "engine_options: dtype is not one of them; expected engine_dtype"),
    (dict(engine="vllm", engine_options=dict(max_kept="abc")), "engine_options: max_kept: expected a whole number of at least 0, got 'abc'"),
    (dict(engine="vllm", engine_options=dict(cache_gib=0)), "engine_options: cache_gib: expected a positive number, got 0"),
    (dict(sync_limit=-1.0), "sync_limit: expected None or a number of at least 0, got -1.0"),
    (dict(replay=4), "replay: expected room for at least the 128 responses"), (dict(replay_age=2), "replay_age: nothing is stored with replay=0"),
    (dict(replay=512, replay_share=0.01), "replay_share: 0.01 of 16 prompts is less than one group"),
    (dict(replay=512, replay_memory=8), "replay_memory: expected a folder `out`"),
    (dict(replay_by="age"), "replay_by: expected one of uniform, success"), (dict(old="model", mode="async"), "old: the second model .*in mode async"),
    (dict(old="model", replay=512), "old: the second model .*stored responses"), (dict(old_beta=0.5), "old_beta: belongs to old='ewma', got old=None"),
    (dict(old_beta=1.0, old="ewma"), "old_beta: expected a number from 0 to below 1"), (dict(old_alpha=2.0), "old_alpha: expected a number from 0 to 1"),
    (dict(recipe="rover", mode="async"), "old: recipe 'rover' needs the old policy's whole distribution .*mode async"),
    (dict(recipe="rover", replay=512), "old: recipe 'rover' needs .*replay=512; expected 'snapshot'"),
    (dict(recipe="rover", engine="vllm"), "old: recipe 'rover' needs .*engine vllm"),
    (dict(keep_checkpoints=0), "keep_checkpoints: expected a number of at least 1"),
    (dict(verify_timeout=0), "verify_timeout: expected a positive number")])
def test_what_does_not_go_together_is_said_before_it_runs(wrong, message):
    with pytest.raises(ValueError, match=message): resolve(TrainConfig(**wrong))


def test_every_choice_has_a_flag():
    line = ("train --recipe ppo --mode async --staleness 2 --partial --engine hf --engine-dtype bfloat16 --engine-device cpu --top-p 0.9 --top-k 5 "
            "--min-p 0.01 --replay 512 --replay-share 0.25 --replay-age 8 --replay-by success --replay-memory 64 --old ewma --old-beta 0.5 --autocast bfloat16 "
            "--gradient-checkpointing --compile --logp-chunk 512 --lora 8 --keep-checkpoints 3 --verify-timeout 2.5 --out x")
    values = config_values(parse(line.split()))
    config, said = TrainConfig(**values), line.split()[3:]
    for flag, word in zip(said, [*said[1:], "--"]):
        if flag.startswith("--"):
            value = getattr(config, flag[2:].replace("-", "_"))
            assert value is True if word.startswith("--") else str(value) == word, flag
    commands = next(a for a in build_parser()._actions if a.choices is not None)
    flags = {action.dest for action in commands.choices["train"]._actions}
    assert {f.name for f in fields(TrainConfig)} - flags <= {"knobs", "betas", "track"}


def test_modes_from_the_command_line(tmp_path, capsys):
    small = "--steps 3 --prompts-per-step 2 --group-size 4 --eval-prompts 8 --eval-every 3 --threads 1"
    assert main(f"train --recipe tis --mode lag --staleness 2 --replay 16 --old snapshot {small} --out {tmp_path}".split()) == 0
    record = read_record(tmp_path / "sort-tis-k2-lag-replay16-s0.json")
    assert record["config"]["mode"] == "lag" and record["config"]["old"] == "snapshot" and record["steps"]["age_max"] == [0, 1, 2]
    assert main(f"train --recipe dapo --mode periodic {small} --out {tmp_path}".split()) == 2
    assert capsys.readouterr().err.startswith("offpolicy: mode: recipe 'dapo' cannot take in a batch piece by piece")


def test_records_of_before_are_still_theirs():
    "What an older record does not name had today's default."
    before = {name: x for name, x in config_facts(TrainConfig()).items() if name not in ("mode", "replay", "top_p", "partial", "old_alpha", "verify_timeout")}
    same_config(config_facts(TrainConfig()), before, "here")
    with pytest.raises(ValueError, match="mode='sync' there, 'lag' here"): same_config(config_facts(TrainConfig(mode="lag")), before, "here")


def test_names_of_runs_tell_them_apart():
    names = [run_name(TrainConfig(**how)) for how in ({}, dict(staleness=4), dict(mode="lag"), dict(mode="async", staleness=4), dict(replay=256))]
    assert names == ["sort-topr-k1-s0", "sort-topr-k4-s0", "sort-topr-k1-lag-s0", "sort-topr-k4-async-s0", "sort-topr-k1-replay256-s0"]
    assert old_of(TrainConfig(), recipe("topr")) == "behaviour" and old_of(TrainConfig(), recipe("decoupled_ppo")) == "proximal"
    assert all(re.fullmatch("[a-z0-9-]+", name) for name in names)
