"""Every penalty against a hand-solved case, its slow twin, its derivative and its invariants."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tasft.loss import (
    IGNORE_INDEX,
    PENALTIES,
    CostSpace,
    Head,
    TokenSum,
    avoid_statistics,
    divergence,
    log_probability,
    margins,
    nll,
    reference,
    shift,
)

BETA = 0.3
every_penalty = pytest.mark.parametrize("name", PENALTIES)


@dataclass(frozen=True)
class Case:
    """Inputs of a penalty; the reference model differs in its hidden states only."""

    hidden: Tensor
    before: Tensor  # hidden states of the reference model
    weight: Tensor
    bias: Tensor | None
    table: Tensor  # rows of the cost space, the first of them zero
    labels: Tensor
    segments: Tensor

    @classmethod
    def draw(cls, n: int, v: int, d: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0):
        """Random inputs with large and small logits, and about a third of positions ignored."""
        torch.manual_seed(seed)
        spread = torch.rand(n, 1, dtype=torch.float64) * 3
        labels = torch.randint(v, (n,))
        labels[torch.rand(n) < 0.3] = IGNORE_INDEX
        labels[-1] = seed % v  # something counts
        table = torch.randn(v, d + 1, dtype=torch.float64) + 0.3
        table[0] = 0
        return cls(
            (torch.randn(n, d, dtype=torch.float64) * spread).to(dtype),
            torch.randn(n, d).to(dtype),
            torch.randn(v, d).to(dtype),
            torch.randn(v).to(dtype),
            table.to(dtype),
            labels,
            torch.randint(max(n // 3, 1), (n,)) * 7 - 3,
        )

    def to(self, dtype: torch.dtype) -> "Case":
        names = ("hidden", "before", "weight", "bias", "table")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def pick(self, rows: Tensor) -> "Case":
        names = ("hidden", "before", "labels", "segments")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    @torch.no_grad()
    def needs(self, name: str) -> dict[str, Any]:
        space = CostSpace.of(self.table)
        have = {
            "space": space,
            "margins": margins(self.before, self.head, self.labels, space=space),
            "reference": log_probability(self.before, self.head, self.labels),
            "segments": self.segments,
            "beta": BETA,
        }
        return {need: have[need] for need in PENALTIES[name].needs}

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias)


def fast(name: str, case: Case, **options: Any) -> TokenSum:
    return PENALTIES[name].fn(case.hidden, case.head, case.labels, **case.needs(name), **options)


def slow(name: str, case: Case) -> Tensor:
    """The same total by the equations of `reference`, all in the dtype of the case."""
    keep = case.labels != IGNORE_INDEX
    labels, segments = case.labels[keep], case.segments[keep]
    logits = reference.logits(case.hidden, case.weight, case.bias)[keep]
    response = reference.Response(logits, labels)
    with torch.no_grad():
        before = reference.Response(reference.logits(case.before, case.weight, case.bias)[keep], labels)
    unit = reference.unit(case.table)

    def each(whole: reference.Response) -> list[reference.Response]:
        return [reference.Response(whole.logits[segments == s], whole.tokens[segments == s]) for s in segments.unique()]

    if name == "emd":
        return reference.eq5_emd_loss([response], unit)
    if name == "emd_exact":
        return -reference.transport_cost(response, unit).sum()
    if name == "emd_hinge":
        return reference.hinge(response, before, unit).sum()
    if name == "nlcl":
        return reference.eq7_nlcl(each(response)) * len(each(response))
    if name == "unlikelihood":
        return reference.unlikelihood(response).sum()
    if name in ("npo", "npo_mean"):
        pairs = zip(each(response), each(before), strict=True)
        return torch.stack([getattr(reference, name)(*pair, BETA) for pair in pairs]).sum()
    if name == "simnpo":
        return torch.stack([reference.simnpo(one, BETA) for one in each(response)]).sum()
    assert name == "ascent"
    return reference.log_q(response).sum()


def gradients(total: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total, wanted)


def gradient(total: Tensor, hidden: Tensor) -> Tensor:
    return gradients(total, [hidden])[0]


def tracked(case: Case, head: bool = False) -> Case:
    names = ("hidden", "weight", "bias") if head else ("hidden",)
    return replace(case, **{name: getattr(case, name).clone().requires_grad_() for name in names})


# --- 1. Solved by hand ----------------------------------------------------------------------

# Q = (1/2, 1/4, 1/4) and (1/8, 3/8, 1/2), both against token 0 at (1, 0); the others are at
# (-1, 0) and (0, 1). So mu = (1/4, 1/4) and (-1/4, 1/2); EMD = 3/4 and 5/4; the other tokens
# cost 3/2 and 10/7 on average; and P = sqrt(1/2 * 1/8) = 1/4. The reference says the first with 1/4, so pi/pi_ref = 2;
# its other tokens are as likely among themselves. The middle position is ignored.
BY_HAND = {
    "emd": (-(10 / 16) - (29 / 16), 2),
    "emd_exact": (-3 / 4 - 5 / 4, 2),
    "emd_hinge": (3 / 4 + 5 / 28, 2),
    "nlcl": (math.log(4 / 3), 1),
    "unlikelihood": (-math.log(1 / 2) - math.log(7 / 8), 2),
    "npo": (2 / BETA * math.log(1 + 2**BETA), 1),
    "npo_mean": (2 / BETA * math.log(1 + 2 ** (BETA / 2)), 1),
    "simnpo": (2 / BETA * math.log(1 + (1 / 4) ** BETA), 1),
    "ascent": (math.log(1 / 16), 2),
}


@every_penalty
def test_a_case_solved_by_hand(name):
    q = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [0.9, 0.05, 0.05], [1 / 8, 3 / 8, 1 / 2]]).double()
    labels, segments = torch.tensor([0, IGNORE_INDEX, 0]), torch.tensor([4, 9, 4])
    table = torch.tensor([[2.0, 0], [-3, 0], [0, 5]]).double()
    before = q.clone()
    before[0] = torch.tensor([2, 3, 3]) / 8
    case = Case(q.log(), before.log(), torch.eye(3).double(), None, table, labels, segments)
    total, count = fast(name, case)
    expected_total, expected_count = BY_HAND[name]
    assert total.item() == pytest.approx(expected_total, abs=1e-14)
    assert count == expected_count


def test_shift_puts_the_next_label_at_each_position():
    labels = torch.tensor([[5, 6, 7], [IGNORE_INDEX, 8, 9]])
    expected = torch.tensor([[6, 7, IGNORE_INDEX], [8, 9, IGNORE_INDEX]])
    assert torch.equal(shift(labels), expected)


# --- 2. Equal to the slow twin --------------------------------------------------------------


# The chunks of the second divide V; those of the third and fourth are one token and more than there are.
SIZES = [(1, 11, 4), (7, 11, 11), (257, 11, 1), (1, 1031, 2000), (7, 1031, 64), (257, 1031, None)]
SIZES += [(1, 49152, 1000), (7, 49152, 4096)]
# As many positions of as many words: for one penalty of each kind.
LARGEST, OF_EACH_KIND = (257, 49152, None), ("emd_exact", "nlcl")
CASES = [(name, *size) for name in PENALTIES for size in SIZES] + [(name, *LARGEST) for name in OF_EACH_KIND]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen-head", "trained-head"])
@pytest.mark.parametrize(("name", "n", "v", "chunk_size"), CASES)
def test_value_and_gradient_equal_the_reference(name, n, v, chunk_size, trained):
    case = tracked(Case.draw(n, v), head=trained)
    wanted = [case.hidden, case.weight, case.bias] if trained else [case.hidden]
    total, expected = fast(name, case, chunk_size=chunk_size).total, slow(name, case)
    # float64; the largest differences seen were 7e-15 of the value (1e-13 of small ones) and 5e-13 in the gradient.
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=1e-13)
    pairs = zip(gradients(total, wanted), gradients(expected, wanted), strict=True)
    for got, right in pairs:
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-12)


@every_penalty
def test_a_bias_that_is_trained_alone_gets_its_gradient(name):
    case = Case.draw(31, 41)
    case = replace(case, bias=case.bias.requires_grad_())
    total, expected = fast(name, case).total, slow(name, case)
    torch.testing.assert_close(gradient(total, case.bias), gradient(expected, case.bias))


def test_margins_equal_the_reference_and_are_zero_where_ignored():
    case = Case.draw(31, 41)
    keep = case.labels != IGNORE_INDEX
    logits = reference.logits(case.hidden, case.weight, case.bias)[keep]
    expected = reference.margin(reference.Response(logits, case.labels[keep]), reference.unit(case.table))
    got = margins(case.hidden, case.head, case.labels, space=CostSpace.of(case.table), chunk_size=4)
    torch.testing.assert_close(got[keep], expected)
    assert (got[~keep] == 0).all()


def test_margins_are_exact_where_the_token_is_certain():
    """The other two tokens are equally likely at every height of the first."""
    table = torch.tensor([[1.0, 0], [-1, 0], [0, 1]])
    hidden = torch.tensor([[3.0, 0, 0], [30, 0, 0], [3000, 0, 0]])
    labels = torch.zeros(3, dtype=torch.long)
    got = margins(hidden, Head(torch.eye(3)), labels, space=CostSpace.of(table))
    torch.testing.assert_close(got, torch.full((3,), 1.5))


def test_statistics_equal_the_reference():
    case = Case.draw(31, 41)
    likeliest = reference.logits(case.hidden, case.weight, case.bias).argmax(1)
    case.labels[10:20] = likeliest[10:20]
    keep = case.labels != IGNORE_INDEX
    logits = reference.logits(case.hidden, case.weight, case.bias)[keep]
    response = reference.Response(logits, case.labels[keep])
    space = CostSpace.of(case.table)
    got = avoid_statistics(case.hidden, case.head, case.labels, space=space, chunk_size=4)
    cost = reference.transport_cost(response, reference.unit(case.table))
    torch.testing.assert_close(got.emd.total, cost.sum())
    torch.testing.assert_close(got.entropy.total, reference.entropy(response).sum())
    torch.testing.assert_close(got.top1.total, logits.softmax(1).amax(1).sum())
    assert got.emd.count == got.entropy.count == got.top1.count == keep.sum()


def diverged(case: Case, transform: dict[str, Any] | None = None, **options: Any) -> TokenSum:
    keep = case.labels != IGNORE_INDEX
    heads = (Head(weight, case.bias, **(transform or {})) for weight in (case.weight, case.weight.detach() * 0.9))
    head, head_before = heads
    return divergence(case.hidden, head, case.labels, before=case.before[keep], head_before=head_before, **options)


def naive_divergence(case: Case, transform: dict[str, Any] | None = None) -> Tensor:
    keep = case.labels != IGNORE_INDEX
    now = reference.logits(case.hidden, case.weight, case.bias, **(transform or {}))
    before = reference.logits(case.before, case.weight.detach() * 0.9, case.bias, **(transform or {})).detach()
    return F.kl_div(now[keep].log_softmax(1), before[keep].log_softmax(1), log_target=True, reduction="sum")


@pytest.mark.parametrize(("n", "v", "chunk_size"), SIZES)
@pytest.mark.parametrize("transform", [{}, {"scale": 0.7}, {"scale": 3.0, "softcap": 2.5}], ids=str)
def test_divergence_and_its_gradient_equal_their_definition(n, v, chunk_size, transform):
    case = tracked(Case.draw(n, v))
    got, expected = diverged(case, transform, chunk_size=chunk_size), naive_divergence(case, transform)
    torch.testing.assert_close(got.total, expected, rtol=1e-12, atol=1e-12)
    assert got.count == (case.labels != IGNORE_INDEX).sum()
    derivative = gradient(got.total, case.hidden)
    torch.testing.assert_close(derivative, gradient(expected, case.hidden), rtol=1e-11, atol=1e-12)
    assert (derivative[case.labels == IGNORE_INDEX] == 0).all()


def test_divergence_solved_by_hand():
    """From (1/2, 1/4, 1/4) to (1/4, 1/4, 1/2): 1/2 log 2 + 1/4 log 1/2 = 1/4 log 2; the second row has weight 3."""
    q = torch.tensor([[1 / 4, 1 / 4, 1 / 2], [0.9, 0.05, 0.05], [1 / 2, 1 / 4, 1 / 4]]).double()
    before = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 2, 1 / 4, 1 / 4]]).double()
    labels, weights, head = (
        torch.tensor([1, IGNORE_INDEX, 1]),
        torch.tensor([1.0, 7.0, 3.0]).double(),
        Head(torch.eye(3).double()),
    )
    got = divergence(q.log(), head, labels, before=before.log(), head_before=head, weights=weights)
    assert got.total.item() == pytest.approx(math.log(2) / 4, abs=1e-15)
    assert got.count == 4


def test_divergence_passes_gradcheck():
    case = tracked(Case.draw(7, 11))
    assert torch.autograd.gradcheck(
        lambda hidden: diverged(replace(case, hidden=hidden), {"softcap": 2.5}).total, case.hidden
    )


def test_divergence_of_nothing_is_a_zero_that_back_propagates():
    case = tracked(Case.draw(7, 11))
    case.labels.fill_(IGNORE_INDEX)
    total, count = diverged(case)
    assert (total, count) == (0, 0)
    assert (gradient(total, case.hidden) == 0).all()


def test_divergence_from_itself_is_zero_and_never_negative():
    case = Case.draw(150, 41, dtype=torch.float32)
    kept = case.hidden[case.labels != IGNORE_INDEX]
    same = divergence(case.hidden, case.head, case.labels, before=kept, head_before=case.head)
    assert 0 <= same.total < 1e-4
    near = divergence(case.hidden + 1e-4, case.head, case.labels, before=kept, head_before=case.head)
    assert near.total >= 0


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_divergence_of_extreme_logits_is_finite(size):
    case = Case.draw(31, 41, dtype=torch.float32)
    case = tracked(replace(case, hidden=case.hidden * size, before=case.before * size))
    total = diverged(case).total
    assert total.isfinite()
    assert gradient(total, case.hidden).isfinite().all()


def test_divergence_refuses_a_head_that_is_trained_and_states_of_other_rows():
    case = tracked(Case.draw(7, 11), head=True)
    with pytest.raises(ValueError, match="trained"):
        diverged(case)
    with torch.no_grad():
        diverged(case)
    with pytest.raises(ValueError, match="of the earlier model"):
        divergence(case.hidden, case.head, case.labels, before=case.before[:1], head_before=case.head)


def test_log_probability_equals_cross_entropy():
    case = tracked(Case.draw(31, 41))
    keep = case.labels != IGNORE_INDEX
    got = log_probability(case.hidden, case.head, case.labels, chunk_size=4)
    logits = reference.logits(case.hidden, case.weight, case.bias)
    expected = -F.cross_entropy(logits, case.labels, reduction="none", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(got, expected)
    assert (got[~keep] == 0).all()
    torch.testing.assert_close(gradient(got.sum(), case.hidden), gradient(expected.sum(), case.hidden))


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("labels", ["some", "none"])
def test_nll_equals_the_reference(softcap, labels):
    case = tracked(Case.draw(31, 41))
    if labels == "none":
        case.labels.fill_(IGNORE_INDEX)
    keep = case.labels != IGNORE_INDEX
    total, count = nll(case.hidden, Head(case.weight, case.bias, 0.7, softcap), case.labels)
    logits = reference.logits(case.hidden, case.weight, case.bias, 0.7, softcap)[keep]
    expected = reference.eq1_sft([reference.Response(logits, case.labels[keep])])
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradient(total, case.hidden), gradient(expected, case.hidden))
    assert count == keep.sum()


@pytest.mark.parametrize("trained", [False, True], ids=["frozen-head", "trained-head"])
@pytest.mark.parametrize("transform", [{"scale": 0.125}, {"softcap": 2.5}, {"scale": 3.0, "softcap": 2.5}], ids=str)
@every_penalty
def test_scale_and_softcap_equal_the_naive_formula(name, transform, trained, monkeypatch):
    case = tracked(Case.draw(31, 41), head=trained)
    wanted = [case.hidden, case.weight, case.bias] if trained else [case.hidden]
    naive = reference.logits
    monkeypatch.setattr(Case, "head", property(lambda case: Head(case.weight, case.bias, **transform)))
    monkeypatch.setattr(reference, "logits", lambda *args: naive(*args, **transform))
    total, expected = fast(name, case, chunk_size=7).total, slow(name, case)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradients(total, wanted), gradients(expected, wanted))


@pytest.mark.parametrize("matrix", ["table", "weight"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen-head", "trained-head"])
@every_penalty
def test_a_centred_space_and_the_head_as_space_equal_explicit_unit_rows(name, trained, matrix, monkeypatch):
    case = tracked(Case.draw(31, 41), head=trained)
    wanted = [case.hidden, case.weight, case.bias] if trained else [case.hidden]
    unit = reference.unit(getattr(case, matrix).detach(), center=True)
    space = CostSpace.of(getattr(case, matrix), center=True)
    torch.testing.assert_close(space.embed(torch.arange(41)), unit)
    monkeypatch.setattr(reference, "unit", lambda _: unit)
    needs = case.needs(name) | ({"space": space} if "space" in PENALTIES[name].needs else {})
    if "margins" in needs:
        needs["margins"] = margins(case.before, case.head, case.labels, space=space)
    total = PENALTIES[name].fn(case.hidden, case.head, case.labels, **needs, chunk_size=7).total
    expected = slow(name, case)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradients(total, wanted), gradients(expected, wanted))


def test_a_row_of_zeros_is_at_cost_one_from_all_others_and_at_none_from_itself():
    case = Case.draw(9, 41)
    space = CostSpace.of(case.table)
    assert (space.embed(torch.tensor([0])) == 0).all()
    labels = torch.zeros(9, dtype=torch.long)
    torch.testing.assert_close(margins(case.hidden, case.head, labels, space=space), torch.ones(9).double())
    q = reference.logits(case.hidden, case.weight, case.bias).softmax(1)
    total = PENALTIES["emd_exact"].fn(case.hidden, case.head, labels, space=space).total
    torch.testing.assert_close(total, (q[:, 0] - 1).sum())


def test_the_cost_space_refers_to_its_matrix_without_gradient():
    matrix = torch.randn(5, 3, requires_grad=True)
    space = CostSpace.of(matrix)
    assert space.matrix.data_ptr() == matrix.data_ptr()
    assert not space.matrix.requires_grad
    assert not space.inverse_norm.requires_grad


# --- 3. The derivative ----------------------------------------------------------------------


@every_penalty
def test_gradcheck_in_hidden_weight_and_bias(name):
    case = Case.draw(7, 11, d=3)
    needs, labels = case.needs(name), case.labels
    inputs = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]

    def function(hidden, weight, bias):
        fn = PENALTIES[name].fn
        return fn(hidden, Head(weight, bias, 0.7, 9.0), labels, **needs, chunk_size=3).total

    assert torch.autograd.gradcheck(function, inputs)


# --- 4. Invariants --------------------------------------------------------------------------

drawn = settings(max_examples=15, deadline=None, derandomize=True)
cases = st.builds(Case.draw, st.integers(1, 20), st.integers(2, 30), seed=st.integers(0, 10**6))


@every_penalty
@drawn
@given(case=cases, data=st.data())
def test_row_order_and_chunk_size_do_not_matter(name, case, data):
    order = torch.tensor(data.draw(st.permutations(range(len(case.labels)))))
    plain = fast(name, case)
    other = fast(name, case.pick(order), chunk_size=data.draw(st.integers(1, 25)))
    torch.testing.assert_close(other.total, plain.total)
    assert other.count == plain.count


RANGES = {
    "emd": (-4, 0),
    "emd_exact": (-2, 0),
    "emd_hinge": (0, 2),
    "nlcl": (0, math.inf),
    "unlikelihood": (0, math.inf),
    "npo": (0, math.inf),
    "npo_mean": (0, math.inf),
    "simnpo": (0, math.inf),
    "ascent": (-math.inf, 0),
}


@every_penalty
@drawn
@given(case=cases)
def test_each_term_is_in_its_range(name, case):
    total, count = fast(name, case)
    low, high = RANGES[name]
    assert low * count - 1e-12 <= total <= high * count + 1e-12
    counted = case.labels != IGNORE_INDEX
    per = {"token": counted.sum(), "response": len(case.segments[counted].unique())}
    assert count == per[PENALTIES[name].per]


@every_penalty
@drawn
@given(case=cases, times=st.integers(2, 4))
def test_a_row_of_weight_k_counts_as_k_rows(name, case, times):
    """Of one response: the others have weight 1."""
    chosen = case.segments == case.segments[-1]
    copies = [case.pick(chosen.nonzero()[:, 0]) for _ in range(times - 1)]
    copies = [replace(copy, segments=copy.segments + 10**6 * k) for k, copy in enumerate(copies, 1)]
    names = ("hidden", "before", "labels", "segments")
    joined = {name: torch.cat([getattr(part, name) for part in (case, *copies)]) for name in names}
    weights = torch.where(chosen, times, 1).double()
    weighted, repeated = fast(name, case, weights=weights), fast(name, replace(case, **joined))
    torch.testing.assert_close(weighted.total, repeated.total)
    assert weighted.count == repeated.count


@every_penalty
@drawn
@given(case=cases)
def test_ignored_positions_have_exactly_zero_gradient_and_no_say(name, case):
    case = tracked(case)
    ignored = case.labels == IGNORE_INDEX
    total = fast(name, case).total
    assert (gradient(total, case.hidden)[ignored] == 0).all()
    poisoned = case.hidden.detach().clone()
    poisoned[ignored] = torch.nan
    assert fast(name, replace(case, hidden=poisoned)).total == total


@every_penalty
@drawn
@given(case=cases, lift=st.floats(-50, 50))
def test_raising_all_logits_alike_changes_nothing(name, case, lift):
    lifted = replace(case, bias=case.bias + lift)
    torch.testing.assert_close(fast(name, lifted).total, fast(name, case).total, rtol=1e-9, atol=1e-9)


@every_penalty
def test_nothing_to_count_still_back_propagates(name):
    case = Case.draw(5, 11)
    inputs = [t.clone().requires_grad_() for t in (case.hidden, case.weight)]
    case = replace(case, hidden=inputs[0], weight=inputs[1], labels=torch.full((5,), IGNORE_INDEX))
    total, count = fast(name, case)
    total.backward()
    assert total == 0
    assert count == 0
    assert all((tensor.grad == 0).all() for tensor in inputs)


@pytest.mark.parametrize("bad", [-1, 11])
@every_penalty
def test_a_label_that_is_no_token_is_refused(name, bad):
    case = Case.draw(5, 11)
    needs = case.needs(name)
    case.labels[2] = bad
    with pytest.raises(ValueError, match=rf"\[{bad}\].*11 tokens"):
        PENALTIES[name].fn(case.hidden, case.head, case.labels, **needs)


def test_disagreeing_shapes_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have only our own sentence
    case = Case.draw(5, 11)
    space = CostSpace.of(case.table[:10])
    with pytest.raises(ValueError, match="4 labels for 5 hidden"):
        log_probability(case.hidden, case.head, case.labels[:4])
    with pytest.raises(ValueError, match="10 tokens, the head 11"):
        avoid_statistics(case.hidden, case.head, case.labels, space=space)


# --- 5. Precision and memory ----------------------------------------------------------------


@every_penalty
def test_bf16_is_no_further_from_the_truth_than_the_naive_formula(name):
    def errors(seed: int) -> Tensor:
        low = tracked(Case.draw(48, 301, seed=seed).to(torch.bfloat16))
        true = tracked(low.to(torch.float64))
        truth = slow(name, true)
        slope = gradient(truth, true.hidden)
        totals = fast(name, low).total, slow(name, low)
        return torch.tensor(
            [[(t.detach() - truth.detach()).abs(), (gradient(t, low.hidden) - slope).norm()] for t in totals]
        )

    ours, naive = torch.stack([errors(seed) for seed in range(8)]).mean(0)
    # Closer by 1.07 (gradient of `emd`) to 118 times (value of `nlcl`) when this was written.
    assert (ours <= naive).all(), (ours, naive)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e8])
@every_penalty
def test_extreme_logits_give_finite_values_and_gradients(name, size):
    case = Case.draw(40, 11, dtype=torch.float32)
    hidden = torch.cat([case.hidden, case.weight[case.labels.clamp(min=0)]]) * size
    twice = case.pick(torch.arange(40).repeat(2))
    case = tracked(replace(twice, hidden=hidden))
    total = fast(name, case).total
    assert total.isfinite()
    assert gradient(total, case.hidden).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nlcl_is_precise_however_certain_the_response(dtype):
    """With one token, 1 - P is a logistic function of the logit gap: nlcl = softplus(gap)."""
    gap = torch.tensor([-30.0, -5, 0, 5, 15.9, 16.1, 30, 36, 37, 80, 110, 1e4], dtype=dtype)
    hidden = torch.stack([gap, torch.zeros_like(gap)], 1).requires_grad_()
    labels = torch.zeros(len(gap), dtype=torch.long)
    fn, head = PENALTIES["nlcl"].fn, Head(torch.eye(2, dtype=dtype))
    values = [fn(h[None], head, labels[:1], segments=labels[:1]).total for h in hidden]
    tolerance = {"rtol": 30 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(torch.stack(values), torch.logaddexp(gap, 0 * gap), **tolerance)
    slope = gradient(sum(values), hidden)[:, 0]
    torch.testing.assert_close(slope, gap.sigmoid(), **tolerance)


class Allocations(TorchDispatchMode):
    """Records the sizes of new tensors, those of backward included; views of what there was are none."""

    def __init__(self):
        super().__init__()
        self.numels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        new = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.numels += [t.numel() for t in new if t.untyped_storage().data_ptr() not in known]
        return out


@every_penalty
def test_no_more_than_a_chunk_of_logits_is_ever_held(name):
    n, v, d, chunk = 64, 1994, 3, 8
    case = tracked(Case.draw(n, v, d=d))
    needs, kept = case.needs(name), []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t)
    with Allocations() as made:
        with keep:
            total = PENALTIES[name].fn(case.hidden, case.head, case.labels, **needs, chunk_size=chunk).total
        total.backward()
    assert max(made.numels) <= 2 * n * chunk  # logits and costs
    # The head itself is no copy; what else is kept for backward has the width of a hidden state.
    assert sum(numel for numel in kept if numel < v) < 10 * n * (d + 1)


def test_divergence_holds_no_more_than_a_chunk_of_both_predictions():
    n, chunk = 64, 8
    case = tracked(Case.draw(n, 1994, d=3))
    case.labels.fill_(1)
    with Allocations() as made:
        diverged(case, chunk_size=chunk).total.backward()
    made.numels.remove(case.weight.numel())  # the earlier head of the test
    assert max(made.numels) <= 2 * n * chunk


@every_penalty
def test_a_trained_head_takes_no_more_than_its_own_gradient(name):
    n, v, chunk = 64, 1994, 8
    case = tracked(Case.draw(n, v, d=3), head=True)
    needs = case.needs(name)
    with Allocations() as made:
        PENALTIES[name].fn(case.hidden, case.head, case.labels, **needs, chunk_size=chunk).total.backward()
    assert max(made.numels) <= case.weight.numel()
    assert case.weight.numel() < n * v / 10


# --- 6. Where it is called ------------------------------------------------------------------


COMPILED = """
import sys
import torch
from test_loss import PENALTIES, Case, Head, gradients, tracked

