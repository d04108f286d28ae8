"""What int8 and fp8 products cost on TPUs that are not there: one layer of Llama-3.1-8B on one chip, by the compiler.

    python tools/bench_quant.py                      # v5e, v5p and v6e: 5 to 10 minutes
    python tools/bench_quant.py v5e:2x2 int8 int8-bf16-weights

Forward and backward with full remat, 8,192 tokens, bfloat16 activations and weights; attention is replaced by an
elementwise stand-in, so that products and what rounds their operands are all there is. Default options of the compiler.
The whole model: maxlm compile configs/llama3_8b.yaml --on v5e:4x4 --quant. Needs libtpu, no TPU. Columns:

    cycles    the compiler's estimates, summed
    of bf16   over those of bfloat16
    products  what of them is products, with what is fused into them
    s8        products of int8 in the program
    at work   memory besides arguments
"""

import argparse
import dataclasses
import json
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from maxlm import hlo, units
from maxlm.hardware import detect
from maxlm.model.stack import REMAT_POLICIES
from maxlm.parallel.quantized import quantized_einsum
from maxlm.quant import Recipe
from maxlm.quant_rules import SUMMED_INSIDE
from maxlm.topology import topology_devices

T, D, F, N, K, H = 8192, 4096, 14336, 32, 8, 128
WEIGHTS = {"q": (D, N, H), "k": (D, K, H), "v": (D, K, H), "o": (N, H, D), "gate": (D, F), "up": (D, F), "down": (F, D)}
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
KINDS = {
    "bf16": None,
    "int8": Recipe(),
    "int8-anew": Recipe(anew=True),
    "int8-bf16-weights": Recipe(d_weight="bf16"),
    "int8-forward": Recipe(d_activation="bf16", d_weight="bf16"),
    "fp8": Recipe("fp8", "fp8", "fp8"),
}


def layer(recipe: Recipe | None, params: dict[str, jax.Array], x: jax.Array, words: jax.Array) -> jax.Array:
    """A layer whose attention is an elementwise product."""
    salts = {name: i for i, name in enumerate(WEIGHTS)}

    def times(subscripts: str, x: jax.Array, name: str) -> jax.Array:
        if recipe is None:
            return jnp.einsum(subscripts, x, params[name])
        own = dataclasses.replace(recipe, salt=salts[name])
        return quantized_einsum(subscripts, own, x, params[name], words)[0]

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)
        return (y * scale * weight.astype(jnp.float32)).astype(x.dtype)

    h = norm(x, params["norm1"])
    q, k, v = times("BTD,DNH->BTNH", h, "q"), times("BTD,DKH->BTKH", h, "k"), times("BTD,DKH->BTKH", h, "v")
    mixed = q * jnp.repeat(jnp.tanh(k) * v, N // K, axis=2)
    x = x + times("BTNH,NHD->BTD", mixed, "o")
    h = norm(x, params["norm2"])
    h = jax.nn.silu(times("BTD,DF->BTF", h, "gate")) * times("BTD,DF->BTF", h, "up")
    return x + times("BTF,FD->BTD", h, "down")


def measure(topology: str, recipe: Recipe | None) -> dict[str, Any]:
    """Figures of one compiled layer."""
    device = topology_devices(topology)[0]
    mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Explicit,))
    chip = detect(device)
    if recipe is not None and chip is not None:
        recipe = dataclasses.replace(recipe, summed_inside=chip.name in SUMMED_INSIDE)

    def shape(*dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, jax.P()))

    keep = REMAT_POLICIES["full"]

    def both(params: Any, x: jax.Array, g: jax.Array, words: jax.Array) -> Any:
        y, pull = jax.vjp(jax.checkpoint(lambda params, x: layer(recipe, params, x, words), policy=keep), params, x)
        return y, pull(g)

    params = {name: shape(*dims) for name, dims in WEIGHTS.items()} | {"norm1": shape(D), "norm2": shape(D)}
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = jax.jit(both).lower(params, shape(1, T, D), shape(1, T, D), shape(1, T, dtype=jnp.uint32))
        compiled = lowered.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    costs = [(op.cycles * op.times, op.source) for op in hlo.operations(text) if op.cycles]
    return {
        "cycles": sum(cost for cost, _ in costs),
        "products": sum(cost for cost, source in costs if "dot_general" in source),
        "s8": len(re.findall(r"= s32\[[^\]]*\]\S* (?:convolution|dot)\(", text)),
        "heap_bytes": memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
        "compile_s": time.perf_counter() - started,
    }


def main() -> int:
    """Prints a line per topology and type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="*", metavar="TOPOLOGY or TYPE", help=f"topologies; types: {', '.join(KINDS)}")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each")
    args = parser.parse_args()
    topologies = [name for name in args.wanted if ":" in name] or TOPOLOGIES
    kinds = [name for name in args.wanted if ":" not in name] or ["int8"]
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"unknown type {', '.join(sorted(unknown))}; choose among {', '.join(KINDS)}")
    for topology in topologies:
        plain = None
        for kind in dict.fromkeys(["bf16", *kinds]):
            figures = measure(topology, KINDS[kind])
            plain = plain or figures["cycles"]
            result = {"topology": topology, "kind": kind, **figures, "of_bf16": figures["cycles"] / plain}
            print(json.dumps(result) if args.json else line(result), flush=True)
    return 0


def line(result: dict[str, Any]) -> str:
    """A result for people."""
    return (
        f"{result['topology']:10} {result['kind']:18} {result['cycles'] / 1e6:7.1f} M cycles, {result['of_bf16']:.3f} "
        f"of bf16, products {result['products'] / 1e6:6.1f} M, {result['s8']} of s8, at work "
        f"{units.size(result['heap_bytes'])}, compiled in {result['compile_s']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
