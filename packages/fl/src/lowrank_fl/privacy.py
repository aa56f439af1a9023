"""How much of a client a private run gives away: ε, by Flower's accountant."""

from functools import lru_cache

from lowrank_core import LowrankError
from lowrank_fl.config import RunConfig


def epsilon(config: RunConfig, rounds: int) -> float | None:
    """ε at `privacy.delta` of the models of so many rounds together; None without privacy or without noise.

    It is that of a client whose examples are replaced by any others (replace-one), where each round's clients are a
    uniform sample without replacement (Wang, Balle and Kasiviswanathan, 2019, https://arxiv.org/abs/1808.00087,
    Theorem 27), summed over rounds as Rényi divergences. Such a client moves the sum of changes by two clipping norms,
    so against that the noise is half of `privacy.noise_multiplier`.

    Raises:
        LowrankError: dp-accounting, with which Flower counts, is not installed.
    """
    privacy, federation = config.privacy, config.federation
    if not privacy.noise_multiplier:
        return None
    return _epsilon(privacy.noise_multiplier, privacy.delta, federation.clients_per_round, federation.clients, rounds)


@lru_cache(maxsize=64)
def _epsilon(noise_multiplier: float, delta: float, sampled: int, clients: int, rounds: int) -> float:
    from flwr.supercore.privacy_accounting import (
        GaussianPrivacyEvent,
        NeighboringRelation,
        PrivacyConfig,
        SamplingMethod,
    )
    from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

    import lowrank_fl.flower  # noqa: F401 - sets Flower's environment

    relation, sampling = NeighboringRelation.REPLACE_ONE, SamplingMethod.WITHOUT_REPLACEMENT
    try:
        accountant = RdpAccountant(PrivacyConfig(delta, clients, relation, sampling))
    except ImportError:
        raise LowrankError(
            "ε is counted with dp-accounting, which is not installed; pip install 'lowrank[fl,privacy]', or set "
            "privacy.noise_multiplier=0"
        ) from None
    accountant.compose(GaussianPrivacyEvent(noise_multiplier / 2, sampled, clients), rounds)
    return accountant.get_epsilon(delta)