for name in PENALTIES:
    for trained in (False, True):
        case = tracked(Case.draw(31, 41), head=trained)
        wanted = [case.hidden, case.weight, case.bias] if trained else [case.hidden]
        needs = case.needs(name)

        def caller(hidden, weight, bias):
            total, count = PENALTIES[name].fn(hidden.sin(), Head(weight, bias), case.labels, **needs)
            return total * 2 / count

        plain = caller(case.hidden, case.weight, case.bias)
        compiled = torch.compile(caller, backend="aot_eager")(case.hidden, case.weight, case.bias)
        torch.testing.assert_close(compiled, plain)
        torch.testing.assert_close(gradients(compiled, wanted), gradients(plain, wanted))
        print(name, trained)
"""


def test_a_compiled_caller_gets_the_same():
    """In a process of its own: what checks shapes in the tests cannot be compiled."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", COMPILED], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 2 * len(PENALTIES)


@every_penalty
def test_autocast_takes_no_precision(name):
    """On a CPU; on a GPU it chooses the type of the factors, not that of the sums."""
    case = tracked(Case.draw(31, 41, dtype=torch.float32), head=True)
    needs, wanted = case.needs(name), [case.hidden, case.weight]
    plain = PENALTIES[name].fn(case.hidden, case.head, case.labels, **needs).total
    with torch.autocast("cpu", torch.bfloat16):
        total = PENALTIES[name].fn(case.hidden, case.head, case.labels, **needs).total
    assert total == plain
    torch.testing.assert_close(gradients(total, wanted), gradients(plain, wanted), rtol=0, atol=0)


