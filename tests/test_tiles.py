"""The GPU's kernels against their twins in torch, run by Triton's interpreter and, where there is a GPU, on it."""

import sys
from dataclasses import fields, replace
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from test_loss import Case, slow
from torch import Tensor

from tasft.loss import PENALTIES, Head, scan, tiles
from tasft.loss.tiles import Chunk, Running

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CPU = torch.device("cpu")


def loaded() -> dict[str, ModuleType]:
    """Triton's modules, but for the compiled ones, which cannot be loaded twice."""
    return {
        name: module
        for name, module in sys.modules.items()
        if f"{name}.".startswith("triton.") and not name.startswith("triton._C")
    }


@pytest.fixture(scope="module")
def interpreted():
    """`tiles_triton` over a Triton of its own.

    What is interpreted is decided when it is decorated, also in Triton itself, and an interpreted call
    changes Triton's modules for good: neither may reach what runs on the GPU.
    """
    if not find_spec("triton"):
        pytest.skip("triton is not installed")
    spec = spec_from_file_location("interpreted_tiles", Path(tiles.__file__).with_name("tiles_triton.py"))
    module = module_from_spec(spec)
    kept = loaded()
    for name in kept:
        del sys.modules[name]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            spec.loader.exec_module(module)
    finally:
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(kept)
    if tuple(map(int, module.triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("older interpreters (3.6 was seen) cannot count loops with NumPy 2.5")
    return module


# --- 1. Each function -------------------------------------------------------------------------


class Kernels(NamedTuple):
    module: ModuleType
    device: torch.device


TWIN = Kernels(tiles, CPU)


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=GPU)])
def kernels(request, monkeypatch):
    if request.param == "interpreted":
        found = Kernels(request.getfixturevalue("interpreted"), CPU)
    else:
        found = Kernels(import_module("tasft.loss.tiles_triton"), torch.device("cuda"))
    monkeypatch.setattr(found.module, "_BLOCK", 256)  # 1031 columns are five blocks, the last cut off.
    return found


class Look(NamedTuple):
    rows: int
    columns: int
    dtype: torch.dtype
    narrow: torch.dtype | None  # None: `out` is `tile`.
    size: float = 3.0  # Of the products.
    whole: bool = True  # With everything that a chunk may do without.


# Narrow is float16: the interpreter does not round to bfloat16, it cuts off.
LOOKS = [
    Look(1, 1, torch.float32, torch.float16),
    Look(7, 1, torch.float64, None),
    Look(33, 11, torch.float32, torch.float16),
    Look(33, 11, torch.float32, torch.float16, whole=False),
    Look(1, 130, torch.float32, None),
    Look(7, 1031, torch.float32, torch.float16),
    Look(7, 1031, torch.float64, None),
    Look(7, 1031, torch.float64, None, whole=False),
    Look(7, 130, torch.float32, None, size=1e4),
    Look(7, 130, torch.float32, torch.float16, size=1e4, whole=False),
]
looks = pytest.mark.parametrize("look", LOOKS, ids=lambda look: "-".join(map(str, look)))
parts = pytest.mark.parametrize("parts", [1, 2])


def draw(look: Look, parts: int, device: torch.device, rise: bool = False) -> tuple[Tensor, Tensor, Chunk]:
    """Products, room for what they become, and chunk; labels before, in and after it, and at both of its ends."""
    rows, columns = look.rows, look.columns
    tile = torch.randn(parts, rows, columns, dtype=torch.float64)
    tile[0] *= look.size
    tile[0, ::2] += 5 * look.size * rise
    tile = tile.to(device, look.dtype)
    label = torch.arange(rows, device=device) % 5 * max(columns // 3, 1) - columns // 3
    label[0], label[-1] = columns - 1, 0
    bias, along, inverse_norm = torch.randn(3, columns).to(device, look.dtype)
    scale, offset = torch.randn(2, rows).to(device, look.dtype)
    chunk = Chunk(label, 0.7, None, None, inverse_norm.abs(), None, None, None)
    if look.whole:
        chunk = Chunk(label, 0.7, 6.0, bias, inverse_norm.abs(), along, scale, offset)
    return tile, tile if look.narrow is None else torch.empty_like(tile, dtype=look.narrow), chunk


def folded(kernels: Kernels, look: Look, parts: int) -> list[Tensor]:
    torch.manual_seed(0)
    running = Running.of(look.rows, look.dtype, kernels.device)
    found = []
    for rise in (False, True):
        tile, out, chunk = draw(look, parts, kernels.device, rise)
        found += [kernels.module.fold(tile, out, running, chunk, entropy=parts == 2), out]
        found += [sums.clone() for sums in running[: 2 * parts]]
    return found


def embedded(kernels: Kernels, look: Look) -> list[Tensor]:
    torch.manual_seed(0)
    running = Running.of(look.rows, look.dtype, kernels.device)
    found = []
    for rise in (False, True):
        tile, out, chunk = draw(look, 1, kernels.device, rise)
        found += [kernels.module.embed(tile, out, running, chunk), out]
        found += [sums.clone() for sums in running[:3]]
    return found


def unfolded(kernels: Kernels, look: Look, parts: int) -> list[Tensor]:
    torch.manual_seed(0)
    tile, out, chunk = draw(look, parts, kernels.device)
    z = tile[0].clone()
    tiles.logits(z, chunk.bias, chunk.gain, chunk.ceiling)
    mass, base = (torch.rand(2, look.rows, dtype=look.dtype) + 1).to(kernels.device)
    # Autograd may hand in one number for all rows.
    odds = mass[0].expand(look.rows)
    kernels.module.unfold(tile, out[0], Running(z.amax(1), mass, mass, mass), chunk, odds, base)
    return [out[0]]


# Of the largest in its row, or of 1. Interpreted, the largest differences were 2e-15, 1.6e-6 and 2^-12.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2**-10}


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        scale = theirs.double().abs().amax(-1, keepdim=True).clamp(min=1)
        difference = ((ours.cpu().double() - theirs.double()) / scale).abs().max()
        assert difference <= TOLERANCE[ours.dtype]


@parts
@looks
def test_fold_equals_its_twin_over_two_chunks(kernels, look, parts):
    assert_equal(folded(kernels, look, parts), folded(TWIN, look, parts))


@looks
def test_embed_equals_its_twin_over_two_chunks(kernels, look):
    assert_equal(embedded(kernels, look), embedded(TWIN, look))


@parts
@looks
def test_unfold_equals_its_twin(kernels, look, parts):
    assert_equal(unfolded(kernels, look, parts), unfolded(TWIN, look, parts))


@pytest.mark.parametrize("narrow", [None, torch.float16])
def test_embed_adds_up_the_rounded_weights(kernels, narrow):
    look = Look(7, 1031, torch.float32, narrow)
    _, out, _, _, moment, *_ = embedded(kernels, look)
    torch.testing.assert_close(moment, out[0].float().sum(1), rtol=2e-6, atol=0)


# --- 2. Whole penalties -----------------------------------------------------------------------

every_penalty = pytest.mark.parametrize("name", PENALTIES)
head_is_trained = pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])


