"""Settings of the loss, and of noise on the embeddings."""

from engine.config.settings import Settings, setting


class TokenLossSettings(Settings):
    """What a loss has beside the cross-entropy of the trained tokens."""

    label_smoothing_factor: float = setting(
        0.0, "Optimisation", "share of a target that all tokens have alike, such as 0.1", ge=0, lt=1
    )
    z_loss: float = setting(
        0.0,
        "Optimisation",
        "factor of the squared logarithm of the softmax's sum, such as 1e-4: logits stay small",
        ge=0,
        le=1,
    )
    neftune_noise_alpha: float = setting(
        0.0,
        "Optimisation",
        "NEFTune: noise on the embeddings of a step, of this size over sqrt(tokens x width); 5",
        ge=0,
        le=1000,
    )
