"""What the penalties cost in time and memory, beside naive PyTorch, EMO's way and what other libraries offer.

A measurement is one forward and backward: from hidden states (N, D) and a head (V, D) to the gradient of the hidden
states, and with `--trained` to that of the head. Every variant is measured once a round, and its time divided by that
of the naive formula in the same round: the speed of a machine drifts, the ratio hardly. Each measurement on a CPU is
made in a process of its own, forked from one that holds the inputs, so that its peak memory is its own; the inputs are
not counted. On a GPU one process makes them all, with torch's own counter set back each time.

The floor is what the matrix products of a variant alone would take at the rate of a large square product measured in
the same round. One product of N x V x D takes 2 N V D operations; how many a variant does, by its algorithm, for a
frozen and for a trained head, is stated in `VARIANTS`. Nothing but these products is counted.
"""

import argparse
import ctypes
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe, get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from environment import code, environment, machine, markdown, put
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from tasft.loss import PENALTIES, CostSpace, Head, divergence, nll

T = TypeVar("T")

MODELS = {
    "llama-2-7b": (32000, 4096),
    "smollm2-135m": (49152, 576),
    "llama-3.2-1b": (128256, 2048),
    "gemma-3-270m": (262144, 640),
}
GPU_MODELS = {"llama-3.1-8b": (128256, 4096), "gemma-3-270m": (262144, 640)}
# Its logits take more than the 32 MiB up to which glibc keeps what is freed for what is next.
QUICK = {"cpu": ("smollm2-135m/256",), "cuda": ("gemma-3-270m/4096",)}

LEAST_ROUNDS, MOST_ROUNDS = 2, 5
SECONDS, QUICK_SECONDS = 60.0, 25.0  # After these no further round of a shape is started.
LEAST_SECONDS = 0.3  # One measurement repeats what is shorter than this, and takes the median.
RESPONSE = 64  # Tokens in a response.


class Shape(NamedTuple):
    """N positions, V tokens, D width; named after the model that has V and D."""

    model: str
    tokens: int
    vocabulary: int
    width: int

    @property
    def name(self) -> str:
        """What `--shapes` selects by."""
        return f"{self.model}/{self.tokens}"

    @property
    def product(self) -> int:
        """Operations of one product of all positions with the whole head."""
        return 2 * self.tokens * self.vocabulary * self.width


# Large enough to start the threads, so small that what it leaves behind is not seen.
WARM_UP = Shape("warm-up", 32, 2048, 64)


@dataclass(frozen=True)
class Case:
    """Inputs of every variant; a penalty takes those that it names in `needs`.

    `unit`, the normalised rows of the head that the naive formula needs, counts as an input there: V x D more memory
    than what is shown.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    space: CostSpace
    unit: Tensor
    segments: Tensor
    reference: Tensor
    margins: Tensor
    beta: float = 0.1

    @classmethod
    def of(cls, shape: Shape, device: str, dtype: torch.dtype, trained: bool) -> "Case":
        """Random inputs: logits with variance 1."""
        _, n, v, d = shape
        torch.manual_seed(0)
        # Scaled in place: a copy would be a gigabyte.
        weight = torch.randn(v, d, device=device, dtype=dtype).div_(math.sqrt(d)).requires_grad_(trained)
        return cls(
            hidden=torch.randn(n, d, device=device, dtype=dtype, requires_grad=True),
            weight=weight,
            labels=torch.randint(v, (n,), device=device),
            # A trained head moves away from its frozen geometry, which then is a matrix of its own.
            space=CostSpace.of(weight.detach().clone() if trained else weight),
            unit=F.normalize(weight.detach(), dim=1),
            segments=torch.arange(n, device=device) // RESPONSE,
            reference=torch.full((n,), -math.log(v), device=device),
            margins=torch.full((n,), 2.0, device=device),  # Out of reach: every position has a gradient.
        )

    def clear(self) -> None:
        """Forget the gradients."""
        self.hidden.grad = self.weight.grad = None


# --- What is measured -----------------------------------------------------------------------


def naive(case: Case) -> Tensor:
    mean = F.linear(case.hidden, case.weight).softmax(1) @ case.unit
    return -(1 - (mean * case.unit[case.labels]).sum(1)).sum()


def emo(case: Case) -> Tensor:
    """The Earth Mover Distance of EMO (Ren et al. 2023, arXiv 2310.04691), written from its formula, as a penalty.

    The prediction and the one-hot target are both mapped to embeddings by a product, and the rows normalised anew.
    """
    unit = F.normalize(case.weight.detach(), dim=1)
    q = F.linear(case.hidden, case.weight).softmax(1)
    p = torch.zeros_like(q).scatter_(1, case.labels[:, None], 1.0)
    return -(1 - ((p @ unit) * (q @ unit)).sum(1)).sum()


def naive_likelihood(case: Case) -> Tensor:
    log_q = F.linear(case.hidden, case.weight).log_softmax(1)
    return log_q.gather(1, case.labels[:, None]).sum()


def cross_entropy(case: Case) -> Tensor:
    return F.cross_entropy(F.linear(case.hidden, case.weight), case.labels, reduction="sum")


def linear_cross_entropy(case: Case) -> Tensor:
    """torch's, in chunks of the size that `tasft.loss.nll` passes."""
    return nll(case.hidden, Head(case.weight), case.labels).total


