"""Settings that all tests share."""

import os


# Before torch is imported: tiny tensors gain nothing from threads, and no test may reach for the Hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["support_plugin"]
