"""Networks that grow: a trained one made larger, one trained on what another left."""
