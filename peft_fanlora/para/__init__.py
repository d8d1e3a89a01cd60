"""PARA: vectors that are computed from the prompt once and scale Q, V and U for all tokens that follow."""
