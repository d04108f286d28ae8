"""The transformer: embedding, layer stack, output projection."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config import ModelConfig
from maxlm.model.dropout import Drop, keep_all
from maxlm.model.head import HeadTransform
from maxlm.model.linear import spread
from maxlm.model.norm import Norm
from maxlm.model.param import constant, dims_of, normal
from maxlm.model.stack import Aux, gather_weight, make_layers, use_weights
from maxlm.sharding import compute_spec, constrain, einsum, gather

STACKS = ("dense_layers", "layers")
"""Names of the parameters of layers, in order."""

Stack = Callable[[nnx.Dict, jax.Array, jax.Array, jax.Array, int], tuple[jax.Array, Aux]]
"""(layers, x_BTD, positions_BT, segments_BT, number of the first) -> x_BTD and sums of what layers report."""


class Transformer(nnx.Module):
    """Parameters of the whole model, created in their resting places.

    Must be created and called under `jax.set_mesh`.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, stack_shape: tuple[int, ...] | None = None):
        """Args: stack_shape: leading dims of the layers' parameters, see stack.make_layers."""
        self.config = config
        embed_key, position_key, layer_key, head_key = jax.random.split(key, 4)
        self.embed = normal(embed_key, "VD", config, config.init_std)
        learned = config.position == "learned"
        self.positions = normal(position_key, "TD", config, config.init_std) if learned else None
        types_key, transform_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        self.token_types = normal(types_key, "YD", config, config.init_std) if config.num_token_types else None
        self.embed_norm = Norm(config) if config.embed_norm else None
        lead, pattern, dense = config.num_lead_layers, config.lead_pattern, config.num_experts is None
        lead_key = jax.random.fold_in(layer_key, 0)
        self.dense_layers = make_layers(lead_key, config, pattern, lead // len(pattern), True) if lead else None
        self.layers = make_layers(layer_key, config, config.main_pattern, config.num_repeats, dense, stack_shape)
        self.final_norm = None if config.norm_position == "residual" else Norm(config)
        self.head = HeadTransform(transform_key, config) if config.head_transform else None
        self.unembed = None if config.tie_embeddings else normal(head_key, "DV", config, config.d_model**-0.5)
        self.unembed_bias = constant("V", config, 0.0) if config.unembed_bias else None

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        stack: Stack,
        drop: Drop = keep_all,
        types_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, Aux]:
        """Runs embedding and layers; `hidden` and `logits` take what comes out.

        Args:
            tokens_BT: int32 token ids.
            positions_BT: int32 positions within documents.
            segments_BT: int32 document numbers; a token attends within its own.
            stack: runs the layers.
            drop: dropout of the embedding.
            types_BT: int32 token types, of a model that has them; None: all are 0.

        Returns:
            The residual stream [B, T, D], and the sums over layers of what they report.
        """
        x_BTD = self.embedded(tokens_BT, positions_BT, drop, types=types_BT)
        if self.dense_layers is not None:
            x_BTD, _ = stack(self.dense_layers, x_BTD, positions_BT, segments_BT, 0)
        return stack(self.layers, x_BTD, positions_BT, segments_BT, self.config.num_lead_layers)

    def embedded(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        drop: Drop = keep_all,
        dims: str = "BT",
        types: jax.Array | None = None,
    ) -> jax.Array:
        """What enters the layers.

        Args:
            tokens: int32 token ids.
            positions: int32 positions within documents.
            drop: dropout.
            dims: their dimensions, "BT" or "MBT".
            types: int32 token types; None: all are 0.

        Returns:
            dims + "D" in the compute dtype.
        """
        dtype = jnp.dtype(self.config.dtype)
        with jax.named_scope("embedding"):
            x = _lookup(f"{dims}D", gather(self.embed[...], "VD", dtype), tokens)
            if self.config.embedding_scale is not None:
                x = x * jnp.asarray(self.config.embedding_scale, dtype)
            if self.positions is not None:
                x = x + _lookup(f"{dims}D", gather(self.positions[...], "TD", dtype), positions)
            if self.token_types is not None:
                types = jnp.zeros_like(tokens) if types is None else types
                x = x + _lookup(f"{dims}D", gather(self.token_types[...], "YD", dtype), types)
            if self.embed_norm is not None:
                x = _in_use(self.embed_norm, dtype)(x, f"{dims}D")
            return drop(x, 0)

    def hidden(self, x_BTD: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] of what leaves the layers: the residual stream after the last norm."""
        if self.final_norm is None:
            return x_BTD
        graphdef, state = nnx.split(self.final_norm)
        x_BTD, state = _grads_together((x_BTD, state))
        return nnx.merge(graphdef, use_weights(state, dims_of(state), x_BTD.dtype, 0, gather_weight))(x_BTD)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 logits [B, T, V] over the padded vocabulary of what leaves the layers.

        Padding is the lowest float and cannot be sampled.
        """
        weight, dims = self.projection
        gathered = gather(weight, dims, x_BTD.dtype)
        x_BTD = self.projected(x_BTD)
        logits_BTV = einsum(f"BTD,{dims}->BTV", x_BTD, gathered, preferred_element_type=jnp.float32)
        if self.unembed_bias is not None:
            logits_BTV = logits_BTV + spread(gather(self.unembed_bias[...], "V", jnp.float32), logits_BTV, "BTV")
        return self._finish(logits_BTV)

    def projected(self, x_BTD: jax.Array) -> jax.Array:
        """What the output projection multiplies [B, T, D], of what leaves the layers."""
        x_BTD = self.hidden(x_BTD)
        return x_BTD if self.head is None else _in_use(self.head, x_BTD.dtype)(x_BTD)

    @property
    def projection(self) -> tuple[jax.Array, str]:
        """The weight that makes logits, and its dimension letters."""
        return (self.embed[...], "VD") if self.unembed is None else (self.unembed[...], "DV")

    def _finish(self, logits_BTV: jax.Array) -> jax.Array:
        config = self.config
        if config.logit_softcap is not None:
            logits_BTV = config.logit_softcap * jnp.tanh(logits_BTV / config.logit_softcap)
        if config.padded_vocab == config.vocab_size:
            return logits_BTV
        real_V = constrain(jnp.arange(config.padded_vocab) < config.vocab_size, "V")
        return jnp.where(real_V[None, None], logits_BTV, jnp.finfo(jnp.float32).min)


