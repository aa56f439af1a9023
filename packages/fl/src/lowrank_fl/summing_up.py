"""What a round came to as its line of metrics.jsonl."""

from lowrank_fl.flower.rounds import TrainedRound
from lowrank_fl.results import Evaluation, RoundRow


def row_of(trained: TrainedRound, found: Evaluation, spent: float | None, seconds: float) -> RoundRow:
    """The round's line; `spent` is its ε, `seconds` are the evaluation's."""
    simulated = trained.simulated
    dropped = {str(client): reason for client, reason in trained.dropped.items()}
    for client, reason in found.dropped.items():
        before = dropped.get(str(client))
        dropped[str(client)] = f"{before}; testing: {reason}" if before else f"testing: {reason}"
    return RoundRow(
        round=trained.number,
        accuracy=found.accuracy,
        loss=found.loss,
        train_loss=trained.train_loss,
        uplink_bytes=trained.uplink_bytes,
        downlink_bytes=trained.downlink_bytes,
        total_bytes=trained.uplink_bytes + trained.downlink_bytes,
        seconds=trained.seconds + seconds,
        clients=trained.clients,
        dropped=dropped,
        worst_accuracy=found.worst_accuracy,
        client_accuracies=found.client_accuracies,
        evaluation_bytes=found.sent_bytes,
        aggregation_gap=trained.found.gap,
        layer_gaps=trained.found.layer_gaps,
        refit_residual=trained.found.residual,
        rank=sum(trained.ranks.values()) if trained.ranks else None,
        layer_ranks=trained.ranks,
        epsilon=spent,
        simulated_seconds=simulated.seconds if simulated else None,
        waited_seconds=simulated.waited if simulated else None,
    )
