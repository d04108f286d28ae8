"""The optimizer: an optax chain, where its state lives, and the update inside the train step.

Every optimizer is the same chain, so that clipping, decay, learning rates and freezing mean the same for all five:

    clip to global norm -> direction (the optimizer proper) -> + weight_decay * param -> * -lr(step) -> * factor by path

optax transforms run unchanged on typed shardings (Explicit mesh axes), with one exception, the Newton-Schulz iteration
of muon: see `_over_layers`. Their init is typed too: for parameters with shardings, the types of its result say where
every leaf of the state rests, which is like its parameter on the dims it keeps (a factored second moment loses the axes
of the dims it is averaged over; counts are replicated).
"""

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from maxlm.config import OptimConfig
from maxlm.config_file import ConfigError
from maxlm.moments import kept_in
from maxlm.schedule import make_schedule

Tree = Any
"""A nested dict with one leaf per parameter, or an optimizer state."""

MUON_RMS = 0.2
"""Root mean square of muon's update before the learning rate, which is about AdamW's."""


def make_optimizer(
    optim: OptimConfig, num_steps: int, dims: Tree, router_bias_rate: float = 0.0, num_repeats: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer of a run.

    - adamw: bias-corrected first and second moments (beta1, beta2, eps).
    - sgd: heavy-ball momentum, m = momentum * m + gradient.
    - adafactor: second moments only, with its own decay 1 - (step + 1) ** -0.8. A parameter whose two largest dims
      are both >= 128 keeps a row and a column of them, others keep them whole. Updates are clipped to root mean
      square 1 per parameter (a stack of layers counts as one). The learning rate is absolute: neither relative steps
      nor parameter scaling, since lr and lr_rules already say it.
    - lion: sign of an average of the gradient (beta1, beta2); wants a learning rate 3 to 10 times below adamw's.
    - muon: momentum (Nesterov), orthogonalized layer by layer. The update has root mean square 0.2 whatever the
      shape of the matrix, so learning_rate and weight_decay are those of adamw. Embeddings, the output projection,
      positions, norms and biases take adamw's direction with beta1, beta2, eps and peak rate adam_lr.

    Rules by path are resolved here, so a wrong regular expression is an error before anything compiles. Frozen
    parameters have no state, and their gradients do not count in the norm that is clipped. The learning rate depends
    on the update count in the state only, so a restored state continues the schedule. Biases of routers follow none of
    this: their gradient is a load error, and they move against its sign by router_bias_rate.

    Args:
        optim: optimizer, schedule, and rules by path. An empty decay_mask decays every parameter.
        num_steps: optimizer steps of the whole run, a count.
        dims: for every parameter its dimension letters, such as {"layers": {"mlp": {"w_up": "LDF"}}}.
        router_bias_rate: step of the routers' biases, in units of scores.
        num_repeats: real layers of a pipeline's stacks (RPL); default: all, they are not filled up.

    Returns:
        An optax transformation; `update` applies it.

    Raises:
        ConfigError: an expression of decay_mask, lr_rules or freeze is invalid, or matches no parameter.

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019; Shazeer and Stern, Adafactor, 2018;
        Chen et al., Symbolic Discovery of Optimization Algorithms, 2023 (lion); Jordan et al., Muon, 2024;
        Liu et al., Muon is Scalable for LLM Training, 2025, equation 4 (the 0.2).
    """
    frozen = _matching("freeze", optim.freeze, dims)
    live = jax.tree.map(lambda is_frozen, d: not is_frozen and not _is_router_bias(d), frozen, dims)
    steps = [kept_in(optim.state_dtype, _direction(optim, dims, live, num_repeats))]
    # Links that do nothing stay in the chain: a resumed run may turn clipping or decay on and off.
    bound = None if optim.state_on_host else optim.clip_norm  # there the caller clips: see clip_factor
    steps.insert(0, optax.identity() if bound is None else optax.clip_by_global_norm(bound))
    if not optim.weight_decay:
        steps.append(optax.add_decayed_weights(0.0, mask=live))
    else:
        kept = _matching("decay_mask", [optim.decay_mask] if optim.decay_mask else [], dims)
        steps.append(optax.add_decayed_weights(optim.weight_decay, mask=jax.tree.map(lambda m: not m, kept)))
    steps.append(optax.scale_by_learning_rate(make_schedule(optim, num_steps)))
    steps.append(_scale(_lr_factors(optim, dims)))
    return _partition(optax.chain(*steps), frozen, dims, router_bias_rate)


def grad_norm(grads: Tree, dims: Tree, freeze: Iterable[str] = ()) -> jax.Array:
    """Global norm of the gradients, without the load errors of routers' biases.

    Args:
        grads: float32 gradients.
        dims: dimension letters of every parameter.
        freeze: expressions of parameters that do not count either.
    """
    trees = grads, dims, _matching("freeze", freeze, dims)
    leaves = zip(*map(jax.tree.leaves, trees), strict=True)
    squares = [jnp.square(g).sum() for g, d, is_frozen in leaves if not (is_frozen or _is_router_bias(d))]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def clip_factor(optim: OptimConfig, grads: Tree, dims: Tree) -> jax.Array:
    """By what optax.clip_by_global_norm would multiply all gradients."""
    if optim.clip_norm is None:
        return jnp.ones(())
    return jnp.minimum(1.0, optim.clip_norm / grad_norm(grads, dims, optim.freeze))


def update(
    tx: optax.GradientTransformation, params: Tree, opt_state: Tree, grads: Tree, good: jax.typing.ArrayLike = True
) -> tuple[Tree, Tree]:
    """One optimizer step; called inside the jitted train step.

    Args:
        tx: from make_optimizer.
        params: float32 parameters, laid out as they rest.
        opt_state: from tx.init, laid out as its types say.
        grads: float32 gradients, already reduced over devices and laid out like the parameters.
        good: bool scalar; without it parameters and state stay as they are, counts of updates too.

    Returns:
        New parameters and state, with the shardings of the old ones.
    """
    # optax mixes Python floats with integer counts, which strict promotion (our tests) refuses.
    with jax.numpy_dtype_promotion("standard"), jax.named_scope("optimizer"):
        updates, new_state = tx.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates), new_state
        return jax.tree.map(partial(jnp.where, good), new, (params, opt_state))


def ema_update(ema: Tree, params: Tree, decay: float, step: jax.typing.ArrayLike) -> Tree:
    """Moves the average of the weights towards the weights: ema + (1 - d) * (params - ema).

    The average starts as a copy of the initial weights, not at zero, so there is no bias to divide out; instead
    d = min(decay, (1 + step) / (10 + step)) makes it forget them: while the second is smaller, their share falls
    as step ** -9.

    Args:
        ema: float32 average, starting as a copy of the parameters.
        params: float32 parameters after the update.
        decay: its decay per step, in (0, 1).
        step: 0-based step of that update, int or int32 scalar.

    Returns:
        The new average, sharded like the old one.

    References:
        Polyak and Juditsky, 1992; the warmup is num_updates of tf.train.ExponentialMovingAverage.
    """
    step = jnp.asarray(step, jnp.float32)
    keep = jnp.minimum(jnp.float32(decay), (1 + step) / (10 + step))
    return optax.incremental_update(params, ema, 1 - keep)


def _partition(
    trained: optax.GradientTransformation, frozen: Tree, dims: Tree, router_bias_rate: float
) -> optax.GradientTransformationExtraArgs:
    """Every parameter with its own rule: trained, frozen, or balanced (a router's bias)."""
    label = lambda f, d: "frozen" if f else "balanced" if _is_router_bias(d) else "trained"  # noqa: E731
    rules: dict[Any, optax.GradientTransformation] = {"trained": trained, "frozen": optax.set_to_zero()}
    if router_bias_rate:
        against = lambda errors, _: jax.tree.map(lambda e: -router_bias_rate * jnp.sign(e), errors)  # noqa: E731
        rules["balanced"] = optax.stateless(against)
    return optax.partition(rules, jax.tree.map(label, frozen, dims))


def _direction(optim: OptimConfig, dims: Tree, live: Tree, num_repeats: int | None) -> optax.GradientTransformation:
    """The optimizer proper: gradients to the direction of ascent, before decay and learning rate."""
    adam = optax.scale_by_adam(optim.beta1, optim.beta2, optim.eps)
    if optim.name == "adamw":
        return adam
    if optim.name == "sgd":
        return optax.trace(optim.momentum)
    if optim.name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), _clip_rms(dims, num_repeats))
    if optim.name == "lion":
        return optax.scale_by_lion(optim.beta1, optim.beta2)
    numbers = jax.tree.map(_matrix_axes, dims)
    is_matrix = jax.tree.map(lambda n, a: n is not None and a, numbers, live, is_leaf=_is_numbers)
    others = jax.tree.map(lambda m, a: not m and a, is_matrix, live)
    masked = jax.tree.map(lambda n, m: n if m else optax.MaskedNode(), numbers, is_matrix, is_leaf=_is_numbers)
    orthogonal = _over_layers(scale_by_muon(beta=optim.momentum, weight_dimension_numbers=masked), dims)
    muon = optax.chain(orthogonal, _to_rms(masked))
    return optax.chain(optax.masked(muon, is_matrix), optax.masked(adam, others))