def _in_use(module: Any, dtype: Any) -> Any:
    """A part of the model with its weights brought into use."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, use_weights(state, dims_of(state), dtype, 0, gather_weight))


@jax.custom_vjp
def _grads_together(tree: Any) -> Any:
    """The same; gradients by its arrays go on when all are there.

    Else the compiler puts off the gradient of the last norm's weight until the layers' backward pass has ended, and
    keeps what it needs so long: the residual stream and its gradient.
    """
    return tree


_grads_together.defvjp(lambda tree: (tree, None), lambda _, grads: (jax.lax.optimization_barrier(grads),))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(dims: str, table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table [dims]; the gradient is summed in float32, since a frequent token's bf16 sum would stall."""
    return _whole(table_VD).at[ids].get(out_sharding=compute_spec(dims))


def _lookup_fwd(dims: str, table_VD: jax.Array, ids: jax.Array) -> tuple[jax.Array, Any]:
    return _lookup(dims, table_VD, ids), (table_VD, ids)


def _lookup_bwd(dims: str, saved: Any, g: jax.Array) -> tuple[jax.Array, None]:
    table_VD, ids = saved
    plain = lambda table: _whole(table).at[ids].get(out_sharding=compute_spec(dims))  # noqa: E731
    _, pull = jax.vjp(plain, table_VD.astype(jnp.float32))
    return pull(g.astype(jnp.float32))[0].astype(table_VD.dtype), None


_lookup.defvjp(_lookup_fwd, _lookup_bwd)


def _whole(table_VD: jax.Array) -> jax.Array:
    """The table whole over tensor too, so that any row can be read."""
    return jax.reshard(table_VD, jax.P(None, None, reduced=jax.typeof(table_VD).sharding.spec.reduced))
