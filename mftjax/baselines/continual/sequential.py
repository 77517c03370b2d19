"""Fine-tuning on each task in turn, with nothing done against forgetting: what the other methods must beat."""

from mftjax.baselines.continual.method import Method

FULL = Method(trained="full")
LORA = Method(trained="lora")
