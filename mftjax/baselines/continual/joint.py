"""Training on all tasks at once, with the steps of all of them together: the upper bound."""

from mftjax.baselines.continual.method import Method

METHOD = Method(is_joint=True)
