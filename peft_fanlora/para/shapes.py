"""The types of the fields of a PARA configuration; `ParaConfig` checks their values."""

from ..sharing.reading import AdapterFields, Text


class ParaFields(AdapterFields):
    """The fields of a `ParaConfig`, except `r` and `prompt_end_token_ids`, whose checks include the type."""

    pooling: Text
    activation: Text
    para_dropout: float
    init_para_weights: bool
