"Runs that are killed, disks that are full, losses that are no number: what is kept, and what goes on."

import errno
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
import torch
from forks import ended, fork
from transformers import AutoConfig, AutoModelForCausalLM

from offpolicy_rl.lab.run_explorer import kept_batches
from offpolicy_rl.llm import model as llm_model
from offpolicy_rl.llm import parallel
from offpolicy_rl.llm.adapter import linear_layers, merged_weights
from offpolicy_rl.llm.checkpoint import checkpoints, save_checkpoint, set_weights
from offpolicy_rl.llm.cli import main
from offpolicy_rl.llm.config import TrainConfig, beside, checkpoint_folder, record_path, run_name
from offpolicy_rl.llm.engine import token_logps
from offpolicy_rl.llm.fidelity import mismatch
from offpolicy_rl.llm.model import char_tokenizer, load
from offpolicy_rl.llm.record import read_record
from offpolicy_rl.llm.schedule import Lag
from offpolicy_rl.llm.tasks import Sort, register, tasks
from offpolicy_rl.llm.train import Trainer, save_pretrained, train
from offpolicy_rl.llm.verify import close_judges
from offpolicy_rl.llm.worker import SHARED, publish, published

SHORT = dict(task="sort", prompts_per_step=4, group_size=4, eval_prompts=8, steps=6, eval_every=3)


pytestmark = pytest.mark.usefixtures("models")


# kill -9

# One process imports everything; each attempt at the run is a fork of it. It is killed a few updates after it began, at a random moment of
# one more update's length; the last attempt is left alone.
KILLED_RUNS = """
import json, os, random, signal, sys, time, torch, traceback
torch.set_num_threads(1)
from offpolicy_rl.llm.config import TrainConfig, checkpoint_folder
from offpolicy_rl.llm.checkpoint import checkpoints
from offpolicy_rl.llm.train import Trainer, train
rng = random.Random(0)
Trainer(TrainConfig())  # imports what a model needs
for how, kills in json.loads(sys.argv[1]):
    config, steps, told, pids, seconds = TrainConfig(**how), [0], [], [], 0.1
    for i in range(kills + 1):
        news, tell = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(config, lambda step, row: os.write(tell, b"."))
                code = 0
            except BaseException: traceback.print_exc()
            finally: os._exit(code)
        os.close(tell)
        pids.append(child)
        dots = b""
        if i < kills:
            dots += os.read(news, 1)
            for _ in range(rng.randint(0, 4)):
                start = time.perf_counter()
                dots += os.read(news, 1)
                seconds = 0.5 * (seconds + time.perf_counter() - start)
            time.sleep(rng.random() * seconds)
            os.kill(child, signal.SIGKILL)
        code = os.waitpid(child, 0)[1]
        while more := os.read(news, 100): dots += more
        os.close(news)
        told.append(len(dots))
        steps.append(max((int(p.name[5:]) for p in checkpoints(checkpoint_folder(config))), default=0))
    print(json.dumps(dict(code=code, steps=steps, told=told, pids=pids)), flush=True)
"""


