"""What chunking the penalty costs in time and saves in memory, as ratios within one run.

Each variant runs forward and backward in a process of its own, so that its peak memory is its own:
`naive` is `emd_exact` on materialised logits, `chunked` ours, and `cross_entropy` torch's chunked
linear cross-entropy, which has one product with the vocabulary less: the floor. `cross_entropy_default` is
the same with the chunks that torch chooses.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Rows, width, vocabulary: two avoid answers of 256 tokens; width and vocabulary of
# SmolLM2-135M, and the vocabulary of Gemma 3 270M.
SHAPES = {"smollm2-135m": (512, 576, 49152), "gemma3-270m": (512, 640, 262144)}
# Small, but each buffer is over 32 MiB: glibc keeps smaller ones after they are freed.
QUICK = {"quick": (512, 32, 49152)}
VARIANTS = ("naive", "chunked", "cross_entropy", "cross_entropy_default")


def measure(variant: str, shape: tuple[int, int, int], repeats: int) -> dict[str, float]:
    """Median time and peak extra memory of one variant, in this process."""
    # Here, not above: the peak of a child starts at what its parent holds.
    import torch
    import torch.nn.functional as F

    from tasft.loss import CHUNK_ROWS, CostSpace, Head, emd_exact

    def naive(hidden: Any, weight: Any, labels: Any, space: CostSpace) -> Any:
        mu = space.expect(F.linear(hidden, weight).softmax(1))
        return -(1 - (mu * space.embed(labels)).sum(1)).sum()

    def chunked(hidden: Any, weight: Any, labels: Any, space: CostSpace) -> Any:
        return emd_exact(hidden, Head(weight), labels, space=space).total

    def cross_entropy(hidden: Any, weight: Any, labels: Any, space: CostSpace) -> Any:
        # Its own choice is one row a chunk where V >> N, and 4 times slower than `naive`.
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_ROWS, chunking_method=None)
        return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)

    def cross_entropy_default(hidden: Any, weight: Any, labels: Any, space: CostSpace) -> Any:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)

    function = {
        "naive": naive,
        "chunked": chunked,
        "cross_entropy": cross_entropy,
        "cross_entropy_default": cross_entropy_default,
    }[variant]

    def inputs(n: int, d: int, v: int) -> tuple[Any, ...]:
        torch.manual_seed(0)
        weight = torch.randn(v, d).div_(d**0.5)  # in place: a copy would raise the peak before
        hidden, labels = torch.randn(n, d, requires_grad=True), torch.randint(v, (n,))
        return hidden, weight, labels, CostSpace.of(weight)

    function(*inputs(8, 8, 16)).backward()  # what torch imports on first use is not the method's
    case = inputs(*shape)
    before_kib = peak_kib()
    runtimes_ms = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(*case).backward()
        runtimes_ms.append((time.perf_counter() - start) * 1e3)
    return {
        "runtime_ms": statistics.median(runtimes_ms),
        "peak_mib": (peak_kib() - before_kib) / 1024,
    }


def peak_kib() -> int:
    """Largest memory that this process has held, inputs and libraries included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak  # bytes there


def main() -> None:
    """Measure all shapes and variants, print the ratios, and write the numbers if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape, seconds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        variant, text, count = args.child
        print(json.dumps(measure(variant, json.loads(text), int(count))))
        return

    repeats = 3
    results: list[dict[str, Any]] = []
    table = Table("shape", "rows x width x vocabulary", "variant", "time / naive", "memory / naive")
    for name, shape in (QUICK if args.quick else SHAPES).items():
        for variant in VARIANTS:
            child = [sys.executable, __file__, "--child", variant, json.dumps(shape), str(repeats)]
            output = subprocess.run(child, check=True, capture_output=True, text=True).stdout
            results.append({"shape": name, "variant": variant, **json.loads(output)})
            naive = results[-1 - VARIANTS.index(variant)]
            ratios = [f"{results[-1][k] / naive[k]:.2f}" for k in ("runtime_ms", "peak_mib")]
            table.add_row(name, " x ".join(map(str, shape)), variant, *ratios)
    Console().print(table)
    if args.json:
        threads = os.environ.get("OMP_NUM_THREADS", "all")
        args.json.write_text(json.dumps({"threads": threads, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