def penalty(name: str) -> Callable[[Case], Tensor]:
    fn, needs = PENALTIES[name].fn, PENALTIES[name].needs

    def run(case: Case) -> Tensor:
        keywords = {need: getattr(case, need) for need in needs}
        return fn(case.hidden, Head(case.weight), case.labels, **keywords).total

    return run


def naive_divergence(case: Case) -> Tensor:
    now, before = (F.linear(hidden, case.weight).log_softmax(1) for hidden in (case.hidden, case.hidden.detach()))
    return F.kl_div(now, before, log_target=True, reduction="sum")


def retain(case: Case) -> Tensor:
    head = Head(case.weight)
    return divergence(case.hidden, head, case.labels, before=case.hidden.detach(), head_before=head).total


def trl(case: Case) -> Tensor:
    """TRL's chunked log-probability, as `add_fused_lm_head` calls it."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    log_q, *_ = ChunkedLogProbFunction.apply(
        case.hidden, case.weight, None, case.labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",)
    )
    return log_q.sum()


def liger(case: Case) -> Tensor:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(case.hidden, case.weight, case.labels, reduction="sum")


class Variant(NamedTuple):
    """What is measured.

    Attributes:
        run: From inputs to a sum that can be differentiated.
        baseline: The naive formula of the same family.
        products: How many products it does, 2 N V D operations each, forward and backward: with the head frozen, and
            trained.
        only: The device that it runs on, if not on all, and why.
        frozen: Whether it gives no gradient to the head.
    """

    run: Callable[[Case], Tensor]
    baseline: str
    products: tuple[int, int]
    only: tuple[str, str] | None = None
    frozen: bool = False


# In the order of measurement: close to what it is compared with. Products with a frozen head: the logits and the
# gradient of the hidden states take 2. Naive costs add the mean embedding and its way back, `emo` the target's too.
# `emd_exact` takes both kinds of product, with the head and with the costs, forward and back. `emd` and TRL compute
# the logits again in backward. A trained head takes one more, and ours the second pass. The naive divergence takes the
# logits of both models and one way back; ours adds up the embeddings under both, so that it needs one pass.
VARIANTS: dict[str, Variant] = {
    "naive": Variant(naive, "naive", (4, 5)),
    "emd_exact": Variant(penalty("emd_exact"), "naive", (4, 6)),
    "emd_hinge": Variant(penalty("emd_hinge"), "naive", (4, 6)),
    "emd": Variant(penalty("emd"), "naive", (5, 6)),
    "emo": Variant(emo, "naive", (5, 6)),
    "naive_likelihood": Variant(naive_likelihood, "naive_likelihood", (2, 3)),
    **{
        name: Variant(penalty(name), "naive_likelihood", (2, 4))
        for name in ("nlcl", "unlikelihood", "npo", "npo_mean", "simnpo", "ascent")
    },
    "naive_divergence": Variant(naive_divergence, "naive_divergence", (3, 4)),
    "divergence": Variant(retain, "naive_divergence", (4, 4), frozen=True),
    "cross_entropy": Variant(cross_entropy, "naive_likelihood", (2, 3)),
    "linear_cross_entropy": Variant(linear_cross_entropy, "naive_likelihood", (2, 3)),
    "trl": Variant(trl, "naive_likelihood", (3, 4)),
    "liger": Variant(liger, "naive_likelihood", (2, 3), only=("cuda", "its Triton kernels need a GPU")),
}


# --- How it is measured ---------------------------------------------------------------------


class Sample(NamedTuple):
    """One measurement: seconds of a forward and backward, bytes at the peak above the inputs."""

    seconds: float
    peak: int


def step(run: Callable[[Case], Tensor], case: Case) -> None:
    case.clear()
    run(case).backward()


def on_cpu(run: Callable[[Case], Tensor], case: Case, threads: int) -> Sample | str:
    """Measure in a process of its own; or why there is no result."""

    def measure() -> Sample:
        torch.set_num_threads(threads)
        step(run, Case.of(WARM_UP, "cpu", case.weight.dtype, trained=case.weight.requires_grad))
        forget_peak()
        before = resident_peak()
        seconds = [timed(partial(step, run, case))]
        peak = resident_peak() - before
        while sum(seconds) < LEAST_SECONDS:
            seconds.append(timed(partial(step, run, case)))
        return Sample(statistics.median(seconds), peak)

    return forked(measure)


def on_gpu(run: Callable[[Case], Tensor], case: Case) -> Sample | str:
    """As `on_cpu`, in this process."""
    try:
        step(run, case)  # Kernels are compiled and chosen.
        case.clear()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = [gpu_timed(partial(step, run, case)) for _ in range(5)]
        return Sample(statistics.median(seconds), torch.cuda.max_memory_allocated() - before)
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        case.clear()


def cpu_rate(dtype: torch.dtype, threads: int, side: int = 2048) -> float:
    """Operations a second of a square product."""

    def measure() -> float:
        torch.set_num_threads(threads)
        left, right, out = (torch.ones(side, side, dtype=dtype) for _ in range(3))
        return statistics.median(timed(lambda: torch.mm(left, right, out=out)) for _ in range(4))

    seconds = forked(measure)
    assert isinstance(seconds, float), seconds
    return 2 * side**3 / seconds


def gpu_rate(dtype: torch.dtype, side: int = 8192) -> float:
    """As `cpu_rate`."""
    # A chip slows down with the bits that it flips: ones would show a rate that no real product has.
    left, right, out = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(3))
    torch.mm(left, right, out=out)
    return 2 * side**3 / statistics.median(gpu_timed(lambda: torch.mm(left, right, out=out)) for _ in range(20))


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def gpu_timed(work: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def forget_peak() -> None:
    """Give back what is free, and start the peak again at what is left, where the system can: Linux with glibc."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> int:
    """Most bytes that this process has held. A fork starts at what it holds then, not at its parent's peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forked(work: Callable[[], T]) -> T | str:
    """Result of some work in a copy of this process, or what became of the copy."""
    reader, writer = Pipe(duplex=False)
    process = get_context("fork").Process(target=lambda: writer.send(work()))
    process.start()
    writer.close()
    try:
        return reader.recv()
    except EOFError:
        process.join()
        return f"ended with exit code {process.exitcode}"
    finally:
        process.join()


def missing(device: str, dtype: torch.dtype, trained: bool) -> dict[str, str]:
    """The variants that cannot run here, and why. Those that can have imported what they need, before any fork."""
    trial, reasons = Case.of(WARM_UP, device, dtype, trained=False), {}
    for name, variant in VARIANTS.items():
        if variant.only and variant.only[0] != device:
            reasons[name] = variant.only[1]
        if variant.frozen and trained:
            reasons[name] = "the head is frozen where it is used"
            continue
        try:
            variant.run(trial)
        except ImportError as error:
            reasons[name] = f"no package {error.name}"
    return reasons


def measure(
    shape: Shape, device: str, dtype: torch.dtype, trained: bool, threads: int, seconds: float, reasons: dict[str, str]
) -> list[dict[str, Any]]:
    """Rows of one shape, from as many rounds as start within some seconds."""
    case = Case.of(shape, device, dtype, trained)
    sample: Callable[[Callable[[Case], Tensor]], Sample | str] = partial(on_gpu, case=case)
    rate = partial(gpu_rate, dtype)
    if device == "cpu":
        sample, rate = partial(on_cpu, case=case, threads=threads), partial(cpu_rate, dtype, threads)
    reasons = dict(reasons)
    rates: list[float] = []
    samples: dict[str, list[Sample]] = {name: [] for name in VARIANTS}
    start = time.perf_counter()
    while len(rates) < LEAST_ROUNDS or (len(rates) < MOST_ROUNDS and time.perf_counter() - start < seconds):
        rates.append(rate())
        for name, variant in VARIANTS.items():
            if name in reasons:
                continue
            result = sample(variant.run)
            if isinstance(result, str):
                reasons[name] = result
            else:
                samples[name].append(result)
    return [row(shape, name, samples, rates, trained, reasons.get(name)) for name in VARIANTS]


def row(
    shape: Shape, name: str, samples: dict[str, list[Sample]], rates: list[float], trained: bool, reason: str | None
) -> dict[str, Any]:
    variant = VARIANTS[name]
    facts: dict[str, Any] = {"shape": shape.name, **shape._asdict(), "variant": name, "baseline": variant.baseline}
    if reason is not None:
        return facts | {"not_run": reason}
    own, base = samples[name], samples[variant.baseline]
    operations = variant.products[trained] * shape.product
    # Each with what was measured in the same round.
    floors = [operations / rate for rate in rates]
    floor_ratios = [one.seconds / floor for one, floor in zip(own, floors, strict=True)]
    time_ratios = [one.seconds / other.seconds for one, other in zip(own, base, strict=False)]
    peaks = [statistics.median(one.peak for one in some) if some else 0 for some in (own, base)]
    return facts | {
        "times_ms": [1e3 * one.seconds for one in own],
        "time_ms": 1e3 * statistics.median(one.seconds for one in own),
        "time_ratio": statistics.median(time_ratios) if time_ratios else None,
        "time_ratio_range": [min(time_ratios), max(time_ratios)] if time_ratios else None,
        "peak_mib": peaks[0] / 2**20,
        "peak_ratio": peaks[0] / peaks[1] if peaks[1] else None,
        "operations": operations,
        "rate_gflops": statistics.median(rates) / 1e9,
        "floor_ms": 1e3 * statistics.median(floors),
        "floor_ratio": statistics.median(floor_ratios),
        "share_of_rate": 1 / statistics.median(floor_ratios),
    }


# --- How it is told -------------------------------------------------------------------------

COLUMNS = (
    "shape",
    "variant",
    "time, ms",
    "time / naive",
    "peak, MiB",
    "peak / naive",
    "floor, ms",
    "time / floor",
    "share of rate",
)


def table(report: dict[str, Any]) -> str:
    """The report as a table in Markdown, with what it was measured on under it."""
    lines = [COLUMNS, ("---", "---") + ("--:",) * (len(COLUMNS) - 2)]
    told = None
    for row in report["rows"]:
        shape = "N {tokens}, V {vocabulary}, D {width} ({model})".format(**row)
        lines.append(("" if shape == told else shape, f"`{row['variant']}`", *cells(row)))
        told = shape
    where = report["environment"]
    head = "trained" if report["trained"] else "frozen"
    return markdown(lines, f"{machine(where)}; {code(where)}; head {head}.")


def cells(row: dict[str, Any]) -> list[str]:
    if "not_run" in row:
        return [f"not run: {row['not_run']}"] + [""] * (len(COLUMNS) - 3)
    ratio = "-"
    if row["time_ratio"] is not None:
        low, high = row["time_ratio_range"]
        ratio = f"{row['time_ratio']:.2f} ({low:.2f} to {high:.2f})"
    return [
        number(row["time_ms"]),
        ratio,
        number(row["peak_mib"]),
        "-" if row["peak_ratio"] is None else f"{row['peak_ratio']:.3f}",
        number(row["floor_ms"]),
        f"{row['floor_ratio']:.2f}",
        f"{row['share_of_rate']:.0%}",
    ]


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, under a minute")
    parser.add_argument("--shapes", nargs="+", metavar="TEXT", help="only those whose MODEL/N contains one of these")
    parser.add_argument("--sizes", nargs=3, type=int, metavar=("N", "V", "D"), help="one shape, of these sizes")
    parser.add_argument("--seconds", type=float, help="after which no further round of a shape is started")
    parser.add_argument("--trained", action="store_true", help="with the gradient of the head")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--page", type=Path, metavar="PATH", help="put the table between the marks of this page")
    args = parser.parse_args()
    models, counts = (MODELS, (64, 256, 1024)) if args.device == "cpu" else (GPU_MODELS, (4096,))
    shapes = [Shape(model, n, *sizes) for model, sizes in models.items() for n in counts]
    wanted = QUICK[args.device] if args.quick else args.shapes or [""]
    shapes = [shape for shape in shapes if any(text in shape.name for text in wanted)]
    if args.sizes:
        shapes = [Shape("made", *args.sizes)]
    if not shapes:
        parser.error(f"no shape is named like {wanted}")

    dtype, threads = getattr(torch, args.dtype), torch.get_num_threads()
    report: dict[str, Any] = {"environment": environment(args.device, args.dtype, threads), "trained": args.trained}
    if args.device == "cpu":
        torch.set_num_threads(1)  # Threads do not outlive a fork, and a child would wait for them.
    reasons = missing(args.device, dtype, args.trained)
    report["rows"] = []
    for shape in shapes:
        print(f"{shape.name} ...", file=sys.stderr, flush=True)
        seconds = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)
        report["rows"] += measure(shape, args.device, dtype, args.trained, threads, seconds, reasons)
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")
    Console().print(Markdown(table(report)))
    if args.page:
        put(table(report), "loss", args.page)


if __name__ == "__main__":
    main()