def killed(configs: list[TrainConfig], kills: list[int]) -> list[dict]:
    """Run each configuration with its number of kills at random moments; the last exit code, the checkpoint that each attempt left (`steps`, after a 0 for
    the beginning), how many updates each attempt said that it had done (`told`), and its process (`pids`)."""
    how = [[{k: v for k, v in vars(c).items() if v != getattr(TrainConfig(), k)}, count] for c, count in zip(configs, kills)]
    done = subprocess.run([sys.executable, "-c", KILLED_RUNS, json.dumps(how)], capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return [dict(json.loads(line), errors=done.stderr) for line in done.stdout.splitlines()]


def same_numbers(a: dict, b: dict) -> None:
    for key in ("evaluations", "samples", "config", "recipe", "updates"): assert a[key] == b[key]
    assert a["steps"].keys() == b["steps"].keys()
    for name in a["steps"]:
        if not name.endswith("seconds"): assert a["steps"][name] == b["steps"][name], name


def test_runs_killed_at_any_moment_go_on_and_end_with_the_same_numbers(tmp_path):
    """Four kinds of run, each killed several times; a checkpoint after every update, so that many kills fall into the writing of one.

    A run never goes back behind an update that it has done, and ends with the numbers of a run that nobody disturbed. One whose samples come
    from another process does so too: that is asked for the same pieces, with the same seeds, and brings them one after the other."""
    small = {**SHORT, "steps": 30, "eval_every": 15, "save_every": 1, "threads": 1, "prompts_per_step": 2}
    runs = [dict(recipe="topr", mode="lag", staleness=3, save_model=True), dict(recipe="decoupled_ppo", staleness=4, old="snapshot", keep_checkpoints=2),
            dict(recipe="vtrace", staleness=2, replay=32, replay_age=8, replay_by="success", replay_memory=8), dict(recipe="reinforce", mode="periodic")]
    configs = [TrainConfig(**small, **how, out=str(tmp_path / "killed")) for how in runs]
    for config, how, found in zip(configs, runs, killed(configs, kills=[5, 5, 5, 3])):
        assert found["code"] == 0 and len(set(found["steps"])) > 3, found
        assert all(done <= b - a <= done + 1 for a, b, done in zip(found["steps"], found["steps"][1:-1], found["told"])), found     # the checkpoint comes first
        assert found["steps"][-2] + found["told"][-1] == 30
        no_engines_left_of(found["pids"])
        whole = train(TrainConfig(**small, **how, out=str(tmp_path / "whole")))
        same_numbers(read_record(record_path(config)), json.loads(json.dumps(whole)))
        assert sorted(os.listdir(tmp_path / "killed")) == sorted([*(record_path(c).name for c in configs), beside(configs[0], "model").name])
    same = [beside(replace(configs[0], out=str(tmp_path / folder)), "model") / "model.safetensors" for folder in ("killed", "whole")]
    assert same[0].read_bytes() == same[1].read_bytes()


def no_engines_left_of(pids: list[int]) -> None:
    "What engines keep of weights goes once their learner is gone."
    left = lambda: [path for pid in pids for path in SHARED.glob(f"offpolicy-engine-{pid}-*")]
    deadline = time.monotonic() + 10
    while left() and time.monotonic() < deadline: time.sleep(0.1)
    assert not left()


def test_an_asynchronous_run_that_is_killed_goes_on(tmp_path):
    "What it has lost is in flight: the numbers are others, the ages are not, and neither process nor weights are left over."
    config = TrainConfig(**{**SHORT, "steps": 20, "eval_every": 20}, save_every=1, threads=1, recipe="tis", mode="async", staleness=2, out=str(tmp_path))
    found, = killed([config], kills=[1])
    record = read_record(record_path(config))
    assert found["code"] == 0 and 0 < found["steps"][1] < 20, found
    assert record["updates"] == 20 and max(record["steps"]["age"]) <= 2 and os.listdir(tmp_path) == [record_path(config).name]
    no_engines_left_of(found["pids"])


def test_what_a_killed_run_left_half_written_goes_when_it_goes_on(tmp_path):
    config = TrainConfig(**SHORT, out=str(tmp_path))
    for name in (f".{run_name(config)}.json-abc", f".making-{run_name(config)}.model-abc", f".{run_name(replace(config, seed=1))}.json-abc"):
        (tmp_path / name).write_text("half")
    train(config)
    assert sorted(os.listdir(tmp_path)) == [".sort-topr-k1-s1.json-abc", "sort-topr-k1-s0.json"]       # another run's is not touched


def test_what_a_killed_process_left_half_written_is_not_a_checkpoint(tmp_path):
    for name in (".making-abc", ".gone-step-000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, 2, {}, {})
    assert os.listdir(tmp_path) == ["step-000002"]


def test_as_many_checkpoints_stay_as_are_asked_for(tmp_path):
    config = TrainConfig(**SHORT, save_every=1, keep_checkpoints=3, out=str(tmp_path))
    seen = []
    train(config, lambda step, row: seen.append([p.name[-1] for p in checkpoints(checkpoint_folder(config))]))
    assert seen == [["1"], ["1", "2"], ["1", "2", "3"], ["2", "3", "4"], ["3", "4", "5"], ["3", "4", "5"]]
    assert os.listdir(tmp_path) == [f"{run_name(config)}.json"]


def test_afresh_leaves_nothing_of_the_run_before(tmp_path):
    config = TrainConfig(**SHORT, save_every=1, out=str(tmp_path))
    save_checkpoint(checkpoint_folder(config), 100, {}, {})     # further than the new run ever comes
    class Enough(Exception): pass
    def progress(step, row):
        if step == 2: raise Enough
    with pytest.raises(Enough): train(config, progress, afresh=True)
    assert [p.name for p in checkpoints(checkpoint_folder(config))] == ["step-000002"]


def test_resume_goes_on_or_says_that_there_is_nothing(tmp_path, capsys):
    line = f"train --steps 4 --prompts-per-step 2 --group-size 4 --eval-prompts 8 --eval-every 2 --save-every 1 --out {tmp_path} --resume"
    assert main(line.split()) == 2 and "resume: there is no checkpoint of sort-topr-k1-s0" in capsys.readouterr().err
    config = TrainConfig(steps=4, prompts_per_step=2, group_size=4, eval_prompts=8, eval_every=2, save_every=1, out=str(tmp_path))
    trainer = Trainer(config)
    trainer.log_evaluation()
    trainer.advance()
    trainer.save(checkpoint_folder(config))
    assert main(line.split()) == 0 and read_record(record_path(config))["updates"] == 4
    assert main(line.split()) == 0      # finished: there is the record
    assert main([*line.split(), "--afresh"]) == 2 and "resume: expected one of afresh and resume" in capsys.readouterr().err


def test_an_adapter_is_kept_by_itself_and_saved_as_part_of_the_weights(tmp_path):
    pytest.importorskip("peft")
    config = TrainConfig(recipe="tis", mode="lag", staleness=2, lora=4, lr=1e-2, **SHORT)
    trainer, again = Trainer(config), Trainer(config)
    for _ in range(3): trainer.advance()
    trainer.save(tmp_path / "kept")
    again.restore(tmp_path / "kept" / "step-000003")
    for t in (trainer, again): t.advance()
    for name, column in trainer.record["steps"].items(): assert name.endswith("seconds") or column == again.record["steps"][name]
    small = (tmp_path / "kept" / "step-000003" / "model.safetensors").stat().st_size
    save_pretrained(trainer, tmp_path / "model")
    saved, _ = load(str(tmp_path / "model"))
    assert small < (tmp_path / "model" / "model.safetensors").stat().st_size / 5
    rollouts = trainer.sample()
    merged, apart = (token_logps(model, rollouts)[0] for model in (saved, trainer.model))
    torch.testing.assert_close(merged, apart, atol=5e-5, rtol=0)
    assert (apart - rollouts.logp_mu).abs().max() > 1e-2        # it has moved


MIXTURES = dict(qwen3_moe=dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16), mixtral=dict(num_local_experts=4),
                deepseek_v3=dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=4,
                                 n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1))


