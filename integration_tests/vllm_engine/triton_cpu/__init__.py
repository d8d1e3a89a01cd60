"""A backend "cpu" for Triton that compiles nothing: Triton's interpreter runs vLLM's second model runner on it."""
