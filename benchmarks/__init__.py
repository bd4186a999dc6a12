"""Side by side with what a user would pick instead: one file a question, `python -m benchmarks` for all of them."""
