"""What the tests of models need of pytest."""

# Marks that transformers' own tests carry.
MARKS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test")


def pytest_configure(config):
    """Let the marks of transformers' tests be used under --strict-markers."""
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: set by transformers' own tests")
