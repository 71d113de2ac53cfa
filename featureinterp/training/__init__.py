"""The recipe: corpus → activations → SAE → figures that can be trusted."""
