"""What a run needs: memory, time, bytes sent."""
