"""The command for a GPU's record, in miniature on a CPU; the arithmetic of tokens, operations and the peak."""

import inspect
import json
import os
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from offpolicy_rl.llm import cli
from offpolicy_rl.llm import scale as at_scale
from offpolicy_rl.llm.model import ARCHITECTURE, char_tokenizer, decode, embedded_model, encode, imitate, load
from offpolicy_rl.llm.record import machine, read_record, write_record
from offpolicy_rl.llm.scale import (RECIPES, SHEETS, SIZES, STALENESS, TASKS, Shape, forward_flops, group_flops, measured_peak, plan, scale, scale_table,
                                    shape_of, started_path, task_folder, throughput, total)
from offpolicy_rl.llm.tasks import Sort, held_out, task
from offpolicy_rl.llm.verify import close_judges

pytestmark = pytest.mark.usefixtures("models")

BASIC = "gym:basic_arithmetic,max_terms=2,max_digits=1,whitespace=no_space"
GRID = dict(size="mini", tasks=[BASIC], target=0.02, device="cpu", staleness=[1, 16], steps=3, prompts_per_step=4, group_size=8, eval_prompts=32)


@pytest.fixture(scope="module")
def grid(models, tmp_path_factory):
    "The command's own run, in miniature: its arguments, its output, its folder."
    folder = tmp_path_factory.mktemp("scale")
    known = os.path.join(os.environ["OFFPOLICY_RL_CACHE"], "scale")
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in GRID.items() if not isinstance(v, list)]
    lists = [x for k, v in GRID.items() if isinstance(v, list) for x in (f"--{k}", *map(str, v))]
    yield ["scale", *flags, *lists, f"--models={known}", f"--out={folder}", "--jobs=2", "--window=2", "--keep-rollouts=1"], folder, known
    close_judges()


def records_in(folder): return {p.name: p for p in sorted(task_folder(folder, BASIC).glob("*.json"))}


def test_the_command_makes_the_grid_and_keeps_what_is_finished(grid, capsys):
    argv, folder, known = grid
    assert cli.main(argv) == 0, capsys.readouterr().err
    made = records_in(folder)
    assert len(made) == len(RECIPES) * 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(BASIC)]
    assert len(lines) == len(made) and all(line.endswith("%") for line in lines)
    model, = {read_record(path)["config"]["model"] for path in made.values()}
    assert os.path.dirname(model) == str(known)
    for path in made.values():
        record = read_record(path)
        assert record["updates"] == 3
        assert all(0 < x <= 1 for x in record["throughput"]["share"].values()) and record["throughput"]["peak"]["dtype"] == "float32"
    before = {name: p.read_bytes() for name, p in made.items()}
    gone, bare, foreign = list(made)[:3]      # lost; killed before its throughput was written; made on another machine
    made[gone].unlink()
    for name in (bare, foreign):
        record = read_record(made[name])
        del record["throughput"]
        if name == foreign: record["machine"]["cpu"] = "another"
        write_record(made[name], record)
    start, stood = time.time(), os.stat(model).st_mtime_ns
    assert cli.main([*argv, "--jobs=1"]) == 0
    after = {name: p.read_bytes() for name, p in records_in(folder).items()}
    assert {name for name in before if before[name] != after[name]} <= {gone, bare, foreign} and after.keys() == before.keys()
    assert made[gone].stat().st_mtime > start and os.stat(model).st_mtime_ns == stood
    there = {name: json.loads(after[name])["throughput"] for name in (gone, bare, foreign)}
    assert there[gone]["share"] and there[bare]["share"] and there[foreign]["share"] is None and there[foreign]["tokens_per_second"]["whole"] > 0
    table = scale_table([read_record(p) for p in records_in(folder).values()]).splitlines()
    assert len(table) == len(made) + 1 and sum(line.endswith("-") for line in table) == 1


def test_tokens_are_those_that_went_through(grid):
    argv, folder, _ = grid
    for path in list(records_in(folder).values())[::3]:
        record, kept = read_record(path), sorted(path.with_suffix(".rollouts").iterdir())
        rows = [[json.loads(line) for line in p.read_text().splitlines()] for p in kept]
        tokenizer = AutoTokenizer.from_pretrained(record["config"]["model"])
        prompts = sum(len(ids) for step in rows for ids in encode(tokenizer, [r["prompt"] for r in step[::8]]))
        written = sum(sum(r["mask"]) for step in rows for r in step)
        found = record["throughput"]
        assert len(rows) == 3 and (found["prompt_tokens"], found["response_tokens"]) == (prompts, written)
        assert found["seconds"]["training"] == pytest.approx(total(record, "training_seconds"), rel=1e-4)
        assert found["seconds"]["sampling"] + found["seconds"]["training"] < record["seconds"]


