"""Scripts that print a table of ratios taken in one run and write JSON."""
