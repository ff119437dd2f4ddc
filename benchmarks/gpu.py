"""All that is to be measured on a GPU, in one command of at most 10 minutes: one JSON file and one page in Markdown.

    python benchmarks/gpu.py --out benchmarks/results/gpu

A part that fails or takes too long loses nothing of the others. `--rehearse` goes the same way on a CPU, in tiny sizes.
"""

import argparse
from pathlib import Path

import loss
import step
import torch
from parts import PYTHON, Part, go

# Who takes a step: all live in memory at once.
STEPPING = ("trl_sft", "tasft_none", "tasft_emd", "tasft_nlcl")


def parts(rehearse: bool) -> dict[str, Part]:
    """What is measured, in order, the most needed first; on a GPU 580 seconds at the most."""
    tiles = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_tiles.py")
    losses = (PYTHON, "benchmarks/loss.py", "--json", "{json}")
    steps = (PYTHON, "benchmarks/step.py", "--json", "{json}", "--only")
    if rehearse:
        small = ("tasft_none", "--quick", "--rounds", "1")
        kernels, sizes, bf16 = (*tiles, "--collect-only"), (*losses, "--sizes", "32", "512", "32"), (*steps, *small)
    else:
        gpu = ("--device", "cuda", "--dtype", "bfloat16")
        kernels, sizes = (*tiles, "-m", "gpu"), (*losses, *gpu, "--seconds", "30")
        bf16 = (*steps, *STEPPING, *gpu, "--model", "llama-3.2-1b", "--rounds", "5")
    return {
        "kernels": Part("Kernels: tests on this GPU", kernels, 120),
        "loss": Part("Losses at real sizes", sizes, 160, loss.table),
        "step": Part("A step, 1B parameters in bfloat16", bf16, 150, step.table),
        "step-4bit": Part("A step, 1B parameters in 4 bits", (*bf16, "--quantize", "4bit"), 150, step.table),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="STEM", help="writes STEM.json and STEM.md")
    parser.add_argument("--only", nargs="+", choices=list(parts(True)), default=list(parts(True)))
    parser.add_argument("--rehearse", action="store_true", help="the same way on a CPU, with tiny sizes")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: --rehearse goes the same way without one")
    wanted = {name: part for name, part in parts(args.rehearse).items() if name in args.only}
    where = ("cpu", "float32") if args.rehearse else ("cuda", "bfloat16")
    go("Measured on a GPU", wanted, args.out, *where, torch.get_num_threads())


if __name__ == "__main__":
    main()
