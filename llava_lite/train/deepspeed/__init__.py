"""What DeepSpeed needs: its JSON files, experts across ranks, offload, other numbers of ranks."""