@every_penalty
def test_autocast_takes_the_factors_of_a_narrow_head_as_they_are(name, monkeypatch):
    """On a CPU: bfloat16 weights are multiplied as such, hidden states rounded to them, sums are of float32."""
    case = Case.draw(31, 41)
    case = tracked(replace(case.to(torch.bfloat16), hidden=case.hidden.bfloat16().float(), bias=case.bias.float()))
    plain = fast(name, case).total
    allowed: list[str] = []
    for product in ("mm", "addmm"):
        real = getattr(torch, product)
        monkeypatch.setattr(
            torch,
            product,
            lambda *args, real=real, **kwargs: (
                allowed.append(torch.backends.mkldnn.matmul.fp32_precision) or real(*args, **kwargs)
            ),
        )
    with torch.autocast("cpu", torch.bfloat16):
        total = fast(name, case).total
    assert set(allowed) == {"bf16"}
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    torch.testing.assert_close(total, plain, rtol=1e-2, atol=1e-3)


@every_penalty
def test_gradients_have_the_types_of_what_they_belong_to(name):
    case = Case.draw(31, 41)
    case = tracked(replace(case.to(torch.bfloat16), hidden=case.hidden.float(), bias=case.bias.float()), head=True)
    total = fast(name, case).total
    assert total.dtype == torch.float32
    total.backward()
    assert [t.grad.dtype for t in (case.hidden, case.weight, case.bias)] == [
        torch.float32,
        torch.bfloat16,
        torch.float32,
    ]


