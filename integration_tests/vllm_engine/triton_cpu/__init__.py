"""A Triton backend "cpu" without a compiler, with which Triton's interpreter runs vLLM's second model runner."""