def outcome(name: str, case: Case, trained: bool, chunk_size: int | None = None, plain: bool = False) -> list[Tensor]:
    """Value, and gradients in the hidden states and, if trained, the head, which scales and caps unless plain."""
    needs = case.needs(name)
    tensors = [case.hidden, case.weight, case.bias]
    wanted = [tensor.clone().requires_grad_() for tensor in (tensors if trained else tensors[:1])]
    hidden, weight, bias = wanted + tensors[len(wanted) :]
    head = Head(weight, bias) if plain else Head(weight, bias, 0.7, 20.0)
    total = PENALTIES[name].fn(hidden, head, case.labels, **needs, chunk_size=chunk_size).total
    return [total.detach(), *torch.autograd.grad(total, wanted)]


@head_is_trained
@pytest.mark.parametrize("name", ["emd", "emd_exact", "nlcl"])
def test_a_penalty_through_the_interpreted_kernels(interpreted, monkeypatch, name, trained):
    case = Case.draw(7, 41)
    expected = outcome(name, case, trained, chunk_size=16)
    functions = {f.__name__: f for f in (interpreted.fold, interpreted.embed, interpreted.unfold)}
    monkeypatch.setattr(scan, "tiles", SimpleNamespace(**functions, logits=tiles.logits))
    # float64; they differed by 3e-13 at most.
    torch.testing.assert_close(outcome(name, case, trained, chunk_size=16), expected, rtol=1e-11, atol=1e-12)


# --- 3. On a GPU ------------------------------------------------------------------------------


def gpu(test):
    for mark in GPU:
        test = mark(test)
    return test


def large(dtype: torch.dtype, n: int = 257, v: int = 49152, seed: int = 0) -> Case:
    """Of a real vocabulary; every other label is likely."""
    case = Case.draw(n, v, d=64, seed=seed)
    likely = case.weight[case.labels.clamp(min=0)] * 0.5
    likely[::2] = 0
    return replace(case, hidden=case.hidden + likely, before=case.before + likely).to(dtype)


def on(device: str, case: Case) -> Case:
    return replace(case, **{field.name: getattr(case, field.name).to(device) for field in fields(case)})


def errors(got: list[Tensor], true: list[Tensor]) -> Tensor:
    """Relative distance of value and gradients."""
    pairs = zip(got, true, strict=True)
    return torch.stack([(ours.cpu().double() - right).norm() / right.norm() for ours, right in pairs])


@gpu
@head_is_trained
@every_penalty
def test_float32_on_a_gpu_is_as_precise_as_on_a_cpu(name, trained):
    case = large(torch.float32)
    true = outcome(name, case.to(torch.float64), trained)
    got = errors(outcome(name, on("cuda", case), trained), true)
    assert (got < 2e-5).all(), got  # 4e-6 on a CPU.


@gpu
@head_is_trained
@every_penalty
def test_bfloat16_on_a_gpu_is_no_further_from_the_truth_than_the_naive_formula(name, trained):
    def both(seed: int) -> Tensor:
        case = large(torch.bfloat16, seed=seed)
        true = outcome(name, case.to(torch.float64), trained, plain=True)[:2]
        case = on("cuda", case)
        ours = outcome(name, case, trained, plain=True)[:2]
        total = slow(name, replace(case, hidden=case.hidden.requires_grad_()))
        naive = [total.detach(), *torch.autograd.grad(total, case.hidden)]
        return torch.stack([errors(ours, true), errors(naive, true)])

    ours, naive = torch.stack([both(seed) for seed in range(3)]).mean(0)
    # The naive one is nan where bfloat16 takes a token for certain.
    assert (ours <= naive.nan_to_num(torch.inf)).all(), (ours, naive)


@gpu
@head_is_trained
@every_penalty
def test_memory_on_a_gpu_is_that_of_a_chunk(name, trained):
    n, v = 2048, 128256
    case = on("cuda", large(torch.bfloat16, n, v))
    needs = case.needs(name)
    hidden, weight = (tensor.requires_grad_(wanted) for tensor, wanted in ((case.hidden, True), (case.weight, trained)))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    PENALTIES[name].fn(hidden, Head(weight, case.bias), case.labels, **needs, chunk_size=2048).total.backward()
    assert torch.cuda.max_memory_allocated() - before < n * v * 4 / 4
