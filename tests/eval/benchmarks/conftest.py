"""Tables of Hugging Face are cached below each test's own directory."""

import pytest


@pytest.fixture(autouse=True)
def table_cache(tmp_path, monkeypatch):
    """Keep what `datasets` makes of tables out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "table_cache")
