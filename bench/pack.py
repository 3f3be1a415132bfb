"""Tokens read and seconds for log-probs and their gradient: a row for each response, prompts once, and packed (`offpolicy_rl.llm.pack`).

    python bench/pack.py                      2 rounds of everything, two minutes on one CPU core
    python bench/pack.py --rounds 1 --only packed

One process, one model (a Qwen3 of 12 million parameters), the same responses for all: once of lengths with a long tail, once all of one length, where
there is nothing to gain but the prompts. Seconds are the processor's, the least of the rounds; all ways' log-probs are compared with the first one's.
By length: in passes of 8 responses of similar length, as the learner's `micro_batch` makes them. Checkpointed: activations are made again in the backward
pass, and there is no cache, so without packing each prompt is read with every response to it.
"""
import argparse
import sys
import time

import torch

from offpolicy_rl.llm.engine import token_logps
from offpolicy_rl.llm.model import embedded_model
from offpolicy_rl.llm.pack import check_packs, layout
from offpolicy_rl.llm.rollouts import Rollouts, pad_left

SIZE = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6, head_dim=64, intermediate_size=1152)
LENGTHS = (256, 512, 1024, 2048)


def batch(groups: int, n: int, tail: float, longest: int) -> Rollouts:
    "Random prompts of 40 to 80 tokens, and responses whose lengths have the median 32 and a log of this standard deviation."
    g = torch.Generator().manual_seed(0)
    ids, real = pad_left([torch.randint(3, 30, (int(k),), generator=g).tolist() for k in torch.randint(40, 81, (groups,), generator=g)], 0)
    lengths = (32 * (tail * torch.randn(groups * n, generator=g)).exp()).clamp(2, longest).long()
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()
    group = torch.arange(groups).repeat_interleave(n)
    tokens = torch.randint(3, 30, mask.shape, generator=g) * mask.long()
    return Rollouts(ids, real, tokens, mask, torch.zeros_like(mask), group, torch.zeros_like(group), [""] * groups, [""] * len(group))


def by_length(r: Rollouts, size: int = 8) -> list[torch.Tensor]:
    return list(r.mask.sum(1).argsort(stable=True).split(size))


def ways(r: Rollouts) -> dict[str, dict]:
    "How to read the responses: all at once, or in passes."
    return {"a row for each": dict(share=False), "prompts once": dict(share=True), "prompts once, by length": dict(share=True, parts=by_length(r)),
            **{f"packed, rows of {length:,}": dict(pack=length) for length in LENGTHS}}


def read(model, r: Rollouts, share: bool | None = None, pack: int | None = None, parts: list[torch.Tensor] | None = None) -> torch.Tensor:
    "Log-probs of all tokens, once their gradient has been taken, a pass at a time."
    out = torch.zeros_like(r.mask)
    for part in parts or [torch.arange(len(r))]:
        some = r.take(part).trimmed()
        logp, _ = token_logps(model, some, share=share, pack=pack)
        logp.sum().backward()
        out[part, :logp.shape[1]] = logp.detach()
    return out


def measure(model, r: Rollouts, how: dict[str, dict], rounds: int) -> None:
    "A line for each way; the rounds take turns."
    needed = int(r.prompt_mask.sum() + r.mask.sum()) - len(r)
    seconds, tokens, first = {}, {}, None
    count = []
    handle = model.get_input_embeddings().register_forward_hook(lambda layer, given, out: count.append(given[0].numel()))
    for _ in range(rounds):
        for name, arguments in how.items():
            model.zero_grad()
            count.clear()
            start = time.process_time()
            logp = read(model, r, **arguments)
            spent = time.process_time() - start
            seconds[name], tokens[name] = min(spent, seconds.get(name, spent)), sum(count)
            first = logp if first is None else first
            if (gap := float((logp - first).abs().max())) > 1e-4: sys.exit(f"{name}: log-probs differ by {gap:.1e}")
    handle.remove()
    base = next(iter(seconds))
    print(f"{'':26s}{'tokens':>9s}{'/ needed':>10s}{'seconds':>10s}{'ratio':>8s}")
    for name, spent in seconds.items(): print(f"{name:26s}{tokens[name]:9,d}{tokens[name] / needed:10.2f}{spent:10.2f}{seconds[base] / spent:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (("groups", 4, "prompts"), ("n", 8, "responses to each"), ("longest", 256, "tokens of the longest response"),
                                ("rounds", 2, "of everything"), ("threads", 1, "of torch")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    parser.add_argument("--only", default="", help="ways whose name has this in it, beside the first")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = embedded_model(architecture=SIZE)
    check_packs(model, max(LENGTHS))      # its passes are not counted
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, {args.groups} prompts with {args.n} responses each")
    for title, tail in (("lengths with a long tail", 1.0), ("all of one length", 0.0)):
        r = batch(args.groups, args.n, tail, args.longest)
        lengths = r.mask.sum(1)
        some = {name: how for i, (name, how) in enumerate(ways(r).items()) if not i or args.only in name}
        print(f"\n{title}: median {int(lengths.median())}, mean {lengths.mean():.0f}, at most {int(lengths.max())} tokens;",
              "rows are", ", ".join(f"{n} x {width}" for n, width in (layout(r, length).ids.shape for length in LENGTHS)))
        measure(model, r, some, args.rounds)
        if not tail: continue
        print("\nthe same, checkpointed")
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        for layer in model.model.layers: layer.training = True
        apart = {"a row for each": dict(share=False), "by length": dict(share=False, parts=by_length(r))} | {k: v for k, v in some.items() if "packed" in k}
        measure(model, r, apart, args.rounds)
        model.gradient_checkpointing_disable()
        model.eval()


if __name__ == "__main__": main()
