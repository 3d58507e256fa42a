"""The inner maximization over a small ball: geometry, search, and what is searched for."""
