"""Eight fake CPU devices, strict number types, no state that leaks from one test to the next.

Everything up to the fixtures has to happen before jax makes its first array.
"""

import gc
import importlib.metadata
import importlib.util
import os
import signal

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a test that wants the cache turns it on for itself
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu compiles without asking for the machine it would run on
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reads the network
os.environ["MPLBACKEND"] = "agg"
os.environ["MAXLM_CALIBRATION"] = os.environ["MAXLM_PRICES"] = ""  # not those of whoever runs the tests
# On a busy machine eight devices share few cores: wait for a slow collective, do not abort the process.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        # Tests compile for minutes and compute for seconds: no optimization, no pieces for more threads, plain kernels.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        # Compiles in half the time; unknown to the jaxlib of jax 0.12, which ends the process at an unknown flag.
        "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib") < "0.11" else "",
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
).strip()

# In the background of a script SIGINT is ignored, and would be in programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# By config and not by environment: programs that tests start see the machine as a user's would.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ORACLES = {"torch": "torch", "transformers": "transformers", "aqtp": "aqt"}  # package: module


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names a test by the beginning of a long text: the names of all tests go back and forth between processes."""
    return repr(val[:40]) if isinstance(val, str | bytes) and len(val) > 1000 else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives tests that use libtpu one process, begins with those that take long, and skips what is not installed."""
    # one that takes a minute and comes last leaves the other processes without work
    items.sort(key=lambda item: not (item.get_closest_marker("long") or item.get_closest_marker("slow")))
    missing = [package for package, module in ORACLES.items() if not _is_installed(module)]
    for item in items:
        if item.get_closest_marker("oracle") and missing:
            reason = f"{', '.join(missing)} not installed; install with: make test-oracles"
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("tpu"):
            item.add_marker(pytest.mark.xdist_group("tpu"))
            if not _is_installed("libtpu"):
                reason = "libtpu not installed; install with: pip install 'maxlm[plan]'"
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Collects garbage less often: tracing makes millions of objects that live on, and each round looks at them all."""
    gc.collect()
    gc.freeze()  # what imports have made stays
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder of compiled programs, which all test processes share."""
    own = tmp_path_factory.getbasetemp()
    return str((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "xla")


@pytest.fixture(scope="module")
def compiled_once(compiled):
    """The folder of compiled programs: a module's programs of one kind compile once, as in a user's second start."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": compiled,
        "jax_compilation_cache_max_size": 1 << 33,  # with a limit, jax locks the folder
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield compiled
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def no_mesh_left_set():
    """A test that calls jax.set_mesh and does not leave it would lend its mesh to the next one."""
    yield
    if not jax.sharding.get_abstract_mesh().empty:
        jax.set_mesh(None)
        pytest.fail("the test left jax.set_mesh set; use `with jax.set_mesh(mesh):`")
