"""FanLoRA: LoRA on the most critical modules of each layer."""
