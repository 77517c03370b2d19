"""The runs: meta-training, prediction, fine-tuning, evaluation."""
