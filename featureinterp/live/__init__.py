"""A run's model and SAE at work again: on new texts, with tokens left out, and pushed along a direction."""
