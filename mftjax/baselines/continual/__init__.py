"""Methods against forgetting, by name; each is a `Method`, one file each."""

from mftjax.baselines.continual import agem, ewc, joint, l2sp, lwf, memory, merging, olora, replay, sequential
from mftjax.baselines.continual.method import Method, Setup, Task, Weights, last_hidden, of_sft, sft_loss

METHODS: dict[str, Method] = {
  "sequential full": sequential.FULL,
  "sequential LoRA": sequential.LORA,
  "L2-SP": l2sp.METHOD,
  "EWC": ewc.METHOD,
  "LwF": lwf.METHOD,
  "O-LoRA": olora.METHOD,
  "merging": merging.METHOD,
  "replay 1 %": replay.replaying(sequential.LORA, 0.01),
  "replay 5 %": replay.replaying(sequential.LORA, 0.05),
  "A-GEM": agem.method(0.05),
  "joint": joint.METHOD,
}

__all__ = ["METHODS", "Method", "Setup", "Task", "Weights", "last_hidden", "memory", "of_sft", "replay", "sft_loss"]