def _clip_rms(dims: Tree, num_repeats: int | None) -> optax.GradientTransformation:
    """optax.clip_by_block_rms(1.0) of what is real: the zeros that fill up a pipeline's stack do not count."""

    def clip(dims: str, u: jax.Array) -> jax.Array:
        filled = math.prod(u.shape[:3]) / num_repeats if num_repeats and dims.startswith("RPL") else 1.0
        return u / jnp.maximum(1.0, jnp.sqrt(jnp.square(u).mean() * filled))

    return optax.stateless(lambda updates, _: _masked_map(clip, dims, updates))


def _is_router_bias(dims: str) -> bool:
    return "X" in dims and "D" not in dims


def _is_numbers(x: Any) -> bool:
    return x is None or isinstance(x, MuonDimensionNumbers)


def _matrix_axes(dims: str) -> MuonDimensionNumbers | None:
    """Input and output dims of a parameter that muon treats as a matrix (per layer and expert), else None.

    A matrix maps the residual stream D to heads or features, or back. What has vocabulary or position rows is a
    table, whose rows get gradients one by one; a router (X) is a table of experts; what has no D and another dim is a
    bias or a norm.
    """
    rest = [i for i, letter in enumerate(dims) if letter not in "LRPE"]
    letters = [dims[i] for i in rest]
    if "D" not in letters or len(rest) < 2 or not {"V", "T", "X"}.isdisjoint(letters):
        return None
    d, others = dims.index("D"), tuple(i for i in rest if dims[i] != "D")
    return MuonDimensionNumbers((d,), others) if d == rest[0] else MuonDimensionNumbers(others, (d,))


