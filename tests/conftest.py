"""Eight CPU devices for every test, a persistent compilation cache, quick compiles, nothing else."""

import contextlib
import fnmatch
import importlib.metadata
import io
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs of tests run once or twice: compiling is nearly all of their time. What users run, commands and notebook in
# processes of their own, compiles as shipped.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")  # one LLVM module a program: a tenth less time
FLAGS.append("--xla_llvm_disable_expensive_passes=true")  # a twentieth less
if importlib.metadata.version("jax") < "0.11":  # later ones do not know the flag
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # a kept program is read in half of its time
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # no program says where its lines are from: a twentieth

import gc  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import matplotlib.figure  # noqa: E402
import pytest  # noqa: E402

from tests.left_out import LEFT_OUT  # noqa: E402

gc.set_threshold(100_000, 20, 100)  # tracing makes many objects that live: walking them is a tenth of the time

assert jax.device_count() == 8, "the tests need eight forced CPU devices: import jax only after conftest"


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the slow tests (real model, several processes)")


# An ordinary run tries the same examples each time, whatever ran before and however slow the machine; --all explores.
SETTINGS = dict(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, **SETTINGS)
hypothesis.settings.register_profile("explore", print_blob=True, **SETTINGS)


def pytest_configure(config):
    hypothesis.settings.load_profile("explore" if config.getoption("--all") else "fixed")
    config.addinivalue_line("markers", "slow: needs the real model, several processes or minutes; run with --all")
    config.addinivalue_line("markers", "pictures: looks at pictures, which are not rendered elsewhere")


# Longest first (`--durations=0`, summed by file): two workers take file after file, and one that takes a long file last
# works alone in the end. What is not listed is short; it comes after, in the usual order. xdist would put the files of
# many tests first, whatever they take: `launch/test.sh` says `--no-loadscope-reorder`.
LONGEST = (
    "test_faults", "battery/test_methods", "core/test_routing", "battery/test_product", "training/test_loop",
    "kernels/test_ops", "acceptance/test_flexolmo", "export/test_load", "evaluation/test_load_run",
    "acceptance/test_moa_hetero", "backbones/test_families", "core/test_contracts", "cases/test_zero_rows",
    "engines/test_equal", "decode/test_generate", "acceptance/test_dmoerm", "acceptance/test_llava_mole",
    "acceptance/test_moe_surveys", "surgery/test_runs", "acceptance/test_lora_mixer", "stores/test_stores",
    "modules/test_layers", "core/test_step", "training/test_probe", "modules/test_docs", "training/test_knobs",
    "acceptance/test_x_lora", "export/test_formats", "evaluation/test_report", "acceptance/test_coe",
    "training/test_disk", "acceptance/test_kshot_experts", "cases/test_beliefs",
)  # fmt: skip


@pytest.fixture
def without_cache():
    """For programs of devices that are not there: an executable without a client cannot be read back."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


# Tests start processes, which inherit this: what one file leaves behind would be another one's fault.
def _inherited() -> dict:
    return {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_", "MOLORA_"))}


AT_THE_START = _inherited()


def pytest_collection_finish(session):
    assert _inherited() == AT_THE_START, "a module of tests changes the environment when it is imported"
    gc.collect()
    gc.freeze()  # modules and items live to the end: no collection has to walk them again


def pytest_collection_modifyitems(config, items):
    place = {f"tests/{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))
    if config.getoption("--all"):
        return
    left_out = pytest.mark.slow
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in LEFT_OUT):
            item.add_marker(left_out)
    # the marker, not `item.keywords`, which also hold the names of folders: a clone in one called "slow" ran nothing
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


# Every run ends with pictures, half a second each. All of them are put together; those in files are rendered for the
# tests that look at them.
render, RENDERED, DOT = matplotlib.figure.Figure.savefig, [False], io.BytesIO()
render(matplotlib.figure.Figure(figsize=(0.1, 0.1)), DOT, dpi=20)


def savefig(figure, target, **options):
    if RENDERED[0] or not isinstance(target, pathlib.Path):
        render(figure, target, **options)
    else:
        target.write_bytes(DOT.getvalue())  # which can be read again


matplotlib.figure.Figure.savefig = savefig


@contextlib.contextmanager
def _drawn():
    before, RENDERED[0] = RENDERED[0], True
    try:
        yield
    finally:
        RENDERED[0] = before


@pytest.fixture(scope="session")
def drawn():
    """`with drawn():` pictures are rendered within it, where a whole test of them would take too long."""
    return _drawn


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    RENDERED[0] = item.get_closest_marker("pictures") is not None


# Each compiled program makes all that comes after it slower: with 3,500 of them alive a test took eight times as long.
# (MLIR looks through its contexts one by one, and each program keeps one; the maps of its code are three more for the
# kernel and the unwinder, and Linux gives a process 65,530.) So they go between two files where a hundred were made;
# within a file, whose tests share them, only where it made some thousands.
MAPS, AFTER_A_FILE, WITHIN_A_FILE = pathlib.Path("/proc/self/maps"), 300, 10_000
_kept = [None]


def _maps() -> int:
    with MAPS.open("rb") as lines:
        return sum(1 for _ in lines)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    result = yield
    if nextitem is None or nextitem.path != item.path:
        assert _inherited() == AT_THE_START, f"{item.path.name} leaves another environment than it found"
    _forget_programs(item, nextitem)
    return result


def _forget_programs(item, nextitem):
    if MAPS.exists() and nextitem is not None:
        now, same = _maps(), nextitem.path == item.path
        _kept[0] = now if _kept[0] is None else _kept[0]
        if now - _kept[0] > (WITHIN_A_FILE if same else AFTER_A_FILE):
            jax.clear_caches()
            gc.collect()
            _kept[0] = _maps()
