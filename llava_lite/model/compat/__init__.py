"""LLaVA's and MoE-LLaVA's own names for models and their methods."""