@pytest.mark.parametrize("kind", MIXTURES)
def test_an_adapter_on_a_mixture_of_experts_reaches_engines_and_the_saved_model(kind, tmp_path):
    pytest.importorskip("peft")
    tokenizer, folder = char_tokenizer(), tmp_path / "mixture"
    ends = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                                                  num_attention_heads=2, num_key_value_heads=2, **ends, **MIXTURES[kind]))
    for part in (plain, tokenizer): part.save_pretrained(folder)
    trainer = Trainer(TrainConfig(recipe="reinforce", model=str(folder), lora=4, lr=0.05, warmup=0, **SHORT))
    trainer.marks = lambda rollouts, rows: [i / len(rows) for i in rows]        # an untrained model never guesses right
    for _ in range(2): trainer.advance()
    trained = {name.partition(".lora_")[0] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == set(linear_layers(plain)) and not any(".experts" in name for name in trained)
    assert ("model.layers.1.mlp.shared_experts.up_proj" in trained) == ("model.layers.0.mlp.down_proj" in trained) == (kind == "deepseek_v3")
    publish(tmp_path, trainer.model, 2, 0)
    plain = load(str(folder))[0]
    before = token_logps(plain, rollouts := trainer.sample())[0]
    set_weights(plain, published(tmp_path)[0])          # as an engine in another process does
    assert mismatch(plain, rollouts) < 1e-5 < 1e-3 < (before - rollouts.logp_mu).abs().max()
    save_pretrained(trainer, tmp_path / "model")
    saved, merged = dict(load(str(tmp_path / "model"))[0].named_parameters()), merged_weights(trainer.model)
    assert saved.keys() == merged.keys() and all(torch.equal(saved[name], x) for name, x in merged.items())


# a second start, another configuration

def in_the_middle_of(config: TrainConfig) -> list[int]:
    "A copy of this process that is in the middle of the run, and a copy of that one, as a verifier may be: their numbers."
    news, tell = os.pipe()

    def progress(step, row):
        os.write(tell, json.dumps([os.getpid(), fork(partial(time.sleep, 60))]).encode())
        time.sleep(60)
    fork(partial(train, config, progress))
    os.close(tell)
    try: return json.loads(os.read(news, 100))
    finally: os.close(news)


def one_of_two(rank: int, port: int, config: TrainConfig, path: Path) -> None:
    "What one process of two is told that starts a run."
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
    try: train(config)
    except ValueError as error: path.write_text(str(error))
    parallel.leave()


def test_a_run_has_its_files_to_itself_until_it_ends_or_is_killed(tmp_path, capsys):
    config = TrainConfig(**SHORT, save_every=1, threads=1, out=str(tmp_path))
    run, beside_it = in_the_middle_of(config)
    try:
        said = "out: sort-topr-k1-s0 is running in .* already"
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        for how in (dict(), dict(afresh=True), dict(resume=True)):
            with pytest.raises(ValueError, match=said): train(config, **how)
        assert main(f"train --steps 6 --prompts-per-step 4 --group-size 4 --eval-prompts 8 --eval-every 3 --threads 1 --out {tmp_path}".split()) == 2
        assert capsys.readouterr().err.startswith("offpolicy: out: sort-topr-k1-s0 is running")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        told = [tmp_path.parent / f"told{rank}" for rank in (0, 1)]
        assert [ended(pid) for pid in [fork(partial(one_of_two, rank, port, config, path)) for rank, path in enumerate(told)]] == [0, 0]
        assert told[0].read_text() == told[1].read_text() != ""     # none waits for the other
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert train(replace(config, seed=1, steps=1))["updates"] == 1      # another run
        os.kill(run, signal.SIGKILL)
        assert ended(run) == -signal.SIGKILL
        assert train(config)["updates"] == 6
    finally:
        for pid in (run, beside_it): os.kill(pid, signal.SIGKILL) if Path(f"/proc/{pid}").exists() else None
    assert sorted(os.listdir(tmp_path)) == ["sort-topr-k1-s0.json", "sort-topr-k1-s1.json"]


def test_a_finished_record_is_returned_and_never_another_configurations(tmp_path):
    config = TrainConfig(**SHORT, out=str(tmp_path))
    record = train(config)
    assert train(config, progress=lambda step, row: pytest.fail("it runs")) == json.loads(json.dumps(record))
    with pytest.raises(ValueError, match=r"sort-topr-k1-s0.json belongs to another configuration \(lr=0.0003 there, 1e-05 here\)"):
        train(replace(config, lr=1e-5))
    assert read_record(record_path(config))["config"]["lr"] == 3e-4
    train(replace(config, lr=1e-5), afresh=True)
    assert read_record(record_path(config))["config"]["lr"] == 1e-5


def test_a_model_that_cannot_be_saved_costs_neither_record_nor_checkpoint(tmp_path):
    config = TrainConfig(**SHORT, save_every=4, save_model=True, out=str(tmp_path))
    model = beside(config, "model")
    def in_the_way(step, row):
        if step == 6: model.write_text("a file where the folder is to be")
    with pytest.raises(NotADirectoryError): train(config, in_the_way)
    assert read_record(record_path(config))["updates"] == 6
    assert [path.name for path in checkpoints(checkpoint_folder(config))] == ["step-000004"]
    model.unlink()
    steps = []
    train(config, lambda step, row: steps.append(step))
    assert steps == [5, 6] and (model / "model.safetensors").exists() and not checkpoint_folder(config).exists()
    assert train(config)["updates"] == 6
    (model / "config.json").rename(tmp_path / "elsewhere")
    for path in model.iterdir(): path.unlink()
    model.rmdir()
    with pytest.raises(ValueError, match="save_model: .* is finished and its model was not kept"): train(config)


def test_after_a_million_updates_the_last_is_still_the_last(tmp_path):
    for step in (999_999, 1_000_000, 1_000_001): save_checkpoint(tmp_path, step, {}, {}, keep=2)
    (tmp_path / "step-000001.bak").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-1000000", "step-1000001"]
    lag = Lag(SimpleNamespace(version=999_999), 2)
    lag.restore(None, {"lag-1000000": {}, "lag-999999": {}, "lag-1000001": {}, "model": {}}, {})
    assert [version for version, _ in lag.kept] == [999_999, 1_000_000, 1_000_001]
    for step in (1_000_000, 999_999): (tmp_path / f"step-{step:06d}.jsonl").touch()
    assert list(kept_batches(tmp_path)) == [999_999, 1_000_000]


# disks

@pytest.fixture
def small_disk(tmp_path):
    "A folder on a file system of its own that holds two checkpoints of the embedded model and not three."
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3400k", "tmpfs", str(folder)], capture_output=True).returncode: pytest.skip("cannot mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint_and_names_the_file(small_disk):
    config = TrainConfig(**SHORT, save_every=1, keep_checkpoints=3, out=str(small_disk))
    with pytest.raises(OSError) as stop: train(config)
    assert stop.value.errno == errno.ENOSPC and Path(stop.value.filename).suffix == ".safetensors"
    assert sorted(os.listdir(checkpoint_folder(config))) == ["step-000001", "step-000002"]
    assert train(TrainConfig(**SHORT, save_every=0, out=str(small_disk)))["updates"] == 6       # and the run goes on from there


def test_a_file_that_may_not_grow_is_named_too(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try: code = main(f"train --steps 3 --prompts-per-step 2 --group-size 4 --eval-prompts 8 --save-every 1 --out {tmp_path}".split())
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and "File too large" in err and "optimizer.safetensors" in err
    assert [p.name for p in tmp_path.rglob("*")] == ["sort-topr-k1-s0.checkpoints"]


# verifiers and losses

def test_a_verifier_that_hangs_is_counted_and_costs_a_reward(monkeypatch):
    class Hangs(Sort):
        name, inline = "hangs", False
        def verify(self, prompt, response):
            if response[:1] == "1": time.sleep(60)
            return 0.5
    monkeypatch.setattr("offpolicy_rl.llm.tasks._tasks", tasks())
    register(Hangs())
    monkeypatch.setattr(llm_model, "embedded_path", lambda task, seed, own=llm_model.embedded_path: own(Sort(), seed))
    trainer = Trainer(TrainConfig(**{**SHORT, "task": "hangs", "eval_prompts": 1}, verify_timeout=0.3))
    row = trainer.advance()
    r, = trainer.fresh
    late = [text[:1] == "1" for text in r.texts]
    assert 0 < sum(late) < 16 and row["timeouts"] == sum(late) and r.reward.tolist() == [0.5 * (not x) for x in late]
    close_judges()


def test_a_loss_that_is_no_number_leaves_its_batch(tmp_path):
    config = TrainConfig(**SHORT, staleness="offline", out=str(tmp_path))
    trainer = Trainer(config)
    trainer.advance()
    with torch.no_grad(): next(trainer.model.parameters()).fill_(math.nan)
    with pytest.raises((ValueError, FloatingPointError), match="^step 1: .*its batch is in .*sort-topr-offline-s0.stopped.jsonl"): trainer.advance()
    rows = [json.loads(line) for line in beside(config, "stopped.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and all(len(r["pieces"]) == len(r["logp_mu"]) == sum(r["mask"]) for r in rows)
    assert all(x is None for r in rows for x in r["logp"]) and all(math.isfinite(x) for r in rows for x in r["logp_mu"])
    assert {r["version"] for r in rows} == {0} and all("=" in r["prompt"] for r in rows)