def test_the_warm_started_model_is_partly_right_in_safetensors_and_whole(grid):
    _, records, known = grid
    folder, = {read_record(path)["config"]["model"] for path in records_in(records).values()}
    told = json.loads(open(os.path.join(folder, "warm_start.json")).read())
    assert 0.02 <= told["success"][0] < 0.9 and told["steps"] % SIZES["mini"].check == 0 and told["machine"] == machine()
    assert not [name for name in os.listdir(known) if name.startswith(".making") or name.endswith(".checkpoints")]
    model, tokenizer = load(folder, BASIC)
    with safe_open(os.path.join(folder, "model.safetensors"), "pt") as weights: assert "model.layers.1.mlp.up_proj.weight" in weights.keys()
    assert sum(p.numel() for p in model.parameters()) == told["parameters"] == shape_of(folder).parameters < 1e6
    assert (shape_of(folder).layers, shape_of(folder).width) == (2, 64)
    assert decode(tokenizer, encode(tokenizer, ["Calculate 1+2."])) == ["Calculate 1+2."]


class Seen(Sort):
    "Remembers what it was asked to demonstrate."
    def demonstrate(self, prompt, rng):
        asked.append(prompt)
        return super().demonstrate(prompt, rng)


asked: list[str] = []


def test_imitation_takes_the_tasks_in_turn_and_stops_when_told():
    asked.clear()
    tasks, model, steps = [Seen(4), Seen(6)], embedded_model(), []
    loss = imitate(model, char_tokenizer(), tasks, steps=9, batch=8, lr=1e-3, warmup=1, betas=(0.9, 0.95), grad_clip=1.0, autocast="bfloat16",
                   enough=lambda step: steps.append(step) or step == 3)
    assert steps == [1, 2, 3] and loss > 0 and [len(p) - 1 for p in asked] == [4] * 8 + [6] * 8 + [4] * 8
    assert not any(held_out(tasks[0] if len(p) == 5 else tasks[1], p) for p in asked)
    assert all(p.dtype == torch.float32 for p in model.parameters())


class Stopped(Exception): pass


def test_a_warm_start_that_is_stopped_goes_on_and_ends_with_the_same_bits(tmp_path):
    def made(kept, stop=None):
        model, asked_of = embedded_model(), []
        def enough(step):
            asked_of.append(step)
            if step == stop: raise Stopped
            return False
        how = dict(steps=8, batch=8, lr=1e-3, warmup=4, betas=(0.9, 0.95), grad_clip=1.0, kept=kept, keep_every=3)
        try: imitate(model, char_tokenizer(), [Sort(4), Sort(6)], **how, enough=enough)
        except Stopped: pass
        return torch.cat([p.detach().flatten() for p in model.parameters()]), asked_of

    whole, steps = made(None)
    assert steps == list(range(1, 9)) and made(tmp_path, stop=5)[1] == [1, 2, 3, 4, 5]
    again, steps = made(tmp_path)
    assert torch.equal(again, whole) and steps == [4, 5, 6, 7, 8]


def test_one_run_with_the_gpus_types(models, tmp_path):
    known = os.path.join(os.environ["OFFPOLICY_RL_CACHE"], "scale-sort4")
    record, = scale("mini", ["sort4"], recipes=["topr"], staleness=[1], models=known, target=0.2, device="cpu", out=str(tmp_path), steps=2, prompts_per_step=4,
                    group_size=4, eval_prompts=16, autocast="bfloat16", engine_dtype="bfloat16", jobs=1)
    assert record["throughput"]["peak"]["dtype"] == "bfloat16" and record["config"]["dtype"] == "float32"
    assert max(record["steps"]["ratio_q99"]) > 1 or min(record["steps"]["ratio_q01"]) < 1      # even fresh samples come from a policy that is a little another


def test_operations_by_hand():
    shape = Shape(parameters=100, layers=3, width=5)
    # two tokens, that look at one and at two: 2 * 2 * 100 and 4 * 3 * 5 * (1 + 2)
    assert forward_flops(shape, 2) == 400 + 180
    # one more looks at three
    assert forward_flops(shape, 1, before=2) == 200 + 180 and forward_flops(shape, 3) == 400 + 180 + 200 + 180
    # a prompt of two, five responses of two tokens, of which the first is read
    assert group_flops(shape, 2, 2, 5) == 580 + 5 * 380 and group_flops(shape, 2, 1, 5) == 580
    # five updates in windows of two: means of 2, 2 and 1
    record = dict(config=dict(prompts_per_step=3, group_size=5), updates=5, window=2,
                  steps=dict(length=[2.0, 2.0, 2.0], sampling_seconds=[1.0, 2.0, 4.0], training_seconds=[2.0, 2.0, None], sync_seconds=[0.0, 1.0, 0.0]))
    found = throughput(record, shape, prompts=30, peak=dict(flops_per_second=2e4))
    forward = 15 * (580 + 5 * 380)
    assert found["seconds"] == dict(sampling=10, sync=2, training=8) and found["response_tokens"] == 150
    assert found["tokens_per_second"] == dict(sampling=15, training=150 / 8, whole=7.5)
    assert found["flops_per_second"] == pytest.approx(dict(sampling=forward / 10, training=3 * forward / 8, whole=4 * forward / 20))
    assert found["share"] == pytest.approx({name: x / 2e4 for name, x in found["flops_per_second"].items()})
    assert throughput(record, shape, 30, None)["share"] is None


