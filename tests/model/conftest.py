"""What the tests of models need of pytest."""

# Markers of transformers' own tests.
MARKERS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test")


def pytest_configure(config):
    """Register the markers of transformers' tests, for --strict-markers."""
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: set by transformers' own tests")


def pytest_itemcollected(item):
    """Let what costs most in transformers' tests of models run for one backbone, and for the others where time is.

    Attention and the opening of a checkpoint are transformers' own code, of which no line differs between backbones.
    """
    costs_most = ("test_eager_matches_sdpa_inference", "test_bc_torch_dtype")
    other = "test_common.py::Test" in item.nodeid and "::TestLlama::" not in item.nodeid
    if other and item.name.startswith(costs_most):
        item.add_marker("slow")
