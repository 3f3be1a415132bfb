"""The time of a whole training step (sampling included), beside TRL's GRPOTrainer in the same process.

Same model, task, batch, group, response length, type and threads. Responses of a group that are alike are computed once here, and those of a
group whose rewards are all equal have no backward pass: how many differ and how many are equal is printed beside the times.
Usage: python bench/step.py [--steps 60] [--threads 1] [--task sort] [--temperature 1] [--compile]
"""

import argparse
import os
import random
import statistics
import tempfile
import time
import warnings
from dataclasses import replace

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from offpolicy_rl.llm.config import TrainConfig
from offpolicy_rl.llm.model import load
from offpolicy_rl.llm.tasks import draw, task
from offpolicy_rl.llm.train import Trainer


def now() -> tuple[float, float]:
    "The clock's seconds, and those of this process on all cores, which a machine that others use too does not stretch."
    return time.perf_counter(), time.process_time()


def ours(config: TrainConfig, rounds: int, shares: list[tuple[float, float]]):
    "Times of each step of this package's trainer, a chunk at a time. `shares` gets those of responses that differ, and of those that teach nothing."
    trainer = Trainer(config)
    while True:
        times = [now()]
        for _ in range(rounds):
            rollouts = trainer.sample()
            trainer.update(rollouts)
            trainer.step += 1
            times.append(now())
        shares.append((len(rollouts.distinct()[0]) / len(rollouts), len(trainer.idle(rollouts)) / len(rollouts)))
        yield spans(times)


def spans(times: list[tuple[float, float]]) -> list[tuple[float, float]]:
    "What lies between each time and the next."
    return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(times, times[1:])]


class Clock(TrainerCallback):
    "The ends of steps. The first step, which has no end before it, is left out of the times."

    def __init__(self): self.ends: list[tuple[float, float]] = []

    def on_step_end(self, args, state, control, **kwargs): self.ends.append(now())


def trl(config: TrainConfig, rounds: int):
    "Times of each step of TRL's trainer, a chunk at a time."
    job = task(config.task)
    model, tokenizer = load("embedded", job, config.seed)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    size = config.prompts_per_step * config.group_size

    def reward(prompts, completions, **_): return [job.verify(p, c) for p, c in zip(prompts, completions)]
    prompts = draw(job, 4096, random.Random(0))
    while True:
        with tempfile.TemporaryDirectory() as folder:
            settings = GRPOConfig(
                output_dir=folder, per_device_train_batch_size=size, num_generations=config.group_size, max_completion_length=job.max_tokens,
                max_steps=rounds + 1, learning_rate=config.lr, lr_scheduler_type="constant", top_k=0, temperature=config.temperature,
                beta=0.0, num_iterations=1,
                steps_per_generation=1, epsilon=0.2, loss_type="grpo", scale_rewards=True, use_cpu=True, bf16=False, fp16=False,
                gradient_checkpointing=False, logging_steps=1000, save_strategy="no", report_to=[], disable_tqdm=True)
            clock = Clock()
            trainer = GRPOTrainer(model=model.train(), reward_funcs=reward, args=settings, train_dataset=Dataset.from_dict({"prompt": prompts}),
                                  processing_class=tokenizer, callbacks=[clock])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        yield spans(clock.ends)


def compiled(config: TrainConfig, steps: int) -> None:
    "What compiling costs, and after how many updates it has paid."
    median = {}
    for name in ("eager", "compiled"):
        trainer = Trainer(replace(config, compile=name == "compiled"))
        seconds = []
        for _ in range(steps):
            rollouts = trainer.sample()
            start = time.process_time()
            trainer.update(rollouts)
            seconds.append(time.process_time() - start)
            trainer.step += 1
        median[name] = statistics.median(seconds[3:])
        first = sum(seconds[:3]) - 3 * median[name]
        print(f"{name:16s} {1e3 * median[name]:7.1f} ms of processor time an update (median of {steps - 3}); the first three cost {first:.1f} s more")
    won = median["eager"] - median["compiled"]
    print(f"compiling has paid after {first / won:.0f} updates" if won > 0 else "compiling does not pay")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each trainer (default 60)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--task", default="sort", help="default sort")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (default 1)")
    parser.add_argument("--compile", action="store_true", help="compare the update with its compiled form instead")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    config, chunk = TrainConfig(recipe="grpo", task=args.task, threads=args.threads, temperature=args.temperature), 10
    if args.compile: return compiled(config, args.steps)
    times: dict[str, list[tuple[float, float]]] = dict(ours=[], trl=[])
    shares: list[tuple[float, float]] = []
    # in turns, so that a machine that others use too slows both alike
    runs = dict(ours=ours(config, chunk, shares), trl=trl(config, chunk))
    for run in runs.values(): next(run)  # warm up
    before = os.getloadavg()[0]
    while len(times["trl"]) < args.steps:
        for name, run in runs.items(): times[name] += next(run)
    samples = config.prompts_per_step * config.group_size
    differ, idle = map(statistics.fmean, zip(*shares))
    print(f"{args.task}, temperature {args.temperature:g}, {args.threads} thread(s), load {before:.1f} to {os.getloadavg()[0]:.1f}; "
          f"of {samples} responses {samples * differ:.0f} differ and {samples * idle:.0f} teach nothing")
    quartiles = {name: [statistics.quantiles(column, n=4) for column in zip(*spans)] for name, spans in times.items()}
    for name, label in (("ours", "offpolicy_rl"), ("trl", "TRL GRPOTrainer")):
        (low, middle, high), (cpu_low, cpu, cpu_high) = quartiles[name]
        print(f"{label:16s} {1e3 * middle:7.1f} ms a step (quartiles {1e3 * low:.1f} to {1e3 * high:.1f}), {samples / middle:.0f} samples/s; "
              f"processor {1e3 * cpu:.1f} ms ({1e3 * cpu_low:.1f} to {1e3 * cpu_high:.1f})")
    ratio = [quartiles["trl"][i][1] / quartiles["ours"][i][1] for i in range(2)]
    print(f"ratio TRL / offpolicy_rl: {ratio[0]:.2f} by the clock, {ratio[1]:.2f} by processor time")


if __name__ == "__main__": main()
