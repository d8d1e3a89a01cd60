"""The named choices that the command line offers; they are here so that its `--help` imports nothing else."""

from typing import Literal


Engine = Literal["transformers", "vllm"]
ScoreName = Literal["path", "ablation", "sensitivity", "output_norm", "weight_norm"]
Strategy = Literal["layer", "role", "global"]
