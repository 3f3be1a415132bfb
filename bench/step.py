"""The time of a whole training step (sampling included), beside TRL's GRPOTrainer in the same process.

Same model, task, batch, group, response length, type and threads. Usage: python bench/step.py [--steps 60] [--threads 1]
"""

import argparse
import os
import random
import statistics
import tempfile
import time
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from offpolicy_rl.llm.config import TrainConfig
from offpolicy_rl.llm.model import load
from offpolicy_rl.llm.tasks import draw, task
from offpolicy_rl.llm.train import Trainer


def ours(config: TrainConfig, rounds: int):
    "Seconds of each step of this package's trainer, a chunk at a time."
    trainer = Trainer(config)
    while True:
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            rollouts = trainer.sample()
            trainer.update(rollouts)
            trainer.step += 1
            seconds.append(time.perf_counter() - start)
        yield seconds


class Clock(TrainerCallback):
    "Seconds between the ends of two steps; the first step, which has no end before it, is left out."

    def __init__(self): self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs): self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]: return [b - a for a, b in zip(self.ends, self.ends[1:])]


def trl(config: TrainConfig, rounds: int):
    "Seconds of each step of TRL's trainer, a chunk at a time."
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
                max_steps=rounds + 1, learning_rate=config.lr, lr_scheduler_type="constant", temperature=1.0, top_k=0, beta=0.0, num_iterations=1,
                steps_per_generation=1, epsilon=0.2, loss_type="grpo", scale_rewards=True, use_cpu=True, bf16=False, fp16=False,
                gradient_checkpointing=False, logging_steps=1000, save_strategy="no", report_to=[], disable_tqdm=True)
            clock = Clock()
            trainer = GRPOTrainer(model=model.train(), reward_funcs=reward, args=settings, train_dataset=Dataset.from_dict({"prompt": prompts}),
                                  processing_class=tokenizer, callbacks=[clock])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        yield clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each trainer (default 60)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    config, chunk = TrainConfig(recipe="grpo", task="sort", threads=args.threads), 10
    times: dict[str, list[float]] = dict(ours=[], trl=[])
    # in turns, so that a machine that others use too slows both alike
    runs = dict(ours=ours(config, chunk), trl=trl(config, chunk))
    for run in runs.values(): next(run)  # warm up
    while len(times["trl"]) < args.steps:
        for name, run in runs.items(): times[name] += next(run)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    best = {name: min(seconds) for name, seconds in times.items()}
    samples = config.prompts_per_step * config.group_size
    for name, label in (("ours", "offpolicy_rl"), ("trl", "TRL GRPOTrainer")):
        print(f"{label:16s} {1e3 * median[name]:7.1f} ms a step (median of {len(times[name])}), best {1e3 * best[name]:.1f} ms, "
              f"{samples / median[name]:.0f} samples/s")
    print(f"ratio TRL / offpolicy_rl: {median['trl'] / median['ours']:.2f} (median), {best['trl'] / best['ours']:.2f} (best)")


if __name__ == "__main__": main()
