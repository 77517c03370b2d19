"""One readable file an experiment."""