def _to_rms(numbers: Tree) -> optax.GradientTransformation:
    """Scales orthogonal matrices, whose root mean square is max(fan_in, fan_out) ** -0.5, to MUON_RMS."""

    def scale(n: tuple[tuple[int, ...], tuple[int, ...]], x: jax.Array) -> jax.Array:
        fans = [math.prod(x.shape[i] for i in axes) for axes in n]
        return x * (MUON_RMS * math.sqrt(max(fans)))

    return optax.stateless(lambda updates, _: jax.tree.map(scale, numbers, updates, is_leaf=_is_numbers))


def _over_layers(muon: optax.GradientTransformation, dims: Tree) -> optax.GradientTransformation:
    """Runs scale_by_muon with whole matrices: the layers of a stack are dealt out to the devices.

    Newton-Schulz multiplies a matrix with its transpose, five times three products. On sharded matrices each product
    is communication (and a type error under Explicit axes). So every mesh axis that splits a matrix is moved to the
    layer dim, by one all-to-all each, and back afterwards. On n devices each computes ceil(L / n) layers whole; a stack
    that n does not divide is filled up with zeros, which stay zeros. The stages of a pipeline do so with their own
    layers. A matrix outside a stack is left to the partitioner (auto_axes), which gathers it.
    """

    def update_fn(updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
        del params
        dealt = _masked_map(_deal, dims, updates), state._replace(mu=_masked_map(_deal, dims, state.mu))
        run: Any = muon.update
        if not jax.sharding.get_abstract_mesh().empty:  # it is on a single device without a mesh
            specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, dealt)
            run = jax.sharding.auto_axes(muon.update, out_sharding=specs)
        new, new_state = run(*dealt)
        return (
            _masked_map(_collect, dims, new, updates),
            new_state._replace(mu=_masked_map(_collect, dims, new_state.mu, state.mu)),
        )

    return optax.GradientTransformation(muon.init, update_fn)


def _deal(dims: str, x: jax.Array) -> jax.Array:
    x = _join_rounds(dims, x)
    *_, last = path = _layer_path(dims, x)
    sizes = jax.sharding.get_abstract_mesh().shape
    at = dims.find("L")
    missing = -x.shape[at] % math.prod(sizes[axis] for axis in _axes(last[at])) if len(path) > 1 else 0
    if missing:
        x = jnp.pad(x, [(0, missing if i == at else 0) for i in range(x.ndim)])
    return _hops(x, path[1:])


