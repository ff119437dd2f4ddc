"""The paper's equations in its own order: slow, allocating freely, to be read beside it.

Source: Lu, Sinha, Varakantham, "Semantic Loss Guided Data Efficient Supervised Fine Tuning for
Safe Responses in LLMs", 2024 (arXiv 2412.06843). Equations 1, 2, 7 and 8 are reconstructed from
its words; the length-normalised P in 2 and 7 is ORPO's. Every fast path of this package is tested
against this module, and nothing else uses it.

Shapes: T positions of a response, V tokens, D width; P and Q are distributions over the V tokens.
`embeddings` are the rows e_w of `unit`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class Response(NamedTuple):
    """The tokens y_t of one response and the logits of Q_t that predict each of them."""

    logits: Float[Tensor, "T V"]
    tokens: Int[Tensor, " T"]


# --- What the equations are made of ---------------------------------------------------------


def logits(
    hidden: Float[Tensor, "T D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, "T V"]:
    """Output head of Llama, with what Granite, Cohere (scale) and Gemma 2 (softcap) add."""
    scores = scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores


def unit(matrix: Float[Tensor, "V D"], center: bool = False) -> Float[Tensor, "V D"]:
    """Rows on the unit sphere, after taking off their mean; zero rows have no part in it."""
    real = matrix.any(dim=1, keepdim=True)
    if center:
        matrix = torch.where(real, matrix - matrix[real.squeeze(1)].mean(0), 0.0)
    return F.normalize(matrix, dim=1)


def log_q(response: Response) -> Float[Tensor, " T"]:
    """Log-likelihood of each token, log Q(y_t | x, y_<t)."""
    return response.logits.log_softmax(1).gather(1, response.tokens[:, None])[:, 0]


def probability(response: Response) -> Float[Tensor, ""]:
    """P(y|x), the geometric mean of the token probabilities."""
    return log_q(response).mean().exp()


def mean_embedding(q: Float[Tensor, "*T V"], embeddings: Float[Tensor, "V D"]) -> Float[Tensor, "*T D"]:
    """Expected embedding, mu = sum_w Q(w) e_w."""
    return q @ embeddings


# --- Equations 1 to 8 -----------------------------------------------------------------------


def eq1_sft(responses: Sequence[Response]) -> Float[Tensor, ""]:
    """L_SFT = -1/N sum_i sum_t log Q(y_it | x_i, y_i<t)."""
    return -torch.stack([log_q(response).sum() for response in responses]).mean()


def eq2_orpo(winner: Response, loser: Response) -> Float[Tensor, ""]:
    """L_ORPO = -log sigmoid(log(odds(y_w|x) / odds(y_l|x))), odds = P / (1 - P)."""

    def odds(response: Response) -> Tensor:
        return probability(response) / (1 - probability(response))

    return -F.logsigmoid(torch.log(odds(winner) / odds(loser)))


def eq3_emd(p: Float[Tensor, " V"], q: Float[Tensor, " V"], distance: Float[Tensor, "V V"]) -> float:
    """EMD(P,Q;d) = min over g >= 0 with row sums P, column sums Q of sum_ij g_ij d_ij.

    The linear program itself, for small V. One of its 2 V conditions follows from the others and is left out: with
    all of them, totals that differ by a rounding leave it without a solution.

    Raises:
        ValueError: P and Q are no distributions of the same mass, or the program has no solution.
    """
    from scipy.optimize import linprog

    p, q, distance = p.double(), q.double(), distance.double()
    if not torch.isclose(p.sum(), q.sum(), rtol=1e-4):
        raise ValueError(
            f"P has a mass of {p.sum():.6g} and Q of {q.sum():.6g}: there is no plan from one to the other"
        )
    size = len(p)
    leaving = torch.eye(size).repeat_interleave(size, dim=1)
    arriving = torch.eye(size).repeat(1, size)
    plan = linprog(
        distance.flatten().numpy(),
        A_eq=torch.cat([leaving, arriving[:-1]]).numpy(),
        b_eq=torch.cat([p, q[:-1] * (p.sum() / q.sum())]).numpy(),
    )
    if plan.fun is None:
        raise ValueError(f"no plan of transport was found: {plan.message}")
    return float(plan.fun)


def eq4_cosine_distance(embeddings: Float[Tensor, "V D"]) -> Float[Tensor, "V V"]:
    """d_c(e, e') = 1 - cos(e, e'), on unit vectors 1/2 ||e - e'||^2 (the poster drops the 1/2)."""
    return 1 - embeddings @ embeddings.T


def eq5_emd_loss(responses: Sequence[Response], embeddings: Float[Tensor, "V D"]) -> Float[Tensor, ""]:
    """L_EMD(N) = -1/N sum_i sum_t ||e_{y_it} - mu_it||^2."""
    distances = [
        (embeddings[tokens] - mean_embedding(logits.softmax(1), embeddings)).square().sum()
        for logits, tokens in responses
    ]
    return -torch.stack(distances).mean()


