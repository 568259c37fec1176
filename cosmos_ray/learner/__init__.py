"""The DeepSpeed ZeRO learner: sample mixture, training core, Ray shell."""
