"""Scaling laws: how the loss falls with compute, model size and tokens, fitted to runs.

All are sums of power laws, L(x) = E + sum_i A_i / x_i^a_i: of compute, L(C), or of model size and tokens, L(N, D).
They are fitted as Hoffmann et al. fit theirs (approach 3): the lowest Huber loss of log L, from a grid of starts.
Theirs stopped early (Besiroglu et al.), so the descent goes on here until nothing changes. It is not
L-BFGS but damped Gauss-Newton with the Huber loss as weights, which numpy does for all starts and draws at once.

Intervals: Besiroglu et al. draw their 240 runs again, with replacement. A user has six, and such a draw would often
hold too few sizes to fit anything. So losses are drawn again: those of the fit, with noise as large as the runs'
distance from it tells, itself uncertain by the degrees of freedom. That gives t intervals where a law is linear. What
they do not hold is that the law itself may be wrong, which grows with the extrapolation.

References:
    Hoffmann et al., arXiv:2203.15556, section 3.3 and appendix D; Besiroglu et al., arXiv:2404.10102.
"""

import dataclasses
import itertools

import numpy as np

DELTA = 1e-3
"""Of the Huber loss: Hoffmann's."""
EXPONENTS, FEW_EXPONENTS = (0.05, 0.15, 0.3, 0.5, 0.8, 1.3), (0.15, 0.8)
"""Of the starts: for the runs, and for each draw, beside the runs' own constants."""
BOUNDS = (0.01, 3.0)
"""Of a fitted exponent."""
NOTHING = 14.0
"""A term whose logarithm is so far below that of the loss is nothing."""
NUM_DRAWS = 200
COVERAGE = 0.9
"""Share of cases in which an interval shall hold the truth."""


@dataclasses.dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats per token.

    Attributes:
        E: loss that no model of any size gets below.
        A: of the term of model size.
        B: of the term of tokens.
        alpha: exponent of model size N, in parameters that a token visits, embeddings included.
        beta: exponent of tokens D.
        source: where the constants are from, in words.
        flops_per_token_param: training FLOPs of a token for each parameter.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    source: str
    flops_per_token_param: float = 6.0

    def loss(self, params: float, tokens: float) -> float:
        """Loss of a model of so many parameters after so many tokens."""
        return self.E + self.A / params**self.alpha + self.B / tokens**self.beta

    def optimum(self, budget_flops: float) -> tuple[float, float]:
        """Parameters and tokens that give the lowest loss for training FLOPs (Hoffmann et al., equation 4)."""
        product = budget_flops / self.flops_per_token_param
        params = float(optimal_params(np.array([self.E, self.A, self.B, self.alpha, self.beta]), product))
        return params, product / params

    def tokens_for(self, params: float, loss: float) -> float:
        """Tokens after which a model of so many parameters has a loss.

        Raises:
            ValueError: no number of tokens is enough.
        """
        floor = self.E + self.A / params**self.alpha
        if loss <= floor:
            raise ValueError(
                f"a model of {params:.3g} parameters does not reach a loss of {loss:.4f} with any number of tokens: "
                f"by the law it stays above {floor:.4f}"
            )
        return (self.B / (loss - floor)) ** (1 / self.beta)


PUBLISHED = {
    "chinchilla": Law(1.69, 406.4, 410.7, 0.34, 0.28, "Hoffmann et al. 2022, arXiv:2203.15556, approach 3"),
    "chinchilla-replicated": Law(
        1.8172, 482.01, 2085.43, 0.3478, 0.3658, "Besiroglu et al. 2024, arXiv:2404.10102, on Hoffmann's runs"
    ),
}
"""Laws by name, of MassiveText and its tokenizer."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted sum of K power laws.

    Attributes:
        constants: E, then A of each term, then the exponent of each; float64 [1 + 2 K].
        draws: constants that the runs allow as well, float64 [draws, 1 + 2 K]; None where there are not more runs
            than constants.
        noise: standard deviation of a run's log loss that goes with each draw, float64 [draws]; None likewise.
        rms: root mean square of the runs' distance from the fit, as a fraction of the loss.
    """

    constants: np.ndarray
    draws: np.ndarray | None
    noise: np.ndarray | None
    rms: float

    def losses(self, *x: float) -> tuple[float, np.ndarray | None]:
        """Loss at a point, and losses that a single run there may have (float64 [draws])."""
        value = float(predict(self.constants, np.array(x)))
        if self.draws is None or self.noise is None:
            return value, None
        one_run = np.random.default_rng(1).standard_normal(len(self.noise))
        return value, predict(self.draws, np.array(x)) * np.exp(self.noise * one_run)