# --- 7. The mathematics ---------------------------------------------------------------------

LINPROG_TOLERANCE = 1e-6  # HiGHS meets its constraints to 1e-7; 5e-8 was seen.


def test_on_simplices_jensen_is_below_the_emd_and_the_paper_below_jensen():
    torch.manual_seed(0)
    for _ in range(100):
        p, q = torch.distributions.Dirichlet(torch.full((6,), 0.4)).sample((2,)).double()
        p, q = p / p.sum(), q / q.sum()
        unit = reference.unit(torch.randn(6, 3).double())
        distance = reference.eq3_emd(p, q, reference.eq4_cosine_distance(unit))
        jensen = reference.jensen_bound(p, q, unit)
        paper = reference.proposition_1(p, q, unit)
        assert 0 <= paper <= jensen <= distance + LINPROG_TOLERANCE
        torch.testing.assert_close(jensen / paper, torch.tensor(36.0).double())


def test_the_linear_program_is_solved_in_single_precision_and_refuses_what_has_no_plan():
    torch.manual_seed(0)
    distance = reference.eq4_cosine_distance(reference.unit(torch.randn(40, 3).double()))
    for _ in range(5):
        # Sums differ by a rounding.
        p, q = torch.randn(2, 40).mul(4).softmax(1) + 1e-7
        found = reference.eq3_emd(p, q, distance)
        exact = reference.eq3_emd((p / p.sum()).double(), (q / q.sum()).double(), distance)
        assert found == pytest.approx(exact, abs=1e-5)
    with pytest.raises(ValueError, match=r"P has a mass of 1 and Q of 0\.5"):
        reference.eq3_emd(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.25]), torch.ones(2, 2))
    for broken in (torch.tensor([1.5, -0.5]), torch.tensor([float("nan"), 0.5])):
        with pytest.raises(ValueError, match=r"there is no plan|no plan of transport was found"):
            reference.eq3_emd(broken, torch.tensor([0.5, 0.5]), torch.ones(2, 2))


