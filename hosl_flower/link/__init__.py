"""Links between a strategy and its clients."""
