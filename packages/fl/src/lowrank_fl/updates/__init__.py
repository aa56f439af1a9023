"""Low-rank updates of dense weights (FedMUD): clients train and send a few factors of each layer's change."""