def test_operations_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    model = embedded_model()
    model.set_attn_implementation("eager")
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    with FlopCounterMode(display=False) as counter: model(torch.randint(3, 30, (2, 24)), use_cache=False)
    mine = forward_flops(Shape(matrices, 2, 64), 24)
    unmasked = 4 * 2 * 64 * (24 * 24 - 24 * 25 / 2)       # torch counts the tokens that a causal mask hides
    assert counter.get_total_flops() == 2 * (mine + unmasked)


def test_the_peak_is_of_the_fastest_product_on_this_device(monkeypatch):
    peak = measured_peak(n=256)
    assert peak["flops_per_second"] > 0
    assert (peak["dtype"], peak["device"], peak["data_sheet"]) == ("float32", machine()["cpu"], None)
    assert measured_peak(dtype="bfloat16", n=64)["flops_per_second"] > 0
    ticks = iter([0, 1, 1, 2, 2, 5, 5, 5.5, 6, 8])      # two warm up, then 3, 0.5 and 2 seconds
    monkeypatch.setattr(at_scale, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert measured_peak(n=10, repeats=3)["flops_per_second"] == 2 * 10**3 / 0.5
    assert SHEETS["H200"][1] == SHEETS["H100 80GB HBM3"][1] > SHEETS["A100"][1] > 1e14


def test_the_large_size_is_large_and_the_small_one_the_embedded():
    with torch.device("meta"):
        from transformers import Qwen3Config, Qwen3ForCausalLM
        large = Qwen3ForCausalLM(Qwen3Config(vocab_size=105, **SIZES["100m"].architecture))
    assert sum(p.numel() for name, p in large.named_parameters() if "embed" not in name) > 100e6
    assert {**SIZES["mini"].architecture, "max_position_embeddings": 256} == ARCHITECTURE


def test_what_the_command_line_says_is_what_the_functions_do():
    args = cli.parse(["scale"])
    own = {name: p.default for fn in (plan, scale) for name, p in inspect.signature(fn).parameters.items()}
    own |= dict(device="cuda")      # of `scale`; `plan` alone is for any device
    named = {name: default for name, default, *_ in cli._SCALE}
    assert {name: getattr(args, name) for name in named} == named == {name: own[name] for name in named}
    assert (named["tasks"], named["recipes"], named["staleness"]) == (TASKS, RECIPES, STALENESS)
    assert all(task(name).demonstrate(task(name).shown[0]["question"], None) for name in TASKS)


def test_on_a_gpu_products_are_bfloat16(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = plan("mini", ["sort4"], device="cuda", out=str(tmp_path))[0]
    assert (config.dtype, config.autocast, config.engine_dtype, config.lr) == ("float32", "bfloat16", "bfloat16", SIZES["mini"].lr)
    here = plan("mini", ["sort4"], device="cpu", out=str(tmp_path))[0]
    assert here.autocast is here.engine_dtype is None and here.model != config.model


def test_each_of_what_it_is_made_from_gives_a_model_of_its_own():
    one = (Sort(4),)
    key = lambda size="mini", tasks=one, target=0.4, cast=None, seed=0: started_path("m", size, tasks, target, "cpu", cast, seed, make=False)
    assert key() == key() and len({key(), key("100m"), key(tasks=(Sort(4), Sort(5))), key(target=0.5), key(cast="bfloat16"), key(seed=1)}) == 6


@pytest.mark.parametrize("changed, named", [
    (dict(size="big"), "size"), (dict(target=1.0), "target"), (dict(target=0.0), "target"), (dict(tasks=[]), "tasks"),
    (dict(seeds=[1, 1]), "seeds"), (dict(recipes=[]), "recipes"),
    (dict(tasks=["chess"]), "task"),
    (dict(recipes=["nonesuch"]), "recipe"), (dict(recipes=["dapo"]), "recipes"), (dict(staleness=[0]), "staleness"), (dict(mode="lag"), "mode"),
    (dict(replay=64), "mode"), (dict(device="cuda:99"), "device"), (dict(device="abacus"), "device"), (dict(lr=-1.0), "lr"), (dict(jobs=0), "jobs")])
def test_what_cannot_run_is_refused_before_the_warm_start(changed, named, tmp_path, monkeypatch):
    monkeypatch.setattr(at_scale, "kept_model", lambda *_: pytest.fail("a model was made"))
    with pytest.raises(ValueError, match=rf"{named}"):
        scale(**{**GRID, "models": str(tmp_path / "models"), "out": str(tmp_path / "out"), **changed})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argument", ["n", "repeats"])
def test_a_peak_of_nothing_is_refused(argument):
    with pytest.raises(ValueError, match=f"{argument}: expected at least 1, got 0"): measured_peak(**{argument: 0})
