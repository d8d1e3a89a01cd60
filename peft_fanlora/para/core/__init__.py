"""PARA's equations as functions of tensors. They import only torch, so that serving engines can use them."""