def predict(constants: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Loss by a sum of power laws.

    Args:
        constants: as in Fit, float64 [..., 1 + 2 K].
        x: float64 [..., K].

    Returns:
        float64 [...].
    """
    k = x.shape[-1]
    terms = constants[..., 1 : 1 + k] / x ** constants[..., 1 + k :]
    return constants[..., 0] + terms.sum(-1)


def optimal_params(constants: np.ndarray, product: float) -> np.ndarray:
    """Parameters that give the lowest L(N, D) for a product of parameters and tokens; at least one of each.

    Args:
        constants: E, A, B, alpha, beta; float64 [..., 5].
        product: parameters times tokens.

    Returns:
        float64 [...].
    """
    _, A, B, alpha, beta = np.moveaxis(constants, -1, 0)
    log_params = (np.log(alpha * A) - np.log(beta * B) + beta * np.log(product)) / (alpha + beta)
    return np.exp(np.clip(log_params, 0, np.log(product)))


def interval(values: np.ndarray | None) -> tuple[float, float] | None:
    """The middle COVERAGE of values, lower and upper end."""
    if values is None:
        return None
    low, high = np.quantile(values, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def fit(x_nK: np.ndarray, loss_n: np.ndarray, seed: int = 0) -> Fit:
    """Fits a sum of power laws.

    Args:
        x_nK: compute, or model size and tokens, of each run; positive float64 [n, K].
        loss_n: positive float64 [n]; at least as many runs as constants, 1 + 2 K.
        seed: of the draws.
    """
    n, k = x_nK.shape
    middle_K = np.log(x_nK).mean(0)  # as powers of x itself A and its exponent would be all but collinear
    logs_nK, log_loss_n = np.log(x_nK) - middle_K, np.log(loss_n)
    best = _best(logs_nK, log_loss_n[None], _starts(k, log_loss_n, EXPONENTS))[0]
    fitted_n, _ = _log_loss(best, logs_nK)
    squares, free = float(((fitted_n - log_loss_n) ** 2).sum()), n - (1 + 2 * k)
    constants, rms = _in_units(best, middle_K), (squares / n) ** 0.5
    if free < 1:
        return Fit(constants, None, None, rms)
    rng = np.random.default_rng(seed)
    noise = np.minimum(np.sqrt(squares / rng.chisquare(free, NUM_DRAWS)), 10)  # a factor of e^10 is as good as any
    drawn = fitted_n + noise[:, None] * rng.standard_normal((NUM_DRAWS, n))
    starts = np.concatenate([best[None], _starts(k, log_loss_n, FEW_EXPONENTS)])
    return Fit(constants, _in_units(_best(logs_nK, drawn, starts), middle_K), noise, rms)


def _in_units(theta: np.ndarray, middle_K: np.ndarray) -> np.ndarray:
    """From logarithms of E and each A, with x in units of its middle, to constants."""
    k = len(middle_K)
    exponents = theta[..., 1 + k :]
    scaled = np.exp(theta[..., 1 : 1 + k] + exponents * middle_K)
    return np.concatenate([np.exp(theta[..., :1]), scaled, exponents], -1)


def _log_loss(theta: np.ndarray, logs_nK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log losses [..., n], and the share that E and each term have of the loss [..., n, 1 + K]."""
    k = logs_nK.shape[1]
    terms = np.repeat(theta[..., None, : 1 + k], len(logs_nK), -2)
    terms[..., 1:] -= theta[..., None, 1 + k :] * logs_nK
    largest = terms.max(-1, keepdims=True)
    shares = np.exp(terms - largest)
    total = shares.sum(-1, keepdims=True)
    return (np.log(total) + largest)[..., 0], shares / total


def _huber(error: np.ndarray) -> np.ndarray:
    """Sum over the runs, which are the last axis."""
    clipped = np.clip(error, -DELTA, DELTA)
    return (clipped * (error - clipped / 2)).sum(-1)


def _starts(k: int, log_loss_n: np.ndarray, exponents: tuple[float, ...]) -> np.ndarray:
    """Equal parts of the mean loss, with all exponents; [X, 1 + 2 K]."""
    grid = np.array(list(itertools.product(exponents, repeat=k)))
    return np.concatenate([np.full((len(grid), 1 + k), log_loss_n.mean() - np.log(1 + k)), grid], 1)


def _best(logs_nK: np.ndarray, log_loss_Sn: np.ndarray, starts_XP: np.ndarray) -> np.ndarray:
    """The best constants for each of S sets of losses; logarithms of E and each A, and exponents [S, 1 + 2 K]."""
    sets, count = len(log_loss_Sn), len(starts_XP)
    found, value = _descend(np.tile(starts_XP, (sets, 1)), logs_nK, np.repeat(log_loss_Sn, count, 0))
    return found.reshape(sets, count, -1)[np.arange(sets), value.reshape(sets, count).argmin(1)]


def _descend(
    theta: np.ndarray, logs_nK: np.ndarray, log_loss: np.ndarray, max_steps: int = 300
) -> tuple[np.ndarray, np.ndarray]:
    """Lowers the Huber loss from each start until nothing changes.

    Args:
        theta: starts, float64 [S, 1 + 2 K].
        logs_nK: of x.
        log_loss: float64 [S, n].
        max_steps: at most.

    Returns:
        Constants [S, 1 + 2 K] and Huber losses [S].
    """
    k = logs_nK.shape[1]
    low = np.concatenate([np.full(1 + k, log_loss.min() - NOTHING), np.full(k, BOUNDS[0])])
    high = np.concatenate([np.full(1 + k, np.inf), np.full(k, BOUNDS[1])])
    fitted, shares = _log_loss(theta, logs_nK)
    value, damping = _huber(fitted - log_loss), np.full(len(theta), 1e-2)
    for _ in range(max_steps):
        error = fitted - log_loss
        weighted = np.minimum(1, DELTA / np.maximum(np.abs(error), 1e-300))
        slopes = np.concatenate([shares, -shares[..., 1:] * logs_nK], -1)  # [S, n, P], of log losses
        downhill = np.einsum("snp,sn,sn->sp", slopes, weighted, error)
        stays = ((theta <= low) & (downhill > 0)) | ((theta >= high) & (downhill < 0))
        slopes, downhill = np.where(stays[:, None], 0, slopes), np.where(stays, 0, downhill)
        curvature = np.einsum("snp,sn,snq->spq", slopes, weighted, slopes)
        diagonal = np.einsum("spp->sp", curvature)
        diagonal += damping[:, None] * diagonal + 1e-12  # in place: a view of the curvature
        step = np.linalg.solve(curvature, downhill[..., None])[..., 0]
        tried = np.clip(theta - step, low, high)
        tried_fitted, tried_shares = _log_loss(tried, logs_nK)
        tried_value = _huber(tried_fitted - log_loss)
        better = tried_value < value
        gain = np.where(better, value - tried_value, 0)
        theta, fitted = np.where(better[:, None], tried, theta), np.where(better[:, None], tried_fitted, fitted)
        shares = np.where(better[:, None, None], tried_shares, shares)
        value = np.where(better, tried_value, value)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e9)
        if (gain <= 1e-9 * value).all() and (damping[~better] > 1e6).all():
            break
    return theta, value
