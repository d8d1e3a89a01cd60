"""What the fields of a PARA configuration have to look like; which values of them there are, the configuration says."""

from ..sharing.reading import AdapterFields, Text


class ParaFields(AdapterFields):
    """The fields of a `ParaConfig`, but for the two whose checks cover the type: `r` and `prompt_end_token_ids`."""

    pooling: Text
    activation: Text
    para_dropout: float
    init_para_weights: bool
