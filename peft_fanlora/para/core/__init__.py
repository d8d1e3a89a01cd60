"""PARA's equations as functions of tensors. They import torch alone, so that a serving engine can use them."""