def eq6_eq8_mixture(
    imitate: Sequence[Response],
    avoid: Sequence[Response],
    penalty: Callable[[Sequence[Response]], Tensor],
    weight: float,
) -> Tensor:
    """L = L_SFT(K) + lambda L_pen(B - K), K imitate rows in a batch of B.

    Equation 6 with `eq5_emd_loss` as penalty, 8 with `eq7_nlcl`. A term without rows is 0.
    """
    zero = torch.zeros(())
    return (eq1_sft(imitate) if imitate else zero) + weight * (penalty(avoid) if avoid else zero)


def eq7_nlcl(responses: Sequence[Response]) -> Float[Tensor, ""]:
    """L_NLCL(N) = -1/N sum_i log(1 - P(y_i|x_i))."""
    return -torch.stack([torch.log(1 - probability(response)) for response in responses]).mean()


# --- Proposition 1, and the bound that holds without its loss of |V|^2 ----------------------


def proposition_1(
    p: Float[Tensor, " V"], q: Float[Tensor, " V"], embeddings: Float[Tensor, "V D"]
) -> Float[Tensor, ""]:
    """The paper's lower bound of the EMD: 1/(2|V|^2) ||mu_P - mu_Q||^2."""
    return jensen_bound(p, q, embeddings) / len(p) ** 2


def jensen_bound(p: Float[Tensor, " V"], q: Float[Tensor, " V"], embeddings: Float[Tensor, "V D"]) -> Float[Tensor, ""]:
    """Jensen's inequality over the optimal plan: EMD >= 1/2 ||mu_P - mu_Q||^2 (unit rows)."""
    gap = mean_embedding(p, embeddings) - mean_embedding(q, embeddings)
    return gap.square().sum() / 2


# --- The twins of what the paper does not have ----------------------------------------------


def costs(tokens: Int[Tensor, " T"], embeddings: Float[Tensor, "V D"]) -> Float[Tensor, "T V"]:
    """Row y_t of equation 4; a token costs itself nothing, even one whose embedding is zero."""
    return (1 - embeddings[tokens] @ embeddings.T).scatter(1, tokens[:, None], 0.0)


def transport_cost(response: Response, embeddings: Float[Tensor, "V D"]) -> Float[Tensor, " T"]:
    """EMD_t against the one-hot y_t, whose only plan is the product: sum_w Q_t(w) d(w, y_t)."""
    return (response.logits.softmax(1) * costs(response.tokens, embeddings)).sum(1)


def margin(response: Response, embeddings: Float[Tensor, "V D"]) -> Float[Tensor, " T"]:
    """m_t = sum_{w != y_t} Q_t(w) / (1 - Q_t(y_t)) d(w, y_t), by leaving y_t out of the sums."""
    others = 1 - F.one_hot(response.tokens, len(embeddings))
    q = response.logits.softmax(1) * others
    return (q * costs(response.tokens, embeddings)).sum(1) / q.sum(1)


def hinge(response: Response, reference: Response, embeddings: Float[Tensor, "V D"]) -> Float[Tensor, " T"]:
    """max(0, m_t - EMD_t), with m_t of the reference model."""
    room = margin(reference, embeddings) - transport_cost(response, embeddings)
    return room.clamp(min=0)


def unlikelihood(response: Response) -> Float[Tensor, " T"]:
    """-log(1 - Q_t(y_t)) (Welleck et al. 2019)."""
    return -torch.log(1 - log_q(response).exp())


def npo(response: Response, reference: Response, beta: float) -> Float[Tensor, ""]:
    """2/beta log(1 + (pi/pi_ref)^beta), pi the probability of the whole response (Zhang et al. 2024)."""
    ratio = (log_q(response).sum() - log_q(reference).sum()).exp()
    return 2 / beta * torch.log(1 + ratio**beta)


def npo_mean(response: Response, reference: Response, beta: float) -> Float[Tensor, ""]:
    """As `npo`, of the geometric mean over the tokens (Safe Unlearning, Zhang et al. 2024)."""
    ratio = (log_q(response).mean() - log_q(reference).mean()).exp()
    return 2 / beta * torch.log(1 + ratio**beta)


def simnpo(response: Response, beta: float) -> Float[Tensor, ""]:
    """-2/beta log sigmoid(-beta/|y| log pi), without a margin (Fan et al. 2024)."""
    return -2 / beta * torch.log(torch.sigmoid(-beta * log_q(response).mean()))


def entropy(response: Response) -> Float[Tensor, " T"]:
    """-sum_w Q_t(w) log Q_t(w), in nats."""
    log_all = response.logits.log_softmax(1)
    return -(log_all.exp() * log_all).sum(1)
