"""Experiment scripts: read the config, call the library, write the result."""