def _collect(dims: str, x: jax.Array, home: jax.Array) -> jax.Array:
    joined, at = jax.eval_shape(partial(_join_rounds, dims), home), dims.find("L")
    x = _hops(x, _layer_path(dims, joined)[-2::-1])
    x = x if x.shape == joined.shape else jax.lax.slice_in_dim(x, 0, joined.shape[at], axis=at)
    if x.shape == home.shape:
        return x
    num_rounds, num_stages, *rest = home.shape
    return x[0].reshape(num_stages, num_rounds, *rest).swapaxes(0, 1)


def _join_rounds(dims: str, x: jax.Array) -> jax.Array:
    """All layers that a stage of a pipeline holds side by side: [R, P, L, ...] -> [1, P, R * L, ...]."""
    if not dims.startswith("RPL") or x.shape[0] == 1:
        return x
    num_rounds, num_stages, num_layers, *rest = x.shape
    return x.swapaxes(0, 1).reshape(num_stages, num_rounds * num_layers, *rest)[None]


def _hops(x: jax.Array, specs: list[P]) -> jax.Array:
    """Reshards step by step."""
    # Shardy lets other uses of x start from the last of several hops, so that a momentum on its way home was replicated
    # for Newton-Schulz. The barrier gives the hops an x of their own.
    x = jax.lax.optimization_barrier(x) if specs else x
    for spec in specs:
        x = jax.reshard(x, spec)
    return x


def _layer_path(dims: str, x: jax.Array) -> list[P]:
    """Specs from how x rests to its layers dealt out over devices, one mesh axis per hop.

    Several axes in one reshard make XLA replicate the array first; one by one each is an all-to-all.
    """
    spec = jax.typeof(x).sharding.spec
    entries = [_axes(e) for e in spec.partitions]
    path = [spec]
    at = dims.find("L")
    for i in range(at + 1, len(entries)) if at >= 0 else ():
        while entries[i] and dims[i] != "E":  # experts stay apart: each is a matrix of its own
            *rest, axis = entries[i]
            entries[at], entries[i] = (*entries[at], axis), tuple(rest)
            path.append(P(*(e or None for e in entries)))
    return path


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _masked_map(f: Callable[..., jax.Array], facts: Tree, *trees: Tree) -> Tree:
    """Maps f(fact, *leaves) over parameters that the trees have, and leaves optax's MaskedNodes alone."""

    def is_masked(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    def call(x: Any, fact: Any, *rest: Any) -> Any:
        return x if is_masked(x) else f(fact, x, *rest)

    return jax.tree.map(call, trees[0], facts, *trees[1:], is_leaf=is_masked)


def _lr_factors(optim: OptimConfig, dims: Tree) -> Tree:
    """Each parameter's learning rate as a multiple of the schedule's."""
    for pattern in optim.lr_rules:
        _matching("lr_rules", [pattern], dims)
    adam_lr = optim.adam_lr if optim.name == "muon" and optim.adam_lr is not None else optim.learning_rate

    def factor(path: str, letters: str) -> float:
        own = adam_lr / optim.learning_rate if _matrix_axes(letters) is None else 1.0
        return own * next((f for pattern, f in optim.lr_rules.items() if re.fullmatch(pattern, path)), 1.0)

    return jax.tree_util.tree_map_with_path(lambda keys, d: factor(_path(keys), d), dims)


def _scale(factors: Tree) -> optax.GradientTransformation:
    def update_fn(updates: Tree, _: Tree) -> Tree:
        return _masked_map(lambda f, x: x if f == 1.0 else x * f, factors, updates)

    return optax.stateless(update_fn)


def _matching(field: str, patterns: Iterable[str], dims: Tree) -> Tree:
    """A tree of bools: does a pattern match the whole path of the parameter?

    Raises:
        ConfigError: a pattern is invalid, or matches no parameter.
    """
    paths = [_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(dims)]
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"optim.{field}: {pattern!r} is not a regular expression: {error}") from None
        if not any(compiled[-1].fullmatch(path) for path in paths):
            raise ConfigError(
                f"optim.{field}: {pattern!r} matches no parameter; it must match a whole path such as "
                f"{', '.join(paths[:: max(1, len(paths) // 4)][:4])}"
            )
    return jax.tree_util.tree_map_with_path(lambda keys, _: any(c.fullmatch(_path(keys)) for c in compiled), dims)


def _path(keys: tuple[Any, ...]) -> str:
    return ".".join(key.key for key in keys)