def test_jensens_bound_is_reached_by_two_points():
    p, q = torch.eye(5).double()[:2]
    unit = reference.unit(torch.randn(5, 3).double())
    distance = reference.eq3_emd(p, q, reference.eq4_cosine_distance(unit))
    assert reference.jensen_bound(p, q, unit).item() == pytest.approx(distance, abs=LINPROG_TOLERANCE)


def test_the_linear_program_equals_the_closed_form_on_one_hot_targets():
    case = Case.draw(20, 7)
    unit = reference.unit(case.table + 0.1)
    labels = case.labels.clamp(min=0)
    q = reference.logits(case.hidden, case.weight, case.bias).softmax(1)
    distance = reference.eq4_cosine_distance(unit)
    program = [
        reference.eq3_emd(one_hot, row, distance) for one_hot, row in zip(F.one_hot(labels, 7).double(), q, strict=True)
    ]
    response = reference.Response(q.log(), labels)
    cost = reference.transport_cost(response, unit)
    assert cost.tolist() == pytest.approx(program, abs=LINPROG_TOLERANCE)


def test_the_surrogate_is_twice_the_emd_less_the_spread():
    case = Case.draw(50, 31)
    case = replace(case, labels=case.labels.clamp(min=1), table=case.table + 1)
    mu = reference.mean_embedding(
        reference.logits(case.hidden, case.weight, case.bias).softmax(1), reference.unit(case.table)
    )
    spread = (1 - mu.square().sum(1)).sum()
    expected = 2 * fast("emd_exact", case).total + spread
    torch.testing.assert_close(fast("emd", case).total, expected)


def test_nlcl_is_orpo_with_the_odds_of_the_winner_at_one():
    evens = reference.Response(torch.zeros(3, 2).double(), torch.zeros(3, dtype=torch.long))
    loser = reference.Response(torch.randn(5, 4).double(), torch.arange(5) % 4)
    torch.testing.assert_close(reference.eq2_orpo(evens, loser), reference.eq7_nlcl([loser]))


def test_the_mixture_adds_the_terms_that_have_rows():
    torch.manual_seed(0)
    one, two = (reference.Response(torch.randn(5, 4).double(), torch.arange(5) % 4) for _ in range(2))
    mix, penalty = reference.eq6_eq8_mixture, reference.eq7_nlcl
    both = mix([one], [two], penalty, 0.5)
    torch.testing.assert_close(both, mix([one], [], penalty, 0.5) + mix([], [two], penalty, 0.5))
    torch.testing.assert_close(mix([one], [], penalty, 0.5), -reference.log_q(one).sum())
