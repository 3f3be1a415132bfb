"""Memory and time of log-probs with all logits (float32, log-softmax, autograd) against the chunks of `offpolicy_rl.llm.logp`.

    python bench/logp.py                      8 responses of 1,024 tokens, vocabulary 152,000 (the plain way takes about 16 GB)
    python bench/logp.py --scale 0.125        an eighth of the tokens
    python bench/logp.py --entropy grad       with an entropy that has a gradient

Each way runs in a process of its own: value and gradient of sum_i c_i log pi_i (and of c'_i H_i). Its memory is the largest resident set that
the operating system saw, less what there was before the first logit. Where less memory is free than the plain way takes, t is halved until it
fits, for both alike, and the output says so.
"""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("logp", "entropy", "gradient by hidden", "gradient by head")
COPIES = {"no": 4, "detached": 6, "grad": 7}  # of all logits: what the plain way holds at its worst, and one to spare


def measure(way: str, args: argparse.Namespace, folder: Path) -> None:
    "Run one way; its results go into `folder`, its memory and time to standard output."
    import torch
    from safetensors.torch import save_file

    from offpolicy_rl.llm.engine import token_entropy
    from offpolicy_rl.llm.logp import chunked_logp
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    hidden, head = torch.randn(args.b, args.t, args.d, requires_grad=True), torch.randn(args.v, args.d).div(args.d ** 0.5).requires_grad_()
    tokens, up, up_entropy = torch.randint(args.v, (args.b, args.t)), torch.randn(args.b, args.t), torch.randn(args.b, args.t)

    def plain() -> dict:
        logits = hidden @ head.T
        logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        if args.entropy == "no": return dict(logp=logp)
        with torch.set_grad_enabled(args.entropy == "grad"): return dict(logp=logp, entropy=token_entropy(logits))

    def chunks() -> dict:
        return chunked_logp(hidden, head, tokens, chunk=args.chunk, entropy={"no": False, "grad": True}.get(args.entropy, "detached"))
    before, start = peak(), time.process_time()
    out = dict(plain=plain, chunks=chunks)[way]()
    loss = (out["logp"] * up).sum()
    if args.entropy == "grad": loss = loss + (out["entropy"] * up_entropy).sum()
    loss.backward()
    print(json.dumps(dict(seconds=time.process_time() - start, before=before, peak=peak())))
    found = {**out, NAMES[2]: hidden.grad, NAMES[3]: head.grad}
    save_file({name: x.detach().contiguous() for name, x in found.items()}, folder / way)


def peak() -> int:
    "The largest resident set of this process so far, in bytes."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fitting(args: argparse.Namespace) -> int:
    "`t`, halved until the plain way fits what memory is free (where the system says how much that is)."
    t, known = args.t, Path("/proc/meminfo")
    if not known.exists(): return t
    free = next(int(line.split()[1]) * 1024 for line in known.read_text().splitlines() if line.startswith("MemAvailable"))
    while t > 1 and COPIES[args.entropy] * 4 * args.b * t * args.v > free: t //= 2
    return t


def differences(folder: Path) -> dict[str, float]:
    "The largest difference of each result, relative to the plain way's largest entry."
    from safetensors.torch import load_file
    plain, chunks = load_file(folder / "plain"), load_file(folder / "chunks")
    return {name: float((plain[name] - chunks[name]).abs().max() / plain[name].abs().max()) for name in NAMES if name in plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (("b", 8, "responses"), ("t", 1024, "tokens of each"), ("v", 152_000, "tokens of the vocabulary"), ("d", 64, "width")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default:,})")
    parser.add_argument("--scale", type=float, default=1.0, help="a factor on t (default 1)")
    parser.add_argument("--chunk", type=int, help="rows at a time (default: as many as fill 64 MB)")
    parser.add_argument("--entropy", choices=list(COPIES), default="no", help="an entropy besides, with or without gradient (default no)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--way", choices=["plain", "chunks"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way: return measure(args.way, args, args.folder)
    asked = args.t = max(1, int(args.t * args.scale))
    args.t = fitting(args)
    if args.t < asked: print(f"t is {args.t} instead of {asked}: less memory is free than the plain way takes")
    print(f"b {args.b}, t {args.t}, v {args.v:,}, d {args.d}: all logits are {4e-9 * args.b * args.t * args.v:.2f} GB in float32")
    options = [f"--{name}={value}" for name, value in vars(args).items() if value is not None and name not in ("way", "folder", "scale")]
    with tempfile.TemporaryDirectory() as folder:
        seen = {}
        for way in ("plain", "chunks"):
            run = subprocess.run([sys.executable, __file__, *options, f"--way={way}", f"--folder={folder}"], stdout=subprocess.PIPE, text=True, check=True)
            seen[way] = r = json.loads(run.stdout)
            r["added"] = r["peak"] - r["before"]
            print(f"{way:8s} {r['added'] / 1e9:7.2f} GB above the {r['before'] / 1e9:.2f} GB before, {r['seconds']:7.1f} s of the processor")
        off = differences(Path(folder))
    ratio = {key: seen["plain"][key] / seen["chunks"][key] for key in ("added", "peak", "seconds")}
    print(f"plain / chunks: memory {ratio['added']:.1f} (whole process {ratio['peak']:.1f}), time {ratio['seconds']:.2f}")
    print("largest difference, relative to the largest entry: " + ", ".join(f"{name} {x:.1e}" for name, x in off.items()))
    if ratio["added"] < 4 or max(off.values()) > 1e-5: sys.exit("expected a quarter of the memory and differences below 1e-5")


if __name__ == "__main__": main()
